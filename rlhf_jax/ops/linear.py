"""The matrix product of every layer and of the vocabulary."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from rlhf_jax.ops import cpu
from rlhf_jax.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Array, kernel: Array, dtype: jnp.dtype | None = None) -> Array:
    """x·W over the last axis of ``x``.

    Args:
        x: [..., D].
        kernel: [D, F], of the dtype of ``x``.
        dtype: of the result; None for that of ``x``. Its cotangent is rounded to the
            dtype of ``x`` before the products of the backward pass.

    Returns:
        [..., F].
    """
    return _product(x, kernel, dtype)


@cpu.on_cpu(cpu.product)
def _product(x: Array, kernel: Array, dtype: jnp.dtype | None) -> Array:
    return jnp.einsum('...d,df->...f', x, kernel, preferred_element_type=dtype)


def _forward(
    x: Array, kernel: Array, dtype: jnp.dtype | None
) -> tuple[Array, tuple[Array, Array]]:
    return linear(x, kernel, dtype), (x, kernel)


def _backward(
    dtype: jnp.dtype | None, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    dy = dy.astype(x.dtype)
    d_kernel = kernel_gradient(x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))
    return jnp.einsum('...f,df->...d', dy, kernel), d_kernel


linear.defvjp(_forward, _backward)


@cpu.on_cpu(cpu.kernel_gradient)
def kernel_gradient(x: Array, dy: Array) -> Array:
    """xᵀ·dy of [N, D] and [N, F] → [D, F], the gradient of a kernel: as it stands, or
    as (dyᵀ·x)ᵀ, whichever transposes the narrower factor.
    """
    if x.shape[1] <= dy.shape[1]:
        return jax.lax.dot_general(x, dy, cpu.OVER_ROWS)
    return jax.lax.dot_general(dy, x, cpu.OVER_ROWS).T
