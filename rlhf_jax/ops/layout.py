"""How arrays lie on the mesh, for what the partitioner cannot find out by itself, and
which platform a program is for.

Steps do not know their mesh. Where a computation would lose the batch sharding (a
gather by a permutation, say), they call :func:`over_batch`, which acts only inside a
mesh that has the axes of ``sharding.py``, and is the identity on one device and under
``pmap``. A kernel runs on each device for its rows and heads (:func:`per_device`), and
what suits one platform alone asks :func:`platform`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.extend.backend import get_backend
from jax.sharding import PartitionSpec

from rlhf_jax.types import Array

BATCH_AXES = ('data', 'fsdp')  # mesh axes over which the rows of a batch are split
HEAD_AXIS = 'tensor'  # and the heads of its layers


def platform() -> Literal['cpu', 'cuda', 'rocm', 'tpu']:
    """What the program that is being traced will run on: the devices of the mesh that
    ``sharding.compile_step`` sets, which need not be there. Without a mesh, as in a
    plain ``jax.jit``, JAX's default backend, which is asked nowhere else.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        backend = get_backend()
        name, is_nvidia = backend.platform, 'cuda' in backend.platform_version
    else:
        name, is_nvidia = device.platform, 'NVIDIA' in device.device_kind
    if name != 'gpu':
        return name
    return 'cuda' if is_nvidia else 'rocm'


def per_device(
    fn: Callable[..., Any], in_specs: tuple[PartitionSpec, ...], out_specs: Any
) -> Callable[..., Any]:
    """``fn``, run by every device of the mesh for its part: the partitioner cannot look
    into a kernel. On one device and under ``pmap``, ``fn`` itself.

    Args:
        fn: of arrays; for parts of them it gives the parts of its result.
        in_specs: how the arguments are split, by :func:`row_axes` and
            :func:`head_axes`; what they leave whole, every device computes alike.
        out_specs: how the results are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not {*BATCH_AXES, HEAD_AXIS} <= set(mesh.axis_names):
        return fn
    specs = {'in_specs': in_specs, 'out_specs': out_specs}
    return jax.shard_map(fn, **specs, check_vma=False)


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
