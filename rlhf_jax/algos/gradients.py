"""Exact gradients over microbatches and devices.

A loss function returns a *sum* and its *weight*: how much was summed up, in tokens or
pairs. Weights and gradients of sums are added over microbatches and devices, and the
gradient is divided by the total weight once, at the end. A mean of the means of
microbatches would differ from that where their weights do. Read ``algos/sft.py`` next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.ops.layout import batch_shards, over_batch
from rlhf_jax.types import (
    Array,
    Metrics,
    Params,
    TrainState,
    merge_metrics,
    reduce_metrics,
)

# (params, batch) -> (sum of the loss, its weight, metrics)
LossFn = Callable[[Params, Any], tuple[Array, Array, Metrics]]


class Cuts(NamedTuple):
    """Length buckets: a microbatch is cut to the shortest size that holds its rows."""

    lengths: Array  # [B] int32, places that each row needs
    sizes: tuple[int, ...]  # places of a microbatch, ascending; the last holds all rows
    cut: Callable[[Any, int], Any]  # (rows, size) -> rows of so many places


def microbatches(batch: Any, count: int) -> Any:
    """Splits the rows of a batch into ``count`` microbatches: [B, …] → [count, B/count,
    …].

    Microbatch i holds the rows i, i + count, …, so that rows stay on the device they
    are on.

    Raises:
        ValueError: the rows do not divide.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % count:
        raise ValueError(
            f'{rows} rows per device group do not divide into '
            f'num_microbatches={count}; '
            f'use a divisor of {rows}'
        )

    def split(x: Array) -> Array:
        x = jnp.swapaxes(x.reshape(rows // count, count, *x.shape[1:]), 0, 1)
        return over_batch(x, axis=1)

    return jax.tree.map(split, batch)


def sort_by_length(batch: Any, lengths: Array, count: int) -> Any:
    """Orders the rows so that :func:`microbatches` puts rows of similar length into the
    same microbatch, the shortest first. Every row stays on its device.

    Args:
        batch: a pytree whose leaves have the rows in front.
        lengths: [B].
        count: of the microbatches.
    """
    rows = lengths.shape[0]
    devices = batch_shards(rows)
    if rows % (devices * count):
        return batch  # its microbatches do not lie evenly on the devices
    order = jnp.argsort(lengths.reshape(devices, -1), axis=1)
    order = order + jnp.arange(devices)[:, None] * order.shape[1]
    order = order.reshape(devices, count, -1).swapaxes(1, 2).reshape(rows)
    return jax.tree.map(lambda x: over_batch(x[order]), batch)


def mean_gradient(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    *,
    num_microbatches: int = 1,
    axis_name: str | None = None,
    cuts: Cuts | None = None,
) -> tuple[Params, Metrics]:
    """Gradient of Σ loss / Σ weight over all microbatches and devices.

    Args:
        loss_fn: returns a loss *sum*, its weight (free of ``params``) and metrics.
        params: where the gradient is taken.
        batch: a pytree whose leaves have the rows in front.
        num_microbatches: gradients are accumulated over this many parts, one at a time.
        axis_name: mapped device axis, None outside ``pmap``.
        cuts: length buckets: rows are sorted by length, and every microbatch is cut to
            the shortest size that holds its rows. Each size is compiled. None for whole
            rows.

    Returns:
        (gradient like ``params``, metrics reduced over everything).
    """

    def whole(piece: Any) -> tuple[Params, Array, Metrics]:
        def total(p: Params) -> tuple[Array, tuple[Array, Metrics]]:
            loss, weight, metrics = loss_fn(p, piece)
            return loss, (weight, metrics)

        gradient, (weight, metrics) = jax.grad(total, has_aux=True)(params)
        return gradient, weight, metrics

    def fitted(piece: tuple[Any, Array]) -> tuple[Params, Array, Metrics]:
        rows, lengths = piece
        which = jnp.searchsorted(jnp.asarray(cuts.sizes), jnp.max(lengths))
        forms = [lambda rows, n=n: whole(cuts.cut(rows, n)) for n in cuts.sizes]
        return jax.lax.switch(which, forms, rows)

    part = whole
    if cuts is not None:
        part, batch = fitted, (batch, cuts.lengths)
        batch = sort_by_length(batch, cuts.lengths, num_microbatches)
    if num_microbatches == 1:
        gradient, weight, metrics = part(batch)
    else:
        pieces = microbatches(batch, num_microbatches)
        first = jax.tree.map(lambda x: x[0], pieces)
        rest = jax.tree.map(lambda x: x[1:], pieces)

        def add(carry: Any, piece: Any) -> tuple[Any, None]:
            gradient, weight, metrics = carry
            more = part(piece)
            gradient = jax.tree.map(jnp.add, gradient, more[0])
            return (gradient, weight + more[1], merge_metrics(metrics, more[2])), None

        (gradient, weight, metrics), _ = jax.lax.scan(add, part(first), rest)
    if axis_name is not None:
        gradient, weight = jax.lax.psum((gradient, weight), axis_name)
    scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0.0)
    gradient = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradient)
    return gradient, reduce_metrics(metrics, axis_name)


def apply_gradient(
    state: TrainState, gradient: Params, tx: optax.GradientTransformation
) -> TrainState:
    """The state after one optimizer update."""
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)
