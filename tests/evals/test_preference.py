"""The numbers of a reward model on comparisons, by hand."""

import numpy as np
import pytest

from rlhf_jax.evals.preference import (
    preference_report,
    proportion_interval,
    score_pairs,
)
from rlhf_jax.types import JudgedBatch

#                   right      tie        wrong      right
SCORES = np.array([[2.0, 1.0], [0.5, 0.5], [0.0, 3.0], [1.2, 1.0]], np.float32)
#                  longer   equal   shorter  longer
LENGTHS = np.array([[9, 4], [5, 5], [3, 14], [7, 6]])


def test_accuracy_is_strict():
    report = preference_report(SCORES, LENGTHS)
    assert report['accuracy'] == 2 / 4  # the tie is an error
    assert report['pairs'] == 4
    low, high = report['interval']
    assert 0 < low < 0.5 < high < 1


def test_loss_is_the_mean_of_minus_log_sigmoid():
    gaps = [1.0, 0.0, -3.0, 0.2]
    by_hand = np.mean([np.log(1 + np.exp(-gap)) for gap in gaps])
    assert preference_report(SCORES, LENGTHS)['loss'] == pytest.approx(
        by_hand, abs=1e-6
    )


def test_the_length_baseline_tosses_a_coin_on_equal_lengths():
    # longer, equal, shorter, longer: (1 + ½ + 0 + 1) / 4
    assert preference_report(SCORES, LENGTHS)['length_baseline'] == 2.5 / 4


def test_the_ceiling_counts_ties_as_half_and_agreement_leaves_them_out():
    gold = np.array([[1.0, 0.0], [2.0, 2.0], [0.0, 1.0], [0.0, 1.0]])
    report = preference_report(SCORES, LENGTHS, gold)
    assert report['accuracy_ceiling'] == (1 + 0.5 + 0 + 0) / 4
    # of the three that gold orders it agrees on the first and the third
    assert report['gold_agreement'] == pytest.approx(2 / 3)


def test_without_gold_there_is_no_ceiling():
    report = preference_report(SCORES, LENGTHS)
    assert 'accuracy_ceiling' not in report and 'gold_agreement' not in report


def test_accuracy_by_kind():
    kinds = ['padded', 'twins', 'twins', 'padded']
    report = preference_report(SCORES, LENGTHS, kinds=kinds)
    assert report['by_kind'] == [
        {'kind': 'padded', 'count': 2, 'accuracy': 1.0},
        {'kind': 'twins', 'count': 2, 'accuracy': 0.0},
    ]
    assert 'by_kind' not in preference_report(SCORES, LENGTHS)


def test_bins_hold_every_pair_once():
    report = preference_report(SCORES, LENGTHS)
    for name in ('by_margin', 'by_length_difference'):
        assert sum(row['count'] for row in report[name]) == 4
        for row in report[name]:
            assert (row['accuracy'] is None) == (row['count'] == 0)
    bins = {(row['lo'], row['hi']): row for row in report['by_margin']}
    assert bins[0.0, 0.25]['count'] == 2  # the tie and 0.2
    assert bins[0.0, 0.25]['accuracy'] == 0.5
    assert bins[1.0, 2.0]['accuracy'] == 1.0
    assert bins[2.0, 4.0]['accuracy'] == 0.0
    bins = {(row['lo'], row['hi']): row for row in report['by_length_difference']}
    assert bins[None, -10.0]['count'] == 1 and bins[None, -10.0]['accuracy'] == 0
    assert bins[0.0, 1.0]['count'] == 1  # equal lengths have a bin of their own
    assert bins[5.0, 10.0]['count'] == 1 and bins[5.0, 10.0]['accuracy'] == 1


def test_calibration_of_labels_drawn_from_the_claim():
    rng = np.random.default_rng(0)
    size = 8000
    margin = rng.uniform(0, 3, size)
    right = rng.uniform(size=size) < 1 / (1 + np.exp(-margin))
    gap = np.where(right, margin, -margin)
    scores = np.stack([gap, np.zeros(size)], 1)
    table = preference_report(scores, np.ones((size, 2)))['calibration']
    assert [row['count'] for row in table] == [1000] * 8
    predicted = [row['predicted'] for row in table]
    assert predicted == sorted(predicted) and predicted[0] >= 0.5
    for row in table:
        assert row['observed'] == pytest.approx(row['predicted'], abs=0.05)
    sure = preference_report(10 * scores, np.ones((size, 2)))['calibration']
    assert sure[3]['predicted'] - sure[3]['observed'] > 0.2  # overconfident, and seen


