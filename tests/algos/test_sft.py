"""``sft_step``: the loss in NumPy, what counts, accumulation, learning."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algos.sft import SFTHParams, sft_loss, sft_step
from rlhf_jax.data import pipeline
from rlhf_jax.data.columns import Table
from rlhf_jax.data.examples import Counts, Dataset, TokenExample
from rlhf_jax.types import TokenBatch, TrainState

V = 6


def _batch(seed=0, rows=8, length=7):
    """Right-padded rows of different lengths; the first tokens of each are a prompt."""
    rng = np.random.default_rng(seed)
    lengths, prompts = rng.integers(2, length + 1, rows), rng.integers(1, 3, rows)
    place = np.arange(length)
    mask = place < lengths[:, None]
    return TokenBatch(
        tokens=rng.integers(0, V, (rows, length)).astype(np.int32),
        mask=mask,
        loss_mask=mask & (place >= prompts[:, None]),
    )


@pytest.fixture
def params():
    return {
        'table': jnp.asarray(np.random.default_rng(9).normal(size=(V, V)), jnp.float32)
    }


def _state(params, tx):
    params = jax.tree.map(jnp.array, params)
    return TrainState(
        step=jnp.int32(0),
        rng=jax.random.PRNGKey(0),
        params=params,
        opt_state=tx.init(params),
    )


def _slow(table, batch):
    """Sum of the loss, its tokens, and the gradient of the sum, one token at a time."""
    table = np.asarray(table, np.float64)
    total, count, gradient = 0.0, 0, np.zeros_like(table)
    for row in range(len(batch.tokens)):
        for t in range(1, batch.tokens.shape[1]):
            if batch.loss_mask[row, t]:
                before, token = batch.tokens[row, t - 1], batch.tokens[row, t]
                p = np.exp(table[before]) / np.exp(table[before]).sum()
                total, count = total - np.log(p[token]), count + 1
                gradient[before] += p
                gradient[before, token] -= 1
    return total, count, gradient


def test_three_tokens_by_hand(bigram):
    # Behind token 0 the logits are (log 3, 0): p = (3/4, 1/4). Behind token 1: ½ each.
    params = {'table': jnp.array([[np.log(3.0), 0.0], [0.0, 0.0]])}
    every = jnp.ones((1, 3), bool)
    batch = TokenBatch(tokens=jnp.array([[0, 1, 0]]), mask=every, loss_mask=every)
    total, weight, metrics = sft_loss(params, batch, model=bigram)
    # Position 0 has nothing before it: −log ¼ − log ½ over two tokens.
    assert float(weight) == 2
    assert float(total) == pytest.approx(np.log(8), abs=1e-6)
    assert float(metrics['loss'].value()) == pytest.approx(np.log(8) / 2, abs=1e-6)


def test_one_step_against_a_slow_loop(bigram, params):
    batch, tx = _batch(), optax.sgd(1.0)
    total, count, gradient = _slow(params['table'], batch)
    state, metrics = sft_step(
        _state(params, tx), batch, model=bigram, tx=tx, hp=SFTHParams()
    )
    assert float(metrics['loss'].value()) == pytest.approx(total / count, rel=1e-5)
    moved = np.asarray(params['table'] - state.params['table'])
    np.testing.assert_allclose(moved, gradient / count, atol=1e-5)
    norm = np.linalg.norm(gradient / count)
    assert float(metrics['grad_norm'].value()) == pytest.approx(norm, rel=1e-5)
    assert int(state.step) == 1


def test_a_prompt_token_costs_nothing(bigram, params):
    batch = _batch()
    prompt = batch.mask & ~batch.loss_mask
    prompt[:, 0] = False
    assert prompt.any()
    without, weight, _ = sft_loss(params, batch, model=bigram)
    everything = batch.replace(loss_mask=batch.mask)
    with_prompt, more, _ = sft_loss(params, everything, model=bigram)
    assert float(more - weight) == prompt.sum()
    assert float(with_prompt - without) > 0.5
    # A sequence without a response counts nothing, and a batch of them is no NaN.
    empty = batch.replace(loss_mask=np.zeros_like(batch.mask))
    tx = optax.sgd(1.0)
    state, metrics = sft_step(
        _state(params, tx), empty, model=bigram, tx=tx, hp=SFTHParams()
    )
    np.testing.assert_array_equal(state.params['table'], params['table'])
    assert np.isnan(metrics['loss'].value())


def test_a_token_behind_left_padding_is_not_predicted_from_it(bigram, params):
    """Left or right padding, one loss: the first real token has nothing before it."""
    tokens, real = (
        np.array([[1, 2, 3, 0, 0]], np.int32),
        np.array([[1, 1, 1, 0, 0]], bool),
    )
    right = TokenBatch(tokens=tokens, mask=real, loss_mask=real)
    left = jax.tree.map(lambda x: np.roll(x, 2, axis=1), right)
    one, other = (sft_loss(params, batch, model=bigram)[:2] for batch in (right, left))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert float(one[1]) == 2


def test_garbage_ids_in_padding_change_nothing(policy, policy_params, token_batch):
    """In the real model, value and gradient; even where padding is in the loss mask."""
    grad = jax.jit(jax.value_and_grad(lambda p, b: sft_loss(p, b, model=policy)[0]))
    clean = jax.tree.leaves(grad(policy_params, token_batch))
    for garbage in (63, -5, 10**6):
        dirty = token_batch.replace(
            tokens=np.where(token_batch.mask, token_batch.tokens, garbage),
            loss_mask=token_batch.loss_mask | ~token_batch.mask,
        )
        for a, b in zip(clean, jax.tree.leaves(grad(policy_params, dirty))):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_the_last_layer_for_responses_alone_changes_nothing(
    unrolled, policy_params, token_batch
):
    """Loss and gradient; and less is computed. The longest text has twelve tokens, of
    which six are in the loss.
    """
    loss = jax.value_and_grad(lambda p, b: sft_loss(p, b, model=unrolled)[0])
    short = token_batch.replace(response_length=6)
    programs = [
        jax.jit(loss).lower(policy_params, batch).compile()
        for batch in (token_batch, short)
    ]
    flops = [program.cost_analysis()['flops'] for program in programs]
    assert flops[1] < 0.9 * flops[0]
    values = zip(programs, (token_batch, short))
    whole, part = (program(policy_params, batch) for program, batch in values)
    assert float(whole[0]) > 0
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_response_length_that_does_not_reach_is_not_silent(
    policy, policy_params, token_batch
):
    def of(length):
        batch = token_batch.replace(response_length=length)
        return float(sft_loss(policy_params, batch, model=policy)[0])

    assert np.isfinite(of(6)) and np.isnan(of(5))
    packed = token_batch.replace(
        segments=np.zeros_like(token_batch.tokens), response_length=6
    )
    with pytest.raises(ValueError, match='response_length=6 with segments'):
        sft_loss(policy_params, packed, model=policy)


def test_accumulation_equals_the_full_batch(bigram, params):
    """Rows hold between one and six counted tokens: a mean of means would differ."""
    batch, tx = _batch(), optax.sgd(1.0)
    assert len(set(batch.loss_mask.sum(1).tolist())) > 3

    def run(parts):
        hp = SFTHParams(num_microbatches=parts)
        step = jax.jit(functools.partial(sft_step, model=bigram, tx=tx, hp=hp))
        state, metrics = step(_state(params, tx), batch)
        return state.params, {name: metric.value() for name, metric in metrics.items()}

    for a, b in zip(jax.tree.leaves(run(1)), jax.tree.leaves(run(4))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_microbatches_that_do_not_divide_are_an_error(bigram, params):
    tx = optax.sgd(1.0)
    hp = SFTHParams(num_microbatches=3)
    with pytest.raises(
        ValueError, match='8 rows .* num_microbatches=3; use a divisor of 8'
    ):
        sft_step(_state(params, tx), _batch(), model=bigram, tx=tx, hp=hp)


def test_a_memorised_batch(bigram, params):
    """Every step lowers the loss, down to what a bigram can know; one compilation."""
    batch, tx = _batch(), optax.adam(0.1)
    step = jax.jit(functools.partial(sft_step, model=bigram, tx=tx, hp=SFTHParams()))
    state, losses = _state(params, tx), []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics['loss'].value()))
    assert all(b < a for a, b in zip(losses[:20], losses[1:21]))
    # The optimum is the entropy of the counted pairs.
    counts = np.zeros((V, V))
    for row, t in zip(*np.nonzero(batch.loss_mask)):
        counts[batch.tokens[row, t - 1], batch.tokens[row, t]] += 1
    p = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    optimum = -(counts * np.log(np.where(p > 0, p, 1))).sum() / counts.sum()
    assert optimum <= losses[-1] < optimum + 0.2
    assert int(state.step) == 60
    assert step._cache_size() == 1


def test_a_length_within_a_bucket_compiles_nothing(policy, policy_params):
    """Two buckets are two programs, whatever the lengths of the rows of a batch."""
    rng = np.random.default_rng(5)
    sizes = [tuple(rng.integers(low, high, 2)) for low, high in [(1, 4), (4, 8)] * 12]
    examples = [
        TokenExample(rng.integers(0, V, p + r).astype(np.int32), np.arange(p + r) >= p)
        for p, r in sizes
    ]
    counts = Counts('rows', 'demonstrations', 16, 24, 24)
    data = Dataset(Table.of(examples), [None] * 24, counts)
    tx = optax.sgd(0.1)
    step = jax.jit(functools.partial(sft_step, model=policy, tx=tx, hp=SFTHParams()))
    state, shapes = _state(policy_params, tx), set()
    stream = pipeline.batches(data, 2, seed=0, buckets=(6, 16))
    for batch in itertools.islice(stream, 24):
        state, _ = step(state, batch)
        shapes.add((batch.mask.shape[1], tuple(batch.mask.sum(1))))
    assert len(shapes) > 6 and {bucket for bucket, _ in shapes} == {6, 16}
    assert step._cache_size() == 2
