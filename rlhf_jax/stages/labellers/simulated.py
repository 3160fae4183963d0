"""Simulated people label: a function answers as each of several labellers.

    fn(prompts, firsts, seconds, labellers, rng, **args) -> [N] bool

``labellers`` are indices into the setting of that name. The annotators of the embedded
summarisation world are ``rlhf_jax.datasets.tiny_tldr:answer_as``. Read
``stages/labellers/crowd.py`` next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.config import load_dotted
from rlhf_jax.labels.records import Item, Label
from rlhf_jax.stages.labellers import Answered, Asked, Asks
from rlhf_jax.stages.labellers.crowd import (
    CrowdHParams,
    check_crowd,
    known_items,
    spread,
)
from rlhf_jax.stages.labellers.fn import call
from rlhf_jax.stages.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams(CrowdHParams):
    """Simulated labellers."""

    fn: str  # 'package.module:function'
    args: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords of fn


class Checked(NamedTuple):
    """What ``check`` finds."""

    fn: Callable[..., Any]
    gold: list[Item]


def asks(hp: HParams) -> Asks:
    """Comparisons alone."""
    return Asks('comparison', 2)


def check(run: Run, where: str, hp: HParams) -> Checked:
    """The function, and the items whose answer is known.

    Raises:
        ValueError: no such function, a crowd that cannot label, or gold items that are
            no comparisons.
    """
    check_crowd(where, hp)
    fn = load_dotted(hp.fn, f'{where}.fn')
    return Checked(fn, known_items(run, hp.gold, f'{where}.gold', 'gold'))


def label(asked: Asked) -> Answered:
    """The labels of everybody, gold items and repeats included.

    Raises:
        ValueError: the function returns something else.
    """
    hp, (fn, gold) = asked.hp, asked.checked
    wanted = spread(len(asked.items), hp, asked.rng)
    items = [*asked.items, *gold]
    wanted += [
        (len(asked.items) + i, labeller, 0)
        for i in range(len(gold))
        for labeller in range(len(hp.labellers))
    ]
    # Which response somebody sees first is drawn for each of them.
    turned = asked.rng.random(len(wanted)) < 0.5
    shown = [_shown(items[item], turn) for (item, *_), turn in zip(wanted, turned)]
    who = np.asarray([labeller for _, labeller, _ in wanted])
    answers = call(dataclasses.replace(asked, items=shown), fn, hp.args, labellers=who)
    labels = [
        Label(
            item=items[item].item,
            labeller=hp.labellers[labeller],
            probability=1 - p if turn else p,
            order=(1, 0) if turn else (0, 1),
            repeat=repeat,
        )
        for (item, labeller, repeat), turn, p in zip(wanted, turned, answers)
    ]
    return Answered(items, labels)


def _shown(item: Item, turn: bool) -> Item:
    completions = item.completions[::-1] if turn else item.completions
    return dataclasses.replace(item, completions=completions)
