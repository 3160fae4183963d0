"""The page of a reward model: comparisons, rankings, ratings or steps."""

from __future__ import annotations

import math

from rlhf_jax.pages.drawing import Plot, Rows, draw_curves, draw_panels, not_logged
from rlhf_jax.pages.held_out import draw_accuracies, draw_held_out
from rlhf_jax.pages.language_model import GRAD_NORM
from rlhf_jax.pages.page import Json, Page, Verdict, fraction, interval, less, number

# What its eval.json must hold, by the kind of its data.
REQUIRED = {
    'comparisons': ('accuracy', 'interval', 'pairs', 'loss', 'length_baseline'),
    'rankings': ('accuracy', 'interval', 'rankings', 'loss', 'length_baseline'),
    'ratings': ('ratings', 'loss', 'rmse', 'baseline_rmse', 'by_head'),
    'steps': ('accuracy', 'interval', 'steps', 'loss', 'majority_baseline'),
}


def kind_of(e: Json) -> str:
    """What a reward model was judged on: 'comparisons', 'rankings', 'ratings' or
    'steps'.
    """
    return e.get('kind', 'comparisons')


def verdict_of(e: Json) -> Verdict:
    """As its kind of data is judged."""
    if kind_of(e) == 'ratings':
        return _of_ratings(e)
    return _of_steps(e) if kind_of(e) == 'steps' else _of_pairs(e)


def _of_ratings(e: Json) -> Verdict:
    """Pass: every score surely goes with its ratings, and errs less than their mean.

    The lower end of the 95% interval of Pearson's r is above 0, and the root mean
    squared error below that of predicting the mean of the held-out ratings.
    """
    good = all(
        less(0.0, row['interval'][0]) and less(row['rmse'], row['baseline_rmse'])
        for row in e['by_head']
    )
    figure = '; '.join(
        f'{row["head"]}: r {number(row["pearson"])} {interval(row["interval"])}, '
        f'error {number(row["rmse"])} of {number(row["baseline_rmse"])}'
        for row in e['by_head']
    )
    expected = 'interval of r above 0, error below that of the mean rating'
    return Verdict('pass' if good else 'fail', figure, expected)


def _of_steps(e: Json) -> Verdict:
    """Pass: surely better than calling every step what most of them are."""
    floor = e['majority_baseline']
    good = less(floor, e['interval'][0])
    figure = f'accuracy {fraction(e["accuracy"])} {interval(e["interval"])}'
    expected = f'interval above {fraction(floor)} (the more frequent label)'
    return Verdict('pass' if good else 'fail', figure, expected)


def length_rule(longer: float | None) -> tuple[str, float]:
    """The better of the two rules that look at length alone, and its accuracy.

    Args:
        longer: the accuracy of 'longer wins'; that of 'shorter wins' is the rest. None
            where it is not known.
    """
    if longer is None or longer == 0.5:
        return 'chance', 0.5
    return ('longer wins', longer) if longer > 0.5 else ('shorter wins', 1 - longer)


def _of_pairs(e: Json) -> Verdict:
    """Pass: surely better than length alone, and near the ceiling if it is known.

    The lower end of the accuracy's 95% interval is above that of 'longer wins' and of
    'shorter wins', one of which is at least ½; where the data has a gold order,
    accuracy is at least its ceiling − 0.05; where it says on which side of 0 a text
    lies, that is surely told better than by the more frequent side.
    """
    rule, floor = length_rule(e['length_baseline'])
    good = less(floor, e['interval'][0])
    expected = f'interval above {fraction(floor)} ({rule})'
    ceiling = e.get('accuracy_ceiling')
    if ceiling is not None:
        accuracy = e['accuracy']
        # Rounded, because in floating point 0.768 lies below 0.818 − 0.05.
        near = accuracy is not None and round(ceiling - accuracy, 9) <= 0.05
        good = good and near
        expected += f', accuracy ≥ {fraction(ceiling - 0.05)} (ceiling − 0.05)'
    figure = f'accuracy {fraction(e["accuracy"])} {interval(e["interval"])}'
    if (side := e.get('sign_baseline')) is not None:
        good = good and less(side, e['sign_interval'][0])
        expected += f', of the sign above {fraction(side)} (the more frequent one)'
        figure += f', of the sign {fraction(e["sign_accuracy"])} '
        figure += interval(e['sign_interval'])
    return Verdict('pass' if good else 'fail', figure, expected)


def warnings(e: Json) -> list[str]:
    """A score that depends on the side of the padding by more than 0.01."""
    if not less(0.01, e.get('padding_gap')):
        return []
    return [
        f'Scores depend on the side of the padding by {number(e["padding_gap"])}; '
        'beyond 0.01 positions or masks are wrong.'
    ]


def draw(stage: str, rows: Rows, evaluation: Json) -> tuple[list[Plot], list[str]]:
    """Held-out figures by the kind of the data, and how the training went."""
    kind = kind_of(evaluation)
    if kind in ('ratings', 'steps'):
        return _judged_alone(stage, kind, rows, evaluation)
    plots, absent = draw_held_out(stage, 'reward model', evaluation)
    accuracies = ('train/accuracy', 'eval/accuracy')
    plots += draw_accuracies(stage, rows, accuracies)
    losses, level = ('train/loss', 'eval/loss'), ('log 2 =', math.log(2))
    caption = 'Dashed: log 2, the loss of a model that gives every text the same score.'
    plots += draw_curves(
        f'{stage}-loss', 'Loss', 'loss (nats per pair)', rows, losses, level, caption
    )
    caption = 'Spikes that do not die out point to a learning rate too high.'
    plots += draw_panels(f'{stage}-panels', 'Optimisation', rows, (GRAD_NORM,), caption)
    return plots, not_logged(rows, (*losses, *accuracies, GRAD_NORM.metric)) + absent


def _judged_alone(
    stage: str, kind: str, rows: Rows, evaluation: Json
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


PAGE = Page(
    title='Reward model',
    verdict=verdict_of,
    warnings=warnings,
    required=lambda e: REQUIRED[kind_of(e)],
    facts=(
        ('Held-out pairs', 'pairs', ''),
        ('Held-out rankings', 'rankings', ''),
        ('Held-out ratings', 'ratings', ''),
        ('Held-out steps', 'steps', ''),
        ('Ceiling by the labellers’ agreement', 'labellers_ceiling', 'of their labels'),
        ('Loss', 'loss', 'per pair, rating or step'),
        ('Kendall’s τ', 'kendall_tau', 'mean over rankings'),
        ('Texts on the right side of 0', 'sign_accuracy', 'fraction'),
        ('The more frequent side', 'sign_baseline', 'fraction'),
        ('Root mean squared error', 'rmse', 'rating units'),
        ('The same of the mean rating', 'baseline_rmse', 'rating units'),
        ('First errors found', 'first_error_found', 'of responses with one'),
        ('Faultless responses kept', 'faultless_kept', 'of those'),
        ('Mean score of the references', 'mean_reference_score', 'reward units'),
        ('Largest effect of the padding side', 'padding_gap', 'reward units'),
    ),
    draw=draw,
)
