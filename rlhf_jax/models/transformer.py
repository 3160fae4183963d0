"""The one Transformer: a decoder whose family is a configuration, not a copy.

A module holds no state: ``model.apply({'params': p}, …)`` is a pure function, and the
KV cache is a value that goes in and comes out. Layers run under ``nn.scan``, so that
compile time does not grow with depth and every layer's weights are stacked on a leading
axis.

Letters: ``b`` sequences, ``t`` query tokens, ``s`` key tokens, ``d`` width, ``k``
key-value heads, ``g`` query heads per key-value head, ``h`` head size, ``f`` MLP width,
``v`` vocabulary. Read ``models/heads.py`` next.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.types import Array

NEGATIVE = -1e30  # finite, so that a row without any key stays finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What a Transformer is made of. ``hf.py`` fills this from a Hugging Face
    config.
    """

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    norm: Literal['rms', 'layer'] = 'rms'
    norm_eps: float = 1e-5
    activation: Literal['silu', 'gelu', 'gelu_tanh', 'relu'] = 'silu'
    gated_mlp: bool = True
    position: Literal['rope', 'learned'] = 'rope'
    rope_theta: float = 10_000.0
    tied_embeddings: bool = True
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    init_std: float = 0.02
    dtype: str = 'float32'  # of activations and matrix products; parameters are float32
    remat: bool = False  # recompute each layer in the backward pass
    scan_unroll: int = 1  # layers per iteration of the scan

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f'num_heads={self.num_heads} is not divisible by '
                f'num_kv_heads={self.num_kv_heads}'
            )
        if self.position == 'rope' and self.head_dim % 2:
            raise ValueError(
                f'head_dim={self.head_dim} must be even for rotary positions'
            )


@struct.dataclass(kw_only=True)
class KVCache:
    """Keys and values of the tokens so far. All rows write the same slot at the same
    time.
    """

    keys: Array  # [L, B, S, K, H] compute dtype
    values: Array  # [L, B, S, K, H]
    mask: Array  # [B, S] bool, slots that hold a real token
    slot: Array  # [] int32, the next slot to write
    positions: Array  # [B] int32, position of the next token of each row


