"""The figures of the report page: rows of metrics in, inline SVG out.

``draw`` gives every figure one stage's files have data for, and a sentence for each it
has none for. ``report.py`` calls it; read that next. Nothing here touches pyplot, whose
current figure is module-level state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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


GRAD_NORM = Panel('train/grad_norm', 'Gradient norm', 'global L2 norm', log=True)
LR = Panel('train/lr', 'Learning rate', 'per update', exact=True)
SPEED = Panel('train/tokens_per_second', 'Throughput', 'tokens per second')
BEHAVIOUR = (
    Panel('objective/kl', 'KL to the reference', 'nats per sequence', reference=0.0),
    Panel('rollout/response_length', 'Response length', 'tokens'),
    Panel('objective/entropy', 'Policy entropy', 'nats'),
    Panel('rollout/ended', 'Responses that ended', 'fraction'),
)
UPDATES = (
    Panel('policy/approxkl', 'KL of one update', 'nats per token'),
    Panel('policy/clipfrac', 'Clipped ratios', 'fraction of tokens'),
    Panel('policy/ratio_max', 'Largest ratio', 'π / π_old', reference=1.0),
    Panel(
        'val/explained_variance', 'Explained variance', 'of the returns', reference=0
    ),
    Panel('loss/policy', 'Policy loss', 'per token'),
    Panel('loss/value', 'Value loss', 'reward units²'),
    Panel('objective/kl_coef', 'KL coefficient β', 'reward units per nat', exact=True),
    Panel('objective/rlhf_reward', 'Reward less KL', 'reward units'),
)


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


def _tick(value: float, _: int | None = None) -> str:
    """A tick label: no offsets, no powers of ten, a true minus sign."""
    return format(value, ',.0f' if abs(value) >= 1000 else '.4g').replace('-', '−')


def _figure(
    width: float, height: float, rows: int = 1, cols: int = 1, sharex: bool = False
) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout='constrained')
    grid = figure.subplots(rows, cols, squeeze=False, sharex=sharex)
    for axes in grid.flat:
        axes.xaxis.set_major_formatter(_tick)
        axes.yaxis.set_major_formatter(_tick)
        axes.margins(x=0.01)
    return figure, grid


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as one <svg> element whose ids no other figure of the page shares."""
    text = StringIO()
    metadata = dict.fromkeys(('Date', 'Creator', 'Format', 'Type'))
    with matplotlib.rc_context({**STYLE, 'svg.hashsalt': name}):
        figure.savefig(text, format='svg', metadata=metadata)
    svg = text.getvalue()
    svg = re.sub(r'( id="|url\(#|href="#)', rf'\g<1>{name}-', svg[svg.index('<svg') :])
    svg = re.sub(r' (width|height)="[\d.]+pt"', '', svg, count=2)  # CSS sizes it
    return svg.replace('<svg', f'<svg role="img" aria-label="{label}"', 1)


