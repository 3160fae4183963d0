"""A hint to the partitioner: this array is split over the batch.

Steps do not know their mesh. Where a computation would lose the batch sharding (a
gather by a permutation, say), they call :func:`over_batch`, which acts only inside a
mesh that has the axes of ``sharding.py``, and is the identity on one device and under
``pmap``.
"""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from rlhf_jax.types import Array

BATCH_AXES = ('data', 'fsdp')  # mesh axes over which the rows of a batch are split


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
