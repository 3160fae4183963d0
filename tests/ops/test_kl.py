"""KL estimators by hand and in expectation; the controller of the coefficient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.kl import adapt_kl_coef, kl_estimate


def test_by_hand():
    logprobs = jnp.array([[-1.0, -0.5, -2.0]])
    ref_logprobs = jnp.array([[-1.1, -0.6, -1.5]])
    # d = 0.1, 0.1, −0.5.
    k1, k2, k3 = (
        kl_estimate(logprobs, ref_logprobs, kind) for kind in ('k1', 'k2', 'k3')
    )
    np.testing.assert_allclose(k1, [[0.1, 0.1, -0.5]], atol=1e-6)
    np.testing.assert_allclose(k2, [[0.005, 0.005, 0.125]], atol=1e-6)
    # e^−0.1 − 1 + 0.1 = 0.904837418 − 0.9; e^0.5 − 1 − 0.5 = 1.6487212707 − 1.5.
    np.testing.assert_allclose(
        k3, [[0.004837418, 0.004837418, 0.1487212707]], atol=1e-6
    )


@pytest.mark.parametrize('kind', ['k1', 'k2', 'k3'])
def test_a_policy_has_no_distance_from_itself(kind):
    logprobs = jnp.array([[-3.0, -0.1, -70.0]])
    assert kl_estimate(logprobs, logprobs, kind).tolist() == [[0, 0, 0]]


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    """The expectation over the vocabulary, Σ_v π(v)·k(v), against KL(π ‖ π_ref)."""
    rng = np.random.default_rng(0)
    logprobs = jax.nn.log_softmax(rng.normal(size=9).astype(np.float32))
    ref_logprobs = jax.nn.log_softmax(rng.normal(size=9).astype(np.float32))
    p = np.exp(logprobs)
    exact = float((p * (logprobs - ref_logprobs)).sum())
    assert exact > 0.1
    mean = {
        kind: float((p * kl_estimate(logprobs, ref_logprobs, kind)).sum())
        for kind in ('k1', 'k2', 'k3')
    }
    assert mean['k1'] == pytest.approx(exact, abs=1e-6)
    assert mean['k3'] == pytest.approx(exact, abs=1e-6)
    assert abs(mean['k2'] - exact) > 1e-3
    assert np.all(kl_estimate(logprobs, ref_logprobs, 'k3') >= 0)


def test_an_unknown_estimator_names_the_known_ones():
    with pytest.raises(ValueError, match="'k9' is unknown; use 'k1', 'k2' or 'k3'"):
        kl_estimate(jnp.zeros((1, 1)), jnp.zeros((1, 1)), 'k9')


@pytest.mark.parametrize(
    'kl, factor',
    [
        (0.0, 1 - 0.2 * 0.0512),  # error −1, clipped to −0.2; n/horizon = 512/10,000
        (6.0, 1.0),  # on target
        (6.5, 1 + 0.5 / 6 * 0.0512),  # error 1/12, inside the clip
        (20.0, 1 + 0.2 * 0.0512),
    ],
)
def test_the_coefficient_moves_by_hand(kl, factor):
    moved = adapt_kl_coef(
        jnp.float32(0.15),
        jnp.float32(kl),
        target=6.0,
        horizon=10_000.0,
        num_episodes=512,
    )
    assert float(moved) == pytest.approx(0.15 * factor, rel=1e-6)
