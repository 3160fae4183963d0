"""Ensembles: the members' seeds, their batches side by side, one step by hand.

That every member is a run of its own, on any layout: ``tests/test_sharding.py``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algos.ensemble import (
    ensemble_rm_step,
    member_seed,
    over_members,
    stack_batches,
    stack_members,
)
from rlhf_jax.algos.rm import RMHParams, pair_scores
from rlhf_jax.types import JudgedBatch, TrainState


def _pair(chosen, rejected, length, margin=0.0, weight=1.0):
    """One pair; each text is one token, behind which lies padding of another id."""
    tokens = np.full((1, 2, length), 3, np.int32)
    tokens[..., 0] = chosen, rejected
    mask = np.zeros(tokens.shape, bool)
    mask[..., 0] = True
    one = np.ones(1, np.float32)
    return JudgedBatch(
        tokens=tokens, mask=mask, margin=margin * one, weight=weight * one
    )


def _state(tables, tx):
    params = stack_members(
        [{'table': jnp.array(table), 'backbone': {'layers': {}}} for table in tables]
    )
    return TrainState(
        step=jnp.int32(4),
        rng=jax.random.PRNGKey(0),
        params=params,
        opt_state=jax.vmap(tx.init)(params),
    )


def test_no_two_members_have_the_same_seed():
    seeds = [member_seed(seed, member) for seed in range(40) for member in range(10)]
    assert len(set(seeds)) == 400
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert member_seed(3, 2) == seeds[32]


def test_batches_side_by_side():
    both = stack_batches([_pair(0, 1, 2, margin=0.5), _pair(2, 3, 4, weight=0.0)])
    assert both.tokens.shape == both.mask.shape == (1, 2, 2, 4)
    np.testing.assert_array_equal(both.tokens[0, :, :, 0], [[0, 1], [2, 3]])
    assert both.mask.sum() == 4
    np.testing.assert_array_equal(both.margin, [[0.5, 0]])
    np.testing.assert_array_equal(both.weight, [[1, 0]])


def test_one_step_by_hand(token_scores):
    """Two members with a token's score each; the second sees the pair the other way."""
    tx = optax.sgd(1.0)
    state = _state([[0.0, 1.0, 0, 0], [0.0, 1.0, 5.0, 0]], tx)
    scores = over_members(lambda p, b: pair_scores(p, b, model=token_scores))
    np.testing.assert_allclose(scores(state.params, _pair(1, 2, 2)), [[[1, 0], [1, 5]]])
    batch = stack_batches([_pair(1, 0, 2), _pair(0, 1, 3)])
    state, metrics = ensemble_rm_step(
        state, batch, model=token_scores, tx=tx, hp=RMHParams()
    )
    # Differences 1 and −1: the pushes are σ(−1) = 0.2689 and σ(1) = 0.7311.
    expected = [[-0.2689414, 1.2689414, 0, 0], [0.7310586, 0.2689414, 5, 0]]
    np.testing.assert_allclose(state.params['table'], expected, atol=1e-6)
    assert int(state.step) == 5
    value = {name: float(metric.value()) for name, metric in metrics.items()}
    assert value['accuracy'] == 0.5
    # log(1 + e^−1) = 0.3132617 and log(1 + e) = 1.3132617
    assert value['loss'] == pytest.approx(0.8132617, rel=1e-6)


def test_a_member_without_rows_counts_nothing_in_the_metrics(token_scores):
    tx = optax.sgd(0.0)
    batch = stack_batches([_pair(1, 0, 2), _pair(0, 1, 2, weight=0.0)])
    _, metrics = ensemble_rm_step(
        _state([[0.0, 1.0, 0, 0]] * 2, tx),
        batch,
        model=token_scores,
        tx=tx,
        hp=RMHParams(),
    )
    assert float(metrics['accuracy'].value()) == 1
