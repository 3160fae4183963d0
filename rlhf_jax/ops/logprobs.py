"""Log-probabilities of tokens: the one place where predictions are shifted against
tokens.

``logprobs[:, t]`` scores ``tokens[:, t]`` from the hidden state at ``t − 1``; position
0 is 0. Read ``ops/kl.py`` next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.ops import cpu
from rlhf_jax.ops.layout import batch_shards
from rlhf_jax.ops.linear import kernel_gradient, linear
from rlhf_jax.ops.memory import after
from rlhf_jax.types import Array

# The largest float32 block of logits that is built at once: 2²⁶ entries are 256 MiB.
# Larger products are cut along the tokens and recomputed in the backward pass.
MAX_LOGITS = 2**26
# The same for the blocks of a sum, which recompute nothing. Every block adds to the
# gradient of W, all of which is read and written for it: few tokens would not pay.
MAX_SUM_LOGITS, MIN_SUM_TOKENS = 2**27, 128
# The logit of an id that no tokenizer has: exp gives exactly 0, and unlike −∞ it has a
# product with 0.
NO_TOKEN = -1e9


def token_logprobs(
    hidden: Array,
    unembedding: Array,
    tokens: Array,
    *,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
    num_tokens: int | None = None,
    max_logits: int = MAX_LOGITS,
) -> tuple[Array, Array]:
    """Log-probability of every token given those before it, and the entropy at its
    place.

    logprobs[b, t] = log softmax(h[b, t−1]·W / τ)[tokens[b, t]];   position 0 holds 0.

    Args:
        hidden: [B, T, D] final hidden states.
        unembedding: [D, V].
        tokens: [B, T] int32.
        temperature: τ > 0, the sampling temperature: the policy *is* the tempered
            distribution in rollout, reference and training passes alike.
        softcap: c, for models whose logits are c·tanh(h·W / c); None for others.
        num_tokens: ids from here on have probability 0, in every function of this file
            and so in sampling and training alike; None for no such id, and then
            nothing is computed for it.
        max_logits: entries of the largest logits block of a device; above it the head
            runs in chunks of tokens, whose logits are recomputed in the backward pass.

    Returns:
        (logprobs [B, T], entropy [B, T]) float32, in nats.
    """
    how = (unembedding, temperature, softcap, num_tokens)
    logprobs, entropy = in_chunks(
        lambda states, targets: _score(states, targets, *how),
        (hidden[:, :-1], tokens[:, 1:]),
        unembedding.shape[-1],
        max_logits,
    )
    shift = ((0, 0), (1, 0))
    return jnp.pad(logprobs, shift), jnp.pad(entropy, shift)


def in_chunks(
    score: Callable[..., Any],
    rows: tuple[Array, ...],
    vocabulary: int,
    max_logits: int = MAX_LOGITS,
) -> Any:
    """``score(*rows)``, in chunks of tokens that are recomputed in the backward pass
    where its logits would be too large.

    Args:
        score: of arrays [B, S, …] to a pytree of them, place by place.
        rows: [B, S, …] each.
        vocabulary: V; ``score`` builds [B, S, V].
        max_logits: entries of the largest such block of a device.

    Returns:
        What ``score`` returns, [B, S, …].
    """
    batch, steps = rows[0].shape[:2]
    largest = _block_length(batch, vocabulary, max_logits)
    if steps <= largest:
        return score(*rows)
    one = jax.checkpoint(lambda chunk: score(*chunk))
    blocks = jax.lax.map(one, _cut(rows, largest))
    return jax.tree.map(lambda x: _joined(x, steps), blocks)


def logprob_sum(
    hidden: Array,
    unembedding: Array,
    tokens: Array,
    weights: Array,
    *,
    softcap: float | None = None,
    num_tokens: int | None = None,
    max_logits: int | None = None,
) -> Array:
    """Weighted sum of the log-probabilities that :func:`token_logprobs` gives at
    temperature 1, for a loss whose weights do not depend on them.

    S = Σ_bt w_bt·log softmax(h[b, t−1]·W)[tokens[b, t]]

    The gradient is taken together with the sum, block by block, so that no block of
    logits outlives its turn and none is computed twice.

    Source: the gradient inside the forward pass: Hsu et al. 2024 (Liger Kernel), arXiv
        2410.10989, §3.2.

    Args:
        hidden: [B, T, D] final hidden states.
        unembedding: [D, V].
        tokens: [B, T] int32.
        weights: [B, T] float32, constants; those at position 0 do not count, and where
            they are 0 the token may be any number.
        softcap: as in :func:`token_logprobs`.
        num_tokens: likewise.
        max_logits: entries of the largest block of logits of a device; None for what
            suits it.

    Returns:
        S [] float32, in nats.
    """
    batch, vocabulary = hidden.shape[0], unembedding.shape[-1]
    if max_logits is None:
        max_logits = cpu.MAX_SUM_LOGITS if cpu.is_target() else MAX_SUM_LOGITS
        max_logits = max(max_logits, MIN_SUM_TOKENS * vocabulary)
    largest = _block_length(batch, vocabulary, max_logits)
    rows = hidden[:, :-1], tokens[:, 1:], weights[:, 1:]
    return _sum_by_blocks(unembedding, rows, largest, softcap, num_tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _sum_by_blocks(
    unembedding: Array,
    rows: tuple[Array, Array, Array],
    largest: int,
    softcap: float | None,
    num_tokens: int | None,
) -> Array:
    """rows: states [B, S, D], their targets and weights [B, S]. Where no gradient is
    asked for, that of a block is dead code.
    """
    if rows[0].shape[1] <= largest:
        return _block_gradient(unembedding, rows, softcap, num_tokens)[0]

    def block_sum(block: tuple[Array, Array, Array]) -> Array:
        return _block_gradient(unembedding, block, softcap, num_tokens)[0]

    return jnp.sum(jax.lax.map(block_sum, _cut(rows, largest)))


def _sum_forward(
    unembedding: Array,
    rows: tuple[Array, Array, Array],
    largest: int,
    softcap: float | None,
    num_tokens: int | None,
) -> tuple[Array, tuple[Array, Array]]:
    steps = rows[0].shape[1]
    if steps <= largest:
        total, d_states, d_logits = _block_gradient(
            unembedding, rows, softcap, num_tokens
        )
        d_unembedding = kernel_gradient(_flat(rows[0]), d_logits)
        return total, (d_unembedding.astype(unembedding.dtype), d_states)

    def add(
        d_unembedding: Array, block: tuple[Array, Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        total, d_states, d_logits = _block_gradient(
            unembedding, block, softcap, num_tokens
        )
        d_unembedding = _add_gradient(d_unembedding, _flat(block[0]), d_logits)
        return d_unembedding, (total, d_states)

    d_unembedding, (totals, d_states) = jax.lax.scan(
        add, jnp.zeros_like(unembedding), _cut(rows, largest)
    )
    return jnp.sum(totals), (d_unembedding, _joined(d_states, steps))


def _block_gradient(
    unembedding: Array,
    rows: tuple[Array, Array, Array],
    softcap: float | None,
    num_tokens: int | None,
) -> tuple[Array, Array, Array]:
    """The sum over one block, and its gradients by the states [B, S, D] and by the
    logits before the soft cap [B·S, V].

    ∂S/∂logit_v = w·(1[v = target] − p_v)
    """
    states, targets, weights = rows[0], rows[1].reshape(-1, 1), rows[2].ravel()
    logits = logits_of(_flat(states), unembedding, softcap, num_tokens)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets, axis=-1)[:, 0]
    # A token that does not count may be one that the vocabulary does not have.
    logprobs = jnp.where(weights == 0, 0, chosen - log_z)
    # When these are read, the gradient can take the place of the logits in memory.
    log_z = after(log_z, logprobs)[:, None]
    is_target = targets == jnp.arange(logits.shape[1])
    d_logits = weights[:, None] * (is_target - jnp.exp(logits - log_z))
    if softcap is not None:
        d_logits *= 1 - jnp.square(logits / softcap)
    d_logits = d_logits.astype(states.dtype)
    kernel = unembedding.astype(states.dtype)
    d_states = jnp.einsum('nv,dv->nd', d_logits, kernel).reshape(states.shape)
    return jnp.sum(logprobs * weights), d_states, d_logits


@cpu.on_cpu(cpu.add_gradient)
def _add_gradient(total: Array, states: Array, d_logits: Array) -> Array:
    """total + statesᵀ·d_logits."""
    return total + kernel_gradient(states, d_logits).astype(total.dtype)


def _flat(states: Array) -> Array:
    return states.reshape(-1, states.shape[-1])


def _sum_backward(
    largest: int,
    softcap: float | None,
    num_tokens: int | None,
    saved: tuple[Array, Array],
    d_sum: Array,
) -> tuple[Array, tuple[Array, None, None]]:
    d_unembedding, d_states = (x * d_sum.astype(x.dtype) for x in saved)
    return d_unembedding, (d_states, None, None)


_sum_by_blocks.defvjp(_sum_forward, _sum_backward)


def _block_length(rows: int, vocabulary: int, max_logits: int) -> int:
    """Tokens of every row in the largest block; the bound is for each device."""
    return max(max_logits // (rows // batch_shards(rows) * vocabulary), 1)


def _cut(rows: tuple[Array, ...], largest: int) -> tuple[Array, ...]:
    """[B, S, …] → [blocks, B, size, …], filled up with zeros; sizes are as equal as can
    be, so that little is.
    """
    batch, steps = rows[0].shape[:2]
    size = -(-steps // -(-steps // largest))

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -steps % size)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    return tuple(map(cut, rows))


def _joined(blocks: Array, steps: int) -> Array:
    """[blocks, B, size, …] → [B, steps, …]."""
    rows = jnp.moveaxis(blocks, 0, 1)
    return rows.reshape(rows.shape[0], -1, *rows.shape[3:])[:, :steps]


def soft_cap(x: Array, cap: float | None) -> Array:
    """c·tanh(x / c); the identity for None. Source: Gemma 2, arXiv 2408.00118, §2."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def logits_of(
    states: Array,
    unembedding: Array,
    softcap: float | None,
    num_tokens: int | None = None,
) -> Array:
    """Logits [..., V] float32 of hidden states [..., D]; see :func:`token_logprobs`."""
    logits = linear(states, unembedding.astype(states.dtype), jnp.float32)
    return _of_tokens(soft_cap(logits, softcap), num_tokens)


