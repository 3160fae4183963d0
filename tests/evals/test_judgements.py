"""The numbers of a reward model on rankings, ratings and steps, by hand."""

import numpy as np
import pytest
from scipy import stats

from rlhf_jax.evals.judgements import (
    clustered_interval,
    ranking_report,
    rating_report,
    score_steps,
    step_report,
)
from rlhf_jax.types import JudgedBatch

# Two rankings; of the second the third completion is not there.
RANKS = np.array([[[1], [2], [2]], [[2], [1], [-1]]])
SCORES = np.array([[[3.0], [1.0], [2.0]], [[1.0], [0.5], [9.0]]])
LENGTHS = np.array([[5, 4, 9], [3, 3, 0]])


def test_rankings_by_hand():
    # Ordered pairs: 3 > 1 and 3 > 2 right, 0.5 > 1 wrong; the tie is left out.
    report = ranking_report(SCORES, RANKS, LENGTHS)
    assert report['kind'] == 'rankings'
    assert (report['rankings'], report['pairs']) == (2, 3)
    assert report['accuracy'] == pytest.approx(2 / 3)
    assert report['ties'] == pytest.approx(1 / 4)
    losses = [np.logaddexp(0, -2), np.logaddexp(0, -1), np.logaddexp(0, 0.5)]
    assert report['loss'] == pytest.approx(np.mean(losses))
    # longer, shorter, equal: (1 + 0 + ½) / 3
    assert report['length_baseline'] == pytest.approx(0.5)
    # τ_b: 2 of 3 pairs ordered by the labels, all 3 by the scores: 2/√(2·3); and −1.
    assert report['kendall_tau'] == pytest.approx((2 / np.sqrt(6) - 1) / 2)
    assert 'accuracy_ceiling' not in report and 'by_head' not in report


def test_rankings_with_gold_and_several_heads():
    gold = np.array([[3.0, 2, 2], [0, 1, 0]])
    ranks = np.concatenate([RANKS, RANKS[:, ::-1]], -1)
    scores = np.concatenate([SCORES, SCORES], -1)
    report = ranking_report(scores, ranks, LENGTHS, gold, ('a', 'b'))
    assert [row['head'] for row in report['by_head']] == ['a', 'b']
    assert report['by_head'][0]['accuracy'] == pytest.approx(2 / 3)
    assert sum(row['pairs'] for row in report['by_head']) == report['pairs']
    alone = ranking_report(SCORES, RANKS, LENGTHS, gold)
    assert alone['accuracy_ceiling'] == 1 and alone['gold_agreement'] == pytest.approx(
        2 / 3
    )


def test_sides_of_zero_are_told_apart_from_the_order():
    # Harmful, safe and the virtual response, twice; then both are safe.
    ranks = np.array([[[1], [3], [2]], [[1], [3], [2]], [[2], [3], [1]]])
    scores = np.array([[2.0, -1.0, 0], [3.0, 1.0, 0], [-2.0, -1.0, 0]])[..., None]
    lengths = np.array([[4, 2, 0], [2, 4, 0], [3, 3, 0]])
    report = ranking_report(scores, ranks, lengths)
    # Of texts: 2 > −1 and 3 > 1 right, −2 > −1 wrong.
    assert report['pairs'] == 3 and report['accuracy'] == pytest.approx(2 / 3)
    assert report['length_baseline'] == pytest.approx(0.5)
    # Of signs: only the 1 is on the wrong side; 2 of 6 texts are harmful.
    assert report['sign_accuracy'] == pytest.approx(5 / 6)
    assert report['sign_baseline'] == pytest.approx(4 / 6)
    assert report['sign_interval'][0] < 5 / 6 <= report['sign_interval'][1]
    gaps = [3, 2, -1, 2, 1, 3, -1, 2, 1]
    assert report['loss'] == pytest.approx(np.logaddexp(0, -np.array(gaps)).mean())
    named = ranking_report(scores, ranks, lengths, heads=('harm',))
    (row,) = named['by_head']
    assert row['pairs'] == 3 and row['accuracy'] == pytest.approx(2 / 3)
    assert 'sign_accuracy' not in ranking_report(SCORES, RANKS, LENGTHS)


