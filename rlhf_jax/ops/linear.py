"""The matrix product of every layer and of the vocabulary, with a backward pass that
XLA runs well.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from rlhf_jax.types import Array

_OVER_ROWS = (((0,), (0,)), ((), ()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Array, kernel: Array, dtype: jnp.dtype | None = None) -> Array:
    """x·W over the last axis of ``x``.

    The gradient of W is xᵀ·dy or (dyᵀ·x)ᵀ, whichever transposes the smaller factor.
    JAX always takes the second. On a CPU XLA then fuses the backward pass of an
    activation, or of the softmax over a vocabulary, into the transposed copy of dy, and
    walks memory against its order.

    Args:
        x: [..., D].
        kernel: [D, F], of the dtype of ``x``.
        dtype: of the result; None for that of ``x``. Its cotangent is rounded to the
            dtype of ``x`` before the products of the backward pass.

    Returns:
        [..., F].
    """
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
    rows_x, rows_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    if rows_x.shape[1] <= rows_dy.shape[1]:
        d_kernel = jax.lax.dot_general(rows_x, rows_dy, _OVER_ROWS)
    else:
        d_kernel = jax.lax.dot_general(rows_dy, rows_x, _OVER_ROWS).T
    return jnp.einsum('...f,df->...d', dy, kernel), d_kernel


linear.defvjp(_forward, _backward)