def _of_tokens(logits: Array, num_tokens: int | None) -> Array:
    """Logits [..., V], less those of ids that the tokenizer does not have."""
    vocabulary = logits.shape[-1]
    if num_tokens is None or num_tokens >= vocabulary:
        return logits
    return jnp.where(jnp.arange(vocabulary) < num_tokens, logits, NO_TOKEN)


def logits_fn(
    unembedding: Array,
    softcap: float | None,
    rows: int,
    num_tokens: int | None = None,
) -> Callable[[Array], Array]:
    """:func:`logits_of` for a loop that reads the same matrix over and over.

    Args:
        unembedding: [D, V].
        softcap: as in :func:`token_logprobs`.
        rows: B of the states.
        num_tokens: as in :func:`token_logprobs`.

    Returns:
        A function of states [B, D] to logits [B, V] float32.
    """
    product = _repeated_product(unembedding, rows)
    return lambda states: _of_tokens(soft_cap(product(states), softcap), num_tokens)


@cpu.on_cpu(cpu.repeated_product)
def _repeated_product(unembedding: Array, rows: int) -> Callable[[Array], Array]:
    """states [rows, D] ↦ states·W [rows, V] float32."""
    return lambda states: linear(states, unembedding.astype(states.dtype), jnp.float32)


def _score(
    states: Array,
    targets: Array,
    unembedding: Array,
    temperature: Array | float,
    softcap: float | None,
    num_tokens: int | None,
) -> tuple[Array, Array]:
    logits = logits_of(states, unembedding, softcap, num_tokens) / temperature
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # H = log Z − Σ p·logit: needs no second array of log-probabilities.
    expected = jnp.sum(jnp.exp(logits - log_z[..., None]) * logits, axis=-1)
    return chosen - log_z, log_z - expected
