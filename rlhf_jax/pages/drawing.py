"""How the report page draws: curves over training steps, panels, SVG out.

The pages say what each kind of stage shows; read ``page.py`` next. Nothing here touches
pyplot, whose current figure is module-level state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette, told apart with every common colour vision deficiency.
BLUE, ORANGE = '#0072b2', '#d55e00'
INK, MUTED, GRID = '#1f2933', '#667381', '#e4e8ec'
HALF, FULL = 5.2, 10.7  # inches: one and two columns of the page
MAX_POINTS = 800  # of one curve; beyond it, equal runs of points are averaged

STYLE = {
    'svg.fonttype': 'none',  # text stays text: small, sharp and searchable
    'font.size': 8.5,
    'text.color': INK,
    'axes.titlesize': 8.5,
    'axes.titleweight': 'bold',
    'axes.titlelocation': 'left',
    'axes.labelcolor': MUTED,
    'axes.edgecolor': '#b8c1ca',
    'axes.linewidth': 0.7,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': GRID,
    'grid.linewidth': 0.6,
    'xtick.color': MUTED,
    'ytick.color': MUTED,
    'legend.fontsize': 8,
    'legend.frameon': False,
    'lines.linewidth': 1.5,
}


@dataclass(frozen=True)
class Plot:
    """One figure of the page."""

    title: str
    svg: str  # one <svg> element, no prolog
    caption: str  # how to read it
    wide: bool = False  # spans both columns


@dataclass(frozen=True)
class Panel:
    """One small panel of a curve against training steps."""

    metric: str  # name in metrics.jsonl
    title: str
    unit: str  # label of the y axis
    log: bool = False
    exact: bool = False  # set, not measured: drawn as it is, without a running mean
    reference: float | None = None  # a dashed line at the value that matters


# ----------------------------------------------------------------------------- numbers


def series(rows: Rows, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The finite points of one metric.

    Returns:
        (steps [n], values [n]), float64; beyond ``MAX_POINTS``, means of equal runs.
    """
    points = [
        (row['step'], row[metric])
        for row in rows
        if row.get(metric) is not None and math.isfinite(row[metric])
    ]
    table = np.array(points, np.float64).reshape(-1, 2)
    if len(table) > MAX_POINTS:
        runs = np.array_split(table, MAX_POINTS)
        table = np.stack([run.mean(axis=0) for run in runs])
    return table[:, 0], table[:, 1]


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over 5% of the points, centred; one-sided at the end.

    At the beginning the window shrinks to nothing: curves are steep there, and a
    one-sided mean would start them at the wrong height.
    """
    index = np.arange(len(values))
    before = np.minimum(len(values) // 40, index)
    after = np.minimum(before, index[::-1])
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[index + after + 1] - total[index - before]) / (before + after + 1)


def wilson(accuracy: np.ndarray, count: np.ndarray) -> np.ndarray:
    """95% interval of a binomial fraction.

    **Source** E. B. Wilson (1927), Probable inference, the law of succession, and
    statistical inference.

    Args:
        accuracy: [n] observed fraction.
        count: [n] number of trials, > 0.

    Returns:
        [2, n] distances from ``accuracy`` down to the lower and up to the upper end.
    """
    z = 1.959964
    centre = (accuracy + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = accuracy * (1 - accuracy) / count + z**2 / (4 * count**2)
    half = z * np.sqrt(spread) / (1 + z**2 / count)
    return np.maximum(np.stack([accuracy - centre + half, centre + half - accuracy]), 0)


# ----------------------------------------------------------------------------- drawing


def tick(value: float, _: int | None = None) -> str:
    """A tick label: no offsets, no powers of ten, a true minus sign."""
    return format(value, ',.0f' if abs(value) >= 1000 else '.4g').replace('-', '−')


def blank(
    width: float, height: float, rows: int = 1, cols: int = 1, sharex: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure, in inches, and its axes [rows, cols], still empty."""
    figure = Figure(figsize=(width, height), layout='constrained')
    grid = figure.subplots(rows, cols, squeeze=False, sharex=sharex)
    for axes in grid.flat:
        axes.xaxis.set_major_formatter(tick)
        axes.yaxis.set_major_formatter(tick)
        axes.margins(x=0.01)
    return figure, grid


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as one <svg> element whose ids no other figure of the page shares."""
    text = StringIO()
    metadata = dict.fromkeys(('Date', 'Creator', 'Format', 'Type'))
    with matplotlib.rc_context({**STYLE, 'svg.hashsalt': name}):
        figure.savefig(text, format='svg', metadata=metadata)
    svg = text.getvalue()
    svg = re.sub(r'( id="|url\(#|href="#)', rf'\g<1>{name}-', svg[svg.index('<svg') :])
    svg = re.sub(r' (width|height)="[\d.]+pt"', '', svg, count=2)  # CSS sizes it
    return svg.replace('<svg', f'<svg role="img" aria-label="{label}"', 1)


def draw_curve(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    color: str,
    label: str,
    exact: bool = False,
) -> None:
    """Points and their running mean; few points are joined, very few marked."""
    axes.xaxis.set_major_locator(MaxNLocator('auto', integer=True))
    if len(steps) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    if exact or len(steps) < 40:
        marker = 'o' if len(steps) <= 30 else None
        axes.plot(steps, values, color=color, label=label, marker=marker, ms=2.5)
        return
    axes.plot(steps, values, color=color, alpha=0.3, lw=0.7)
    axes.plot(steps, smooth(values), color=color, label=label)


def draw_level(axes: Axes, value: float, label: str | None = None) -> None:
    """A dashed horizontal line at a value that matters."""
    axes.axhline(value, color=MUTED, lw=0.9, ls=(0, (4, 3)), label=label)


def draw_curves(
    name: str,
    title: str,
    unit: str,
    rows: Rows,
    metrics: tuple[str, str],
    level: tuple[str, float | None],
    caption: str,
) -> list[Plot]:
    """Training and evaluation of one quantity, with a dashed level."""
    figure, ((axes,),) = blank(HALF, 2.9)
    styles = (('train', BLUE), ('evaluation', ORANGE))
    for metric, (label, color) in zip(metrics, styles, strict=True):
        steps, values = series(rows, metric)
        if len(steps):
            draw_curve(axes, steps, values, color, label)
    if not axes.lines:
        return []
    if level[1] is not None:
        draw_level(axes, level[1], f'{level[0]} {level[1]:.3g}')
    axes.set(xlabel='training step', ylabel=unit)
    # Above the axes, where no curve can run through it.
    axes.legend(loc='lower left', bbox_to_anchor=(-0.02, 1.0), ncols=3, borderpad=0.2)
    return [Plot(title, to_svg(figure, name, title), caption)]


def draw_panels(
    name: str, title: str, rows: Rows, panels: Sequence[Panel], caption: str
) -> list[Plot]:
    """Small panels, four to a row; nothing when no panel has a point."""
    everything = [(panel, *series(rows, panel.metric)) for panel in panels]
    drawn = [item for item in everything if len(item[1])]
    if not drawn:
        return []
    cols = min(len(drawn), 4)
    lines, wide = math.ceil(len(drawn) / cols), cols > 1
    width, height = (FULL, 2.25 * lines) if wide else (HALF, 2.9)
    figure, grid = blank(width, height, lines, cols)
    for axes, (panel, steps, values) in zip(grid.flat, drawn, strict=False):
        draw_curve(axes, steps, values, BLUE, panel.title, panel.exact)
        axes.set(title=panel.title, ylabel=panel.unit, xlabel='training step')
        if panel.reference is not None:
            draw_level(axes, panel.reference)
        if panel.log and values.min() > 0:
            axes.set_yscale('log')
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(tick)
            axes.yaxis.set_minor_locator(NullLocator())
    for axes in grid.flat[len(drawn) :]:
        axes.set_axis_off()
    return [Plot(title, to_svg(figure, name, title), caption, wide)]


def not_logged(rows: Rows, metrics: Sequence[str]) -> list[str]:
    """A sentence naming the metrics without a point, if there are rows at all."""
    missing = [metric for metric in metrics if not len(series(rows, metric)[0])]
    return [f'Not in metrics.jsonl: {", ".join(missing)}.'] if rows and missing else []


def drawn(draw: Callable[..., Any], *arguments: Any) -> Any:
    """What a page draws, in the style of the report."""
    with matplotlib.rc_context(STYLE):
        return draw(*arguments)
