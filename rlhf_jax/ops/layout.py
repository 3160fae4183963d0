"""How arrays lie on the mesh, for what the partitioner cannot find out by itself.

Steps do not know their mesh. Where a computation would lose the batch sharding (a
gather by a permutation, say), they call :func:`over_batch`, which acts only inside a
mesh that has the axes of ``sharding.py``, and is the identity on one device and under
``pmap``. A kernel is told which axes split its rows and its heads.
"""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from rlhf_jax.types import Array

BATCH_AXES = ('data', 'fsdp')  # mesh axes over which the rows of a batch are split
HEAD_AXIS = 'tensor'  # and the heads of its layers


def batch_shards(rows: int) -> int:
    """Over how many devices so many rows of a batch are split; 1 outside such a mesh,
    or where they do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
        return 1
    size = mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]
    return 1 if rows % size else size


def over_batch(x: Array, axis: int = 0) -> Array:
    """Constrains axis ``axis`` of ``x`` to be split over the batch axes of the mesh, if
    any.
    """
    if batch_shards(x.shape[axis]) == 1:
        return x
    spec = PartitionSpec(*(None,) * axis, BATCH_AXES)
    return jax.lax.with_sharding_constraint(x, spec)


def row_axes(rows: int) -> tuple[str, ...] | None:
    """The mesh axes that split so many rows of a batch; None where nothing does."""
    return BATCH_AXES if batch_shards(rows) > 1 else None


def head_axes(heads: int) -> str | None:
    """The mesh axis that splits so many heads; None where nothing does."""
    size = jax.sharding.get_abstract_mesh().shape.get(HEAD_AXIS, 1)
    return HEAD_AXIS if size > 1 and heads % size == 0 else None