def _curve(
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


def _line(axes: Axes, value: float, label: str | None = None) -> None:
    axes.axhline(value, color=MUTED, lw=0.9, ls=(0, (4, 3)), label=label)


def _curves(
    name: str,
    title: str,
    unit: str,
    rows: Rows,
    metrics: tuple[str, str],
    level: tuple[str, float | None],
    caption: str,
) -> list[Plot]:
    """Training and evaluation of one quantity, with a dashed level."""
    figure, ((axes,),) = _figure(HALF, 2.9)
    styles = (('train', BLUE), ('evaluation', ORANGE))
    for metric, (label, color) in zip(metrics, styles, strict=True):
        steps, values = series(rows, metric)
        if len(steps):
            _curve(axes, steps, values, color, label)
    if not axes.lines:
        return []
    if level[1] is not None:
        _line(axes, level[1], f'{level[0]} {level[1]:.3g}')
    axes.set(xlabel='training step', ylabel=unit)
    # Above the axes, where no curve can run through it.
    axes.legend(loc='lower left', bbox_to_anchor=(-0.02, 1.0), ncols=3, borderpad=0.2)
    return [Plot(title, _svg(figure, name, title), caption)]


def _panels(
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
    figure, grid = _figure(width, height, lines, cols)
    for axes, (panel, steps, values) in zip(grid.flat, drawn, strict=False):
        _curve(axes, steps, values, BLUE, panel.title, panel.exact)
        axes.set(title=panel.title, ylabel=panel.unit, xlabel='training step')
        if panel.reference is not None:
            _line(axes, panel.reference)
        if panel.log and values.min() > 0:
            axes.set_yscale('log')
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(_tick)
            axes.yaxis.set_minor_locator(NullLocator())
    for axes in grid.flat[len(drawn) :]:
        axes.set_axis_off()
    return [Plot(title, _svg(figure, name, title), caption, wide)]


def _absent(rows: Rows, metrics: Sequence[str]) -> list[str]:
    missing = [metric for metric in metrics if not len(series(rows, metric)[0])]
    return [f'Not in metrics.jsonl: {", ".join(missing)}.'] if rows and missing else []


# ---------------------------------------------------------------------- language models


def _language_model(
    stage: str, rows: Rows, evaluation: Mapping[str, Any]
) -> tuple[list[Plot], list[str]]:
    level = ('before', evaluation.get('loss_before'))
    if stage == 'pretrain':
        level = ('uniform guessing', evaluation.get('uniform_loss'))
    caption = (
        'Lower is better. Thin: each logged step; thick: running mean over 5% of them. '
        'An evaluation curve that turns up while training falls is overfitting.'
    )
    losses, unit = ('train/loss', 'eval/loss'), 'loss (nats per token)'
    plots = _curves(f'{stage}-loss', 'Loss', unit, rows, losses, level, caption)
    caption = (
        'A gradient norm whose spikes do not die out points to a learning rate too '
        'high; throughput that sags points to the input pipeline.'
    )
    panels = (GRAD_NORM, LR, SPEED)
    plots += _panels(f'{stage}-panels', 'Optimisation', rows, panels, caption)
    return plots, _absent(rows, (*losses, *(panel.metric for panel in panels)))


# ------------------------------------------------------------------------- reward model


def _accuracy_bars(evaluation: Mapping[str, Any]) -> str:
    bars = [
        ('gold order (ceiling)', evaluation.get('accuracy_ceiling'), '#9aa5b1'),
        ('reward model', evaluation['accuracy'], BLUE),
        ('longer wins', evaluation['length_baseline'], '#9aa5b1'),
        ('chance', 0.5, '#c8d0d8'),
    ]
    bars = [bar for bar in reversed(bars) if bar[1] is not None]
    figure, ((axes,),) = _figure(HALF, 0.75 + 0.42 * len(bars))
    for place, (label, value, color) in enumerate(bars):
        axes.barh(place, value, color=color, height=0.6)
        end = value
        if label == 'reward model' and None not in evaluation['interval']:
            low, end = evaluation['interval']
            reach = [[max(value - low, 0)], [max(end - value, 0)]]
            axes.errorbar(value, place, xerr=reach, color=INK, capsize=3, lw=1.1)
        axes.text(end + 0.015, place, f'{value:.3f}', va='center', color=INK)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], color=INK)
    axes.tick_params(axis='y', length=0)
    axes.set(xlim=(0, 1.1), xlabel='accuracy (fraction of held-out pairs)')
    axes.grid(False, axis='y')
    return _svg(figure, 'rm-bars', 'accuracy of the reward model and its baselines')


def _bin_label(low: float | None, high: float | None) -> str:
    # An open end is infinite, which JSON writes as null.
    if low is None or high is None:
        return f'≥ {_tick(low)}' if high is None else f'< {_tick(high)}'
    return f'{_tick(low)} to {_tick(high)}'


