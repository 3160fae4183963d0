"""The parts of a Transformer layer: rotary positions, norms, attention, MLP.

Letters: ``b`` sequences, ``t`` query tokens, ``s`` key tokens, ``d`` width, ``k``
key-value heads, ``g`` query heads per key-value head, ``h`` head size, ``f`` MLP width.
Read ``models/transformer.py`` next.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.models.attention import attend
from rlhf_jax.models.config import RopeScaling, TransformerConfig
from rlhf_jax.ops import cpu
from rlhf_jax.ops.linear import linear
from rlhf_jax.ops.memory import recomputed
from rlhf_jax.types import Array

KV = tuple[Array, Array]  # keys and values, [B, K, S, H] each


@struct.dataclass(kw_only=True)
class View:
    """What a layer's attention may see, and where its tokens stand."""

    visible: Array  # [B, T, S] bool, keys that a token may see
    slot: Array | None  # [] int32, where a cache takes these tokens
    rotary: tuple[Array, Array] | None  # cos and sin, [B, T, 1, R/2] float32


def rope_frequencies(
    dim: int, theta: float, scaling: RopeScaling | None = None
) -> Array:
    """θ^(−2i/R) for i < R/2, stretched as ``scaling`` says, [R/2] float32.

    Source: Su et al. 2021, arXiv 2104.09864; see ``RopeScaling`` for the stretching.
    """
    frequencies = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if scaling is None:
        return frequencies
    if scaling.kind == 'linear':
        return frequencies / scaling.factor
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = jnp.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotary_tables(positions: Array, frequencies: Array) -> tuple[Array, Array]:
    """cos and sin of position·frequency, [B, T] → [B, T, 1, R/2] each."""
    angles = positions.astype(jnp.float32).reshape(-1, 1) * frequencies
    tables = _computed_once(jnp.cos(angles), jnp.sin(angles))
    cos, sin = (table.reshape(*positions.shape, 1, -1) for table in tables)
    return cos, sin


@cpu.on_cpu(cpu.computed_once)
def _computed_once(*tables: Array) -> tuple[Array, ...]:
    return tables


