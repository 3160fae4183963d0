"""Sampling: prefill, then one compiled ``while_loop`` over a KV cache.

Temperature, top-k, top-p, the EOS ids and the stop strings are *traced* values:
changing them compiles nothing, while there are as many ids and strings of about the
same length. Every row has a key of its own, so a sample depends neither on the
neighbours in its batch nor on the size of the batch. Read ``continuous_batching.py``
next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rlhf_jax.models.heads import CausalLM, fuse_projections, unstack_layers
from rlhf_jax.models.transformer import KVCache, grow, repeat_rows
from rlhf_jax.ops.logprobs import logits_fn
from rlhf_jax.types import Array, Generation, Params, PRNGKey

# A cache grows with the response in stretches of at least so many tokens, each of which
# compiles the decoding of a token once more.
MIN_STRETCH, MAX_STRETCHES = 32, 4


@struct.dataclass(kw_only=True)
class Sampling:
    """How tokens are drawn and where a response stops. Build it by :func:`sampling`."""

    temperature: Array  # [] float32; 0 is greedy
    top_k: Array  # [] int32; 0 is off
    top_p: Array  # [] float32; 1 is off
    eos_ids: Array  # [E] int32; −1 matches nothing
    stop_table: Array  # [S, V] int16, see ops/stop_table.py; [1, 1] for no stop string
    stop_after: Array  # [] int32, response tokens before a stop sequence may count


def sampling(
    *,
    eos_ids: Sequence[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_table: np.ndarray | None = None,
    stop_after: int = 0,
) -> Sampling:
    """Builds the traced sampling parameters.

    Args:
        eos_ids: ids that end a response; it keeps the one that ended it.
        temperature: ≥ 0; logits are divided by it; 0 takes the most likely token.
        top_k: keep the k most likely tokens; None for all.
        top_p: keep the smallest set of tokens that reaches this probability; None for
            all.
        stop_table: [S, V], of the strings that end a response as EOS does (the
            reference code of Ziegler et al. truncates at "."), from
            :func:`rlhf_jax.ops.stop_table.stop_table`. They are matched in the text of
            the response, wherever its tokens begin and end; the response keeps the
            token in which one ends. None for no string.
        stop_after: a stop string counts only where it ends in a token from this one on,
            counted from 1.

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
    if stop_table is None:
        stop_table = np.zeros((1, 1), np.int16)
    return Sampling(
        temperature=jnp.float32(temperature),
        top_k=jnp.int32(top_k or 0),
        top_p=jnp.float32(1.0 if top_p is None else top_p),
        eos_ids=jnp.asarray(list(eos_ids) or [-1], jnp.int32),
        stop_table=jnp.asarray(stop_table, jnp.int16),
        stop_after=jnp.int32(stop_after),
    )


def draw_from(weights: Array, keys: PRNGKey) -> Array:
    """Draws one token per row in proportion to its weight.

    First a block of about √V tokens by the Gumbel trick, then a token in it: that takes
    2·√V random numbers per row, where one per token would take V.

    Args:
        weights: [B, V] float32, at least 0, not all 0 in a row.
        keys: [B, 2] uint32, one key per row.

    Returns:
        [B] int32.
    """
    rows, vocabulary = weights.shape
    size = 1 << (vocabulary.bit_length() // 2)
    blocks = jnp.pad(weights, ((0, 0), (0, -vocabulary % size)))
    blocks = blocks.reshape(rows, -1, size)
    keys = jax.vmap(jax.random.split)(keys)
    choose = jax.vmap(jax.random.categorical)
    block = choose(keys[:, 0], jnp.log(jnp.sum(blocks, axis=-1)))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * size + choose(keys[:, 1], jnp.log(inside))).astype(jnp.int32)


def _keep_top_k(weights: Array, top_k: Array) -> Array:
    """Weights [B, V] with those below the k-th highest set to 0; ties with it stay."""
    ordered = jnp.flip(jnp.sort(weights, axis=-1), axis=-1)
    return jnp.where(weights >= ordered[:, top_k - 1, None], weights, 0)


