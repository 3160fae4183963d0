"""The one Transformer, and the three ways to run it: whole, prefill, decode.

A module holds no state: ``model.apply({'params': p}, …)`` is a pure function, and the
KV cache is a value that goes in and comes out. Layers run under ``nn.scan``, so that
compile time does not grow with depth and every layer's weights are stacked on a leading
axis. Its family is a configuration (``models/config.py``). Read ``models/heads.py``
next.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.layers import (
    KV,
    Block,
    Norm,
    View,
    rope_frequencies,
    rotary_tables,
)
from rlhf_jax.ops.memory import look_up
from rlhf_jax.types import Array


@struct.dataclass(kw_only=True)
class KVCache:
    """Keys and values of the tokens so far. All rows write the same slot at the same
    time.
    """

    # Compute dtype; [L, B, K, S, H], or of layers apart a list of [B, K, S, H]
    keys: Array | list[Array]
    values: Array | list[Array]
    mask: Array  # [B, S] bool, slots that hold a real token
    places: Array  # [B, S] int32, the positions of those tokens
    slot: Array  # [] int32, the next slot to write
    positions: Array  # [B] int32, position of the next token of each row


class Transformer(nn.Module):
    """Embeddings, layers and the final norm: tokens to hidden states.

    Parameters: ``embed/tokens`` [V, D] (and ``embed/positions``, ``embed/types``,
    ``embed/norm``), ``layers/…`` stacked [L, …], ``final_norm/scale`` [D] unless the
    last layer ends in a norm. An unstacked last layer (``models.heads.unstack_layers``)
    is run for the ``last`` tokens alone.
    """

    config: TransformerConfig
    last: int | None = None  # tokens, from the end, whose states are wanted

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array,
        allowed: Array,
        distance: Array,
        cache: KV | None = None,
        slot: Array | None = None,
        keep_kv: bool = False,
    ) -> tuple[Array, KV | None]:
        """Args: tokens and positions [B, T]; allowed [B, T, S] bool, keys that a token
        may see; distance [B, T, S] int32, from a key to the token; cache, keys and
        values of a KVCache, which takes these tokens at ``slot``, or None: S is its
        length, or T. Cache and ``keep_kv`` want all layers stacked, or none.

        Returns: (hidden [B, T or last, D] compute dtype; cache, or with ``keep_kv`` the
            keys and values of these tokens, as a KVCache holds them; or None).

        Raises: ValueError, more tokens than the model has learned positions.
        """
        cfg = self.config
        cfg.check_length(tokens.shape[1])
        x = Embed(cfg, name='embed')(tokens, positions)
        views = make_views(cfg, positions, allowed, distance, slot)
        stacked = cfg.num_layers if cfg.num_stacked is None else cfg.num_stacked
        windowed = cfg.windowed if cfg.mixes_windows else (None,) * cfg.num_layers
        kvs: list[KV | None] = []
        if stacked:
            x, kv = self._scan(x, cache, windowed[:stacked], views, keep_kv)
            kvs.append(kv)
        for i in range(stacked, cfg.num_layers):
            old = None if cache is None else (cache[0][i], cache[1][i])
            last = self.last if i == cfg.num_layers - 1 else None
            block = Block(cfg, keep_kv, last, name=f'layers_{i}')
            (x, new), kv = block((x, old), None, windowed[i], views)
            kvs.append(kv if old is None else new)
        if self.last is not None:
            x = x[:, -self.last :]
        if cfg.residual != 'outer':
            x = Norm(cfg, name='final_norm')(x)
        if kvs[0] is None or stacked:
            return x, kvs[0]
        return x, ([keys for keys, _ in kvs], [values for _, values in kvs])

    def _scan(
        self,
        x: Array,
        cache: KV | None,
        windowed: tuple[bool | None, ...],
        views: list[View],
        keep_kv: bool,
    ) -> tuple[Array, KV | None]:
        cfg, count = self.config, len(windowed)
        block = Block
        if cfg.remat:
            block = nn.remat(Block, prevent_cse=False)
        # Parameters are drawn alike however often the body stands in the program.
        unroll = 1 if self.is_initializing() else min(cfg.scan_unroll, count)
        layers = nn.scan(
            block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=(0, 0, nn.broadcast),
            length=count,
            unroll=unroll,
        )
        which = jnp.asarray(windowed) if cfg.mixes_windows else None
        (x, cache), kv = layers(cfg, keep_kv, name='layers')(
            (x, cache), jnp.arange(count), which, views
        )
        return x, kv if cache is None else cache


def make_views(
    cfg: TransformerConfig,
    positions: Array,
    allowed: Array,
    distance: Array,
    slot: Array | None,
) -> list[View]:
    """The views of a model's layers: one, or [everything, window] where they differ."""

    def view(windowed: bool) -> View:
        visible = allowed
        if windowed:
            visible = allowed & (jnp.abs(distance) < cfg.sliding_window)
        theta, scaling = cfg.rope_theta, cfg.rope_scaling
        if windowed and cfg.window_rope_theta is not None:
            theta, scaling = cfg.window_rope_theta, None
        rotary = None
        if cfg.position == 'rope':
            frequencies = rope_frequencies(cfg.rotary_dim, theta, scaling)
            rotary = rotary_tables(positions, frequencies)
        return View(visible=visible, rotary=rotary, slot=slot)

    return [view(windowed) for windowed in sorted(set(cfg.windowed)) or [False]]


