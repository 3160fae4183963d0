"""The length-controlled win rate: on data of known effects, and at the edges."""

import numpy as np
import pytest

from rlhf_jax.evals.policy import Sampled
from rlhf_jax.evaluators import length_controlled


def sampled(lengths, gold):
    zeros = np.zeros(len(lengths))
    scores = {'gold': np.asarray(gold, float)}
    lengths = np.asarray(lengths)
    return Sampled([''] * len(lengths), scores, zeros, zeros, lengths, zeros, {})


def measured(longer, outcomes):
    """Of wins (1), ties (½) and losses (0) at differences of length."""
    before = sampled(np.full(len(longer), 50), np.full(len(longer), 0.5))
    after = sampled(50 + np.asarray(longer), outcomes)
    return length_controlled.evaluate(before, after, {})


def test_known_effects_are_found():
    """logit P = 0.4 + 2·tanh(Δ/σ); responses are longer: the plain rate is higher."""
    rng = np.random.default_rng(1)
    longer = rng.integers(-10, 31, 20_000)
    x = np.tanh(longer / longer.std())
    wins = rng.random(len(x)) < 1 / (1 + np.exp(-0.4 - 2 * x))
    found = measured(longer, wins)
    assert found['lc_win_rate'] == pytest.approx(1 / (1 + np.exp(-0.4)), abs=0.015)
    assert found['lc_length_effect'] == pytest.approx(2, abs=0.1)
    assert wins.mean() > found['lc_win_rate'] + 0.1
    low, high = found['lc_win_rate_interval']
    assert low < found['lc_win_rate'] < high < low + 0.04
    bins = found['lc_by_length']
    assert len(bins) == 5 and bins[0]['win_rate'] < bins[-1]['win_rate'] - 0.3
    assert np.mean([row['longer'] for row in bins]) == pytest.approx(longer.mean())


def test_lengths_that_do_not_differ_leave_the_win_rate():
    """3½ of 5: the prior of 0.1 moves logit 0.847 by 0.1·0.85/(5·0.7·0.3) = 0.08."""
    found = measured([4] * 5, [1, 1, 1, 0.5, 0])
    assert found['lc_win_rate'] == pytest.approx(0.7, abs=0.02)
    assert found['lc_length_effect'] == 0


def test_the_slope_of_the_penalised_likelihood_is_zero():
    longer, wins = np.array([-3, 1, 4, 9, 2.0]), np.array([0, 1, 1, 1, 0.5])
    x = np.tanh(longer / longer.std())
    theta, phi = length_controlled._fit(wins, x)
    rest = wins - 1 / (1 + np.exp(-theta - phi * x))
    assert rest.sum() == pytest.approx(0.1 * theta, abs=1e-9)
    assert (rest * x).sum() == pytest.approx(0.1 * phi, abs=1e-9)


@pytest.mark.parametrize('outcome', [0.0, 1.0])
def test_one_outcome_for_all_stays_finite(outcome):
    found = measured(np.arange(40), np.full(40, outcome))
    rate, (low, high) = found['lc_win_rate'], found['lc_win_rate_interval']
    assert abs(rate - outcome) < 0.1
    assert 0 <= low <= high <= 1 and np.isfinite(found['lc_length_effect'])


def test_the_figure():
    found = measured([0, 5, -2, 7, 1, 3], [1, 1, 0, 0.5, 0, 1])
    (plot,), absent = length_controlled.draw('ppo', [], found)
    assert plot.svg.startswith('<svg') and 'at equal length' in plot.svg
    assert absent == []