def rope(x: Array, tables: tuple[Array, Array]) -> Array:
    """Rotates pairs (i, i + R/2) of the first R entries of the last axis.

    Source: Su et al. 2021, arXiv 2104.09864, in the half-split layout that the weights
    of Hugging Face have.

    Args:
        x: [B, T, N, H].
        tables: of :func:`rotary_tables`.
    """
    cos, sin = tables
    half = cos.shape[-1]
    x32 = x.astype(jnp.float32)
    first, second, rest = jnp.split(x32, (half, 2 * half), axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last ``axes`` axes, computed in float32."""

    config: TransformerConfig
    axes: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        axes = tuple(range(-self.axes, 0))
        shape = x.shape[-self.axes :]
        initial = nn.initializers.constant(1.0 - cfg.norm_offset)
        scale, bias = self.param('scale', initial, shape), None
        if cfg.norm == 'layer':
            bias = self.param('bias', nn.initializers.zeros, shape)

        def normed(x: Array, scale: Array, bias: Array | None) -> Array:
            x32 = x.astype(jnp.float32)
            if bias is not None:
                x32 = x32 - jnp.mean(x32, axis=axes, keepdims=True)
            square = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
            x32 = x32 * jax.lax.rsqrt(square + cfg.norm_eps)
            x32 = x32 * (scale + cfg.norm_offset)
            return (x32 if bias is None else x32 + bias).astype(x.dtype)

        return recomputed(normed)(x, scale, bias)


class Attention(nn.Module):
    """Grouped-query attention over the cache (if any) and the tokens given."""

    config: TransformerConfig
    last: int | None = None  # tokens, from the end, that ask; None for all

    @nn.compact
    def __call__(
        self, x: Array, cache: KV | None, layer: Array | None, view: View
    ) -> tuple[Array, KV]:
        """Args: x [B, T, D]; cache that takes these tokens, or None; layer, see
        :func:`write`; view over the keys of the cache, or of these tokens.

        Returns: (output [B, T, D] or of the last tokens, the cache, or without one the
            (keys, values) [B, K, T, H] of these tokens).
        """
        cfg = self.config
        asking = slice(None if self.last is None else -self.last, None)
        if cfg.fused:
            ends = cfg.num_heads, cfg.num_heads + cfg.num_kv_heads
            heads = ends[1] + cfg.num_kv_heads
            qkv = self._project('query_key_value', heads, x)
            q, k, v = jnp.split(qkv, ends, axis=2)
            q = q[:, asking]
        else:
            q = self._project('query', cfg.num_heads, x[:, asking])
            k = self._project('key', cfg.num_kv_heads, x)
            v = self._project('value', cfg.num_kv_heads, x)
        if cfg.qk_norm is not None:
            axes = 1 if cfg.qk_norm == 'head' else 2
            q = Norm(cfg, axes, name='query_norm')(q)
            k = Norm(cfg, axes, name='key_norm')(k)
        if view.rotary is not None:
            tables = tuple(table[:, asking] for table in view.rotary)
            q, k = rope(q, tables), rope(k, view.rotary)
        k, v = (jnp.moveaxis(x, 2, 1) for x in (k, v))
        groups = cfg.num_heads // cfg.num_kv_heads
        q = q.reshape(*q.shape[:2], cfg.num_kv_heads, groups, cfg.head_dim)
        kv = (k, v)
        if cache is not None:
            kv, (k, v) = write(cache, (k, v), layer, view.slot)
        out = attend(q, k, v, view.visible[:, asking], cfg)
        out = out.reshape(*out.shape[:2], -1)
        # Residual outputs start smaller by √(2·layers), as in GPT-2.
        init = nn.initializers.normal(cfg.init_std / (2 * cfg.num_layers) ** 0.5)
        shape = (cfg.num_heads, cfg.head_dim, cfg.width)
        kernel = self.param('out_kernel', init, shape)
        out = linear(out, kernel.reshape(-1, cfg.width).astype(x.dtype))
        if cfg.attention_out_bias:
            offset = self.param('out_bias', nn.initializers.zeros, (cfg.width,))
            out = out + offset.astype(x.dtype)
        return out, kv

    def _project(self, name: str, heads: int, x: Array) -> Array:
        cfg = self.config
        init = nn.initializers.normal(cfg.init_std)
        kernel = self.param(f'{name}_kernel', init, (cfg.width, heads, cfg.head_dim))
        y = linear(x, kernel.reshape(cfg.width, -1).astype(x.dtype))
        y = y.reshape(*x.shape[:2], heads, cfg.head_dim)
        if cfg.attention_bias:
            zeros = nn.initializers.zeros
            offset = self.param(f'{name}_bias', zeros, (heads, cfg.head_dim))
            y = y + offset.astype(x.dtype)
        return y


def write(cache: KV, kv: KV, layer: Array | None, slot: Array) -> tuple[KV, KV]:
    """Puts keys and values into a cache before they are attended to.

    A cache that is read first and written later is copied by XLA at every token.

    Args:
        cache: of a layer, [B, K, S, H] each, or of all layers, [L, B, K, S, H].
        kv: of the new tokens, [B, K, T, H] each.
        layer: [] int32 of a cache of all layers; None for one of this layer.
        slot: [] int32, the first to write.

    Returns:
        (the new cache, the part of it that is this layer's).
    """
    if layer is None:
        put = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=2
        )
        cache = tuple(map(put, cache, kv))
        return cache, cache
    at = (layer, 0, 0, slot, 0)
    cache = tuple(
        jax.lax.dynamic_update_slice(old, new[None], at) for old, new in zip(cache, kv)
    )
    take = functools.partial(
        jax.lax.dynamic_index_in_dim, index=layer, axis=0, keepdims=False
    )
    return cache, tuple(map(take, cache))


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

        def biased(name: str, y: Array) -> Array:
            if cfg.mlp_bias:
                zeros = nn.initializers.zeros
                offset = self.param(f'{name}_bias', zeros, (y.shape[-1],))
                y = y + offset.astype(y.dtype)
            return y

        def project(name: str, size: int) -> Array:
            kernel = self.param(f'{name}_kernel', init, (cfg.width, size))
            return biased(name, linear(x, kernel.astype(x.dtype)))

        # Of what is as wide as the MLP the backward pass finds these products alone,
        # and computes the activation anew.
        @recomputed
        def down(kernel: Array, first: Array, up: Array | None) -> Array:
            hidden = activate(first)
            return linear(hidden if up is None else hidden * up, kernel)

        if cfg.gated_mlp and cfg.fused:
            first, up = jnp.split(project('gate_up', 2 * cfg.mlp_width), 2, axis=-1)
        elif cfg.gated_mlp:
            up = project('up', cfg.mlp_width)
            first = project('gate', cfg.mlp_width)
        else:
            first, up = project('up', cfg.mlp_width), None
        kernel = self.param('down_kernel', down_init, (cfg.mlp_width, cfg.width))
        return biased('down', down(kernel.astype(x.dtype), first, up))


class Block(nn.Module):
    """One layer; the signature is that of a scan body over the layers."""

    config: TransformerConfig
    keep_kv: bool = False
    last: int | None = None  # tokens, from the end, that the layer is run for

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, KV | None],
        layer: Array | None,
        windowed: Array | None,
        views: list[View],
    ) -> tuple[tuple[Array, KV | None], KV | None]:
        """Args: carry, x [B, T, D] and the cache (:func:`write`); layer [] int32;
        windowed [] bool, which of two views this layer has; views, one or [everything,
        window].

        Returns: (x and the cache, keys and values where there is no cache and they are
            to be kept).
        """
        cfg = self.config
        x, cache = carry
        view = views[0]
        if len(views) > 1:
            view = jax.tree.map(lambda a, b: jnp.where(windowed, b, a), *views)

        def norm(name: str, y: Array, *places: str) -> Array:
            return Norm(cfg, name=name)(y) if cfg.residual in places else y

        y = norm('attention_norm', x, 'pre', 'parallel', 'both')
        y, kv = Attention(cfg, self.last, name='attention')(y, cache, layer, view)
        if self.last is not None:
            x = x[:, -self.last :]
        if cache is not None:
            cache, kv = kv, None
        kv = kv if self.keep_kv else None
        y = norm('attention_out_norm', y, 'post', 'both')
        if cfg.residual == 'parallel':
            x = x + y + MLP(cfg, name='mlp')(Norm(cfg, name='mlp_norm')(x))
            return (x, cache), kv
        x = norm('attention_out_norm', x + y, 'outer')
        y = norm('mlp_norm', x, 'pre', 'both')
        y = norm('mlp_out_norm', MLP(cfg, name='mlp')(y), 'post', 'both')
        x = norm('mlp_out_norm', x + y, 'outer')
        return (x, cache), kv