class Embed(nn.Module):
    """Token embeddings, with learned positions, types and a norm where the family has
    them.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, tokens: Array, positions: Array) -> Array:
        cfg = self.config
        init = nn.initializers.normal(cfg.init_std)
        x = look_up(self.param('tokens', init, (cfg.vocab_size, cfg.width)), tokens)
        if cfg.scale_embeddings:
            x = x * jnp.float32(cfg.width**0.5)
        if cfg.position == 'learned':
            rows = cfg.max_positions + cfg.position_offset
            table = self.param('positions', init, (rows, cfg.width))
            x = x + table[positions + cfg.position_offset]
        if cfg.token_types:
            x = x + self.param('types', init, (cfg.token_types, cfg.width))[0]
        if cfg.embed_norm:
            x = Norm(cfg, name='norm')(x)
        return x.astype(cfg.dtype)


def positions_of(mask: Array, segments: Array | None = None) -> Array:
    """Position of every token: the number of real tokens before it in its document,
    [B, T] int32.

    Source: the exclusive cumulative sum of the mask in openai/lm-human-preferences. It
    makes a score independent of the side a sequence is padded on.

    Args:
        mask: [B, T] bool.
        segments: [B, T] int32, which document of a packed row a token belongs to,
            ascending; None where a row is one document.
    """
    before = jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)
    if segments is None:
        return before
    first = jnp.diff(segments, axis=-1, prepend=segments[:, :1] - 1) != 0
    return before - jax.lax.cummax(jnp.where(first, before, 0), axis=1)


def visible(
    mask: Array, attention: str, segments: Array | None = None
) -> tuple[Array, Array]:
    """Which keys each token sees, and how far back they are, both [B, T, T].

    Args:
        mask: [B, T] bool.
        attention: 'causal' or 'bidirectional'.
        segments: as in :func:`positions_of`; documents do not see each other.
    """
    length = mask.shape[-1]
    allowed = jnp.broadcast_to(mask[:, None, :], (*mask.shape, length))
    if attention == 'causal':
        allowed = allowed & jnp.tril(jnp.ones((length, length), bool))
    if segments is not None:
        allowed = allowed & (segments[:, :, None] == segments[:, None, :])
    order = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
    return allowed, order[:, :, None] - order[:, None, :]


def embed_safe(tokens: Array, mask: Array) -> Array:
    """Replaces ids under the mask by 0, so that a padding id need not be in the
    vocabulary.
    """
    return jnp.where(mask, tokens, 0)


def forward(
    backbone: Transformer, tokens: Array, mask: Array, segments: Array | None = None
) -> Array:
    """Hidden states of whole sequences, [B, T] tokens and mask → [B, T, D].

    ``segments`` keeps the documents of packed rows apart; see :func:`positions_of`.
    """
    hidden, _ = backbone(
        embed_safe(tokens, mask),
        positions_of(mask, segments),
        *visible(mask, backbone.config.attention, segments),
    )
    return hidden


def prefill(
    backbone: Transformer, tokens: Array, mask: Array, cache_length: int
) -> tuple[Array, KVCache]:
    """Runs prompts and fills a fresh cache with ``cache_length`` slots.

    Returns:
        (hidden [B, T, D], cache whose next slot is T).

    Raises:
        ValueError: more slots than the model has learned positions.
    """
    backbone.config.check_length(cache_length)
    length = tokens.shape[1]
    hidden, (keys, values) = backbone(
        embed_safe(tokens, mask),
        positions_of(mask),
        *visible(mask, 'causal'),
        keep_kv=True,
    )
    cache = KVCache(
        keys=keys,
        values=values,
        mask=mask,
        places=positions_of(mask),
        slot=jnp.asarray(length, jnp.int32),
        positions=jnp.sum(mask, axis=-1, dtype=jnp.int32),
    )
    return hidden, grow(cache, cache_length - length)


def repeat_rows(cache: KVCache, count: int) -> KVCache:
    """Every row ``count`` times, in adjacent rows."""

    def repeat(x: Array) -> Array:
        return jnp.repeat(x, count, axis=x.ndim - 4)

    return cache.replace(
        keys=jax.tree.map(repeat, cache.keys),
        values=jax.tree.map(repeat, cache.values),
        mask=jnp.repeat(cache.mask, count, axis=0),
        places=jnp.repeat(cache.places, count, axis=0),
        positions=jnp.repeat(cache.positions, count, axis=0),
    )


def grow(cache: KVCache, slots: int) -> KVCache:
    """The cache with so many empty slots more."""

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, slots), (0, 0)))

    return cache.replace(
        keys=jax.tree.map(pad, cache.keys),
        values=jax.tree.map(pad, cache.values),
        mask=jnp.pad(cache.mask, ((0, 0), (0, slots))),
        places=jnp.pad(cache.places, ((0, 0), (0, slots))),
    )


def decode(
    backbone: Transformer, tokens: Array, real: Array, cache: KVCache
) -> tuple[Array, KVCache]:
    """Runs one more token of every row against the cache.

    Args:
        backbone: bound module.
        tokens: [B] int32.
        real: [B] bool; False writes a slot that nothing will attend to.
        cache: keys and values so far.

    Returns:
        (hidden [B, D], the cache with one slot more).
    """
    # A token always sees itself, and only then is it known to the others.
    here = functools.partial(
        jax.lax.dynamic_update_slice_in_dim, start_index=cache.slot, axis=1
    )
    allowed = here(cache.mask, jnp.ones_like(real)[:, None])
    places = here(cache.places, cache.positions[:, None])
    distance = cache.positions[:, None] - places
    hidden, (keys, values) = backbone(
        jnp.where(real, tokens, 0)[:, None],
        cache.positions[:, None],
        allowed[:, None],
        distance[:, None],
        (cache.keys, cache.values),
        cache.slot,
    )
    cache = KVCache(
        keys=keys,
        values=values,
        mask=here(cache.mask, real[:, None]),
        places=places,
        slot=cache.slot + 1,
        positions=cache.positions + real,
    )
    return hidden[:, 0], cache
