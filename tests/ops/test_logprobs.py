"""Token log-probabilities against a slow reference, chunked and not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import cpu
from rlhf_jax.ops.cpu import LARGE_VOCABULARY, ROWS_BY_TOKENS
from rlhf_jax.ops.logprobs import logits_fn, logits_of, logprob_sum, token_logprobs

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


def _weights():
    weights = np.random.default_rng(1).normal(size=(B, T)).astype(np.float32)
    weights[:, 0] = np.nan  # position 0 does not count
    return jnp.asarray(weights)


@pytest.fixture(params=['cpu', 'cuda'])
def platform(request, monkeypatch):
    """What is run on a GPU, too, here: gradients of W in one part, and barriers."""
    monkeypatch.setattr(cpu, 'platform', lambda: request.param)


@pytest.mark.parametrize('max_logits', [None, 2 * B * V])
def test_of_tokens_that_the_vocabulary_lacks_none_may_count(max_logits):
    """Their weight is 0, or sum and gradient are not finite and stop a run."""
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    unembedding = jnp.ones((D, V))
    for weight in (0, 1):
        tokens = jnp.ones((B, T), jnp.int32).at[0, 1].set(V)
        weights = jnp.ones((B, T)).at[0, 1].set(weight)

        def loss(hidden, tokens=tokens, weights=weights):
            how = {'max_logits': max_logits}
            return logprob_sum(hidden, unembedding, tokens, weights, **how)

        total, gradient = jax.value_and_grad(loss)(hidden)
        assert np.isfinite(total) == (weight == 0)
        assert np.isfinite(gradient).all() == (weight == 0)


@pytest.mark.parametrize('max_logits', [None, 2**26, 1, 4 * B * V, 3 * B * V])
@pytest.mark.parametrize('softcap', [None, 2.0])
@pytest.mark.parametrize('width', [D, 2 * cpu.PARTS])
def test_the_sum_and_its_gradient_are_those_of_the_tokens(
    width, max_logits, softcap, platform
):
    rng = np.random.default_rng(width - D)
    hidden = rng.normal(size=(B, T, width)).astype(np.float32)
    unembedding = rng.normal(size=(width, V)).astype(np.float32)
    tokens = rng.integers(0, V, size=(B, T)).astype(np.int32)
    weights = _weights()

    def whole(hidden, unembedding):
        logprobs, _ = token_logprobs(hidden, unembedding, tokens, softcap=softcap)
        return 0.3 * jnp.sum((logprobs * weights)[:, 1:])

    def by_blocks(hidden, unembedding):
        how = {'softcap': softcap, 'max_logits': max_logits}
        return 0.3 * logprob_sum(hidden, unembedding, tokens, weights, **how)

    expected, gradient = jax.value_and_grad(whole, (0, 1))(hidden, unembedding)
    total, others = jax.value_and_grad(by_blocks, (0, 1))(hidden, unembedding)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert total == pytest.approx(float(by_blocks(hidden, unembedding)), rel=1e-6)
    for mine, theirs in zip(others, gradient):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize('max_logits', [2**26, 3 * B * V])
@pytest.mark.parametrize('softcap', [None, 2.0])
def test_ids_without_a_token_are_as_if_they_were_not_there(inputs, max_logits, softcap):
    """Values and gradients are those of the columns before them alone."""
    hidden, unembedding, tokens = inputs
    known, weights = V - 2, _weights()
    tokens = np.minimum(tokens, known - 1)
    unembedding = unembedding.copy()
    unembedding[:, known:] += 30 * np.sign(hidden[0, 0])[:, None]  # most likely of all
    cut = {'softcap': softcap, 'max_logits': max_logits}
    masked = {**cut, 'num_tokens': known}

    def scored(hidden, unembedding, how):
        logprobs, entropy = token_logprobs(
            hidden, unembedding, tokens, temperature=0.7, **how
        )
        total = logprob_sum(hidden, unembedding, tokens, weights, **how)
        return total + jnp.sum(logprobs * weights + entropy), (logprobs, entropy)

    def run(unembedding, how):
        grad = jax.value_and_grad(lambda *x: scored(*x, how), (0, 1), has_aux=True)
        return grad(hidden, unembedding)

    (total, ours), gradients = run(unembedding, masked)
    (expected, theirs), wanted = run(unembedding[:, :known], cut)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(gradients[0], wanted[0], atol=1e-4)
    np.testing.assert_allclose(gradients[1][:, :known], wanted[1], atol=1e-4)
    assert not np.any(gradients[1][:, known:])


def test_no_block_of_the_sum_exceeds_its_bound(inputs):
    """In the compiled gradient there is no array of all logits, and none is computed
    twice: three products a block.
    """
    hidden, unembedding, tokens = inputs

    def loss(hidden, unembedding):
        weights = jnp.ones((B, T))
        how = {'max_logits': 2 * B * V}
        return logprob_sum(hidden, unembedding, tokens, weights, **how)

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, unembedding))
    assert f'f32[{2 * B},{V}]' in text
    for tokens in (T - 1, T):
        assert f'f32[{B},{tokens},{V}]' not in text
        assert f'f32[{B * tokens},{V}]' not in text
    assert text.count('dot_general[') == 3


def test_a_block_of_the_sum_is_held_once():
    """Its gradient takes the place of its logits, and a quarter of its product with the
    states, as large as a block here, is there at a time.
    """
    width, vocabulary, length = 64, 4096, 257
    hidden, unembedding = jnp.ones((2, length, width)), jnp.ones((width, vocabulary))
    tokens, weights = jnp.zeros((2, length), jnp.int32), jnp.ones((2, length))
    block = width * vocabulary

    def by_blocks(hidden, unembedding):
        how = {'max_logits': block}
        return logprob_sum(hidden, unembedding, tokens, weights, **how)

    def recomputed(hidden, unembedding):
        how = {'max_logits': block}
        return jnp.sum(token_logprobs(hidden, unembedding, tokens, **how)[0])

    def blocks(loss):
        gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
        compiled = gradient.lower(hidden, unembedding).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * block)

    # The states are 0.13 of a block, and so is their gradient.
    assert 1.25 < blocks(by_blocks) < 1.6
    assert blocks(recomputed) > 2


def test_the_gradient_of_half_precision_states(inputs):
    """Products of rounded factors; by the matrix in its own dtype."""
    hidden, unembedding, tokens = inputs
    weights = jnp.asarray(_weights()).at[:, 0].set(0)
    half = jnp.asarray(hidden, jnp.bfloat16)

    def gradient(hidden, max_logits):
        def loss(hidden, unembedding):
            how = {'max_logits': max_logits}
            return logprob_sum(hidden, unembedding, tokens, weights, **how)

        return jax.grad(loss, (0, 1))(hidden, unembedding)

    for max_logits in (None, 2 * B * V):
        d_hidden, d_unembedding = gradient(half, max_logits)
        assert (d_hidden.dtype, d_unembedding.dtype) == (jnp.bfloat16, jnp.float32)
        full = gradient(jnp.asarray(half, jnp.float32), max_logits)
        for mine, theirs in zip((d_hidden, d_unembedding), full):
            np.testing.assert_allclose(mine, theirs, atol=0.1)
            assert np.abs(theirs).max() > 1


def test_large_vocabularies_are_summed_by_blocks_by_default():
    hidden, unembedding = jnp.zeros((8, 129, 2)), jnp.zeros((2, 32_768))
    tokens, weights = jnp.zeros((8, 129), jnp.int32), jnp.ones((8, 129))
    gradient = jax.grad(lambda h: logprob_sum(h, unembedding, tokens, weights))
    text = str(jax.make_jaxpr(gradient)(hidden))
    assert 'f32[256,32768]' in text  # 2²³ entries
    assert 'f32[8,128,32768]' not in text and 'f32[1024,32768]' not in text


@pytest.mark.parametrize(
    ('width', 'spec'), [(D, jax.P()), (8, jax.P()), (8, jax.P('data'))]
)
def test_the_sum_by_blocks_over_devices(width, spec):
    """Rows apart on all devices, W on each or apart too: its gradient is that of all
    rows.
    """
    rng = np.random.default_rng(2)
    rows = 2 * jax.device_count()
    hidden = rng.normal(size=(rows, T, width)).astype(np.float32)
    unembedding = rng.normal(size=(width, V)).astype(np.float32)
    tokens = rng.integers(0, V, size=(rows, T)).astype(np.int32)
    weights = rng.normal(size=(rows, T)).astype(np.float32)

    def gradient(*arrays):
        def total(hidden, unembedding):
            how = {'max_logits': 3 * rows * V}
            return logprob_sum(hidden, unembedding, *arrays[2:], **how)

        return jax.grad(total, (0, 1))(*arrays[:2])

    alone = jax.jit(gradient)(hidden, unembedding, tokens, weights)
    mesh = jax.make_mesh((jax.device_count(),), ('data',))
    apart = jax.NamedSharding(mesh, jax.P('data'))
    matrix = jax.NamedSharding(mesh, spec)
    places = (apart, matrix, apart, apart)
    spread = jax.jit(gradient, in_shardings=places, out_shardings=(apart, matrix))
    for mine, theirs in zip(spread(hidden, unembedding, tokens, weights), alone):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_a_block_is_bounded_for_each_device():
    """Of rows that lie on eight devices a block has eight times as many tokens."""
    rows, vocabulary = 2 * jax.device_count(), 32_768
    hidden, unembedding = jnp.zeros((rows, 257, 2)), jnp.zeros((2, vocabulary))
    tokens, weights = jnp.zeros((rows, 257), jnp.int32), jnp.ones((rows, 257))
    gradient = jax.grad(lambda h: logprob_sum(h, unembedding, tokens, weights))
    mesh = jax.make_mesh((jax.device_count(), 1), ('data', 'fsdp'))
    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(gradient)(hidden))
    assert f'f32[{rows * 128},{vocabulary}]' in text  # 2²³ entries of two rows
    assert f'f32[{rows * 16},{vocabulary}]' in str(jax.make_jaxpr(gradient)(hidden))


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('softcap', [None, 2.0])
@pytest.mark.parametrize(
    ('rows', 'vocabulary', 'by_tokens'),
    [
        (1, LARGE_VOCABULARY, False),
        (2, LARGE_VOCABULARY, True),
        (ROWS_BY_TOKENS, LARGE_VOCABULARY, True),
        (ROWS_BY_TOKENS + 1, LARGE_VOCABULARY, False),
        (2, LARGE_VOCABULARY - 1, False),
    ],
)
def test_a_loop_reads_a_large_vocabulary_by_its_tokens(
    rows, vocabulary, by_tokens, softcap, tied
):
    """The same logits; in the compiled loop the first factor is [V, D]."""
    keys = jax.random.split(jax.random.PRNGKey(0))
    states = jax.random.normal(keys[0], (rows, D))
    shape = (vocabulary, D) if tied else (D, vocabulary)
    stored = jax.random.normal(keys[1], shape)

    def loop(states, stored):
        head = logits_fn(stored.T if tied else stored, softcap, rows, vocabulary - 3)

        def again(i, logits):
            return head(states + 0.01 * logits[:, :1])

        return jax.lax.fori_loop(0, 3, again, jnp.zeros((rows, vocabulary)))

    unembedding, expected = stored.T if tied else stored, jnp.zeros((rows, 1))
    for _ in range(3):
        states_now = states + 0.01 * expected[:, :1]
        expected = logits_of(states_now, unembedding, softcap, vocabulary - 3)
    assert np.all(expected[:, -3:] < -1e8) and np.all(expected[:, :-3] > -1e3)
    compiled = jax.jit(loop).lower(states, stored).compile()
    logits = compiled(states, stored)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    products = [line for line in compiled.as_text().splitlines() if ' dot(' in line]
    by_rows = f'f32[{vocabulary},{rows}]'
    assert any(by_rows in line for line in products) == by_tokens


def test_half_precision_states_give_float32_logits_in_a_loop():
    states = jnp.asarray([[1.0, 2.0**-9]] * 2, jnp.bfloat16)
    unembedding = jnp.ones((2, LARGE_VOCABULARY))
    # 1 + 2⁻⁹ needs 10 bits, of which bfloat16 has 8.
    assert np.asarray(logits_fn(unembedding, None, 2)(states) == 1 + 2**-9).all()
