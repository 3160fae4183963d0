"""What tokens attend to, computed in the form that each backend runs well.

On an NVIDIA GPU in 16 bits cuDNN's fused attention, elsewhere causal blocks of queries.
Letters as in ``models/layers.py``, which calls this.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend

from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.ops.logprobs import soft_cap
from rlhf_jax.types import Array

NEGATIVE = -1e30  # finite, so that a row without any key stays finite
# Causal attention goes over blocks of queries: of about so many tokens or more, and at
# most so many blocks, which are unrolled.
BLOCK, MAX_BLOCKS = 64, 8


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
    return blockwise_attention(q, keys, values, visible, cfg)


def has_fused(cfg: TransformerConfig, queries: int, keys: int) -> bool:
    """Whether cuDNN has this attention: on NVIDIA's GPUs, in 16 bits, for heads of up
    to 128 entries in eights, even lengths, no cap on scores. A single query gains
    nothing by it.
    """
    return (
        'cuda' in get_backend().platform_version
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
    """:func:`attend` by ``jax.nn.dot_product_attention``."""
    batch, length, *heads, size = q.shape
    out = jax.nn.dot_product_attention(
        q.reshape(batch, length, -1, size),
        jnp.moveaxis(keys, 1, 2),
        jnp.moveaxis(values, 1, 2),
        mask=visible[:, None],
        scale=(cfg.query_scalar or cfg.head_dim) ** -0.5,
        # Of whole sequences, so that nothing behind the diagonal is computed: with
        # fewer queries than keys the two sides of JAX's diagonal do not end together.
        is_causal=cfg.attention == 'causal' and length == keys.shape[2],
        implementation=implementation,
    )
    return out.reshape(batch, length, *heads, size)


def blockwise_attention(
    q: Array, keys: Array, values: Array, visible: Array, cfg: TransformerConfig
) -> Array:
    """:func:`attend` by matrix products; causal where the config says so: what lies
    behind the last query of a block is not computed at all, and the weights of a block
    are computed anew in its backward pass, not kept.
    """
    q = jnp.moveaxis(q, 1, 3)  # [B, K, G, T, H]: XLA runs this order faster
    visible = visible[:, None, None]
    block_of = functools.partial(_block, cfg=cfg)
    length, before = q.shape[3], keys.shape[2] - q.shape[3]
    count = min(round(length / BLOCK), MAX_BLOCKS)
    if cfg.attention != 'causal' or count <= 1:
        return jnp.moveaxis(block_of(q, keys, values, visible), 3, 1)
    block_of, blocks, size = jax.checkpoint(block_of), [], -(-length // count)
    for start in range(0, length, size):
        here, seen = slice(start, start + size), slice(before + start + size)
        block = q[..., here, :], keys[:, :, seen], values[:, :, seen]
        blocks.append(block_of(*block, visible[..., here, seen]))
    return jnp.moveaxis(jnp.concatenate(blocks, axis=3), 3, 1)


def _block(
    q: Array, keys: Array, values: Array, visible: Array, *, cfg: TransformerConfig
) -> Array:
    """q [B, K, G, T, H]; visible [B, 1, 1, T, S]. Returns [B, K, G, T, H]."""
    scores = jnp.einsum(
        'bkgth,bksh->bkgts', q, keys, preferred_element_type=jnp.float32
    )
    scores = soft_cap(
        scores * (cfg.query_scalar or cfg.head_dim) ** -0.5, cfg.attention_softcap
    )
    weights = jax.nn.softmax(jnp.where(visible, scores, NEGATIVE), axis=-1)
    return jnp.einsum('bkgts,bksh->bkgth', weights.astype(q.dtype), values)