def rope(x: Array, positions: Array, theta: float) -> Array:
    """Rotates pairs (i, i + H/2) of the last axis by position·θ^(−2i/H).

    Source: Su et al. 2021, arXiv 2104.09864, in the half-split layout of Llama's
        Hugging Face
    weights.

    Args:
        x: [B, T, …, H] float32.
        positions: [B, T] int32.
        theta: base of the frequencies.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    angles = angles.reshape(*positions.shape, *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


class Norm(nn.Module):
    """RMSNorm or LayerNorm, computed in float32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        x32 = x.astype(jnp.float32)
        scale = self.param('scale', nn.initializers.ones, (cfg.width,))
        if cfg.norm == 'layer':
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(
            jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + cfg.norm_eps
        )
        x32 = x32 * scale
        if cfg.norm == 'layer':
            x32 = x32 + self.param('bias', nn.initializers.zeros, (cfg.width,))
        return x32.astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query causal attention over the cache (if any) and the tokens given."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, cache: tuple[Array, Array] | None, bias: Array, positions: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        """Args: x [B, T, D]; cache ([B, S, K, H] keys, values) or None; bias [B, 1, 1,
        T, S + T].

        Returns: (output [B, T, D], (keys, values) of these tokens [B, T, K, H]).
        """
        cfg = self.config
        groups = cfg.num_heads // cfg.num_kv_heads
        init = nn.initializers.normal(cfg.init_std)

        def project(name: str, heads: int) -> Array:
            kernel = self.param(
                f'{name}_kernel', init, (cfg.width, heads, cfg.head_dim)
            )
            y = jnp.einsum('btd,dnh->btnh', x, kernel.astype(x.dtype))
            if cfg.attention_bias:
                zeros = nn.initializers.zeros
                offset = self.param(f'{name}_bias', zeros, (heads, cfg.head_dim))
                y = y + offset.astype(x.dtype)
            return y

        q, k, v = (
            project('query', cfg.num_heads),
            project('key', cfg.num_kv_heads),
            project('value', cfg.num_kv_heads),
        )
        if cfg.position == 'rope':
            q = rope(q.astype(jnp.float32), positions, cfg.rope_theta).astype(x.dtype)
            k = rope(k.astype(jnp.float32), positions, cfg.rope_theta).astype(x.dtype)
        q = q.reshape(*q.shape[:2], cfg.num_kv_heads, groups, cfg.head_dim)

        # With a cache the scores over old and new keys are joined, not the keys: the
        # cache is then only read here, and written once for all layers by the caller.
        parts = [(k, v)] if cache is None else [cache, (k, v)]
        scores = jnp.concatenate(
            [
                jnp.einsum(
                    'btkgh,bskh->bkgts', q, keys, preferred_element_type=jnp.float32
                )
                for keys, _ in parts
            ],
            axis=-1,
        )
        weights = jax.nn.softmax(scores * cfg.head_dim**-0.5 + bias, axis=-1).astype(
            x.dtype
        )
        out, start = 0, 0
        for keys, values in parts:
            stop = start + keys.shape[1]
            out = out + jnp.einsum(
                'bkgts,bskh->btkgh', weights[..., start:stop], values
            )
            start = stop
        out = out.reshape(*out.shape[:2], cfg.num_heads, cfg.head_dim)
        # Residual outputs start smaller by √(2·layers), as in GPT-2.
        out_init = nn.initializers.normal(cfg.init_std / (2 * cfg.num_layers) ** 0.5)
        kernel = self.param(
            'out_kernel', out_init, (cfg.num_heads, cfg.head_dim, cfg.width)
        )
        out = jnp.einsum('btnh,nhd->btd', out, kernel.astype(x.dtype))
        if cfg.attention_out_bias:
            out = out + self.param(
                'out_bias', nn.initializers.zeros, (cfg.width,)
            ).astype(x.dtype)
        return out, (k, v)


class MLP(nn.Module):
    """Gated or plain feed-forward layer."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        init = nn.initializers.normal(cfg.init_std)
        down_init = nn.initializers.normal(cfg.init_std / (2 * cfg.num_layers) ** 0.5)
        activate = {
            'silu': nn.silu,
            'gelu': lambda y: nn.gelu(y, approximate=False),
            'gelu_tanh': lambda y: nn.gelu(y, approximate=True),
            'relu': nn.relu,
        }[cfg.activation]

        def linear(
            name: str, y: Array, size: int, initializer: nn.initializers.Initializer
        ):
            kernel = self.param(f'{name}_kernel', initializer, (y.shape[-1], size))
            y = y @ kernel.astype(y.dtype)
            if cfg.mlp_bias:
                offset = self.param(f'{name}_bias', nn.initializers.zeros, (size,))
                y = y + offset.astype(y.dtype)
            return y

        hidden = linear('up', x, cfg.mlp_width, init)
        if cfg.gated_mlp:
            hidden = activate(linear('gate', x, cfg.mlp_width, init)) * hidden
        else:
            hidden = activate(hidden)
        return linear('down', hidden, cfg.width, down_init)


class Block(nn.Module):
    """One pre-norm layer; the signature is that of a scan body over the layers."""

    config: TransformerConfig
    keep_kv: bool

    @nn.compact
    def __call__(
        self, x: Array, cache: tuple[Array, Array] | None, bias: Array, positions: Array
    ) -> tuple[Array, tuple[Array, Array] | None]:
        y = Norm(self.config, name='attention_norm')(x)
        y, kv = Attention(self.config, name='attention')(y, cache, bias, positions)
        x = x + y
        y = Norm(self.config, name='mlp_norm')(x)
        x = x + MLP(self.config, name='mlp')(y)
        return x, kv if self.keep_kv else None


