"""The kind summary: numbers that other stages found, side by side, such as those of the
rounds of a run. Read ``stages/evaluate.py`` next.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from rlhf_jax import files
from rlhf_jax.config import nearest
from rlhf_jax.pages.drawing import BLUE, FULL, Plot, blank, to_svg
from rlhf_jax.pages.page import Page, Verdict, number
from rlhf_jax.stages.kinds import Makes
from rlhf_jax.stages.run import Result, Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class SummarySettings:
    """The summary stage."""

    # By name the points of a curve, 'STAGE:KEY' each: a number in the eval.json of an
    # earlier stage, or of a finished stage's folder; 'a.b' is the b in a
    series: dict[str, tuple[str, ...]]


SETTINGS = (SummarySettings,)


def _verdict(e: dict[str, Any]) -> Verdict:
    """Pass: every number is there."""
    missing = sum(value is None for values in e['series'].values() for value in values)
    figure = f'{number(len(e["series"]))} series, missing numbers: {number(missing)}'
    return Verdict('fail' if missing else 'pass', figure, '0 missing')


def _draw(stage: str, rows: Any, e: dict[str, Any]) -> tuple[list[Plot], list[str]]:
    series = {name: e['series'][name] for name in e['order']}
    cols = min(len(series), 4)
    lines = math.ceil(len(series) / cols)
    figure, grid = blank(FULL, 2.25 * lines, lines, cols)
    for axes, (name, values) in zip(grid.flat, series.items()):
        points = [(i, v) for i, v in enumerate(values, 1) if v is not None]
        if points:
            axes.plot(*zip(*points), color=BLUE, marker='o', ms=3)
        axes.set(title=name, xlim=(0.5, len(values) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid.flat[len(series) :]:
        axes.set_axis_off()
    svg = to_svg(figure, f'{stage}-series', 'numbers of other stages')
    return [Plot('In order', svg, _table(series), wide=True)], []


def _table(series: dict[str, list[float | None]]) -> str:
    return '; '.join(
        f'{name}: {", ".join(map(number, values))}' for name, values in series.items()
    )


PAGE = Page(
    title='Summary',
    verdict=_verdict,
    required=lambda e: ('series', 'order'),
    facts=(),
    draw=_draw,
)


@dataclasses.dataclass(frozen=True)
class SummaryJob:
    """A checked stage."""

    # By name: eval.json, key, place in the config
    series: dict[str, list[tuple[Path, str, str]]]


def makes(settings: SummarySettings) -> Makes:
    """Nothing but numbers."""
    return Makes()


def load(run: Run, stage: str, settings: SummarySettings) -> SummaryJob:
    """Finds the stages.

    Raises:
        ValueError: no series, one without points, a point that is no 'STAGE:KEY', or
            a stage that is neither earlier nor finished.
    """
    where, order = f'config.{stage}.series', tuple(run.config.stages)
    if not settings.series:
        raise ValueError(f'{where} is empty; name numbers of other stages')
    earlier = order[: order.index(stage)] if stage in order else ()
    found: dict[str, list[tuple[Path, str, str]]] = {}
    for name, points in settings.series.items():
        if isinstance(points, str) or not points:
            raise ValueError(
                f"{where}.{name}={points!r}: name its points, as in ('STAGE:KEY',)"
            )
        for i, point in enumerate(points):
            place = f'{where}.{name}[{i}]'
            source, colon, key = point.rpartition(':')
            if not (source and colon and key):
                raise ValueError(f"{place}={point!r}: write 'STAGE:KEY'")
            folder = run.workdir / source
            if source not in earlier and not (folder / 'done.json').exists():
                folder = files.named_path(source)
                if source in order or not (folder / 'done.json').exists():
                    known = nearest(source, earlier) if earlier else ''
                    raise ValueError(
                        f'{place}={point!r}: {source!r} is no earlier stage, and no '
                        f'finished one{known}'
                    )
            found.setdefault(name, []).append((folder / 'eval.json', key, place))
    return SummaryJob(found)


def train(run: Run, job: SummaryJob) -> Result:
    """Reads the numbers.

    Raises:
        ValueError: a stage has no such key, or what stands there is no number.
    """
    clock = time.monotonic()
    series: dict[str, list[Any]] = {}
    for name, points in job.series.items():
        for path, key, place in points:
            value: Any = files.read_json(path, files.remake(path.parent))
            for part in key.split('.'):
                known = value if isinstance(value, dict) else {}
                if part not in known:
                    hint = nearest(part, known) if known else ''
                    raise ValueError(f'{place}: {path} has no {key}{hint}')
                value = known[part]
            if not isinstance(value, int | float | None):
                raise ValueError(f'{place}: {key} in {path} is no number')
            series.setdefault(name, []).append(value)
    report = {'series': series, 'order': list(series)}  # JSON objects have none
    seconds = {'read': time.monotonic() - clock}
    return Result(steps=0, seconds=seconds, data={}, evaluation=report)
