"""The losses and their gradients against PyTorch's autograd on random batches.

The formulas are written out once more in torch and float64, so that both the value and
the derivative that training uses are checked. ``test_trl_ppo.py`` has whole updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.logprobs import token_logprobs
from rlhf_jax.ops.policy_loss import (
    aggregate,
    clipped_policy_loss,
    clipped_value_loss,
)
from tests.reward_losses.test_bradley_terry import nll

torch = pytest.importorskip('torch')

pytestmark = pytest.mark.parity

SHAPE = (16, 12)


def _mask(rng: np.random.Generator) -> np.ndarray:
    """Responses of 0 to 12 tokens; the first row has none, the second all."""
    lengths = rng.integers(1, SHAPE[1], size=SHAPE[0])
    lengths[:2] = 0, SHAPE[1]
    return np.arange(SHAPE[1]) < lengths[:, None]


def _reduce(loss: Any, mask: Any, how: str) -> Any:
    """The three aggregations, in torch."""
    rows = mask.any(-1)
    if how == 'token_mean':
        return loss[mask].mean()
    sums = (loss * mask).sum(-1)[rows]
    if how == 'sequence_mean':
        sums = sums / mask.sum(-1)[rows]
    return sums.mean()


def _assert_same(
    ours: Callable[..., Any], theirs: Callable[..., Any], *inputs: np.ndarray
) -> None:
    """Compares a scalar function of float arrays, and its gradient for each of them."""
    inputs = [np.asarray(x, np.float32) for x in inputs]
    value, gradients = jax.value_and_grad(ours, argnums=range(len(inputs)))(*inputs)
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    expected = theirs(*tensors)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5, atol=1e-5)
    for gradient, tensor in zip(gradients, tensors):
        want = tensor.grad.numpy()
        assert np.any(want), 'the reference gradient is 0, which would show nothing'
        np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('how', ['token_mean', 'sequence_mean', 'sequence_sum'])
@pytest.mark.parametrize('dual_clip', [None, 1.5])
def test_clipped_policy_loss(how, dual_clip):
    rng = np.random.default_rng(0)
    mask = _mask(rng)
    old, advantages = rng.normal(-3, 1, SHAPE), rng.normal(0, 2, SHAPE)
    new = old + rng.normal(0, 0.5, SHAPE)  # ratios on both sides of both bounds

    def ours(logprobs):
        loss, _, _ = clipped_policy_loss(
            logprobs,
            jnp.float32(old),
            jnp.float32(advantages),
            clip_eps=0.2,
            dual_clip=dual_clip,
        )
        total, weight = aggregate(loss, jnp.asarray(mask), how)
        return total / weight

    def theirs(logprobs):
        a = torch.tensor(advantages)
        ratio = (logprobs - torch.tensor(old)).exp()
        surrogate = torch.minimum(a * ratio, a * ratio.clamp(0.8, 1.2))
        if dual_clip is not None:
            bounded = torch.maximum(surrogate, dual_clip * a)
            surrogate = torch.where(a < 0, bounded, surrogate)
        return _reduce(-surrogate, torch.tensor(mask), how)

    _assert_same(ours, theirs, new)


@pytest.mark.parametrize('clip_eps', [None, 0.2])
def test_clipped_value_loss(clip_eps):
    rng = np.random.default_rng(1)
    mask = _mask(rng)
    old, returns = rng.normal(0, 1, SHAPE), rng.normal(0, 1, SHAPE)
    new = old + rng.normal(0, 0.3, SHAPE)

    def ours(values, targets):
        loss, _ = clipped_value_loss(
            values, jnp.float32(old), targets, clip_eps=clip_eps
        )
        total, weight = aggregate(loss, jnp.asarray(mask), 'token_mean')
        return total / weight

    def theirs(values, targets):
        loss = (values - targets) ** 2
        if clip_eps is not None:
            before = torch.tensor(old)
            near = torch.clamp(values, before - clip_eps, before + clip_eps)
            loss = torch.maximum(loss, (near - targets) ** 2)
        return 0.5 * _reduce(loss, torch.tensor(mask), 'token_mean')

    _assert_same(ours, theirs, new, returns)


def test_bradley_terry_loss():
    rng = np.random.default_rng(2)
    chosen, rejected = rng.normal(0, 2, 32), rng.normal(0, 2, 32)
    margin = rng.uniform(0, 3, 32)
    chosen[:2] += 60, -60  # where a log of a sigmoid would be 0 and −∞

    def ours(chosen, rejected, margin):
        return jnp.mean(nll(chosen, rejected, margin))

    def theirs(chosen, rejected, margin):
        return -torch.nn.functional.logsigmoid(chosen - rejected - margin).mean()

    _assert_same(ours, theirs, chosen, rejected, margin)


@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('max_logits', [2**26, 16 * 50 * 3], ids=['whole', 'chunked'])
def test_token_logprobs_and_entropy(temperature, max_logits):
    rng = np.random.default_rng(3)
    mask = _mask(rng)
    mask[:, 0] = False  # the first token has no predecessor
    tokens = rng.integers(0, 50, SHAPE)
    hidden = rng.normal(0, 1, (*SHAPE, 8))
    unembedding = rng.normal(0, 0.5, (8, 50))
    weights = rng.normal(0, 1, SHAPE)  # another cotangent for every token

    def ours(hidden, unembedding):
        logprobs, entropy = token_logprobs(
            hidden,
            unembedding,
            jnp.asarray(tokens),
            temperature=temperature,
            max_logits=max_logits,
        )
        total = logprobs * jnp.float32(weights) + 0.1 * entropy
        return jnp.sum(total * mask) / mask.sum()

    def theirs(hidden, unembedding):
        logits = (hidden @ unembedding)[:, :-1] / temperature
        log_p = torch.log_softmax(logits, -1)
        chosen = log_p.gather(-1, torch.tensor(tokens)[:, 1:, None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        total = chosen * torch.tensor(weights)[:, 1:] + 0.1 * entropy
        counted = torch.tensor(mask)[:, 1:]
        return total[counted].sum() / counted.sum()

    _assert_same(ours, theirs, hidden, unembedding)


def test_a_value_in_range_is_not_reported_as_clipped():
    rng = np.random.default_rng(4)
    old, new, returns = rng.normal(0, 0.1, (3, 1000)).astype(np.float32)
    _, clipped = clipped_value_loss(new, old, returns, clip_eps=0.2)
    near = torch.clamp(*map(torch.tensor, (new, old - 0.2, old + 0.2)))
    want = (near - torch.tensor(returns)) ** 2 > torch.tensor((new - returns) ** 2)
    assert want.any()
    np.testing.assert_array_equal(clipped, want)
