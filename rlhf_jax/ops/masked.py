"""Every masked reduction of the package, in one file.

A mean over devices or microbatches is never a mean of means: sums and weights are
reduced separately (``axis_name``) and divided once. Values under a False mask are
replaced before any arithmetic, so that a NaN in padding cannot leak. Read
``ops/advantages.py`` next.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.types import Array


def masked_sum(x: Array, mask: Array, axis: int | None = None) -> Array:
    """Sum of the entries of ``x`` where ``mask`` is True, in float32."""
    return jnp.sum(jnp.where(mask, x, 0).astype(jnp.float32), axis=axis)


def masked_mean(
    x: Array, mask: Array, axis: int | None = None, axis_name: str | None = None
) -> Array:
    """Mean of ``x`` where ``mask`` is True; 0 where nothing is counted.

    Args:
        x: any shape.
        mask: bool, same shape.
        axis: axis to reduce, None for all.
        axis_name: mapped device axis over which the mean is global.
    """
    total, weight = masked_sum(x, mask, axis), masked_sum(jnp.ones_like(x), mask, axis)
    if axis_name is not None:
        total, weight = jax.lax.psum((total, weight), axis_name)
    return total / jnp.maximum(weight, 1)


def whiten(
    x: Array,
    mask: Array,
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    axis_name: str | None = None,
) -> Array:
    """Scales the masked entries of ``x`` to unit variance, and to mean 0 if asked.

    y = (x − μ)·(σ² + 1e-8)^−½ (+ μ when ``shift_mean`` is False), 0 under the mask.

    Source: ``whiten`` of openai/lm-human-preferences (population variance, ε inside the
    root). TRL divides by n − 1 instead: ``unbiased``.

    Args:
        x: [B, T] float.
        mask: [B, T] bool.
        shift_mean: subtract the mean. Rewards keep theirs, because their sign has a
            meaning.
        unbiased: variance with n − 1 in the denominator.
        axis_name: mapped device axis; the statistics are always those of the whole
            batch.

    Returns:
        [B, T] float32.
    """
    x = jnp.where(mask, x, 0).astype(jnp.float32)
    mean = masked_mean(x, mask, axis_name=axis_name)
    variance = masked_mean(jnp.square(x - mean), mask, axis_name=axis_name)
    if unbiased:
        count = masked_sum(jnp.ones_like(x), mask)
        if axis_name is not None:
            count = jax.lax.psum(count, axis_name)
        variance = variance * count / jnp.maximum(count - 1, 1)
    whitened = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return jnp.where(mask, whitened, 0)


def last_index(mask: Array) -> Array:
    """Index of the last True of each row, [B, T] → [B] int32; 0 for a row without
    one.
    """
    positions = jnp.arange(mask.shape[-1], dtype=jnp.int32)
    return jnp.max(jnp.where(mask, positions, 0), axis=-1)


def right_align(x: Array, mask: Array) -> Array:
    """Right-aligns rows: rotates each until its last True is at its end, [B, T] → [B,
    T]. What stood behind the last True comes to the front.
    """
    behind = mask.shape[-1] - 1 - last_index(mask)
    places = jnp.arange(mask.shape[-1], dtype=jnp.int32) - behind[..., None]
    return jnp.take_along_axis(x, places % mask.shape[-1], axis=-1)


def at_last(x: Array, mask: Array) -> Array:
    """The entry of each row at its last True, [B, T] → [B]."""
    return jnp.take_along_axis(x, last_index(mask)[..., None], axis=-1)[..., 0]
