"""The mesh, where every parameter lies on it, and the only place that compiles a step.

Two backends run the same step functions and give the same numbers: ``jit`` over a
``(data, fsdp, tensor)`` mesh with ``NamedSharding``s, and ``pmap`` for pure data
parallelism. Read ``checkpoint.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.ops import cpu
from rlhf_jax.ops.layout import BATCH_AXES
from rlhf_jax.optim import path_of

PMAP_AXIS = 'devices'

# bfloat16 means rounded to bfloat16. By default XLA keeps what it fuses in float32,
# other things in every program, and log-probabilities of the same tokens differ by
# tenths of a nat between sampler, reference and training passes. Nothing in float32
# changes. jax.pmap takes no such options.
COMPILER_OPTIONS = {'xla_allow_excess_precision': False}

# First match wins; a path is searched, so optimizer moments follow their parameters.
# Stacked layers have a leading layer axis. `fsdp` cuts the width, `tensor` heads and
# MLP units. A rule but the last names every axis of its array: what an array has more,
# the members of an ensemble, stands in front and stays whole.
RULES: tuple[tuple[str, P], ...] = (
    (r'embed/tokens', P('tensor', 'fsdp')),
    (r'embed/positions', P(None, 'fsdp')),
    (r'lm_head', P('fsdp', 'tensor')),
    (r'attention/(query|key|value)_kernel', P(None, 'fsdp', 'tensor', None)),
    (r'attention/(query|key|value)_bias', P(None, 'tensor', None)),
    (r'attention/out_kernel', P(None, 'tensor', None, 'fsdp')),
    (r'mlp/(up|gate)_kernel', P(None, 'fsdp', 'tensor')),
    (r'mlp/(up|gate)_bias', P(None, 'tensor')),
    (r'mlp/down_kernel', P(None, 'tensor', 'fsdp')),
    (r'.', P()),
)

# What an argument or a result of a compiled function is:
#   params      a tree sharded by RULES (replicated under pmap)
#   batch       rows split over the data and fsdp axes
#   replicated  the same everywhere (keys, sampling parameters, metrics)
Kind = Literal['params', 'batch', 'replicated']


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How devices are used; −1 takes all that are left."""

    backend: Literal['jit', 'pmap'] = 'jit'
    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: ParallelConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh ``(data, fsdp, tensor)`` over all devices.

    Raises:
        ValueError: axes that do not multiply to the number of devices, an unknown
            backend, or ``pmap`` with sharded parameters.
    """
    devices = jax.devices() if devices is None else devices
    if config.backend not in ('jit', 'pmap'):
        raise ValueError(
            f"parallel.backend={config.backend!r} is unknown; use 'jit' or 'pmap'"
        )
    if config.backend == 'pmap' and (config.fsdp, config.tensor) != (1, 1):
        raise ValueError(
            f'pmap is pure data parallelism; fsdp={config.fsdp}, '
            f'tensor={config.tensor} need '
            "parallel.backend='jit'"
        )
    sizes = [config.data, config.fsdp, config.tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f'mesh sizes {sizes}: at most one may be -1, the others at least 1'
        )
    if len(devices) % known:
        raise ValueError(
            f'mesh (data, fsdp, tensor) = {tuple(sizes)} does not divide '
            f'{len(devices)} devices'
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f'mesh (data, fsdp, tensor) = {tuple(sizes)} uses {int(np.prod(sizes))} of '
            f'{len(devices)} devices; leave one axis at -1 to use all'
        )
    grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)


def check_batch_size(
    batch_size: int,
    mesh: Mesh,
    what: str,
    parts: int = 1,
    name: str = 'batch_size',
) -> None:
    """Raises ValueError when rows do not divide over the devices and microbatches."""
    devices = mesh.shape['data'] * mesh.shape['fsdp']
    unit = devices * parts
    if batch_size % unit:
        below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
        use = f'{below} or {above}' if below else f'{above}'
        of = f' × {parts} minibatches and microbatches' if parts > 1 else ''
        raise ValueError(
            f'{what}.{name}={batch_size} is not divisible by {devices} '
            f'devices{of}; use {use}'
        )


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Spec of one array by RULES; an axis that a dimension does not divide is left
    whole.
    """
    if not shape:
        return P()
    spec = next(spec for pattern, spec in RULES if re.search(pattern, path))
    stack = (None,) * (len(shape) - len(spec)) if len(spec) else ()
    axes = (*stack, *spec)[: len(shape)]
    return P(*(axis if axis and size % mesh.shape[axis] == 0 else None
               for axis, size in zip(axes, shape)))  # fmt: skip


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of ``NamedSharding`` like ``tree`` (arrays or shapes), by RULES."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_of(path_of(path), x.shape, mesh)), tree
    )


def init_sharded(
    init: Callable[..., Any], mesh: Mesh, *args: Any, donate: tuple[int, ...] = ()
) -> Any:
    """Runs ``init(*args)`` so that every parameter is born in its place on the mesh; of
    the arguments in ``donate`` it takes over the memory.
    """
    target = shardings(jax.eval_shape(init, *args), mesh)
    return jax.jit(init, out_shardings=target, donate_argnums=donate)(*args)


