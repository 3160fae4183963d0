"""The matrix product of every layer and of the vocabulary, with a backward pass that
XLA runs well.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from rlhf_jax.ops.layout import platform
from rlhf_jax.types import Array

_OVER_ROWS = (((0,), (0,)), ((), ()))
# Up to so many rows a CPU has better code for xᵀ as the first factor; with AVX-512 far
# worse code above.
FEW_ROWS = 24


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Array, kernel: Array, dtype: jnp.dtype | None = None) -> Array:
    """x·W over the last axis of ``x``.

    The gradient of W is xᵀ·dy or (dyᵀ·x)ᵀ, whichever transposes the smaller factor.
    JAX always takes the second. On a CPU XLA then fuses the backward pass of an
    activation, or of the softmax over a vocabulary, into the transposed copy of dy, and
    walks memory against its order.

    Of few rows, as decoding has them, XLA's library for CPUs spends most of the time on
    packing W. It has no product of a transposed first factor, for which XLA turns to
    Eigen, and that packs faster.

    Args:
        x: [..., D].
        kernel: [D, F], of the dtype of ``x``.
        dtype: of the result; None for that of ``x``. Its cotangent is rounded to the
            dtype of ``x`` before the products of the backward pass.

    Returns:
        [..., F].
    """
    *outer, width = x.shape
    rows = math.prod(outer)
    if not 1 < rows <= FEW_ROWS or platform() != 'cpu':
        return jnp.einsum('...d,df->...f', x, kernel, preferred_element_type=dtype)
    # The barrier keeps XLA from turning it back.
    columns = jax.lax.optimization_barrier(x.reshape(rows, width).T)
    y = jax.lax.dot_general(columns, kernel, _OVER_ROWS, preferred_element_type=dtype)
    return y.reshape(*outer, -1)


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


def kernel_gradient(x: Array, dy: Array) -> Array:
    """xᵀ·dy of [N, D] and [N, F] → [D, F]: the gradient of a kernel, see
    :func:`linear`.
    """
    if x.shape[1] <= dy.shape[1]:
        return _over_rows(x, dy)
    product = _over_rows(dy, x)
    if platform() == 'cpu':  # XLA would drop the turn and transpose the wider factor
        product = jax.lax.optimization_barrier(product)
    return product.T


def _over_rows(narrow: Array, wide: Array) -> Array:
    """[N, D] and [N, F] → [D, F], narrowᵀ·wide."""
    if platform() != 'cpu':
        return jax.lax.dot_general(narrow, wide, _OVER_ROWS)
    # XLA would turn to Eigen here too, which is slower than its library and a copy.
    return jax.lax.optimization_barrier(narrow.T) @ wide
