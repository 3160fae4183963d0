"""KL estimators by hand and in expectation; the controller of the coefficient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.kl import adapt_kl_coef, kl_estimate, token_kl


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


# ------------------------------------------------------------------ over the vocabulary


def _two(seed=0, rows=3, length=6, widths=(4, 5), vocabulary=11):
    rng = np.random.default_rng(seed)
    hidden = [rng.normal(size=(rows, length, d)).astype(np.float32) for d in widths]
    heads = [rng.normal(size=(d, vocabulary)).astype(np.float32) for d in widths]
    return tuple(hidden), tuple(heads)


def _slow(hidden, heads, temperature=1.0, softcap=(None, None), num_tokens=None):
    logs = []
    for states, head, cap in zip(hidden, heads, softcap):
        logits = (states.astype(np.float64) @ head)[..., :num_tokens]
        logits = logits if cap is None else cap * np.tanh(logits / cap)
        logits = logits / temperature
        logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    return np.concatenate([np.zeros((len(kl), 1)), kl[:, :-1]], axis=1)


def test_the_kl_of_every_token_by_hand():
    # Logits (0, log 3) and (0, 0): p = (1/4, 3/4), q = (1/2, 1/2).
    states = jnp.ones((1, 2, 1))
    heads = jnp.array([[0.0, np.log(3)]]), jnp.array([[0.0, 0.0]])
    forward = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    reverse = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    both = states, states
    np.testing.assert_allclose(token_kl(both, heads), [[0, forward]], rtol=1e-6)
    np.testing.assert_allclose(token_kl(both, heads[::-1]), [[0, reverse]], rtol=1e-6)


@pytest.mark.parametrize(
    'how',
    [
        {},
        {'temperature': 0.7},
        {'softcap': (2.0, None)},
        {'num_tokens': 8},
        {'max_logits': 70},  # chunks of one token
        {'max_logits': 140, 'num_tokens': 8},  # of two
    ],
)
def test_the_kl_of_every_token_against_a_loop(how):
    hidden, heads = _two()
    slow = {k: v for k, v in how.items() if k != 'max_logits'}
    got = jax.jit(lambda h, w: token_kl(h, w, **how))(hidden, heads)
    np.testing.assert_allclose(got, _slow(hidden, heads, **slow), atol=2e-5)
    assert got.dtype == jnp.float32 and float(got[:, 1:].min()) > 0


def test_a_model_has_no_kl_from_itself_and_chunks_have_its_gradient():
    hidden, heads = _two()
    same = token_kl((hidden[0],) * 2, (heads[0],) * 2)
    np.testing.assert_array_equal(same, 0)

    def total(values, **how):
        return jnp.sum(token_kl(*values, **how) * jnp.arange(6))

    whole = jax.grad(total)((hidden, heads))
    parts = jax.grad(lambda values: total(values, max_logits=70))((hidden, heads))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts)):
        assert np.abs(a).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
