"""Sampling: prefill, then one compiled ``while_loop`` over a KV cache.

Temperature, top-k, top-p, the EOS ids and the stop sequences are *traced* values:
changing them compiles nothing. Every row has a key of its own, so a sample depends
neither on the neighbours in its batch nor on the size of the batch. Read ``rewards.py``
next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rlhf_jax.models.heads import CausalLM
from rlhf_jax.models.transformer import KVCache, by_layer
from rlhf_jax.ops.logprobs import logits_of
from rlhf_jax.types import Array, Generation, Params, PRNGKey


@struct.dataclass(kw_only=True)
class Sampling:
    """How tokens are drawn and where a response stops. Build it by :func:`sampling`."""

    temperature: Array  # [] float32; 0 is greedy
    top_k: Array  # [] int32; 0 is off
    top_p: Array  # [] float32; 1 is off
    eos_ids: Array  # [E] int32; −1 matches nothing
    stop_sequences: (
        Array  # [S, N] int32, left-padded with −1; a row of −1 matches nothing
    )
    stop_after: Array  # [] int32, response tokens before a stop sequence may count


def sampling(
    *,
    eos_ids: Sequence[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_sequences: Sequence[Sequence[int]] = (),
    stop_after: int = 0,
) -> Sampling:
    """Builds the traced sampling parameters.

    Args:
        eos_ids: ids that end a response; it keeps the one that ended it.
        temperature: ≥ 0; logits are divided by it; 0 takes the most likely token.
        top_k: keep the k most likely tokens; None for all.
        top_p: keep the smallest set of tokens that reaches this probability; None for
            all.
        stop_sequences: token sequences that end a response as EOS does (the reference
            code of Ziegler et al. truncates at "."); the response keeps them.
        stop_after: a stop sequence counts only once the response has this many tokens.

    Raises:
        ValueError: a value out of range.
    """
    if temperature < 0:
        raise ValueError(
            f'temperature={temperature} is negative; use 0 for greedy decoding'
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f'top_k={top_k} keeps no token; use None to keep all')
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(
            f'top_p={top_p} is outside (0, 1]; use None to keep all tokens'
        )
    if any(len(sequence) == 0 for sequence in stop_sequences):
        raise ValueError('an empty stop sequence would stop every response at once')
    width = max((len(sequence) for sequence in stop_sequences), default=1)
    stops = np.full((max(len(stop_sequences), 1), width), -1, np.int32)
    for row, sequence in zip(stops, stop_sequences):
        row[width - len(sequence) :] = sequence
    return Sampling(
        temperature=jnp.float32(temperature),
        top_k=jnp.int32(top_k or 0),
        top_p=jnp.float32(1.0 if top_p is None else top_p),
        eos_ids=jnp.asarray(list(eos_ids) or [-1], jnp.int32),
        stop_sequences=jnp.asarray(stops),
        stop_after=jnp.int32(stop_after),
    )


def filter_logits(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Sets the logits outside top-k, then outside top-p of what is left, to −∞.

    Source: top-k: Fan et al. 2018, arXiv 1805.04833; top-p: Holtzman et al. 2020, arXiv
    1904.09751. The token that crosses ``top_p`` is kept; ties with the last kept token
    are too.

    Args:
        logits: [B, V] float32.
        top_k: [] int32, 0 for off.
        top_p: [] float32, 1 for off.

    Returns:
        [B, V] float32.
    """
    vocabulary = logits.shape[-1]
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    rank = jnp.arange(vocabulary)
    within_k = rank < jnp.where(top_k > 0, top_k, vocabulary)
    probabilities = jax.nn.softmax(jnp.where(within_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep = within_k & ((before < top_p) | (top_p >= 1) | (rank == 0))
    threshold = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def sample_tokens(
    logits: Array, keys: PRNGKey, params: Sampling
) -> tuple[Array, Array]:
    """Draws one token per row.

    Args:
        logits: [B, V] float32.
        keys: [B, 2] uint32, one key per row.
        params: sampling parameters.

    Returns:
        (tokens [B] int32, logprobs [B] float32). The log-probability is that of the
        tempered distribution *before* top-k and top-p: it is what training passes
        compute, so that the ratio of PPO starts at 1. Greedy decoding reports it at
        temperature 1.
    """
    greedy = params.temperature <= 0
    scaled = logits / jnp.where(greedy, 1.0, params.temperature)
    kept = jax.lax.cond(
        (params.top_k > 0) | (params.top_p < 1),
        lambda x: filter_logits(x, params.top_k, params.top_p),
        lambda x: x,
        scaled,
    )
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    tokens = jnp.argmax(jnp.where(greedy, kept, kept + noise), axis=-1).astype(
        jnp.int32
    )
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(scaled, axis=-1)


@struct.dataclass(kw_only=True)
class _Loop:
    i: Array  # [] int32, response tokens written
    hidden: Array  # [B, D], state that predicts the next token
    tail: Array  # [B, N] int32, the last tokens of each response
    ended: Array  # [B] bool
    response: Array  # [B, R] int32
    response_mask: Array  # [B, R] bool
    logprobs: Array  # [B, R] float32
    cache: KVCache


def _stopped(tail: Array, length: Array, how: Sampling) -> Array:
    """Whether the last tokens [B, N] of responses of this length end them, [B] bool."""
    is_eos = jnp.any(tail[:, -1:] == how.eos_ids, axis=1)
    stops = how.stop_sequences
    matches = jnp.all((stops == -1) | (tail[:, None] == stops), axis=-1)
    matches = jnp.any(matches & (stops[:, -1] != -1), axis=-1)
    return is_eos | (matches & (length >= how.stop_after))


def generate(
    params: Params,
    tokens: Array,
    mask: Array,
    row_ids: Array,
    key: PRNGKey,
    how: Sampling,
    *,
    model: CausalLM,
    max_new_tokens: int,
) -> Generation:
    """Continues prompts until each row has ended or ``max_new_tokens`` are written.

    Args:
        params: of ``model``.
        tokens: [B, P] int32, left-padded prompts.
        mask: [B, P] bool; every row holds a real token, at its last place.
        row_ids: [B] int32; row i draws from ``fold_in(key, row_ids[i])`` alone.
        key: of this batch of samples.
        how: traced sampling parameters.
        model: the language model.
        max_new_tokens: R, static.

    Returns:
        A Generation of length P + R.
    """
    batch, prompt_length = tokens.shape
    length = prompt_length + max_new_tokens
    unembedding = model.unembedding(params)
    if model.config.is_unrolled:
        backbone = by_layer(model.config, params['backbone'])
        params = {**params, 'backbone': backbone}
        model = CausalLM(dataclasses.replace(model.config, is_listed=True))
    apply = functools.partial(model.apply, {'params': params})
    hidden, cache = apply(tokens, mask, length, method='prefill')
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids)
    start = _Loop(
        i=jnp.int32(0),
        hidden=hidden[:, -1],
        tail=jnp.full((batch, how.stop_sequences.shape[1]), -2, jnp.int32),
        ended=jnp.zeros(batch, bool),
        response=jnp.zeros((batch, max_new_tokens), jnp.int32),
        response_mask=jnp.zeros((batch, max_new_tokens), bool),
        logprobs=jnp.zeros((batch, max_new_tokens), jnp.float32),
        cache=cache,
    )

    def unfinished(loop: _Loop) -> Array:
        return (loop.i < max_new_tokens) & ~jnp.all(loop.ended)

    def one_token(loop: _Loop) -> _Loop:
        logits = logits_of(loop.hidden, unembedding, model.config.logit_softcap)
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, loop.i)
        drawn, logprobs = sample_tokens(logits, keys, how)
        alive = ~loop.ended
        drawn = jnp.where(alive, drawn, 0)
        tail = jnp.concatenate([loop.tail[:, 1:], drawn[:, None]], axis=1)
        stopped = _stopped(tail, loop.i + 1, how)
        hidden, cache = apply(drawn, alive, loop.cache, method='decode')
        return _Loop(
            i=loop.i + 1,
            hidden=hidden,
            tail=tail,
            ended=loop.ended | (alive & stopped),
            response=loop.response.at[:, loop.i].set(drawn),
            response_mask=loop.response_mask.at[:, loop.i].set(alive),
            logprobs=loop.logprobs.at[:, loop.i].set(jnp.where(alive, logprobs, 0)),
            cache=cache,
        )

    end = jax.lax.while_loop(unfinished, one_token, start)
    before = ((0, 0), (prompt_length, 0))
    return Generation(
        tokens=jnp.concatenate([jnp.where(mask, tokens, 0), end.response], axis=1),
        mask=jnp.concatenate([mask, end.response_mask], axis=1),
        response_mask=jnp.pad(end.response_mask, before),
        logprobs=jnp.pad(end.logprobs, before),
        ended=end.ended,
    )
