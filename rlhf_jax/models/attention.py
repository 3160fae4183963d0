"""What tokens attend to, computed in the form that each backend runs well.

On an NVIDIA GPU in 16 bits cuDNN's fused attention, on a TPU JAX's splash kernel,
elsewhere causal blocks of queries. Letters as in ``models/layers.py``, which calls
this.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.ops.layout import head_axes, per_device, platform, row_axes
from rlhf_jax.ops.logprobs import soft_cap
from rlhf_jax.types import Array

NEGATIVE = -1e30  # finite, so that a row without any key stays finite
# Causal attention goes over blocks of queries: of about so many tokens or more, and at
# most so many blocks, which are unrolled.
BLOCK, MAX_BLOCKS = 64, 8
# Queries and keys of a block of the splash kernel: the first that divides the length.
# It has no smaller ones.
SPLASH_BLOCKS = 512, 256, 128


def attend(
    q: Array, keys: Array, values: Array, visible: Array, cfg: TransformerConfig
) -> Array:
    """softmax(q·kᵀ/√H)·v of every head.

    Args:
        q: [B, T, K, G, H], of the last T of S tokens.
        keys: [B, K, S, H].
        values: [B, K, S, H].
        visible: [B, T, S] bool, keys that a token may see.
        cfg: of the model.

    Returns:
        [B, T, K, G, H]; of a token that sees nothing, anything finite.
    """
    if has_fused(cfg, q.shape[1], keys.shape[2]):
        return fused_attention(q, keys, values, visible, cfg, 'cudnn')
    if has_splash(cfg, q.shape[1], keys.shape[2]):
        return splash_attention(q, keys, values, visible, cfg)
    return blockwise_attention(q, keys, values, visible, cfg)


def has_fused(cfg: TransformerConfig, queries: int, keys: int) -> bool:
    """Whether cuDNN has this attention: on NVIDIA's GPUs, in 16 bits, for heads of up
    to 128 entries in eights, even lengths, no cap on scores. A single query gains
    nothing by it.
    """
    return (
        platform() == 'cuda'
        and cfg.dtype in ('bfloat16', 'float16')
        and cfg.head_dim <= 128
        and cfg.head_dim % 8 == 0
        and cfg.attention_softcap is None
        and queries > 1
        and queries % 2 == keys % 2 == 0
    )


def fused_attention(
    q: Array,
    keys: Array,
    values: Array,
    visible: Array,
    cfg: TransformerConfig,
    implementation: Literal['cudnn', 'xla'],
) -> Array:
    """:func:`attend` by ``jax.nn.dot_product_attention``, on every device for the rows
    and the heads that it has.
    """

    def rows(q: Array, keys: Array, values: Array, visible: Array) -> Array:
        out = jax.nn.dot_product_attention(
            q.reshape(*q.shape[:2], -1, q.shape[-1]),
            jnp.moveaxis(keys, 1, 2),
            jnp.moveaxis(values, 1, 2),
            mask=visible[:, None],
            scale=_scale(cfg),
            # Of whole sequences, so that nothing behind the diagonal is computed: with
            # fewer queries than keys the two sides of JAX's diagonal do not end
            # together.
            is_causal=cfg.attention == 'causal' and q.shape[1] == keys.shape[2],
            implementation=implementation,
        )
        return out.reshape(q.shape)

    batch, heads = row_axes(q.shape[0]), head_axes(keys.shape[1])
    by_token, by_head = P(batch, None, heads), P(batch, heads)
    in_specs = by_token, by_head, by_head, P(batch)
    return per_device(rows, in_specs, by_token)(q, keys, values, visible)


def has_splash(cfg: TransformerConfig, queries: int, keys: int) -> bool:
    """Whether the splash kernel has this attention: on TPUs, in bfloat16, of whole
    causal sequences in multiples of 128 tokens, without windows.
    """
    return (
        platform() == 'tpu'
        and cfg.dtype == 'bfloat16'
        and cfg.attention == 'causal'
        and not any(cfg.windowed)
        and queries == keys
        and queries % SPLASH_BLOCKS[-1] == 0
    )


def splash_attention(
    q: Array,
    keys: Array,
    values: Array,
    visible: Array,
    cfg: TransformerConfig,
    interpret: bool = False,
) -> Array:
    """:func:`attend` by ``jax.experimental.pallas.ops.tpu.splash_attention``, on every
    device for the rows and the heads that it has.

    The kernel is causal by itself and keeps documents apart by their ids. Which
    document a token belongs to is read from the first place that it sees; with windows
    that would be another one. ``interpret`` runs it without a TPU.
    """
    # Here, because TPUs alone need Pallas and its import takes time.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    _, length, heads, groups, _ = q.shape
    block = next(size for size in SPLASH_BLOCKS if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mqa(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * groups),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cfg.attention_softcap,
        interpret=interpret,
    )

    def rows(q: Array, keys: Array, values: Array, documents: Array) -> Array:
        ids = splash.SegmentIds(documents, documents)
        return jax.vmap(jax.vmap(kernel, (0, 0, 0, None)))(q, keys, values, ids)

    # Padding sees itself: the kernel divides by the sum of a row's weights.
    real = jnp.diagonal(visible, axis1=1, axis2=2)
    documents = jnp.where(real, jnp.argmax(visible, axis=-1), -1)
    q = jnp.moveaxis(q, 1, 3) * _scale(cfg)
    args = q.astype(keys.dtype), keys, values, documents.astype(jnp.int32)
    batch, by_head = P(row_axes(q.shape[0])), P(row_axes(q.shape[0]), head_axes(heads))
    rows = per_device(rows, (by_head, by_head, by_head, batch), by_head)
    return jnp.moveaxis(rows(*args), 3, 1)


def blockwise_attention(
    q: Array, keys: Array, values: Array, visible: Array, cfg: TransformerConfig
) -> Array:
    """:func:`attend` by matrix products; causal where the config says so: what lies
    behind the last query of a block is not computed at all. The backward pass computes
    the weights of a block anew and keeps two numbers of each row of them.

    Source: Dao et al. 2022, arXiv 2205.14135, app. B.
    """
    q = jnp.moveaxis(q, 1, 3)  # [B, K, G, T, H]: XLA runs this order faster
    out = _by_blocks(q, keys, values, visible[:, None, None], cfg)
    return jnp.moveaxis(out, 3, 1)


def _blocks(
    queries: int, keys: int, cfg: TransformerConfig
) -> list[tuple[slice, slice]]:
    """The queries of each block, and the keys up to the last of them."""
    count = min(round(queries / BLOCK), MAX_BLOCKS)
    if cfg.attention != 'causal' or count <= 1:
        return [(slice(queries), slice(keys))]
    size = -(-queries // count)
    starts = range(0, queries, size)
    return [(slice(i, i + size), slice(keys - queries + i + size)) for i in starts]


def _scores(q: Array, keys: Array, visible: Array, cfg: TransformerConfig) -> Array:
    """[B, K, G, T, S] float32."""
    scores = jnp.einsum(
        'bkgth,bksh->bkgts', q, keys, preferred_element_type=jnp.float32
    )
    scores = soft_cap(scores * _scale(cfg), cfg.attention_softcap)
    return jnp.where(visible, scores, NEGATIVE)


def _scale(cfg: TransformerConfig) -> float:
    return (cfg.query_scalar or cfg.head_dim) ** -0.5


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_blocks(
    q: Array, keys: Array, values: Array, visible: Array, cfg: TransformerConfig
) -> Array:
    """q [B, K, G, T, H]; visible [B, 1, 1, T, S]. Returns [B, K, G, T, H]."""
    return _forward(q, keys, values, visible, cfg)[0]


def _forward(
    q: Array, keys: Array, values: Array, visible: Array, cfg: TransformerConfig
) -> tuple[Array, tuple]:
    outs, norms = [], []
    for here, seen in _blocks(q.shape[3], keys.shape[2], cfg):
        scores = _scores(
            q[..., here, :], keys[:, :, seen], visible[..., here, seen], cfg
        )
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        inverse = 1 / jnp.sum(weights, axis=-1, keepdims=True)
        # Divided behind the product: by as many numbers as a head has, not as keys.
        out = jnp.einsum(
            'bkgts,bksh->bkgth',
            weights.astype(q.dtype),
            values[:, :, seen],
            preferred_element_type=jnp.float32,
        )
        outs.append((out * inverse).astype(q.dtype))
        norms.append((highest, inverse))
    out = jnp.concatenate(outs, axis=3)
    return out, (q, keys, values, visible, out, norms)


def _backward(
    cfg: TransformerConfig, saved: tuple, d_out: Array
) -> tuple[Array, Array, Array, None]:
    q, keys, values, visible, out, norms = saved
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # Σ_s weight·d_weight of a query, without either: Σ_h out·d_out.
    mean = product('bkgth,bkgth->bkgt', out, d_out)[..., None]
    d_q, d_keys, d_values = [], [], []
    for (here, seen), (highest, inverse) in zip(
        _blocks(q.shape[3], keys.shape[2], cfg), norms
    ):
        some_q, some_d_out = q[..., here, :], d_out[..., here, :]
        some_keys, shown = keys[:, :, seen], visible[..., here, seen]
        scores = _scores(some_q, some_keys, shown, cfg)
        weights = jnp.exp(scores - highest) * inverse
        d_weights = product('bkgth,bksh->bkgts', some_d_out, values[:, :, seen])
        d_scores = weights * (d_weights - mean[..., here, :]) * _scale(cfg)
        if cfg.attention_softcap is not None:
            d_scores *= 1 - jnp.square(scores / cfg.attention_softcap)
        d_scores = jnp.where(shown, d_scores, 0).astype(q.dtype)
        d_q.append(product('bkgts,bksh->bkgth', d_scores, some_keys))
        d_keys.append(product('bkgts,bkgth->bksh', d_scores, some_q))
        weights = weights.astype(q.dtype)
        d_values.append(product('bkgts,bkgth->bksh', weights, some_d_out))
    return (
        jnp.concatenate(d_q, axis=3).astype(q.dtype),
        _sum_from_the_front(d_keys).astype(keys.dtype),
        _sum_from_the_front(d_values).astype(values.dtype),
        None,
    )


_by_blocks.defvjp(_forward, _backward)


def _sum_from_the_front(parts: list[Array]) -> Array:
    """The sum of arrays [B, K, S_i, H], S_i ascending, that begin together."""
    ends = [part.shape[2] for part in parts]
    sums = [
        sum(part[:, :, begin:end] for part in parts[i:])
        for i, (begin, end) in enumerate(zip([0, *ends], ends))
    ]
    return jnp.concatenate(sums, axis=2)