def _draw_filtered(weights: Array, keys: PRNGKey, top_k: Array, top_p: Array) -> Array:
    """One token per row out of its top-k, and of what that leaves out of its top-p.

    Draws, and draws again among the more likely tokens where a token is outside, which
    it is when those above it are k or have the weight p. That gives the distribution
    that sorting gives: what is kept keeps its proportions, and a refused token refuses
    all below it.

    Source: top-k: Fan et al. 2018, arXiv 1805.04833; top-p: Holtzman et al. 2020, arXiv
    1904.09751; drawing again instead of sorting: FlashInfer (Ye et al. 2025, arXiv
    2501.01005). The token that crosses ``top_p`` is kept; ties with it, or with the
    k-th, are too.
    """
    vocabulary = weights.shape[-1]
    top_k = jnp.where(top_k > 0, jnp.minimum(top_k, vocabulary), vocabulary)
    # Which share p is of depends on what top-k leaves.
    weights = jax.lax.cond(
        (top_k < vocabulary) & (top_p < 1),
        _keep_top_k,
        lambda weights, _: weights,
        weights,
        top_k,
    )
    mass = jnp.where(top_p < 1, top_p, jnp.inf) * jnp.sum(weights, axis=-1)

    def draw_again(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        trial, floor, tokens, refused = carry
        trial_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, trial)
        drawn = draw_from(jnp.where(weights > floor[:, None], weights, 0), trial_keys)
        own = jnp.take_along_axis(weights, drawn[:, None], axis=-1)
        above = weights > own
        outside = jnp.sum(above, axis=-1) >= top_k
        outside |= jnp.sum(jnp.where(above, weights, 0), axis=-1) >= mass
        return (
            trial + 1,
            jnp.where(refused & outside, own[:, 0], floor),
            jnp.where(refused, drawn, tokens),
            refused & outside,
        )

    rows = weights.shape[:1]
    start = (
        jnp.int32(0),
        jnp.zeros(rows),
        jnp.zeros(rows, jnp.int32),
        jnp.ones(rows, bool),
    )
    return jax.lax.while_loop(lambda carry: jnp.any(carry[3]), draw_again, start)[2]


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
    highest = jnp.max(scaled, axis=-1, keepdims=True)
    weights = jnp.exp(scaled - highest)
    tokens = jax.lax.switch(
        jnp.where(greedy, 0, 1 + ((params.top_k > 0) | (params.top_p < 1))),
        (
            lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
            lambda: draw_from(weights, keys),
            lambda: _draw_filtered(weights, keys, params.top_k, params.top_p),
        ),
    )
    chosen = jnp.take_along_axis(scaled - highest, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jnp.log(jnp.sum(weights, axis=-1))


@struct.dataclass(kw_only=True)
class _Loop:
    i: Array  # [] int32, response tokens written
    last: Array  # [B] int32, the last token of each response
    stop_state: Array  # [B] int16, see ops/stop_table.py
    real: Array  # [B] bool, whether the last token is in the response
    ended: Array  # [B] bool
    response: Array  # [B, R] int32
    response_mask: Array  # [B, R] bool
    logprobs: Array  # [B, R] float32
    cache: KVCache


def stopped(
    state: Array, tokens: Array, lengths: Array, how: Sampling
) -> tuple[Array, Array]:
    """Whether a token ends its response.

    Args:
        state: [B] int16, of the stop strings before the token; 0 before the first.
        tokens: [B] int32.
        lengths: [] or [B] int32, tokens of the response, with this one.
        how: the EOS ids, stop strings and from where on they count.

    Returns:
        (whether it does [B] bool, the state behind it [B] int16).
    """
    is_eos = jnp.any(tokens[:, None] == how.eos_ids, axis=1)
    # An id that the table lacks stands for no text.
    step = how.stop_table.at[state, tokens].get(mode='fill', fill_value=0)
    matches = (step < 0) & (lengths >= how.stop_after)
    return is_eos | matches, jnp.where(step < 0, -1 - step, step)


def _draw_next(loop: _Loop, logits: Array, keys: PRNGKey, how: Sampling) -> _Loop:
    """Draws the next token of every row from its logits [B, V]; nothing of rows that
    have ended.
    """
    drawn, logprobs = sample_tokens(logits, keys, how)
    alive = ~loop.ended
    drawn = jnp.where(alive, drawn, 0)
    ends, stop_state = stopped(loop.stop_state, drawn, loop.i + 1, how)
    return loop.replace(
        i=loop.i + 1,
        last=drawn,
        stop_state=stop_state,
        real=alive,
        ended=loop.ended | (alive & ends),
        response=loop.response.at[:, loop.i].set(drawn),
        response_mask=loop.response_mask.at[:, loop.i].set(alive),
        logprobs=loop.logprobs.at[:, loop.i].set(jnp.where(alive, logprobs, 0)),
    )


def for_decoding(model: CausalLM, params: Params) -> tuple[CausalLM, Params]:
    """The model that decodes, and its parameters.

    Unrolled layers are unstacked, because slicing them out of the stack would copy them
    at every token; their projections are fused, and in a prompt the last layer attends
    from the last token alone, the only one that is read. Scanned layers stay as they
    are, and run for every token.
    """
    if not model.config.is_unrolled:
        return model, params
    return fuse_projections(*unstack_layers(model.clone(last=1), params, 0))


def head_of(model: CausalLM, params: Params, rows: int) -> Callable[[Array], Array]:
    """Hidden states [B, D] of so many rows → logits [B, V], for a loop."""
    cfg = model.config
    return logits_fn(model.unembedding(params), cfg.logit_softcap, rows, cfg.num_tokens)


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
        row_ids: [B·G] int32, G samples for every prompt, in adjacent rows; sample i
            draws from ``fold_in(key, row_ids[i])`` alone. A prompt is run once.
        key: of this batch of samples.
        how: traced sampling parameters.
        model: the language model.
        max_new_tokens: R, static.

    Returns:
        A Generation of B·G rows and length P + R.

    Raises:
        ValueError: row ids that are not a multiple of the prompts, or P + R tokens for
            fewer learned positions.
    """
    model.config.check_length(tokens.shape[1] + max_new_tokens)
    batch, prompts = row_ids.shape[0], tokens.shape[0]
    if batch % prompts:
        raise ValueError(f'{batch} row ids do not divide over {prompts} prompts')
    samples = batch // prompts
    logits_of = head_of(model, params, batch)
    model, params = for_decoding(model, params)
    apply = functools.partial(model.apply, {'params': params})
    hidden, cache = apply(tokens, mask, tokens.shape[1], method='prefill')
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids)
    start = _Loop(
        i=jnp.int32(0),
        last=jnp.zeros(batch, jnp.int32),
        stop_state=jnp.zeros(batch, jnp.int16),
        real=jnp.zeros(batch, bool),
        ended=jnp.zeros(batch, bool),
        response=jnp.zeros((batch, max_new_tokens), jnp.int32),
        response_mask=jnp.zeros((batch, max_new_tokens), bool),
        logprobs=jnp.zeros((batch, max_new_tokens), jnp.float32),
        cache=repeat_rows(cache, samples),
    )

    def draw(hidden: Array, loop: _Loop) -> _Loop:
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, loop.i)
        return _draw_next(loop, logits_of(hidden), keys, how)

    def one_token(loop: _Loop) -> _Loop:
        hidden, cache = apply(loop.last, loop.real, loop.cache, method='decode')
        return draw(hidden, loop.replace(cache=cache))

    loop = draw(jnp.repeat(hidden[:, -1], samples, axis=0), start)
    for begin, end in _stretches(max_new_tokens):
        loop = loop.replace(cache=grow(loop.cache, end - begin))
        loop = jax.lax.while_loop(
            lambda loop, end=end: (loop.i < end) & ~jnp.all(loop.ended), one_token, loop
        )
    tokens, mask = (jnp.repeat(x, samples, axis=0) for x in (tokens, mask))
    return as_generation(
        tokens, mask, loop.response, loop.response_mask, loop.logprobs, loop.ended
    )


def as_generation(
    tokens: Array,
    mask: Array,
    response: Array,
    response_mask: Array,
    logprobs: Array,
    ended: Array,
) -> Generation:
    """Prompts [B, P] with responses and their log-probabilities [B, R] behind them."""
    before = ((0, 0), (tokens.shape[1], 0))
    return Generation(
        tokens=jnp.concatenate([jnp.where(mask, tokens, 0), response], axis=1),
        mask=jnp.concatenate([mask, response_mask], axis=1),
        response_mask=jnp.pad(response_mask, before),
        logprobs=jnp.pad(logprobs, before),
        ended=ended,
        response_length=response.shape[1],
    )


def _stretches(length: int) -> list[tuple[int, int]]:
    """A response in stretches, (begin, end), before each of which the cache grows: a
    token attends to no slot behind its stretch.
    """
    count = min(MAX_STRETCHES, max(length // MIN_STRETCH, 1))
    ends = [length * i // count for i in range(count + 1)]
    return list(zip(ends, ends[1:]))
