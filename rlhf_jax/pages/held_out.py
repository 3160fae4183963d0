"""What the report shows of held-out comparisons: of a reward model, and of the implicit
reward of a policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.pages.drawing import (
    BLUE,
    HALF,
    INK,
    MUTED,
    Plot,
    Rows,
    blank,
    draw_curves,
    draw_level,
    tick,
    to_svg,
    wilson,
)
from rlhf_jax.pages.page import Json


def _accuracy_bars(stage: str, what: str, evaluation: Json) -> str:
    longer = evaluation['length_baseline']
    bars = [
        ('gold order (ceiling)', evaluation.get('accuracy_ceiling'), '#9aa5b1'),
        (what, evaluation['accuracy'], BLUE),
        ('longer wins', longer, '#9aa5b1'),
        ('shorter wins', None if longer is None else 1 - longer, '#9aa5b1'),
        ('chance', 0.5, '#c8d0d8'),
    ]
    bars = [bar for bar in reversed(bars) if bar[1] is not None]
    figure, ((axes,),) = blank(HALF, 0.75 + 0.42 * len(bars))
    for place, (label, value, color) in enumerate(bars):
        axes.barh(place, value, color=color, height=0.6)
        end = value
        if label == what and None not in evaluation['interval']:
            low, end = evaluation['interval']
            reach = [[max(value - low, 0)], [max(end - value, 0)]]
            axes.errorbar(value, place, xerr=reach, color=INK, capsize=3, lw=1.1)
        axes.text(end + 0.015, place, f'{value:.3f}', va='center', color=INK)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], color=INK)
    axes.tick_params(axis='y', length=0)
    axes.set(xlim=(0, 1.1), xlabel='accuracy (fraction of held-out pairs)')
    axes.grid(False, axis='y')
    label = f'accuracy of the {what} and its baselines'
    return to_svg(figure, f'{stage}-bars', label)


def _bin_label(low: float | None, high: float | None) -> str:
    # An open end is infinite, which JSON writes as null.
    if low is None or high is None:
        return f'≥ {tick(low)}' if high is None else f'< {tick(high)}'
    return f'{tick(low)} to {tick(high)}'


def _by_bin(
    name: str, title: str, unit: str, bins: Sequence[Mapping[str, Any]], caption: str
) -> list[Plot]:
    bins = [b for b in bins if b['count'] and b['accuracy'] is not None]
    if not bins:
        return []
    accuracy = np.array([b['accuracy'] for b in bins], np.float64)
    count = np.array([b['count'] for b in bins], np.float64)
    figure, ((axes,),) = blank(HALF, 2.9)
    draw_level(axes, 0.5)
    place = np.arange(len(bins))
    spread = wilson(accuracy, count)
    axes.errorbar(place, accuracy, spread, fmt='o', color=BLUE, capsize=3, lw=1.2)
    labels = [f'{_bin_label(b["lo"], b["hi"])}\nn={b["count"]:,}' for b in bins]
    axes.set_xticks(place, labels, fontsize=8 if len(bins) <= 6 else 6.5)
    axes.set(xlim=(-0.5, len(bins) - 0.5), ylim=(0, 1.03), xlabel=unit)
    axes.set_ylabel('accuracy (fraction of pairs)')
    axes.grid(False, axis='x')
    return [Plot(title, to_svg(figure, name, title), caption)]


def _calibration(stage: str, bins: Sequence[Mapping[str, Any]]) -> list[Plot]:
    bins = [
        b for b in bins if b['count'] and None not in (b['predicted'], b['observed'])
    ]
    if not bins:
        return []
    keys = ('predicted', 'observed', 'count')
    predicted, observed, count = np.array([[b[k] for k in keys] for b in bins], float).T
    figure, ((axes,),) = blank(HALF, 2.9)
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
    return [
        Plot(
            'Calibration',
            to_svg(figure, f'{stage}-calibration', 'Calibration'),
            caption,
        )
    ]


def draw_held_out(
    stage: str, what: str, evaluation: Json
) -> tuple[list[Plot], list[str]]:
    """What eval.json says of the held-out comparisons.

    Args:
        stage: its name.
        what: has ranked them, e.g. 'reward model'.
        evaluation: eval.json, or {} while there is none.
    """
    if not evaluation:
        return [], []
    caption = (
        'With its 95% interval. The ceiling is what the true order reaches on the same '
        'noisy labels; what is no better than “longer wins” or “shorter wins” has '
        'learned length.'
    )
    plots = [
        Plot('Held-out accuracy', _accuracy_bars(stage, what, evaluation), caption)
    ]
    bins = evaluation.get('by_margin') or ()
    caption = (
        'Should rise to the right: it ought to be right where it is sure. Bars: '
        '95% intervals; dashed: chance.'
    )
    title, unit = 'Accuracy by predicted margin', 'score difference |Δ| (reward units)'
    plots += _by_bin(f'{stage}-margin', title, unit, bins, caption)
    bins = evaluation.get('by_length_difference') or ()
    caption = (
        'Should be level. High on the right and below chance on the left: the longer '
        'text is preferred, whichever it is.'
    )
    title, unit = 'Accuracy by length difference', 'chosen − rejected length (tokens)'
    plots += _by_bin(f'{stage}-length', title, unit, bins, caption)
    plots += _calibration(stage, evaluation.get('calibration') or ())
    absent = []
    if evaluation.get('accuracy_ceiling') is None:
        absent.append('No accuracy ceiling: this data has no gold order.')
    for key in ('by_margin', 'by_length_difference', 'calibration'):
        if not evaluation.get(key):
            absent.append(f'eval.json has no {key}, so its figure is left out.')
    return plots, absent


def draw_accuracies(stage: str, rows: Rows, metrics: tuple[str, str]) -> list[Plot]:
    """The accuracy in training and on the held-out comparisons."""
    caption = 'Training accuracy far above evaluation accuracy is overfitting.'
    title, unit = 'Accuracy during training', 'accuracy (fraction of pairs)'
    level = ('chance', 0.5)
    return draw_curves(f'{stage}-accuracy', title, unit, rows, metrics, level, caption)
