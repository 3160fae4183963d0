"""Held-out loss: exact over batches of different weight."""

import functools

import jax
import numpy as np
import pytest

from rlhf_jax.evals.language_model import KINDS, batch_loss, evaluate_loss
from rlhf_jax.sharding import ParallelConfig, compile_step, make_mesh


def by_hand(table, batch):
    log_softmax = table - np.log(np.exp(table).sum(-1, keepdims=True))
    losses = [
        -log_softmax[batch.tokens[i, t - 1], batch.tokens[i, t]]
        for i, t in zip(*np.nonzero(batch.loss_mask))
    ]
    return np.sum(losses), len(losses)


@pytest.mark.parametrize('backend', ['jit', 'pmap'])
def test_the_mean_is_over_tokens_not_batches(bigram, token_batch, backend):
    table = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    light = token_batch.replace(
        loss_mask=token_batch.loss_mask & (np.arange(16) < 2)[:, None]
    )
    compiled = compile_step(
        functools.partial(batch_loss, model=bigram),
        mesh=make_mesh(ParallelConfig(backend=backend)),
        backend=backend,
        **KINDS,
    )
    result = evaluate_loss(compiled, {'table': table}, [token_batch, light])
    (a, n), (b, m) = by_hand(table, token_batch), by_hand(table, light)
    assert m < n
    assert result['tokens'] == n + m
    assert result['loss'] == pytest.approx((a + b) / (n + m), abs=1e-5)


def test_nothing_to_count_is_an_error(bigram, token_batch):
    compiled = jax.jit(functools.partial(batch_loss, model=bigram))
    params = {'table': np.zeros((64, 64), np.float32)}
    nothing = token_batch.replace(loss_mask=np.zeros_like(token_batch.loss_mask))
    for batches in ([], [nothing]):
        with pytest.raises(ValueError, match='no token that counts'):
            evaluate_loss(compiled, params, batches)
