"""What is written for CPUs alone; it changes speed and memory, and nothing that is
computed.

Where XLA's compiler for CPUs turns the plain definition of a function into slow or
large code, the definition carries ``@on_cpu(other)``, and ``other`` of this file runs
in its place in programs for a CPU. Whoever wants to know what is computed reads the
definition and can leave this file out. The last two functions are for the process that
compiles.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from rlhf_jax.ops.layout import platform
from rlhf_jax.types import Array

OVER_ROWS = (((0,), (0,)), ((), ()))  # a dot_general of [N, D] and [N, F] → [D, F]
# Up to so many rows there is better code for xᵀ as the first factor; with AVX-512 far
# worse code above.
FEW_ROWS = 24
# From so many tokens on, and for so many rows at most, there is better code if the
# unembedding lies as [V, D].
LARGE_VOCABULARY, ROWS_BY_TOKENS = 2**14, 16
# The largest float32 block of logits of a sum, in entries: 32 MiB.
MAX_SUM_LOGITS = 2**23
# In so many turns a block's part of the gradient of the unembedding is added.
PARTS = 4

Fn = TypeVar('Fn', bound=Callable[..., Any])


def is_target() -> bool:
    """Whether the program that is being traced will run on a CPU."""
    return platform() == 'cpu'


def on_cpu(other: Callable[..., Any]) -> Callable[[Fn], Fn]:
    """Decorates a plain definition that a program for a CPU replaces.

    Args:
        other: called as ``other(plain, …)`` in a program for a CPU; gives the same, up
            to rounding.
    """

    def decorate(plain: Fn) -> Fn:
        @functools.wraps(plain)
        def call(*args: Any) -> Any:
            return other(plain, *args) if is_target() else plain(*args)

        return call

    return decorate


# ---------------------------------------------------------------------------- products


def product(
    plain: Callable[..., Array], x: Array, kernel: Array, dtype: jnp.dtype | None
) -> Array:
    """x·W. Of few rows, as decoding has them, XLA's library spends most of the time on
    packing W. It has no product of a transposed first factor, for which XLA turns to
    Eigen, and that packs faster.
    """
    *outer, width = x.shape
    rows = math.prod(outer)
    if not 1 < rows <= FEW_ROWS:
        return plain(x, kernel, dtype)
    # The barrier keeps XLA from turning it back.
    columns = jax.lax.optimization_barrier(x.reshape(rows, width).T)
    y = jax.lax.dot_general(columns, kernel, OVER_ROWS, preferred_element_type=dtype)
    return y.reshape(*outer, -1)


def kernel_gradient(plain: Callable[..., Array], x: Array, dy: Array) -> Array:
    """xᵀ·dy, by a copy of the narrow factor. Without the barriers XLA would transpose
    the wide one, fuse the backward pass of an activation, or of the softmax over a
    vocabulary, into that copy, and walk memory against its order; or turn to Eigen,
    which is slower here than XLA's library and a copy.
    """
    del plain
    if x.shape[1] <= dy.shape[1]:
        return jax.lax.optimization_barrier(x.T) @ dy
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(dy.T) @ x).T


def add_gradient(
    plain: Callable[..., Array], total: Array, states: Array, d_logits: Array
) -> Array:
    """total + statesᵀ·d_logits, for a few columns of the states at a time: a product is
    written out before it is added.
    """
    width = total.shape[0]
    if width % PARTS:
        return plain(total, states, d_logits)
    size = width // PARTS

    def add(part: Array, total: Array) -> Array:
        columns = jax.lax.dynamic_slice_in_dim(states, part * size, size, axis=1)
        rows = jax.lax.dynamic_slice_in_dim(total, part * size, size)
        rows = plain(rows, columns, d_logits)
        return jax.lax.dynamic_update_slice_in_dim(total, rows, part * size, axis=0)

    return jax.lax.fori_loop(0, PARTS, add, total)


def repeated_product(
    plain: Callable[..., Any], unembedding: Array, rows: int
) -> Callable[[Array], Array]:
    """states ↦ states·W. For few rows and a large vocabulary W is turned to [V, D]
    once, before the loop; a tied one lies like that already. XLA's library reads that
    faster.
    """
    if not 1 < rows <= ROWS_BY_TOKENS or unembedding.shape[1] < LARGE_VOCABULARY:
        return plain(unembedding, rows)
    turned = unembedding.T

    def by_tokens(states: Array) -> Array:
        kernel = turned.astype(states.dtype)
        columns = jnp.einsum(
            'vd,bd->vb', kernel, states, preferred_element_type=jnp.float32
        )
        # The barrier keeps XLA from making it states·W again.
        return jax.lax.optimization_barrier(columns).T

    return by_tokens


# ---------------------------------------------------------- what is computed, and when


def computed_once(plain: Callable[..., Any], *tables: Array) -> tuple[Array, ...]:
    """The same arrays [N, …]. XLA fuses a cosine into each of its uses and would
    compute it anew in every layer, for every head. It does not fuse through a gather.
    """
    del plain
    every = jnp.arange(tables[0].shape[0])
    return tuple(table[every] for table in tables)


def after(plain: Callable[..., Any] | None, tree: Any, signal: Array) -> Any:
    """``tree``, once ``signal`` is known. XLA schedules operations without pending
    inputs first, and removes optimization barriers before scheduling. So 0·signal is
    added, which it cannot remove, because 0·∞ is not 0.
    """
    del plain
    zero = 0 * signal.ravel()[0]
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def look_up(plain: Callable[..., Any], table: Array, indices: Array) -> Array:
    """Rows of a table. The zeros that its gradient is added to are allocated at the end
    of the backward pass; XLA would allocate them first and hold them throughout.
    """
    del plain
    return _look_up(table, indices)


@jax.custom_vjp
def _look_up(table: Array, indices: Array) -> Array:
    return table[indices]


def _look_up_forward(table: Array, indices: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[indices], (table, indices)


def _look_up_backward(saved: tuple[Array, Array], d_rows: Array) -> tuple[Array, None]:
    table, indices = saved
    zeros = after(None, jnp.zeros_like(table), d_rows)
    return zeros.at[indices].add(d_rows), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


# ------------------------------------------------------------------------- the process


def rarely_collect_garbage() -> None:
    """What imports, token ids and traced programs hold is no garbage, but Python would
    search all of it again and again while a run starts.
    """
    gc.set_threshold(50_000, 20, 20)


def give_back_freed_memory() -> None:
    """Hands what XLA's compiler has freed back to the system. glibc keeps it, some
    hundred MiB for a step of a few layers.
    """
    if hasattr(ctypes, 'windll'):
        return
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # glibc alone has it
    if trim is not None:
        trim(0)
