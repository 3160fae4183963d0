"""Rewards, advantages and returns: by hand and against a slow loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.advantages import gae, token_rewards


def test_token_rewards_by_hand():
    kl = jnp.array([[9.0, 0.1, -0.5, 9.0], [0.2, 0.4, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    mask = jnp.array([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    rewards = token_rewards(jnp.array([2.0, -0.25, 7.0]), kl, mask, 0.05)
    # −0.05·0.1; −0.05·−0.5 + 2; −0.05·0.2; −0.05·0.4 − 0.25. The empty row gets none.
    expected = [[0, -0.005, 2.025, 0], [-0.01, -0.27, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(rewards, expected, atol=1e-6)
    assert rewards.dtype == jnp.float32


def test_gae_of_three_tokens_by_hand():
    rewards, values = jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[0.5, 1.0, 1.5]])
    # γ = 0.9, λ = 0.5. δ₃ = 2 − 1.5 = 0.5; δ₂ = 0 + 0.9·1.5 − 1 = 0.35;
    # δ₁ = 1 + 0.9·1 − 0.5 = 1.4. A₃ = 0.5; A₂ = 0.35 + 0.45·0.5 = 0.575;
    # A₁ = 1.4 + 0.45·0.575 = 1.65875. R = A + V.
    every = jnp.ones((1, 3), bool)
    advantages, returns = gae(rewards, values, every, gamma=0.9, lam=0.5)
    np.testing.assert_allclose(advantages, [[1.65875, 0.575, 0.5]], atol=1e-6)
    np.testing.assert_allclose(returns, [[2.15875, 1.575, 2.0]], atol=1e-6)


def test_gae_of_two_rows_by_hand():
    rewards = jnp.array([[-0.1, 0.2, 0, 1], [0.05, -0.3, 0.7, 0]])
    values = jnp.array([[0.5, 0.4, 0.3, 0.2], [0.1, 0.2, 0.3, 0]])
    # γ = 1, λ = 0.95, first row: δ = −0.2, 0.1, −0.1, 0.8;
    # A₄ = 0.8; A₃ = −0.1 + 0.76 = 0.66; A₂ = 0.1 + 0.627 = 0.727; A₁ = −0.2 + 0.69065.
    # Second row: δ = 0.15, −0.2, 0.4; A₃ = 0.4; A₂ = −0.2 + 0.38; A₁ = 0.15 + 0.171.
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    expected = np.array([[0.49065, 0.727, 0.66, 0.8], [0.321, 0.18, 0.4, 0]])
    np.testing.assert_allclose(advantages, expected, atol=1e-6)
    np.testing.assert_allclose(returns, expected + np.asarray(values), atol=1e-6)


def _case(seed, rows=12, length=9):
    rng = np.random.default_rng(seed)
    start = rng.integers(0, length, size=rows)
    stop = start + rng.integers(0, length + 1, size=rows)  # some rows are empty
    place = np.arange(length)
    mask = (place >= start[:, None]) & (place < stop[:, None])
    rewards, values = rng.normal(size=(2, rows, length)).astype(np.float32)
    return rewards, values, mask


def _slow_gae(rewards, values, mask, gamma, lam):
    advantages = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        places = np.flatnonzero(mask[row])
        next_value = next_advantage = 0.0
        for t in reversed(places):
            delta = rewards[row, t] + gamma * next_value - values[row, t]
            next_advantage = delta + gamma * lam * next_advantage
            next_value = values[row, t]
            advantages[row, t] = next_advantage
    return advantages, np.where(mask, advantages + values, 0)


@pytest.mark.parametrize(
    'gamma, lam', [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)]
)
def test_gae_against_a_slow_loop(gamma, lam):
    rewards, values, mask = _case(0)
    assert mask.any(1).sum() < len(mask) and mask.sum() > 20
    ours = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for a, b in zip(ours, _slow_gae(rewards, values, mask, gamma, lam)):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert a.dtype == jnp.float32


def test_lambda_one_is_return_minus_value_and_lambda_zero_the_one_step_error():
    rewards, values, mask = _case(1)
    rewards_here = np.where(mask, rewards, 0)
    to_go = np.flip(np.cumsum(np.flip(rewards_here, 1), 1), 1) * mask
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(advantages, np.where(mask, to_go - values, 0), atol=1e-5)
    np.testing.assert_allclose(returns, to_go, atol=1e-5)


@pytest.mark.parametrize('garbage', [np.nan, np.inf, 1e30])
def test_garbage_under_the_mask_changes_nothing(garbage):
    rewards, values, mask = _case(2)
    clean = gae(rewards, values, mask, gamma=0.9, lam=0.95)
    dirty = gae(
        np.where(mask, rewards, garbage),
        np.where(mask, values, garbage),
        mask,
        gamma=0.9,
        lam=0.95,
    )
    for a, b in zip(clean, dirty):
        np.testing.assert_array_equal(a, b)
    kl = np.where(mask, rewards, garbage).astype(np.float32)
    scores = jnp.ones(len(mask))
    np.testing.assert_array_equal(
        token_rewards(scores, kl, mask, 0.1), token_rewards(scores, rewards, mask, 0.1)
    )


def test_gae_compiles_once():
    compiled = jax.jit(gae, static_argnames=('gamma', 'lam'))
    for seed in (0, 1, 2):
        compiled(*_case(seed), gamma=1.0, lam=0.95)
    assert compiled._cache_size() == 1