def test_wilson_interval():
    # p = 8/10, z = 1.95996: centre (p + z²/2n)/(1 + z²/n) = 0.71675,
    # half width z·√(p(1−p)/n + z²/4n²)/(1 + z²/n) = 0.22659
    low, high = proportion_interval(8, 10)
    assert low == pytest.approx(0.71675 - 0.22659, abs=2e-4)
    assert high == pytest.approx(0.71675 + 0.22659, abs=2e-4)


def test_rows_that_fill_a_batch_are_left_out():
    def batch(weight, first):
        tokens = first + np.arange(12).reshape(2, 2, 3)
        return JudgedBatch(
            tokens=tokens,
            mask=tokens >= 0,
            margin=np.zeros(2),
            weight=np.array(weight, np.float32),
        )

    scored = score_pairs(
        lambda params, batch: params * batch.tokens[:, :, 0],
        2,
        [batch([1, 1], 0), batch([1, 0], 100)],
    )
    np.testing.assert_array_equal(scored, [[0, 6], [12, 18], [200, 206]])


P = np.array([0.9, 0.6, 0.8, 0.5])


def test_soft_labels_count_by_the_agreement_that_is_expected():
    # right, equal, wrong, right: 0.9, ½, 1 − 0.8, 0.5
    report = preference_report(SCORES, LENGTHS, probability=P)
    assert report['accuracy'] == pytest.approx((0.9 + 0.5 + 0.2 + 0.5) / 4)
    low, high = report['interval']
    assert low < report['accuracy'] < high
    gaps = np.array([1.0, 0.0, -3.0, 0.2])
    by_hand = P * np.log1p(np.exp(-gaps)) + (1 - P) * np.log1p(np.exp(gaps))
    assert report['loss'] == pytest.approx(by_hand.mean(), abs=1e-6)
    # longer, equal, shorter, longer
    assert report['length_baseline'] == pytest.approx((0.9 + 0.5 + 0.2 + 0.5) / 4)
    assert report['label_ceiling'] == pytest.approx((0.9 + 0.6 + 0.8 + 0.5) / 4)
    gold = np.array([[1.0, 0.0], [2.0, 2.0], [0.0, 1.0], [0.0, 1.0]])
    report = preference_report(SCORES, LENGTHS, gold, probability=P)
    assert report['accuracy_ceiling'] == pytest.approx((0.9 + 0.5 + 0.2 + 0.5) / 4)


def test_certain_probabilities_change_the_count_of_equal_scores_alone():
    plain = preference_report(SCORES, LENGTHS)
    sure = preference_report(SCORES, LENGTHS, probability=np.ones(4))
    assert sure.pop('label_ceiling') == 1
    assert sure['accuracy'] == plain['accuracy'] + 0.5 / 4
    for name in ('loss', 'length_baseline', 'pairs'):
        assert sure[name] == pytest.approx(plain[name], rel=1e-6)


def test_ties_count_in_the_loss_alone():
    tied = np.array([False, True, False, False])
    p = np.where(tied, 0.5, 1.0)
    report = preference_report(
        SCORES, LENGTHS, kinds=['a', 'b', 'a', 'b'], probability=p, tied=tied
    )
    assert report['pairs'] == 3 and report['ties'] == 0.25
    assert report['accuracy'] == pytest.approx(2 / 3)
    assert report['length_baseline'] == pytest.approx(2 / 3)
    losses = [
        np.log1p(np.exp(-1)),
        np.log(2),
        np.log1p(np.exp(3)),
        np.log1p(np.exp(-0.2)),
    ]
    assert report['loss'] == pytest.approx(np.mean(losses), abs=1e-6)
    assert [row['count'] for row in report['by_kind']] == [2, 1]
    assert sum(row['count'] for row in report['calibration']) == 3


def test_the_interval_of_fractions_goes_on_from_that_of_counts():
    low, high = proportion_interval(8.0000001, 10)
    assert proportion_interval(8, 10) == pytest.approx([low, high], abs=1e-6)