def test_probabilities_of_comparisons_among_rankings():
    # 3 > 1 and 3 > 2 with certainty, 0.5 > 1 with 0.7, which the scores deny.
    report = ranking_report(SCORES, RANKS, LENGTHS, probability=np.array([1, 0.7]))
    assert report['accuracy'] == pytest.approx((1 + 1 + 0.3) / 3)
    losses = [np.logaddexp(0, -2), np.logaddexp(0, -1)]
    losses += [0.7 * np.logaddexp(0, 0.5) + 0.3 * np.logaddexp(0, -0.5)]
    assert report['loss'] == pytest.approx(np.mean(losses))
    sure = ranking_report(SCORES, RANKS, LENGTHS, probability=np.ones(2))
    assert sure['accuracy'] == ranking_report(SCORES, RANKS, LENGTHS)['accuracy']


def test_a_constant_model_has_no_order():
    report = ranking_report(np.zeros_like(SCORES), RANKS, LENGTHS)
    assert report['accuracy'] == 0 and report['kendall_tau'] == 0


def test_groups_that_agree_make_a_wide_interval():
    """Ten prompts of ten pairs, all right or all wrong, are ten facts, not hundred."""
    grouped = clustered_interval([10, 0] * 5, [10] * 10)
    single = clustered_interval([1, 0] * 50, [1] * 100)
    assert np.diff(grouped) > 2 * np.diff(single) > 0
    low, high = single
    assert low == pytest.approx(0.4, abs=0.02) and high == pytest.approx(0.6, abs=0.02)


def test_ratings_by_hand():
    scores = np.array([[1.0, 0], [2, 0], [3, 0], [5, 0], [9, 0]])
    ratings = np.array([[1.0, 1], [3, 3], [3, 0], [4, 0], [7, 0]])
    rated = np.array([[1, 1], [1, 1], [1, 0], [1, 0], [0, 0]], bool)
    report = rating_report(scores, ratings, rated, ('a', 'b'))
    a, b = report['by_head']
    # errors 0, −1, 0, 1 of a; −1, −3 of b; the last row is rated by nobody
    assert a['rmse'] == pytest.approx(np.sqrt(2 / 4))
    assert b['rmse'] == pytest.approx(np.sqrt(10 / 2))
    assert (report['ratings'], report['loss']) == (6, pytest.approx(12 / 6))
    # the mean of a is 2.75: squares 3.0625 + 0.0625 + 0.0625 + 1.5625 = 4.75
    assert a['baseline_rmse'] == pytest.approx(np.sqrt(4.75 / 4))
    assert report['baseline_rmse'] == pytest.approx(np.sqrt((4.75 + 2) / 6))
    assert a['pearson'] == pytest.approx(np.corrcoef([1, 2, 3, 5], [1, 3, 3, 4])[0, 1])
    assert a['spearman'] == pytest.approx(
        stats.spearmanr([1, 2, 3, 5], [1, 3, 3, 4])[0]
    )
    assert a['interval'][0] < a['pearson'] < a['interval'][1]
    assert b['pearson'] is None and b['interval'] == [None, None]  # a constant


def test_steps_by_hand():
    right = [
        np.array([1, 1, 0, 0], bool),
        np.array([1, 0], bool),
        np.array([1, 1], bool),
    ]
    # The first error is found in the first, missed by one in the second; the third is
    # faultless and kept.
    scores = [np.array([2.0, 1, -1, 3]), np.array([-1.0, -2]), np.array([1.0, 0.5])]
    report = step_report(scores, right)
    assert (report['responses'], report['steps']) == (3, 8)
    assert report['accuracy'] == pytest.approx(6 / 8)  # wrong: 3 and −1
    assert report['majority_baseline'] == pytest.approx(5 / 8)
    assert report['first_error_found'] == pytest.approx(1 / 2)
    assert report['faultless_kept'] == 1
    signs = [2, 1, 1, -3, -1, 2, 1, 0.5]
    assert report['loss'] == pytest.approx(np.mean(np.logaddexp(0, -np.array(signs))))
    assert report['interval'][0] < report['accuracy'] < report['interval'][1] + 1e-9


def test_without_errors_none_can_be_found():
    report = step_report([np.ones(2)], [np.ones(2, bool)])
    assert report['first_error_found'] is None and report['faultless_kept'] == 1


def test_scores_of_steps_leave_out_filling_rows_and_other_tokens():
    step_mask = np.array([[0, 1, 1], [0, 0, 1], [1, 1, 1]], bool)
    batch = JudgedBatch(
        tokens=np.arange(9).reshape(3, 1, 3),
        mask=step_mask[:, None] | True,
        labels=step_mask[:, None].astype(np.float32),
        judged=step_mask[:, None],
        weight=np.array([1, 1, 0], np.float32),
    )
    rows = score_steps(lambda params, batch: params * batch.tokens, 2, [batch, batch])
    assert [row.tolist() for row in rows] == [[2, 4], [10]] * 2
