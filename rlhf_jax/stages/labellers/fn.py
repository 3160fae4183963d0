"""A Python function labels: which of two responses is better, or how likely that is.

    fn(prompts, firsts, seconds, rng, **args) -> [N] bool, or [N] floats from 0 to 1

Read ``stages/labellers/simulated.py`` next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_jax.config import failure, load_dotted
from rlhf_jax.labels.records import Label
from rlhf_jax.stages.labellers import Answered, Asked, Asks
from rlhf_jax.stages.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """A labelling function."""

    fn: str  # 'package.module:function'
    args: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords of fn


def asks(hp: HParams) -> Asks:
    """Comparisons alone."""
    return Asks('comparison', 2)


def check(run: Run, where: str, hp: HParams) -> Callable[..., Any]:
    """The function.

    Raises:
        ValueError: it cannot be imported.
    """
    return load_dotted(hp.fn, f'{where}.fn')


def label(asked: Asked) -> Answered:
    """One label per item, by the function.

    Raises:
        ValueError: it fails, or returns something else.
    """
    probabilities = call(asked, asked.checked, asked.hp.args)
    labels = [
        Label(item=item.item, labeller=asked.hp.fn, probability=p, order=(0, 1))
        for item, p in zip(asked.items, probabilities)
    ]
    return Answered(asked.items, labels)


def call(
    asked: Asked, fn: Callable[..., Any], args: dict[str, Any], **columns: Any
) -> list[float]:
    """What a function says of all items: how likely the first completion is the better
    one.

    Args:
        asked: the items.
        fn: see the module docstring.
        args: its keywords.
        **columns: further parameters, one value per item.

    Raises:
        ValueError: it fails, or returns something else.
    """
    if not asked.items:
        return []
    prompts = [item.prompt for item in asked.items]
    texts = ([item.completions[side] for item in asked.items] for side in (0, 1))
    try:
        found = np.asarray(fn(prompts, *texts, rng=asked.rng, **columns, **args))
    except Exception as error:  # whatever the user's function raises
        raise ValueError(
            f'{asked.where}.fn={asked.hp.fn!r} failed with {failure(error)}'
        ) from error
    is_probability = found.dtype == bool or np.issubdtype(found.dtype, np.floating)
    if not (found.shape == (len(prompts),) and is_probability):
        raise ValueError(
            f'{asked.where}.fn={asked.hp.fn!r} gave {found.dtype} of shape '
            f'{list(found.shape)} for {len(prompts)} pairs; return [N] bool, whether '
            'the first response is the better one, or [N] floats, how likely that is'
        )
    if not ((found >= 0) & (found <= 1)).all():
        odd = found[~((found >= 0) & (found <= 1))][0]
        raise ValueError(
            f'{asked.where}.fn={asked.hp.fn!r} gave {odd}, which is no probability'
        )
    return found.astype(float).tolist()
