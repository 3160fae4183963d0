"""Evaluators by their names, and what becomes of their numbers and figures."""

import numpy as np
import pytest

from rlhf_jax import evaluators
from rlhf_jax.evals.policy import Sampled
from rlhf_jax.pages.drawing import Plot
from rlhf_jax.pages.page import Page

# This module is an evaluator of a user's own.
WANTS_GOLD = True
FACTS = (('Longest', 'longest', 'tokens'),)
WHERE = 'config.ppo.evaluators'


def evaluate(before, after, weights):
    return {'longest': int(after.lengths.max()), 'least': int(before.lengths.min())}


def draw(stage, rows, evaluation):
    return [Plot(f'Longest of {stage}', '<svg/>', str(evaluation['longest']))], ['no x']


def sampled(*lengths):
    zeros = np.zeros(len(lengths))
    return Sampled([''] * len(lengths), {}, zeros, zeros, np.array(lengths), zeros, {})


def test_one_of_a_users_own_is_measured_and_shown():
    names = (__name__,)
    evaluators.check(names, WHERE, has_gold=True)
    both = sampled(2, 3), sampled(5, 4)
    report = evaluators.measure(names, {'kl': 1.0}, *both, {}, where=WHERE)
    assert report == {'kl': 1.0, 'longest': 5, 'least': 2, 'evaluators': [__name__]}
    page = Page(title='x', facts=(('KL', 'kl', ''),), draw=lambda *_: ([], ['no y']))
    page = evaluators.shown(page, report)
    assert page.facts == (('KL', 'kl', ''), *FACTS)
    plots, absent = page.draw('ppo', [], report)
    assert [(plot.title, plot.caption) for plot in plots] == [('Longest of ppo', '5')]
    assert absent == ['no y', 'no x']


def test_without_evaluators_nothing_changes():
    report = {'kl': 1.0}
    assert evaluators.measure((), report, None, None, {}, where=WHERE) == report
    page = Page(title='x', facts=None, draw=lambda *_: ([], []))
    shown = evaluators.shown(page, report)
    assert shown.facts is None and shown.draw('x', [], {}) == ([], [])


@pytest.mark.parametrize(
    ('names', 'has_gold', 'message'),
    [
        (('length_control',), True, "did you mean 'length_controlled'"),
        (('json',), True, 'is no evaluator'),
        (('length_controlled',), False, 'wants a gold reward'),
        (('length_controlled',) * 2, True, 'twice'),
    ],
)
def test_what_cannot_measure_is_refused_before_training(names, has_gold, message):
    with pytest.raises(ValueError, match=message) as caught:
        evaluators.check(names, WHERE, has_gold)
    assert WHERE in str(caught.value)


def test_a_field_of_another_is_not_overwritten():
    both = sampled(1), sampled(1)
    with pytest.raises(ValueError, match='gives least, which eval.json has already'):
        evaluators.measure((__name__,), {'least': 0}, *both, {}, where=WHERE)