def _by_bin(
    name: str, title: str, unit: str, bins: Sequence[Mapping[str, Any]], caption: str
) -> list[Plot]:
    bins = [b for b in bins if b['count'] and b['accuracy'] is not None]
    if not bins:
        return []
    accuracy = np.array([b['accuracy'] for b in bins], np.float64)
    count = np.array([b['count'] for b in bins], np.float64)
    figure, ((axes,),) = _figure(HALF, 2.9)
    _line(axes, 0.5)
    place = np.arange(len(bins))
    spread = wilson(accuracy, count)
    axes.errorbar(place, accuracy, spread, fmt='o', color=BLUE, capsize=3, lw=1.2)
    labels = [f'{_bin_label(b["lo"], b["hi"])}\nn={b["count"]:,}' for b in bins]
    axes.set_xticks(place, labels, fontsize=8 if len(bins) <= 6 else 6.5)
    axes.set(xlim=(-0.5, len(bins) - 0.5), ylim=(0, 1.03), xlabel=unit)
    axes.set_ylabel('accuracy (fraction of pairs)')
    axes.grid(False, axis='x')
    return [Plot(title, _svg(figure, name, title), caption)]


def _calibration(bins: Sequence[Mapping[str, Any]]) -> list[Plot]:
    bins = [
        b for b in bins if b['count'] and None not in (b['predicted'], b['observed'])
    ]
    if not bins:
        return []
    keys = ('predicted', 'observed', 'count')
    predicted, observed, count = np.array([[b[k] for k in keys] for b in bins], float).T
    figure, ((axes,),) = _figure(HALF, 2.9)
    low = min(predicted.min(), observed.min(), 0.5) - 0.04
    spread = wilson(observed, count)
    axes.plot([low, 1], [low, 1], color=MUTED, lw=0.9, ls=(0, (4, 3)))
    axes.errorbar(predicted, observed, spread, fmt='none', color=BLUE, lw=1, alpha=0.6)
    axes.scatter(predicted, observed, s=14 + 110 * count / count.max(), color=BLUE)
    axes.set(xlim=(low, 1.03), ylim=(max(low - 0.04, -0.03), 1.05))
    axes.set_xlabel('predicted σ(|Δ score|) (probability)')
    axes.set_ylabel('observed (fraction correct)')
    caption = (
        'On the diagonal, a score difference means what the Bradley–Terry model says; '
        'below it the model is too sure. Area: number of pairs. Bars: 95% intervals.'
    )
    return [Plot('Calibration', _svg(figure, 'rm-calibration', 'Calibration'), caption)]


def _reward_model(
    rows: Rows, evaluation: Mapping[str, Any]
) -> tuple[list[Plot], list[str]]:
    plots = []
    if evaluation:
        caption = (
            'With its 95% interval. The ceiling is what the true order reaches on the '
            'same noisy labels; a model no better than “longer wins” learned length.'
        )
        plots.append(Plot('Held-out accuracy', _accuracy_bars(evaluation), caption))
    accuracies, losses = (
        ('train/accuracy', 'eval/accuracy'),
        ('train/loss', 'eval/loss'),
    )
    caption = 'Training accuracy far above evaluation accuracy is overfitting.'
    title, unit = 'Accuracy during training', 'accuracy (fraction of pairs)'
    level = ('chance', 0.5)
    plots += _curves('rm-accuracy', title, unit, rows, accuracies, level, caption)
    caption = 'Dashed: log 2, the loss of a model that gives every text the same score.'
    level = ('log 2 =', math.log(2))
    plots += _curves(
        'rm-loss', 'Loss', 'loss (nats per pair)', rows, losses, level, caption
    )
    bins = evaluation.get('by_margin') or ()
    caption = (
        'Should rise to the right: the model ought to be right where it is sure. Bars: '
        '95% intervals; dashed: chance.'
    )
    title, unit = 'Accuracy by predicted margin', 'score difference |Δ| (reward units)'
    plots += _by_bin('rm-margin', title, unit, bins, caption)
    bins = evaluation.get('by_length_difference') or ()
    caption = (
        'Should be level. High on the right and below chance on the left: the model '
        'prefers the longer text, whichever it is.'
    )
    title, unit = 'Accuracy by length difference', 'chosen − rejected length (tokens)'
    plots += _by_bin('rm-length', title, unit, bins, caption)
    plots += _calibration(evaluation.get('calibration') or ())
    caption = 'Spikes that do not die out point to a learning rate too high.'
    plots += _panels('rm-panels', 'Optimisation', rows, (GRAD_NORM,), caption)
    absent = _absent(rows, (*losses, *accuracies, GRAD_NORM.metric))
    if evaluation and evaluation.get('accuracy_ceiling') is None:
        absent.append('No accuracy ceiling: this data has no gold order.')
    for key in ('by_margin', 'by_length_difference', 'calibration'):
        if evaluation and not evaluation.get(key):
            absent.append(f'eval.json has no {key}, so its figure is left out.')
    return plots, absent


