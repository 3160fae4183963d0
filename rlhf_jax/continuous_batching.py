"""Continuous batching: a few rows decode, and a row that is done takes the next prompt.

``generate.generate`` runs a batch until its longest response has ended. Here a row
whose response has ended takes the next waiting prompt, inside the compiled loop. Both
give the same samples. Read ``rewards.py`` next.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.generate import (
    Sampling,
    as_generation,
    for_decoding,
    head_of,
    sample_tokens,
    stopped,
)
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.models.transformer import KVCache, grow
from rlhf_jax.types import Array, Generation, Params, PRNGKey

# Waiting prompts are taken once this share of the rows is free: taking them reads and
# writes the cache of all rows.
FREE_SHARE = 1 / 8


@struct.dataclass(kw_only=True)
class _Pool:
    waiting: Array  # [] int32, the next sample to begin
    samples: Array  # [S] int32, which of the N samples a row writes; N: none
    lengths: Array  # [S] int32, response tokens of it so far
    hidden: Array  # [S, D], state that predicts its next token
    stop_state: Array  # [S] int16, see ops/stop_table.py
    cache: KVCache  # the slots behind the prompts are a ring
    response: Array  # [N, R] int32
    response_mask: Array  # [N, R] bool
    logprobs: Array  # [N, R] float32
    ended: Array  # [N] bool


def generate_continuously(
    params: Params,
    tokens: Array,
    mask: Array,
    row_ids: Array,
    key: PRNGKey,
    how: Sampling,
    *,
    model: CausalLM,
    max_new_tokens: int,
    num_rows: int,
) -> Generation:
    """Continues prompts as :func:`rlhf_jax.generate.generate` does, a few at a time.

    All prompts are prefilled first, in one batch. At every token all rows write the
    same slot of the cache. The R slots behind the prompt are a ring buffer, so that a
    row never overwrites its own response, whenever it began. What is not said here of
    the arguments is as there; N = B·G are the row ids.

    Args:
        num_rows: S, samples that are decoded at the same time, static.

    Returns:
        A Generation of N rows and length P + R.

    Raises:
        ValueError: row ids that are not a multiple of the prompts, no row, or P + R
            tokens for fewer learned positions.
    """
    model.config.check_length(tokens.shape[1] + max_new_tokens)
    prompts, prompt_length = tokens.shape
    count = row_ids.shape[0]
    if count % prompts or num_rows < 1:
        raise ValueError(
            f'{count} row ids of {prompts} prompts by {num_rows} rows: need a multiple '
            'of the prompts, and at least one row'
        )
    group = count // prompts
    logits_of = head_of(model, params, num_rows)
    model, params = for_decoding(model, params)
    apply = functools.partial(model.apply, {'params': params})
    states, filled = apply(tokens, mask, prompt_length, method='prefill')
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids)
    take = functools.partial(_take, states[:, -1], filled, group, count)
    pool = _empty(states, filled, num_rows, count, max_new_tokens)

    def one_token(pool: _Pool) -> _Pool:
        free = pool.samples == count
        due = jnp.sum(free) >= max(1, int(num_rows * FREE_SHARE))
        due = (due | jnp.all(free)) & (pool.waiting < count)
        pool = jax.lax.cond(due, take, lambda pool: pool, pool)
        alive = pool.samples < count
        own = row_keys[jnp.minimum(pool.samples, count - 1)]
        keys = jax.vmap(jax.random.fold_in)(own, pool.lengths)
        drawn, logprobs = sample_tokens(logits_of(pool.hidden), keys, how)
        drawn = jnp.where(alive, drawn, 0)
        ends, state = stopped(pool.stop_state, drawn, pool.lengths + 1, how)
        pool = _note(pool.replace(stop_state=state), drawn, logprobs, alive & ends)
        hidden, cache = apply(drawn, alive, pool.cache, method='decode')
        slots = prompt_length + max_new_tokens
        around = jnp.where(cache.slot == slots, prompt_length, cache.slot)
        return pool.replace(hidden=hidden, cache=cache.replace(slot=around))

    def unfinished(pool: _Pool) -> Array:
        return (pool.waiting < count) | jnp.any(pool.samples < count)

    pool = jax.lax.while_loop(unfinished, one_token, pool)
    tokens, mask = (jnp.repeat(x, group, axis=0) for x in (tokens, mask))
    return as_generation(
        tokens, mask, pool.response, pool.response_mask, pool.logprobs, pool.ended
    )


def _note(pool: _Pool, drawn: Array, logprobs: Array, ends: Array) -> _Pool:
    """Writes the tokens [S] down, and frees the rows whose response is over."""
    count, longest = pool.response.shape
    at = (pool.samples, pool.lengths)  # a free row writes to sample N, which is none
    over = ends | (pool.lengths + 1 == longest)
    return pool.replace(
        samples=jnp.where(over, count, pool.samples),
        lengths=pool.lengths + 1,
        response=pool.response.at[at].set(drawn, mode='drop'),
        response_mask=pool.response_mask.at[at].set(True, mode='drop'),
        logprobs=pool.logprobs.at[at].set(logprobs, mode='drop'),
        ended=pool.ended.at[pool.samples].set(ends, mode='drop'),
    )


def _empty(states: Array, filled: KVCache, rows: int, count: int, length: int) -> _Pool:
    """A pool of which nothing is begun."""
    first = jnp.zeros(rows, jnp.int32)

    def rows_of(x: Array, axis: int) -> Array:
        return jnp.zeros_like(jnp.take(x, first, axis=axis))

    cache = KVCache(
        keys=jax.tree.map(lambda x: rows_of(x, x.ndim - 4), filled.keys),
        values=jax.tree.map(lambda x: rows_of(x, x.ndim - 4), filled.values),
        mask=rows_of(filled.mask, 0),
        places=rows_of(filled.places, 0),
        slot=filled.slot,
        positions=first,
    )
    return _Pool(
        waiting=jnp.int32(0),
        samples=jnp.full(rows, count, jnp.int32),
        lengths=first,
        hidden=rows_of(states[:, -1], 0),
        stop_state=jnp.zeros(rows, jnp.int16),
        cache=grow(cache, length),
        response=jnp.zeros((count, length), jnp.int32),
        response_mask=jnp.zeros((count, length), bool),
        logprobs=jnp.zeros((count, length), jnp.float32),
        ended=jnp.zeros(count, bool),
    )


def _take(states: Array, filled: KVCache, group: int, count: int, pool: _Pool) -> _Pool:
    """Gives every free row the next waiting sample, while there are some."""
    free = pool.samples == count
    which = pool.waiting + jnp.cumsum(free) - 1
    began = free & (which < count)
    prompt = jnp.where(began, which, 0) // group
    length = filled.mask.shape[1]

    def exchange(old: Array, new: Array, axis: int, slots: int) -> Array:
        """Rows of ``old`` along ``axis`` whose first slots become those of ``new``."""
        shape = [1] * old.ndim
        shape[axis] = -1
        first = jax.lax.slice_in_dim(old, 0, length, axis=slots)
        new = jnp.where(began.reshape(shape), jnp.take(new, prompt, axis=axis), first)
        return jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis=slots)

    def cached(old: Array, new: Array) -> Array:
        return exchange(old, new, old.ndim - 4, old.ndim - 2)

    cache = pool.cache
    # Nothing that the row wrote before is seen any more.
    kept = cache.mask & ~began[:, None]
    return pool.replace(
        waiting=jnp.minimum(pool.waiting + jnp.sum(free), count),
        samples=jnp.where(began, which, pool.samples),
        lengths=jnp.where(began, 0, pool.lengths),
        hidden=jnp.where(began[:, None], states[prompt], pool.hidden),
        stop_state=jnp.where(began, 0, pool.stop_state),
        cache=cache.replace(
            keys=jax.tree.map(cached, cache.keys, filled.keys),
            values=jax.tree.map(cached, cache.values, filled.values),
            mask=exchange(kept, filled.mask, 0, 1),
            places=exchange(cache.places, filled.places, 0, 1),
            positions=jnp.where(began, filled.positions[prompt], cache.positions),
        ),
    )
