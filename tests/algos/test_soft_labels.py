"""Soft labels of comparisons, by hand: p·ℓ + (1 − p)·ℓ swapped, for every loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import preference, reward_losses
from rlhf_jax.algos.preference import batch_logps, check_batch, preference_loss
from rlhf_jax.algos.rm import RMHParams, rm_loss
from rlhf_jax.algos.soft_labels import (
    expected_agreement,
    expected_preference_loss,
    expected_reward_loss,
)
from rlhf_jax.preference import aot, dpo, ipo, sppo
from rlhf_jax.reward_losses import bradley_terry
from tests.algos.test_preference import PARAMS, REF, ROWS, _pairs
from tests.algos.test_rm import PARAMS as SCORES
from tests.algos.test_rm import _pairs as scored
from tests.preference.test_losses import PAIRWISE
from tests.preference.test_losses import _pairs as two_pairs

SWAPPABLE = [name for name in PAIRWISE if name != 'aot']
ON_PAIRS = ['bradley_terry', 'davidson', 'rao_kupper', 'robust']


def softplus(x):
    return np.log1p(np.exp(x))


def swap(pairs):
    names = 'logps ref_logps shared_logps ref_shared_logps lengths tokens'.split()
    return pairs.replace(
        **{
            name: jax.tree.map(lambda x: x[:, ::-1], getattr(pairs, name))
            for name in names
        }
    )


# ---------------------------------------------------------------------- reward models


def soft(batch, p, tied=None):
    tied = None if tied is None else np.asarray(tied)
    return batch.replace(probability=np.asarray(p, np.float32), tied=tied)


def rm(model, batch, loss=bradley_terry, loss_hp=None, **hp):
    how = dict(model=model, hp=RMHParams(**hp), loss=loss, loss_hp=loss_hp)
    total, weight, metrics = rm_loss(SCORES, batch, **how)
    return (
        float(total),
        float(weight),
        {k: float(m.value()) for k, m in metrics.items()},
    )


def test_the_cross_entropy_by_hand(token_scores):
    # Scores (1, 0) and (−1, 2.5): differences 1 and −3.5.
    batch = soft(scored([1, 3], [0, 2]), [0.75, 0.25])
    total, weight, metrics = rm(token_scores, batch)
    by_hand = 0.75 * softplus(-1) + 0.25 * softplus(1)
    by_hand += 0.25 * softplus(3.5) + 0.75 * softplus(-3.5)
    assert total == pytest.approx(by_hand, rel=1e-6) and weight == 2
    # The first agrees with 0.75 of its labels, the second with 1 − 0.25.
    assert metrics['accuracy'] == pytest.approx(0.75)


def test_agreement_of_equal_scores_is_a_half():
    got = expected_agreement(jnp.array([2.0, -2.0, 0.0]), jnp.array([0.9, 0.9, 0.9]))
    np.testing.assert_allclose(got, [0.9, 0.1, 0.5], rtol=1e-6)


def test_certain_labels_are_those_of_no_field_bit_by_bit(token_scores):
    batch = scored([1, 3, 2], [0, 2, 2], margin=[0.5, 0, 1])
    grad = jax.value_and_grad(
        lambda table, batch: rm_loss(
            {**SCORES, 'table': table}, batch, model=token_scores, hp=RMHParams()
        )[0]
    )
    one, other = (grad(SCORES['table'], b) for b in (batch, soft(batch, [1, 1, 1])))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_array_equal(a, b)


def test_probability_zero_is_the_swapped_record(token_scores):
    one = rm(token_scores, soft(scored([1, 3], [0, 2], margin=[0.5, 2]), [0, 0]))
    other = rm(token_scores, scored([0, 2], [1, 3], margin=[-0.5, -2]))
    assert one[0] == other[0] and one[2]['accuracy'] == other[2]['accuracy'] == 0.5


def test_label_smoothing_is_the_constant_case(token_scores):
    batch = scored([1, 3], [0, 2], margin=[0.5, 0])
    smoothed = rm(
        token_scores, batch, loss_hp=bradley_terry.HParams(label_smoothing=0.2)
    )
    assert rm(token_scores, soft(batch, [0.8, 0.8]))[0] == pytest.approx(
        smoothed[0], rel=1e-6
    )


@pytest.mark.parametrize('name', ON_PAIRS)
def test_a_tie_is_the_tie_of_the_loss_and_has_no_margin(token_scores, name):
    loss = reward_losses.load(name, 'loss')
    batch = scored([1, 3], [0, 2], margin=[0.5, 0])
    total, _, metrics = rm(token_scores, soft(batch, [0.5, 1], [True, False]), loss)
    gaps, tied = jnp.array([1.0, -3.5]), jnp.array([True, False])
    by_hand = float(jnp.sum(loss.loss(gaps, tied, loss.HParams())))
    assert total == pytest.approx(by_hand, rel=1e-6)
    assert metrics['accuracy'] == 0  # of the second pair alone
    ranked = batch.replace(
        labels=np.array([[[1], [1]], [[1], [2]]], np.float32),
        judged=np.ones((2, 2, 1), bool),
    )
    assert rm(token_scores, ranked, loss)[0] == pytest.approx(total, rel=1e-6)


def test_an_overflow_of_the_other_order_does_not_reach_a_certain_label():
    class Steep:
        @staticmethod
        def loss(gap, tied, hp):
            return jnp.exp(-gap)

    def total(gap, p):
        tied = jnp.zeros_like(gap, bool)
        return jnp.sum(expected_reward_loss(gap, tied, p, Steep, None))

    gap, p = jnp.array([100.0, -100.0]), jnp.array([1.0, 0.0])
    value, gradient = jax.value_and_grad(total)(gap, p)
    assert value == pytest.approx(2 * np.exp(-100), abs=1e-30)
    assert np.isfinite(gradient).all()


# ------------------------------------------------------------------ preference losses


@pytest.mark.parametrize('name', SWAPPABLE)
def test_every_loss_is_its_expectation(name):
    loss, pairs = preference.load(name, 'name'), two_pairs()
    hp = loss.HParams()
    one, rewards = loss.loss(pairs, hp)
    other, _ = loss.loss(swap(pairs), hp)
    p = jnp.array([0.75, 0.5])
    got, got_rewards = expected_preference_loss(pairs, p, loss, hp)
    np.testing.assert_allclose(got, p * one + (1 - p) * other, rtol=1e-6)
    np.testing.assert_allclose(got_rewards, rewards, rtol=1e-6)


@pytest.mark.parametrize('name', SWAPPABLE)
def test_every_loss_is_exact_at_one_and_zero(name):
    loss, pairs = preference.load(name, 'name'), two_pairs()
    hp = loss.HParams()
    one, rewards = loss.loss(pairs, hp)
    got, got_rewards = expected_preference_loss(pairs, jnp.ones(2), loss, hp)
    np.testing.assert_array_equal(got, one)
    np.testing.assert_array_equal(got_rewards, rewards)
    other, _ = loss.loss(swap(pairs), hp)
    got, got_rewards = expected_preference_loss(pairs, jnp.zeros(2), loss, hp)
    np.testing.assert_array_equal(got, other)
    np.testing.assert_allclose(got_rewards, rewards, rtol=1e-6)


def test_dpo_is_the_cross_entropy_and_smoothing_its_constant_case():
    # Margins u = (0.2, −0.05), see test_losses.py.
    got, _ = expected_preference_loss(
        two_pairs(), jnp.array([0.75, 0.5]), dpo, dpo.HParams()
    )
    by_hand = [
        0.75 * softplus(-0.2) + 0.25 * softplus(0.2),
        0.5 * softplus(0.05) + 0.5 * softplus(-0.05),
    ]
    np.testing.assert_allclose(got, by_hand, rtol=1e-6)
    smoothed, _ = dpo.loss(two_pairs(), dpo.HParams(label_smoothing=0.3))
    got, _ = expected_preference_loss(two_pairs(), jnp.full(2, 0.7), dpo, dpo.HParams())
    np.testing.assert_allclose(got, smoothed, rtol=1e-6)


@pytest.mark.parametrize('loss', [ipo, sppo])
def test_regressions_aim_at_the_expected_target(loss):
    """(2p − 1)/(2β): of the difference for IPO, of each log-ratio for SPPO."""
    hp, p = loss.HParams(beta=0.1), jnp.array([0.8])

    def total(d):
        zeros = jnp.zeros((1, 2))
        pairs = two_pairs().replace(
            logps=d[None], ref_logps=zeros, weight=jnp.ones(1), tokens=None,
            shared_logps=zeros, ref_shared_logps=zeros, lengths=zeros + 1,
        )  # fmt: skip
        return expected_preference_loss(pairs, p, loss, hp)[0][0]

    target = 0.6 / (2 * 0.1)  # 3
    aim = jnp.array([target, 0.0] if loss is ipo else [target, -target])
    np.testing.assert_allclose(jax.grad(total)(aim), 0, atol=1e-5)


def test_an_overflow_of_the_other_order_does_not_reach_a_certain_pair():
    class Steep:
        @staticmethod
        def loss(pairs, hp):
            return jnp.exp(pairs.logps[:, 1] - pairs.logps[:, 0]), pairs.logps

    def total(logps):
        pairs, p = two_pairs().replace(logps=logps), jnp.array([1.0, 0.0])
        return jnp.sum(expected_preference_loss(pairs, p, Steep, None)[0])

    value, gradient = jax.value_and_grad(total)(jnp.array([[0.0, -100], [-100, 0]]))
    assert value == pytest.approx(2 * np.exp(-100), abs=1e-30)
    assert np.isfinite(gradient).all()


def test_the_step_weighs_and_counts_by_probability(bigram):
    batch, how = _pairs(bigram), dict(model=bigram, loss=dpo, loss_hp=dpo.HParams())
    plain = preference_loss(PARAMS, batch, {}, **how)
    sure = preference_loss(PARAMS, soft(batch, np.ones(ROWS)), {}, **how)
    assert plain[0] == sure[0]
    p = np.linspace(0, 1, ROWS)
    total, _, metrics = preference_loss(PARAMS, soft(batch, p), {}, **how)
    gap = 0.1 * np.subtract(*(np.asarray(x) for x in _log_ratios(batch, bigram).T))
    by_hand = p * softplus(-gap) + (1 - p) * softplus(gap)
    assert total == pytest.approx((by_hand * batch.weight).sum(), rel=1e-5)
    agrees = np.where(gap > 0, p, 1 - p)
    assert float(metrics['rewards/accuracies'].value()) == pytest.approx(
        (agrees * batch.weight).sum() / batch.weight.sum(), rel=1e-5
    )


def _log_ratios(batch, model):
    return batch_logps(PARAMS, batch, model=model).log_ratios


def test_a_loss_whose_rows_depend_on_each_other_refuses(bigram):
    batch = soft(_pairs(bigram), np.full(ROWS, 0.9))
    with pytest.raises(ValueError, match='aot compares the pairs of a batch'):
        check_batch(aot, batch, REF)