# ---------------------------------------------------------------------------------- PPO

PROXY, GOLD = ('objective/scores', 'Proxy reward'), ('objective/gold', 'Gold reward')


def _rewards(
    name: str, title: str, rows: Rows, by_kl: bool, caption: str
) -> list[Plot]:
    """Proxy and gold, one panel each since their scales differ, by √KL or by step."""
    rows = [row for row in rows if not by_kl or row.get('objective/kl') is not None]
    drawn = [item for item in (PROXY, GOLD) if len(series(rows, item[0])[0])]
    if not drawn:
        return []
    figure, grid = _figure(HALF, 0.7 + 1.75 * len(drawn), len(drawn), sharex=True)
    for axes, (metric, panel) in zip(grid[:, 0], drawn, strict=True):
        axes.set(title=panel, ylabel='reward units')
        if not by_kl:
            _curve(axes, *series(rows, metric), BLUE, panel)
            continue
        both = [row for row in rows if row.get(metric) is not None]
        (steps, kl), (_, reward) = series(both, 'objective/kl'), series(both, metric)
        root = np.sqrt(np.maximum(kl, 0))
        points = axes.scatter(root, reward, c=steps, s=13, cmap='viridis')
        axes.margins(x=0.03)
    root_kl = '√KL to the reference (√nats per sequence)'
    grid[-1, 0].set_xlabel(root_kl if by_kl else 'training step')
    if by_kl and np.ptp(steps) > 0:
        bar = figure.colorbar(points, ax=grid[:, 0], aspect=30, pad=0.02)
        bar.set_label('training step')
        bar.outline.set_visible(False)
    return [Plot(title, _svg(figure, name, title), caption)]


def _ppo(rows: Rows) -> tuple[list[Plot], list[str]]:
    gold = len(series(rows, 'objective/gold')[0]) > 0
    caption = 'Each point is one rollout; a KL estimate below 0 is drawn at 0. ' + (
        'Over-optimisation is the proxy still rising to the right where the gold falls.'
        if gold
        else 'Without a gold reward it cannot show where rising stops being better.'
    )
    plots = _rewards('ppo-frontier', 'Reward against √KL', rows, True, caption)
    caption = 'Mean score of the responses of each rollout, before the KL penalty.'
    plots += _rewards('ppo-rewards', 'Reward during training', rows, False, caption)
    caption = (
        'Length that climbs with the reward, entropy near 0 and a KL that keeps '
        'growing are the usual signs of exploiting the reward model.'
    )
    title = 'What the policy does'
    plots += _panels('ppo-behaviour', title, rows, BEHAVIOUR, caption)
    caption = (
        'A healthy update has a small KL, a few per cent of clipped ratios and an '
        'explained variance above 0 (the critic beats a constant).'
    )
    plots += _panels('ppo-updates', 'How the updates go', rows, UPDATES, caption)
    absent = _absent(rows, [PROXY[0], *(p.metric for p in (*BEHAVIOUR, *UPDATES))])
    if not gold:
        absent.append('No gold reward (objective/gold): only the learned one is shown.')
    return plots, absent


def draw(
    stage: str, rows: Rows, evaluation: Mapping[str, Any] | None
) -> tuple[list[Plot], list[str]]:
    """Every figure that one stage has data for.

    Args:
        stage: 'pretrain', 'sft', 'rm' or 'ppo'.
        rows: of its metrics.jsonl.
        evaluation: its eval.json, or None while there is none.

    Returns:
        (figures, one sentence for each part without data).
    """
    with matplotlib.rc_context(STYLE):
        if stage == 'rm':
            return _reward_model(rows, evaluation or {})
        if stage == 'ppo':
            return _ppo(rows)
        return _language_model(stage, rows, evaluation or {})
