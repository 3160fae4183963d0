"""Token log-probabilities against a slow reference, chunked and not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.logprobs import token_logprobs

B, T, D, V = 3, 8, 5, 7


@pytest.fixture(scope='module')
def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    unembedding = rng.normal(size=(D, V)).astype(np.float32)
    return hidden, unembedding, rng.integers(0, V, size=(B, T)).astype(np.int32)


def _slow(hidden, unembedding, tokens, temperature):
    logprobs, entropy = np.zeros((B, T)), np.zeros((B, T))
    for b in range(B):
        for t in range(1, T):
            logits = hidden[b, t - 1].astype(np.float64) @ unembedding / temperature
            p = np.exp(logits - logits.max())
            p /= p.sum()
            logprobs[b, t] = np.log(p[tokens[b, t]])
            entropy[b, t] = -(p * np.log(p)).sum()
    return logprobs, entropy


def test_two_tokens_by_hand():
    # The state of token 0 gives the logits (log 3, 0): p = (3/4, 1/4).
    hidden = jnp.array([[[np.log(3.0)], [99.0]]])
    unembedding, tokens = jnp.array([[1.0, 0.0]]), jnp.array([[1, 0]])
    logprobs, entropy = token_logprobs(hidden, unembedding, tokens)
    np.testing.assert_allclose(logprobs, [[0, np.log(0.75)]], atol=1e-6)
    expected = -0.75 * np.log(0.75) - 0.25 * np.log(0.25)
    np.testing.assert_allclose(entropy, [[0, expected]], atol=1e-6)
    # Temperature ½ doubles the logits: p = (9/10, 1/10).
    logprobs, _ = token_logprobs(hidden, unembedding, tokens, temperature=0.5)
    np.testing.assert_allclose(logprobs, [[0, np.log(0.9)]], atol=1e-6)


@pytest.mark.parametrize('temperature', [1.0, 0.7, 3.0])
@pytest.mark.parametrize('max_logits', [2**26, 1, 4 * B * V, 3 * B * V, 3 * B * V - 1])
def test_equals_the_slow_reference(inputs, temperature, max_logits):
    """In one block, one token at a time, in chunks that divide the tokens or not."""
    logprobs, entropy = token_logprobs(
        *inputs, temperature=temperature, max_logits=max_logits
    )
    expected = _slow(*inputs, temperature)
    np.testing.assert_allclose(logprobs, expected[0], atol=1e-5)
    np.testing.assert_allclose(entropy, expected[1], atol=1e-5)
    assert logprobs.dtype == entropy.dtype == jnp.float32


def test_chunks_have_the_gradient_of_the_whole(inputs):
    hidden, unembedding, tokens = inputs
    weights = np.random.default_rng(1).normal(size=(2, B, T))

    def total(h, w, max_logits):
        logprobs, entropy = token_logprobs(
            h, w, tokens, temperature=0.7, max_logits=max_logits
        )
        return jnp.sum(logprobs * weights[0] + entropy * weights[1])

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)
    whole, chunked = (
        gradient(hidden, unembedding, size) for size in (2**26, 3 * B * V)
    )
    for a, b in zip(whole, chunked):
        assert float(jnp.abs(a).max()) > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5)


def _sizes(jaxpr):
    """Entries of every array that a program makes, those inside its loops included."""
    for equation in jaxpr.eqns:
        yield from (out.aval.size for out in equation.outvars)
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, 'eqns')):
                inner = getattr(inner, 'jaxpr', inner)
                if hasattr(inner, 'eqns'):
                    yield from _sizes(inner)


@pytest.mark.parametrize('tokens_per_block', [1, 1.5, 2.4, 4, 5])
def test_no_block_of_logits_exceeds_its_bound(tokens_per_block):
    batch, length, width, vocabulary = 2, 8, 2, 1000
    bound = int(tokens_per_block * batch * vocabulary)
    program = jax.make_jaxpr(
        jax.grad(lambda h, w, t: token_logprobs(h, w, t, max_logits=bound)[0].sum())
    )(
        jnp.zeros((batch, length, width)),
        jnp.zeros((width, vocabulary)),
        jnp.zeros((batch, length), jnp.int32),
    )
    largest = max(_sizes(program.jaxpr))
    assert batch * vocabulary <= largest <= bound


def test_the_shift(inputs):
    """``logprobs[:, t]`` scores ``tokens[:, t]`` from the state at ``t − 1``."""
    hidden, unembedding, tokens = inputs
    base, _ = token_logprobs(hidden, unembedding, tokens)
    changed = tokens.copy()
    changed[:, 3] = (tokens[:, 3] + 1) % V
    moved = token_logprobs(hidden, unembedding, changed)[0] != base
    assert moved.any(0).tolist() == [False] * 3 + [True] + [False] * 4
    other = hidden.copy()
    other[:, 3] += 1
    moved = token_logprobs(other, unembedding, tokens)[0] != base
    assert moved.any(0).tolist() == [False] * 4 + [True] + [False] * 3
    assert np.all(base[:, 0] == 0)


def test_half_precision_states_give_float32_results(inputs):
    hidden, unembedding, tokens = inputs
    half, _ = token_logprobs(jnp.asarray(hidden, jnp.bfloat16), unembedding, tokens)
    full, _ = token_logprobs(hidden, unembedding, tokens)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.2)
