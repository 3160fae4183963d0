"""What else is measured of a policy when its stage ends, one file each: the numbers,
and how the report shows them.

An evaluator is a module with these names, in this package or in a file of the user's
own; ``config.NAME.evaluators`` names those of a stage:

* ``evaluate(before, after, weights)``: fields of ``eval.json``, from what the policy of
  before and that of after answered to the same prompts (``evals.policy.Sampled``) and
  the weights of the rewards by name;
* ``FACTS``: its rows of the table in the report, a ``pages.page.Fact`` each;
* ``draw(stage, rows, evaluation)``: its figures, a ``pages.page.Draw``;
* ``WANTS_GOLD = True``, where the samples must have a gold reward.

Read ``length_controlled.py`` next, then ``stages/evaluation.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rlhf_jax.evals.policy import Sampled
from rlhf_jax.named import load_module
from rlhf_jax.pages.drawing import Plot, Rows
from rlhf_jax.pages.page import Draw, Fact, Json, Page


class Evaluator(Protocol):
    """The names of an evaluator; ``WANTS_GOLD`` may be absent."""

    __name__: str
    FACTS: tuple[Fact, ...]
    evaluate: Callable[[Sampled, Sampled, Mapping[str, float]], Json]
    draw: Draw


def load(name: str, where: str) -> Evaluator:
    """The evaluator of a name: ``'length_controlled'`` is a file here,
    ``'my_pkg.mine'`` any.

    Args:
        name: of the module.
        where: how the user knows the setting, e.g. ``'config.ppo.evaluators'``.

    Raises:
        ValueError: no such module, or one that lacks a name of an evaluator.
    """
    needed = ('evaluate', 'FACTS', 'draw')
    return load_module(__name__, name, where=where, what='evaluator', needed=needed)


def check(names: Sequence[str], where: str, has_gold: bool) -> None:
    """Loads the evaluators of a stage before anything compiles.

    Raises:
        ValueError: one that is none, that is named twice, or that wants a gold reward
            where there is none.
    """
    for i, name in enumerate(names):
        if getattr(load(name, where), 'WANTS_GOLD', False) and not has_gold:
            raise ValueError(
                f'{where}: {name!r} wants a gold reward; set the gold of the stage, or '
                'remove it'
            )
        if name in names[:i]:
            raise ValueError(f'{where}={tuple(names)!r} names {name!r} twice')


def measure(
    names: Sequence[str], report: Json, *sampled: Any, where: str
) -> dict[str, Any]:
    """The fields of ``eval.json`` with those of the evaluators in it.

    Args:
        names: of the evaluators.
        report: what is measured without them.
        *sampled: before, after and weights, as an evaluator gets them.
        where: as in :func:`load`.

    Raises:
        ValueError: two give the same field.
    """
    for name in names:
        fields = load(name, where).evaluate(*sampled)
        if twice := fields.keys() & report.keys():
            raise ValueError(
                f'{where}: {name!r} gives {", ".join(sorted(twice))}, which eval.json '
                'has already; give the fields other names'
            )
        report = {**report, **fields}
    return {**report, 'evaluators': list(names)} if names else report


def shown(page: Page, evaluation: Json) -> Page:
    """The page of a stage with what its evaluators show, behind its own."""
    found = [load(name, 'eval.json') for name in evaluation.get('evaluators', ())]

    def draw(stage: str, rows: Rows, evaluation: Json) -> tuple[list[Plot], list[str]]:
        plots, absent = page.draw(stage, rows, evaluation)
        for evaluator in found:
            more, lacking = evaluator.draw(stage, rows, evaluation)
            plots, absent = plots + more, absent + lacking
        return plots, absent

    facts = page.facts
    if facts is not None:
        facts = facts + tuple(fact for one in found for fact in one.FACTS)
    return dataclasses.replace(page, facts=facts, draw=draw)
