"""Rematerialisation, and the order of operations in a backward pass, to save memory.

``recomputed`` is ``jax.checkpoint`` for one function; ``after`` keeps XLA from starting
an operation early and holding its result. Used by ``models/layers.py`` and
``models/transformer.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.ops.layout import platform
from rlhf_jax.types import Array


def after(tree: Any, signal: Array) -> Any:
    """Returns ``tree``, but nothing computed from it starts before ``signal`` is known.

    XLA's compiler for CPUs schedules operations without pending inputs first, and
    removes optimization barriers before scheduling. So 0·signal is added there, which
    XLA cannot remove, because 0·∞ is not 0.

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
    """``fn`` with remat: its backward pass keeps only the arguments, like that of
    ``jax.checkpoint``, and recomputes the rest once its cotangent is known.

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

    The zeros that its gradient is added to are allocated at the end of the backward
    pass. XLA's compiler for CPUs would allocate them first and hold them throughout.
    """
    return table[indices]


def _look_up_forward(table: Array, indices: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[indices], (table, indices)


def _look_up_backward(saved: tuple[Array, Array], d_rows: Array) -> tuple[Array, None]:
    table, indices = saved
    return after(jnp.zeros_like(table), d_rows).at[indices].add(d_rows), None


look_up.defvjp(_look_up_forward, _look_up_backward)