def place(tree: Any, mesh: Mesh, kind: Kind) -> Any:
    """Puts host arrays onto the mesh as a ``kind`` of argument."""
    if kind == 'params':
        return jax.device_put(tree, shardings(tree, mesh))
    spec = P(BATCH_AXES) if kind == 'batch' else P()
    sharding = NamedSharding(mesh, spec)

    def put(x: Any) -> jax.Array:
        if kind == 'batch' and jax.process_count() > 1:
            return jax.make_array_from_process_local_data(sharding, np.asarray(x))
        return jax.device_put(x, sharding)

    return jax.tree.map(put, tree)


def compile_step(
    step: Callable[..., Any],
    *,
    mesh: Mesh,
    backend: str = 'jit',
    inputs: tuple[Kind, ...] = ('params', 'batch'),
    outputs: tuple[Kind, ...] = ('params', 'replicated'),
    donate: tuple[int, ...] = (0,),
) -> Callable[..., Any]:
    """Compiles a step for the mesh; its static arguments are bound by ``partial``
    before.

    Args:
        step: a pure function of ``len(inputs)`` positional pytrees; under ``pmap`` it
            is given ``axis_name`` if it takes one.
        mesh: from :func:`make_mesh`.
        backend: 'jit' or 'pmap'.
        inputs: the kind of each argument. Arguments may lie on the host.
        outputs: the kind of each result; a single result is returned bare.
        donate: positions of the arguments whose memory is reused.

    Returns:
        A function with the same signature and the same numbers under both backends.
        That of 'jit' has ``lower(*arguments)``, which takes shapes too and needs none
        of the mesh's devices: ``lower(*shapes).compile().memory_analysis()``.
    """
    compiler = {'jit': _compile_jit, 'pmap': _compile_pmap}[backend]
    if backend == 'pmap' and 'axis_name' in inspect.signature(step).parameters:
        step = functools.partial(step, axis_name=PMAP_AXIS)
    traced: list[bool] = []

    @functools.wraps(step)
    def noted(*args: Any) -> Any:
        traced.append(True)  # which happens once for every program that is compiled
        return step(*args)

    compiled = compiler(noted, mesh, inputs, outputs, donate)

    def run(*args: Any) -> Any:
        results = compiled(*args)
        if traced:
            traced.clear()
            cpu.give_back_freed_memory()
        return results

    if backend == 'jit':
        run.lower = compiled.lower
    return run


def _compile_jit(
    step: Callable[..., Any],
    mesh: Mesh,
    inputs: tuple[Kind, ...],
    outputs: tuple[Kind, ...],
    donate: tuple[int, ...],
) -> Callable[..., Any]:
    def constrain(x: Any, kind: Kind) -> Any:
        if kind == 'params':
            return jax.lax.with_sharding_constraint(x, shardings(x, mesh))
        spec = P(BATCH_AXES) if kind == 'batch' else P()
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    @functools.wraps(step)
    def placed(*args: Any) -> Any:
        results = step(*args)
        results = results if len(outputs) > 1 else (results,)
        results = tuple(constrain(x, kind) for x, kind in zip(results, outputs))
        return results if len(outputs) > 1 else results[0]

    compiled = jax.jit(placed, donate_argnums=donate, compiler_options=COMPILER_OPTIONS)

    def run(*args: Any) -> Any:
        # Batches come fresh from the host; parameters and states already lie on the
        # mesh.
        args = tuple(
            place(x, mesh, kind) if kind == 'batch' else x
            for x, kind in zip(args, inputs)
        )
        with jax.set_mesh(mesh):
            return compiled(*args)

    def lower(*args: Any) -> jax.stages.Lowered:
        args = tuple(_shapes(x, mesh, kind) for x, kind in zip(args, inputs))
        with jax.set_mesh(mesh):
            return compiled.lower(*args)

    run.lower = lower
    return run


def _shapes(tree: Any, mesh: Mesh, kind: Kind) -> Any:
    """Arrays or shapes as shapes in their place on the mesh."""

    def shape(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    if kind == 'params':
        return jax.tree.map(shape, tree, shardings(tree, mesh))
    where = NamedSharding(mesh, P(BATCH_AXES) if kind == 'batch' else P())
    return jax.tree.map(lambda x: shape(x, where), tree)


def _compile_pmap(
    step: Callable[..., Any],
    mesh: Mesh,
    inputs: tuple[Kind, ...],
    outputs: tuple[Kind, ...],
    donate: tuple[int, ...],
) -> Callable[..., Any]:
    count = mesh.devices.size

    def axes(kinds: tuple[Kind, ...]) -> tuple[int | None, ...]:
        return tuple(0 if kind == 'batch' else None for kind in kinds)

    out_axes = axes(outputs) if len(outputs) > 1 else axes(outputs)[0]
    compiled = jax.pmap(
        step,
        axis_name=PMAP_AXIS,
        in_axes=axes(inputs),
        out_axes=out_axes,
        devices=list(mesh.devices.flat),
        donate_argnums=tuple(i for i in donate if inputs[i] != 'batch'),
    )

    def split(x: Any) -> Any:
        if x.shape[0] % count:
            raise ValueError(f'{x.shape[0]} rows do not divide over {count} devices')
        return x.reshape(count, x.shape[0] // count, *x.shape[1:])

    def join(x: Any) -> Any:
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    def run(*args: Any) -> Any:
        args = tuple(
            jax.tree.map(split, x) if kind == 'batch' else x
            for x, kind in zip(args, inputs)
        )
        results = compiled(*args)
        results = results if len(outputs) > 1 else (results,)
        results = tuple(
            jax.tree.map(join, x) if kind == 'batch' else x
            for x, kind in zip(results, outputs)
        )
        return results if len(outputs) > 1 else results[0]

    return run
