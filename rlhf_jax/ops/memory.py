"""What a backward pass computes anew instead of keeping it, and when it begins to.

Used by ``models/layers.py`` and ``models/transformer.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.ops.layout import platform
from rlhf_jax.types import Array


def after(tree: Any, signal: Array) -> Any:
    """``tree``, for computations that are not to begin before ``signal`` is there.

    XLA's compiler for CPUs begins with whatever waits for nothing, and drops
    optimization barriers before it orders a program. A sum with 0·signal it cannot
    drop, because 0·∞ is not 0.

    Args:
        tree: arrays.
        signal: finite, at least one entry.

    Returns:
        ``tree``; nan where ``signal`` begins with a number that is not finite.
    """
    if platform() != 'cpu':
        return jax.lax.optimization_barrier((tree, signal))[0]
    zero = 0 * signal.ravel()[0]
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def recomputed(fn: Callable[..., Array]) -> Callable[..., Array]:
    """``fn`` with a backward pass that is given the arguments alone, as
    ``jax.checkpoint`` has it, and begins when its cotangent is there.

    Args:
        fn: of arrays or None.
    """

    @jax.custom_vjp
    def call(*args: Array | None) -> Array:
        return fn(*args)

    def forward(*args: Array | None) -> tuple[Array, Any]:
        return fn(*args), args

    def backward(args: Any, cotangent: Array) -> Any:
        return jax.vjp(fn, *after(args, cotangent))[1](cotangent)

    call.defvjp(forward, backward)
    return call


@jax.custom_vjp
def look_up(table: Array, indices: Array) -> Array:
    """Rows of a table, [V, D] and [...] integer → [..., D].

    The zeros that its gradient is added to are made when the rest of the backward pass
    is over. XLA's compiler for CPUs would make them first and keep them throughout.
    """
    return table[indices]


def _look_up_forward(table: Array, indices: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[indices], (table, indices)


def _look_up_backward(saved: tuple[Array, Array], d_rows: Array) -> tuple[Array, None]:
    table, indices = saved
    return after(jnp.zeros_like(table), d_rows).at[indices].add(d_rows), None


look_up.defvjp(_look_up_forward, _look_up_backward)
