"""Rematerialisation, and the order of operations in a backward pass, to save memory.

``recomputed`` is ``jax.checkpoint`` for one function; ``after`` keeps XLA from starting
an operation early and holding its result. Used by ``models/layers.py`` and
``models/transformer.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax.ops import cpu
from rlhf_jax.types import Array


@cpu.on_cpu(cpu.after)
def after(tree: Any, signal: Array) -> Any:
    """Returns ``tree``, but nothing computed from it starts before ``signal`` is known.

    Args:
        tree: arrays.
        signal: finite, at least one entry.

    Returns:
        ``tree``; on a CPU nan where ``signal`` begins with a number that is not finite.
    """
    return jax.lax.optimization_barrier((tree, signal))[0]


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


@cpu.on_cpu(cpu.look_up)
def look_up(table: Array, indices: Array) -> Array:
    """Rows of a table, [V, D] and [...] integer → [..., D]."""
    return table[indices]
