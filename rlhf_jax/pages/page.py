"""What the report page says of a stage: title, verdict, warnings, facts and figures.

A kind of stage has one :class:`Page` (``stages/kinds.py``). It is made of the stage's
files alone: ``eval.json`` and the rows of ``metrics.jsonl``. Read
``language_model.py`` next, then ``reward_model.py`` and ``policy.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_jax.pages.drawing import Panel, Plot, Rows, draw_panels

Json = dict[str, Any]
Fact = tuple[str, str, str]  # label, key in eval.json, unit


@dataclass(frozen=True)
class Verdict:
    """Whether a stage did what it is for."""

    verdict: str  # 'pass', 'fail' or 'unknown'
    figure: str  # the number that decides
    expected: str  # what it had to be


# (name of the stage, rows of metrics, evaluation or {}) -> figures, and a sentence for
# each part without data.
Draw = Callable[[str, Rows, Json], tuple[list[Plot], list[str]]]


def draw_all_metrics(
    stage: str, rows: Rows, evaluation: Json
) -> tuple[list[Plot], list[str]]:
    """A panel for every metric."""
    names = dict.fromkeys(name for row in rows for name in row)
    panels = tuple(Panel(n, n, '') for n in names if n not in ('step', 'seconds'))
    title, caption = 'Metrics', 'All that it logs.'
    return draw_panels(f'{stage}-panels', title, rows, panels, caption), []


def no_verdict(evaluation: Json) -> Verdict:
    """Of a stage for which there is no rule."""
    return Verdict('unknown', 'no rule', 'a verdict on the page of its kind')


@dataclass(frozen=True, kw_only=True)
class Page:
    """The face of a kind of stage.

    Numbers that are not finite are None in what the functions get.
    """

    title: str  # of the kind, as a noun
    # eval.json -> the verdict, by a rule that its docstring states
    verdict: Callable[[Json], Verdict] = no_verdict
    # eval.json -> what looks wrong although the verdict may be a pass
    warnings: Callable[[Json], list[str]] = lambda evaluation: []
    # eval.json -> the keys that it must hold
    required: Callable[[Json], tuple[str, ...]] = lambda evaluation: ()
    # Rows of the table of the evaluation; None for every number in it.
    facts: tuple[Fact, ...] | None = None
    # Rows of the table of what changed, of key_before and key_after. A page that has
    # them shows samples before and after; any other shows single responses.
    changes: tuple[Fact, ...] = ()
    draw: Draw = draw_all_metrics
    max_samples: int = 4  # shown of samples.jsonl
    # eval.json -> a remark above the figures, or None
    remark: Callable[[Json], str | None] = lambda evaluation: None

    @property
    def sample_keys(self) -> tuple[str, ...]:
        """What a row of samples.jsonl must hold."""
        return ('prompt', *(('before', 'after') if self.changes else ('response',)))


# --------------------------------------------------------------------------- for people


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: significant digits, thousands separated, '–' for None."""
    if value is None or not math.isfinite(value):
        return '–'
    if float(value).is_integer() and abs(value) < 1e15:
        return f'{value:,.0f}'.replace('-', '−')
    if 1e3 <= abs(value) < 1e7:
        return f'{value:,.0f}'.replace('-', '−')
    return f'{value:.{digits}g}'.replace('-', '−')


def fraction(value: float | None) -> str:
    """A fraction to three decimals, '–' for None."""
    return '–' if value is None else f'{value:.3f}'


def interval(pair: list[float | None]) -> str:
    """An interval of fractions."""
    return f'[{fraction(pair[0])}, {fraction(pair[1])}]'


def less(a: float | None, b: float | None) -> bool:
    """a < b, and False when either is not a finite number."""
    return a is not None and b is not None and a < b
