"""The Bradley–Terry loss by hand, at its identities and at extreme differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.reward_losses import bradley_terry


def nll(chosen, rejected, margin=0.0):
    """−log σ(r_w − r_l − m), [P] nats."""
    gap = chosen - rejected - margin
    return bradley_terry.loss(gap, jnp.zeros_like(gap, bool), bradley_terry.HParams())


def test_by_hand():
    chosen, rejected = jnp.array([1.5, -0.2, 0.3]), jnp.array([0.5, 0.4, 0.3])
    # −log σ(1) = 0.313262, −log σ(−0.6) = 1.037488, −log σ(0) = 0.693147.
    loss = nll(chosen, rejected)
    np.testing.assert_allclose(loss, [0.313262, 1.037488, 0.693147], atol=1e-6)
    assert float(loss.mean()) == pytest.approx(0.6812989395, abs=1e-6)
    # Margins 1, 2/3, 1/3 leave 0, −1.266667, −0.333333: 0.693147, 1.514908, 0.873639.
    loss = nll(chosen, rejected, jnp.array([1, 2 / 3, 1 / 3]))
    np.testing.assert_allclose(loss, [0.693147, 1.514908, 0.873639], atol=1e-6)
    assert float(loss.mean()) == pytest.approx(1.0272313786, abs=1e-6)


def test_equal_scores_cost_log_two():
    scores = jnp.array([0.0, 123.4, -5.0])
    np.testing.assert_allclose(nll(scores, scores), np.log(2), atol=1e-6)


def test_only_the_difference_counts():
    chosen, rejected = jnp.array([1.0]), jnp.array([0.25])
    shifted = nll(chosen + 8, rejected + 8)
    np.testing.assert_allclose(shifted, nll(chosen, rejected), atol=1e-6)


def test_extreme_differences_stay_finite():
    loss = nll(jnp.array([1e4, -1e4]), jnp.array([-1e4, 1e4]))
    np.testing.assert_allclose(loss, [0, 2e4])
    gradient = jax.grad(lambda r: nll(r, -r).sum())(jnp.array([1e4, -1e4]))
    np.testing.assert_allclose(gradient, [0, -2])


def test_gradient_by_hand():
    # d/dr_w −log σ(r_w − r_l) = −σ(r_l − r_w) = −σ(−1).
    gradient = jax.grad(lambda r: nll(r, jnp.float32(0)))(jnp.float32(1))
    assert float(gradient) == pytest.approx(-1 / (1 + np.e), rel=1e-6)
