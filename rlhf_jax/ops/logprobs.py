"""Log-probabilities of tokens: the one place where predictions are shifted against
tokens.

``logprobs[:, t]`` scores ``tokens[:, t]`` from the hidden state at ``t − 1``; position
0 is 0. Read ``ops/kl.py`` next.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.ops.linear import linear
from rlhf_jax.types import Array

# The largest float32 block of logits that is built at once: 2²⁶ entries are 256 MiB.
# Larger products are cut along the tokens and recomputed in the backward pass.
MAX_LOGITS = 2**26


def token_logprobs(
    hidden: Array,
    unembedding: Array,
    tokens: Array,
    *,
    temperature: Array | float = 1.0,
    softcap: float | None = None,
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
        max_logits: entries of the largest logits block; above it the head runs in
            chunks of tokens, whose logits are recomputed in the backward pass.

    Returns:
        (logprobs [B, T], entropy [B, T]) float32, in nats.
    """
    batch, length, _ = hidden.shape
    states, targets = hidden[:, :-1], tokens[:, 1:]
    steps = length - 1
    largest = max(max_logits // (batch * unembedding.shape[-1]), 1)  # tokens in a block
    chunks = -(-steps // largest)
    if chunks <= 1:
        logprobs, entropy = _score(states, targets, unembedding, temperature, softcap)
    else:
        size = -(-steps // chunks)  # the blocks are about equal, so little is padded
        pad = -steps % size
        states = jnp.pad(states, ((0, 0), (0, pad), (0, 0)))
        targets = jnp.pad(targets, ((0, 0), (0, pad)))
        states = jnp.moveaxis(states.reshape(batch, -1, size, states.shape[-1]), 1, 0)
        targets = jnp.moveaxis(targets.reshape(batch, -1, size), 1, 0)
        score = jax.checkpoint(
            lambda chunk: _score(*chunk, unembedding, temperature, softcap)
        )
        logprobs, entropy = jax.tree.map(
            lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :steps],
            jax.lax.map(score, (states, targets)),
        )
    shift = ((0, 0), (1, 0))
    return jnp.pad(logprobs, shift), jnp.pad(entropy, shift)


def soft_cap(x: Array, cap: float | None) -> Array:
    """c·tanh(x / c); the identity for None. Source: Gemma 2, arXiv 2408.00118, §2."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def logits_of(states: Array, unembedding: Array, softcap: float | None) -> Array:
    """Logits [..., V] float32 of hidden states [..., D]; see :func:`token_logprobs`."""
    logits = linear(states, unembedding.astype(states.dtype), jnp.float32)
    return soft_cap(logits, softcap)


def _score(
    states: Array,
    targets: Array,
    unembedding: Array,
    temperature: Array | float,
    softcap: float | None,
) -> tuple[Array, Array]:
    logits = logits_of(states, unembedding, softcap) / temperature
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # H = log Z − Σ p·logit: needs no second array of log-probabilities.
    expected = jnp.sum(jnp.exp(logits - log_z[..., None]) * logits, axis=-1)
    return chosen - log_z, log_z - expected
