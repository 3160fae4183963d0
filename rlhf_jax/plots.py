"""The figures of the report page: rows of metrics in, inline SVG out.

``draw`` gives every figure one stage's files have data for, and a sentence for each it
has none for. ``report.py`` calls it; read ``drawing.py`` next, which holds the pens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from rlhf_jax.drawing import (
    BLUE,
    HALF,
    INK,
    MUTED,
    STYLE,
    Panel,
    Plot,
    Rows,
    blank,
    draw_curve,
    draw_curves,
    draw_level,
    draw_panels,
    not_logged,
    series,
    tick,
    to_svg,
    wilson,
)
from rlhf_jax.verdicts import ONLINE, REWARD_MODELS

GRAD_NORM = Panel('train/grad_norm', 'Gradient norm', 'global L2 norm', log=True)
LR = Panel('train/lr', 'Learning rate', 'per update', exact=True)
SPEED = Panel('train/tokens_per_second', 'Throughput', 'tokens per second')
REWARDS = (
    Panel('train/rewards/chosen', 'Implicit reward, chosen', 'reward units'),
    Panel('train/rewards/rejected', 'Implicit reward, rejected', 'reward units'),
    Panel('train/logps/chosen', 'log π(chosen)', 'nats per sequence'),
    Panel('train/logps/rejected', 'log π(rejected)', 'nats per sequence'),
    Panel('train/loss', 'Loss', "in the loss's own units"),
    GRAD_NORM,
)
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
    Panel('objective/cost', 'Cost', 'cost units'),
    Panel('objective/lambda', 'Multiplier λ', 'reward per cost', exact=True),
)


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
    plots = draw_curves(f'{stage}-loss', 'Loss', unit, rows, losses, level, caption)
    caption = (
        'A gradient norm whose spikes do not die out points to a learning rate too '
        'high; throughput that sags points to the input pipeline.'
    )
    panels = (GRAD_NORM, LR, SPEED)
    plots += draw_panels(f'{stage}-panels', 'Optimisation', rows, panels, caption)
    return plots, not_logged(rows, (*losses, *(panel.metric for panel in panels)))


# -------------------------------------------------------------- held-out comparisons

LEARNED = {
    'rm': 'reward model',
    'cost': 'cost model',
    'preference': 'implicit reward',
}


def _accuracy_bars(stage: str, evaluation: Mapping[str, Any]) -> str:
    longer = evaluation['length_baseline']
    bars = [
        ('gold order (ceiling)', evaluation.get('accuracy_ceiling'), '#9aa5b1'),
        (LEARNED[stage], evaluation['accuracy'], BLUE),
        ('longer wins', longer, '#9aa5b1'),
        ('shorter wins', None if longer is None else 1 - longer, '#9aa5b1'),
        ('chance', 0.5, '#c8d0d8'),
    ]
    bars = [bar for bar in reversed(bars) if bar[1] is not None]
    figure, ((axes,),) = blank(HALF, 0.75 + 0.42 * len(bars))
    for place, (label, value, color) in enumerate(bars):
        axes.barh(place, value, color=color, height=0.6)
        end = value
        if label == LEARNED[stage] and None not in evaluation['interval']:
            low, end = evaluation['interval']
            reach = [[max(value - low, 0)], [max(end - value, 0)]]
            axes.errorbar(value, place, xerr=reach, color=INK, capsize=3, lw=1.1)
        axes.text(end + 0.015, place, f'{value:.3f}', va='center', color=INK)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], color=INK)
    axes.tick_params(axis='y', length=0)
    axes.set(xlim=(0, 1.1), xlabel='accuracy (fraction of held-out pairs)')
    axes.grid(False, axis='y')
    label = f'accuracy of the {LEARNED[stage]} and its baselines'
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


def _held_out(
    stage: str, evaluation: Mapping[str, Any]
) -> tuple[list[Plot], list[str]]:
    """What eval.json says of the held-out comparisons."""
    if not evaluation:
        return [], []
    caption = (
        'With its 95% interval. The ceiling is what the true order reaches on the same '
        'noisy labels; what is no better than “longer wins” or “shorter wins” has '
        'learned length.'
    )
    plots = [Plot('Held-out accuracy', _accuracy_bars(stage, evaluation), caption)]
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


def _accuracies(stage: str, rows: Rows, metrics: tuple[str, str]) -> list[Plot]:
    caption = 'Training accuracy far above evaluation accuracy is overfitting.'
    title, unit = 'Accuracy during training', 'accuracy (fraction of pairs)'
    level = ('chance', 0.5)
    return draw_curves(f'{stage}-accuracy', title, unit, rows, metrics, level, caption)


def _reward_model(
    stage: str, rows: Rows, evaluation: Mapping[str, Any]
) -> tuple[list[Plot], list[str]]:
    kind = evaluation.get('kind', 'comparisons')
    if kind in ('ratings', 'steps'):
        return _judged_alone(stage, kind, rows, evaluation)
    plots, absent = _held_out(stage, evaluation)
    accuracies = ('train/accuracy', 'eval/accuracy')
    plots += _accuracies(stage, rows, accuracies)
    losses, level = ('train/loss', 'eval/loss'), ('log 2 =', math.log(2))
    caption = 'Dashed: log 2, the loss of a model that gives every text the same score.'
    plots += draw_curves(
        f'{stage}-loss', 'Loss', 'loss (nats per pair)', rows, losses, level, caption
    )
    caption = 'Spikes that do not die out point to a learning rate too high.'
    plots += draw_panels(f'{stage}-panels', 'Optimisation', rows, (GRAD_NORM,), caption)
    return plots, not_logged(rows, (*losses, *accuracies, GRAD_NORM.metric)) + absent


def _judged_alone(
    stage: str, kind: str, rows: Rows, evaluation: Mapping[str, Any]
) -> tuple[list[Plot], list[str]]:
    """Ratings and steps, which no pair is needed for."""
    unit, level = 'squared error', None
    losses, plots = ('train/loss', 'eval/loss'), []
    if kind == 'steps':
        unit, level = 'loss (nats per step)', ('log 2 =', math.log(2))
        accuracies = ('train/accuracy', 'eval/accuracy')
        title, axis = 'Accuracy during training', 'accuracy (fraction of steps)'
        baseline = ('the more frequent label', evaluation['majority_baseline'])
        caption = 'Training accuracy far above evaluation accuracy is overfitting.'
        plots = draw_curves(
            f'{stage}-accuracy', title, axis, rows, accuracies, baseline, caption
        )
    else:
        level = ('the mean rating', evaluation['baseline_rmse'] ** 2)
    caption = 'Dashed: what a model does that says the same of everything.'
    plots += draw_curves(f'{stage}-loss', 'Loss', unit, rows, losses, level, caption)
    caption = 'Spikes that do not die out point to a learning rate too high.'
    plots += draw_panels(f'{stage}-panels', 'Optimisation', rows, (GRAD_NORM,), caption)
    return plots, not_logged(rows, (*losses, GRAD_NORM.metric))


def _preference(
    rows: Rows, evaluation: Mapping[str, Any]
) -> tuple[list[Plot], list[str]]:
    plots, absent = _held_out('preference', evaluation)
    accuracies = ('train/rewards/accuracies', 'eval/accuracy')
    plots += _accuracies('preference', rows, accuracies)
    caption = 'The implicit reward of the chosen response less that of the rejected.'
    title, unit, level = 'Margin during training', 'reward units', ('none', 0.0)
    margins = ('train/rewards/margins', 'eval/margin')
    plots += draw_curves(
        'preference-margin', title, unit, rows, margins, level, caption
    )
    caption = (
        'A chosen response that becomes much less likely, together with the rejected '
        'one, means that probability goes to texts which nobody compared.'
    )
    title = 'What the policy makes of the responses'
    plots += draw_panels('preference-panels', title, rows, REWARDS, caption)
    return plots, not_logged(rows, [panel.metric for panel in REWARDS]) + absent


# ------------------------------------------------------------------------ online stages

PROXY, GOLD = (
    ('objective/proxy_reward', 'Proxy reward'),
    ('objective/gold', 'Gold reward'),
)
# What is optimised: the proxy reward after scaling, clipping and penalties.
SHAPED = ('objective/scores', 'Shaped score')


def _rewards(
    name: str, title: str, rows: Rows, by_kl: bool, caption: str
) -> list[Plot]:
    """Proxy, shaped score (by step alone) and gold, one panel each since their scales
    differ, by √KL or by step.
    """
    rows = [row for row in rows if not by_kl or row.get('objective/kl') is not None]
    panels = (PROXY, GOLD) if by_kl else (PROXY, SHAPED, GOLD)
    drawn = [item for item in panels if len(series(rows, item[0])[0])]
    if not drawn:
        return []
    figure, grid = blank(HALF, 0.7 + 1.75 * len(drawn), len(drawn), sharex=True)
    for axes, (metric, panel) in zip(grid[:, 0], drawn, strict=True):
        axes.set(title=panel, ylabel='reward units')
        if not by_kl:
            draw_curve(axes, *series(rows, metric), BLUE, panel)
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
    return [Plot(title, to_svg(figure, name, title), caption)]


def _online(stage: str, rows: Rows) -> tuple[list[Plot], list[str]]:
    gold = len(series(rows, 'objective/gold')[0]) > 0
    caption = 'Each point is one rollout; a KL estimate below 0 is drawn at 0. ' + (
        'Over-optimisation is the proxy still rising to the right where the gold falls.'
        if gold
        else 'Without a gold reward it cannot show where rising stops being better.'
    )
    plots = _rewards(f'{stage}-frontier', 'Reward against √KL', rows, True, caption)
    caption = (
        'Means over the responses of each rollout. Proxy reward: the weighted sum of '
        'the rewards, as in the table of the evaluation. Shaped score: the same after '
        'scaling, clipping and the penalties for responses that do not end or are too '
        'long; it is what is optimised, less the KL penalty.'
    )
    plots += _rewards(
        f'{stage}-rewards', 'Reward during training', rows, False, caption
    )
    caption = (
        'Length that climbs with the reward, entropy near 0 and a KL that keeps '
        'growing are the usual signs of exploiting the reward model.'
    )
    title = 'What the policy does'
    plots += draw_panels(f'{stage}-behaviour', title, rows, BEHAVIOUR, caption)
    caption = (
        'A healthy update has a small KL, a few per cent of clipped ratios and an '
        'explained variance above 0 (the critic beats a constant).'
    )
    plots += draw_panels(
        f'{stage}-updates', 'How the updates go', rows, UPDATES, caption
    )
    # What the updates log differs from method to method.
    names = (PROXY[0], SHAPED[0])
    absent = not_logged(rows, [*names, *(panel.metric for panel in BEHAVIOUR)])
    if not gold:
        absent.append('No gold reward (objective/gold): only the learned one is shown.')
    return plots, absent


def _all_metrics(stage: str, rows: Rows) -> list[Plot]:
    """A panel per metric, of a stage that has no figures of its own."""
    names = dict.fromkeys(name for row in rows for name in row)
    panels = tuple(Panel(n, n, '') for n in names if n not in ('step', 'seconds'))
    return draw_panels(f'{stage}-panels', 'Metrics', rows, panels, 'All that it logs.')


def draw(
    stage: str, rows: Rows, evaluation: Mapping[str, Any] | None
) -> tuple[list[Plot], list[str]]:
    """Every figure that one stage has data for.

    Args:
        stage: its name.
        rows: of its metrics.jsonl.
        evaluation: its eval.json, or None while there is none.

    Returns:
        (figures, one sentence for each part without data).
    """
    with matplotlib.rc_context(STYLE):
        if stage in REWARD_MODELS:
            return _reward_model(stage, rows, evaluation or {})
        if stage == 'preference':
            return _preference(rows, evaluation or {})
        if stage in ONLINE:
            return _online(stage, rows)
        if stage in ('pretrain', 'sft'):
            return _language_model(stage, rows, evaluation or {})
        return _all_metrics(stage, rows), []
