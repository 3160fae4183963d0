"""``rm_step``: loss, centring, accuracy, weights, margins, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algos.rm import RMHParams, pair_scores, rm_loss, rm_step
from rlhf_jax.types import JudgedBatch, TrainState

# Scores by last token: 0 → 0, 1 → 1, 2 → 2.5, 3 → −1.
PARAMS = {
    'table': jnp.array([0.0, 1.0, 2.5, -1.0]),
    'backbone': {'layers': {}},
}


def _pairs(chosen, rejected, margin=None, weight=None):
    """Pairs whose texts end in the given tokens, behind which lies padding."""
    last = np.stack([chosen, rejected], 1)
    tokens = np.full((*last.shape, 3), 3, np.int32)
    tokens[..., 1] = last
    mask = np.broadcast_to([True, True, False], tokens.shape)
    zeros = np.zeros(len(last), np.float32)
    return JudgedBatch(
        tokens=tokens,
        mask=mask,
        margin=zeros if margin is None else np.array(margin, np.float32),
        weight=zeros + 1 if weight is None else np.array(weight, np.float32),
    )


def _softplus(x):
    return np.log1p(np.exp(x))


def _loss(model, batch, **hp):
    return rm_loss(PARAMS, batch, model=model, hp=RMHParams(**hp))


def test_loss_and_metrics_by_hand(token_scores):
    # Scores (1, 0), (−1, 2.5): differences 1 and −3.5.
    total, weight, metrics = _loss(token_scores, _pairs([1, 3], [0, 2]))
    assert float(weight) == 2
    assert float(total) == pytest.approx(_softplus(-1) + _softplus(3.5), rel=1e-6)
    value = {name: float(metric.value()) for name, metric in metrics.items()}
    assert value == pytest.approx(
        {
            'loss': (_softplus(-1) + _softplus(3.5)) / 2,
            'accuracy': 0.5,
            'score_chosen': 0.0,
            'score_rejected': 1.25,
            'score_gap': 2.25,
        },
        rel=1e-5,
    )


def test_an_equal_pair_costs_log_two_and_is_an_error(token_scores):
    total, _, metrics = _loss(token_scores, _pairs([2], [2]))
    assert float(total) == pytest.approx(np.log(2), rel=1e-6)
    assert float(metrics['accuracy'].value()) == 0


def test_a_margin_is_demanded_of_the_loss_and_not_of_the_accuracy(token_scores):
    total, _, metrics = _loss(token_scores, _pairs([1], [0], margin=[1.5]))
    assert float(total) == pytest.approx(_softplus(0.5), rel=1e-6)  # −log σ(1 − 1.5)
    assert float(metrics['accuracy'].value()) == 1


def test_centring_by_hand(token_scores):
    # c·(r_w + r_l)² = 0.1·(1 + 2.5)²; the reported loss stays the Bradley–Terry one.
    plain, _, _ = _loss(token_scores, _pairs([1], [2]))
    total, _, metrics = _loss(token_scores, _pairs([1], [2]), center_coef=0.1)
    assert float(total - plain) == pytest.approx(1.225, rel=1e-5)
    assert float(metrics['loss'].value()) == pytest.approx(float(plain), rel=1e-6)


def test_rows_of_weight_zero_count_nothing(token_scores):
    two = _loss(token_scores, _pairs([1, 3], [0, 2]), center_coef=0.1)
    filled = _pairs([1, 2, 3, 0], [0, 0, 2, 2], weight=[1, 0, 1, 0])
    four = _loss(token_scores, filled, center_coef=0.1)
    for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(four)):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_filling_row_without_a_token_is_harmless(
    reward_model, reward_params, pair_batch
):
    """In the real model: rows without any mask leave loss and gradient as they are."""
    assert pair_batch.weight[5] == 0
    empty = pair_batch.mask.copy()
    empty[5] = False
    hp = RMHParams(center_coef=0.01)
    grad = jax.jit(
        jax.value_and_grad(lambda p, b: rm_loss(p, b, model=reward_model, hp=hp)[0])
    )
    one = grad(reward_params, pair_batch)
    other = grad(reward_params, pair_batch.replace(mask=empty))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_scores_of_pairs_do_not_depend_on_padding(
    reward_model, reward_params, pair_batch
):
    """Neither on its side, nor on its ids, nor on the other text of the pair."""
    score = jax.jit(functools.partial(pair_scores, model=reward_model))
    base = score(reward_params, pair_batch)
    assert base.shape == (16, 2) and float(jnp.std(base)) > 0.1

    shift = 10 - pair_batch.mask.sum(-1)
    places = (np.arange(10) - shift[..., None]) % 10
    left = pair_batch.replace(
        tokens=np.take_along_axis(pair_batch.tokens, places, -1),
        mask=np.take_along_axis(pair_batch.mask, places, -1),
    )
    np.testing.assert_allclose(score(reward_params, left), base, atol=1e-5)
    dirty = pair_batch.replace(
        tokens=np.where(pair_batch.mask, pair_batch.tokens, 10**6)
    )
    np.testing.assert_array_equal(score(reward_params, dirty), base)
    swapped = jax.tree.map(lambda x: x[:, ::-1] if x.ndim == 3 else x, pair_batch)
    np.testing.assert_allclose(score(reward_params, swapped), base[:, ::-1], atol=1e-5)


def _state(tx):
    params = jax.tree.map(jnp.array, PARAMS)
    return TrainState(
        step=jnp.int32(0),
        rng=jax.random.PRNGKey(0),
        params=params,
        opt_state=tx.init(params),
    )


def test_one_step_by_hand(token_scores):
    """The gradient divides by the weights, not by the rows."""
    batch, tx = _pairs([1, 1, 3], [0, 2, 3], weight=[1, 0, 1]), optax.sgd(1.0)
    state, metrics = rm_step(
        _state(tx), batch, model=token_scores, tx=tx, hp=RMHParams()
    )
    # Pair one: −σ(−1)/2 on token 1 and + on token 0. Pair three is one text twice: 0.
    push = 1 / (1 + np.e) / 2
    np.testing.assert_allclose(
        state.params['table'], [-push, 1 + push, 2.5, -1], atol=1e-6
    )
    assert float(metrics['grad_norm'].value()) == pytest.approx(push * 2**0.5, rel=1e-5)
    assert int(state.step) == 1


def test_accumulation_equals_the_full_batch(token_scores):
    """The microbatches weigh 2, 1, 0 and 1 pairs."""
    tx = optax.sgd(1.0)
    batch = _pairs(
        [1, 2, 3, 0, 1, 2, 0, 3],
        [0, 0, 2, 2, 3, 1, 1, 0],
        margin=np.linspace(0, 1, 8),
        weight=[1, 1, 0, 1, 1, 0, 0, 0],
    )

    def run(parts):
        hp = RMHParams(num_microbatches=parts, center_coef=0.05)
        state, metrics = rm_step(_state(tx), batch, model=token_scores, tx=tx, hp=hp)
        return state.params, {name: metric.value() for name, metric in metrics.items()}

    for a, b in zip(jax.tree.leaves(run(1)), jax.tree.leaves(run(4))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_learning_separates_the_pairs(token_scores):
    batch, tx = _pairs([0, 3, 0], [1, 2, 2]), optax.adam(0.2)  # every pair starts wrong
    step = jax.jit(
        functools.partial(rm_step, model=token_scores, tx=tx, hp=RMHParams())
    )
    state, accuracies = _state(tx), []
    for _ in range(30):
        state, metrics = step(state, batch)
        accuracies.append(float(metrics['accuracy'].value()))
    assert accuracies[0] == 0 and accuracies[-1] == 1
    assert step._cache_size() == 1