class Transformer(nn.Module):
    """Embeddings, layers and the final norm: tokens to hidden states.

    Parameters: ``embed/tokens`` [V, D] (and ``embed/positions``), ``layers/…`` stacked
        [L, …],
    ``final_norm/scale`` [D].
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array,
        bias: Array,
        cache: tuple[Array, Array] | None = None,
        keep_kv: bool = False,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Args: tokens and positions [B, T]; bias [B, 1, 1, T, S + T]; cache [L, B, S,
        K, H] × 2.

        Returns: (hidden [B, T, D] compute dtype, (keys, values) [L, B, T, K, H] or
            None).
        """
        cfg = self.config
        x = Embed(cfg, name='embed')(tokens, positions)
        block = Block
        if cfg.remat:
            block = nn.remat(Block, prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=cfg.num_layers,
            unroll=min(cfg.scan_unroll, cfg.num_layers),
        )
        x, kv = layers(cfg, keep_kv, name='layers')(x, cache, bias, positions)
        return Norm(cfg, name='final_norm')(x), kv


class Embed(nn.Module):
    """Token embeddings, and learned positions where the family has them."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, tokens: Array, positions: Array) -> Array:
        cfg = self.config
        init = nn.initializers.normal(cfg.init_std)
        table = self.param('tokens', init, (cfg.vocab_size, cfg.width))
        x = table[tokens]
        if cfg.position == 'learned':
            x = (
                x
                + self.param('positions', init, (cfg.max_positions, cfg.width))[
                    positions
                ]
            )
        return x.astype(cfg.dtype)


def positions_of(mask: Array) -> Array:
    """Position of every token: the number of real tokens before it, [B, T] int32.

    Source: the exclusive cumulative sum of the mask in openai/lm-human-preferences. It
        makes a
    score independent of the side a sequence is padded on.
    """
    return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def causal_bias(mask: Array) -> Array:
    """Additive attention bias [B, 1, 1, T, T]: real keys up to the query itself."""
    length = mask.shape[-1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    allowed = causal[None] & mask[:, None, :]
    return jnp.where(allowed, 0.0, NEGATIVE)[:, None, None]


def embed_safe(tokens: Array, mask: Array) -> Array:
    """Replaces ids under the mask by 0, so that a padding id need not be in the
    vocabulary.
    """
    return jnp.where(mask, tokens, 0)


def forward(backbone: Transformer, tokens: Array, mask: Array) -> Array:
    """Hidden states of whole sequences, [B, T] tokens and mask → [B, T, D]."""
    hidden, _ = backbone(
        embed_safe(tokens, mask), positions_of(mask), causal_bias(mask)
    )
    return hidden


def prefill(
    backbone: Transformer, tokens: Array, mask: Array, cache_length: int
) -> tuple[Array, KVCache]:
    """Runs prompts and fills a fresh cache with ``cache_length`` slots.

    Returns:
        (hidden [B, T, D], cache whose next slot is T).
    """
    batch, length = tokens.shape
    hidden, (keys, values) = backbone(
        embed_safe(tokens, mask), positions_of(mask), causal_bias(mask), keep_kv=True
    )
    grow = cache_length - length
    pad = ((0, 0), (0, 0), (0, grow), (0, 0), (0, 0))
    cache = KVCache(
        keys=jnp.pad(keys, pad),
        values=jnp.pad(values, pad),
        mask=jnp.pad(mask, ((0, 0), (0, grow))),
        slot=jnp.asarray(length, jnp.int32),
        positions=jnp.sum(mask, axis=-1, dtype=jnp.int32),
    )
    return hidden, cache


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
    old = jnp.where(cache.mask, 0.0, NEGATIVE)[:, None, None, None]
    bias = jnp.pad(old, ((0, 0),) * 4 + ((0, 1),))  # a token always sees itself
    hidden, (keys, values) = backbone(
        jnp.where(real, tokens, 0)[:, None],
        cache.positions[:, None],
        bias,
        (cache.keys, cache.values),
        keep_kv=True,
    )
    at = (0, 0, cache.slot, 0, 0)
    cache = KVCache(
        keys=jax.lax.dynamic_update_slice(cache.keys, keys, at),
        values=jax.lax.dynamic_update_slice(cache.values, values, at),
        mask=jax.lax.dynamic_update_slice(cache.mask, real[:, None], (0, cache.slot)),
        slot=cache.slot + 1,
        positions=cache.positions + real,
    )
    return hidden[:, 0], cache
