"""Orbax: saving and resuming a stage, and handing its parameters to another.

A stage folder holds ``checkpoints/`` (the whole state, the last k of them, written
asynchronously and committed by an atomic rename) and, once the stage is finished,
``params/``: the parameters alone, which is what the next stage, the sampler and the
exporter read. Both have checksums (``files.py``), and nothing is restored from what is
not as it was written. Read ``stages/loop.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from rlhf_jax.files import (
    CHECKSUMS,
    find_damage,
    has_checksums,
    read_json,
    remake,
    write_checksums,
    write_json,
)
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.types import Params

# What the checksums of a finished stage cover.
RESULT, RESULT_PARTS = (
    'the result of a stage',
    (
        'params',
        'model.json',
        'tokenizer',
        'records.jsonl',
    ),
)


def disk_error(error: OSError | ValueError) -> str | None:
    """What the operating system said, where that is the cause of an error.

    Orbax raises a ValueError of TensorStore's for a disk that is full or gone.
    """
    if isinstance(error, OSError):
        return str(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return code and os.strerror(int(code[1]))


class _Checked(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Gives a saved step its checksums, before older steps are deleted; on the first
    process, and in the thread that wrote it.
    """

    async def finalize(self) -> None:
        await super().finalize()
        folder = Path(self.get_final())
        if folder.name.isdigit():  # not the parts of a step
            write_checksums(folder, f'step {folder.name}')


def open_checkpoints(stage_dir: Path, keep: int) -> ocp.CheckpointManager:
    """The checkpoint manager of a stage: asynchronous, atomic, the last ``keep``
    kept.

    The newest checkpoint is compared with its checksums. Where it is damaged, the last
    whole one takes its place: a line says so, and the damaged ones are moved to
    ``stage_dir/damaged``. Those of a version that wrote no checksums are used with a
    warning.

    Raises:
        ValueError: there are checkpoints, but no whole one, or they may not be read.
    """
    folder = stage_dir.absolute() / 'checkpoints'
    _first_process(lambda: _set_damaged_aside(folder))
    try:
        return ocp.CheckpointManager(
            epath.Path(folder),
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, temporary_path_class=_Checked
            ),
        )
    except (RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(  # of an older one: the newest was compared
            f'a checkpoint in {folder} is damaged ({type(error).__name__}: {error}); '
            'remove all but the newest, and the same command goes on from that'
        ) from error


def _set_damaged_aside(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    steps = sorted((name for name in names if name.isdigit()), key=int, reverse=True)
    if steps and not any(has_checksums(folder / step) for step in steps):
        warnings.warn(
            f'{folder / steps[0]} has no {CHECKSUMS} (an earlier version wrote none); '
            'it is used unchecked',
            stacklevel=2,
        )
        return
    damaged = {}
    for step in steps:
        damage = find_damage(folder / step, f'step {step}')
        if damage is None:
            break
        damaged[step] = damage
    if len(damaged) == len(steps) and steps:
        listed = '; '.join(f'step {step}: {what}' for step, what in damaged.items())
        raise ValueError(
            f'{folder} holds no whole checkpoint ({listed}); `rm -r '
            f'{shlex.quote(str(folder))}` and the same command again train the stage '
            'anew'
        )
    for place, what in damaged.items():
        aside = _move_aside(folder / place)
        print(
            f'[{folder.parent.name}] checkpoint {folder / place} is damaged ({what}) '
            f'and is now {aside}; training goes on from step {step}',
            flush=True,
        )


def _move_aside(path: Path) -> Path:
    """Moves a checkpoint into the folder ``damaged`` of its stage."""
    folder = path.parents[1] / 'damaged'
    folder.mkdir(exist_ok=True)
    places = (folder / f'{path.name}-{i}' for i in itertools.count(1))
    place = next(place for place in places if not place.exists())
    return path.rename(place)


def _first_process(work: Callable[[], None]) -> None:
    """Does what changes files on the first process, and waits for it on the others,
    where it fails too.
    """
    failed = None
    if jax.process_index() == 0:
        try:
            work()
        except (OSError, ValueError) as error:
            failed = error
    if jax.process_count() > 1:
        all_failed = multihost_utils.broadcast_one_to_all(failed is not None)
        if all_failed and failed is None:
            raise ValueError('the first process stopped; its error says why')
    if failed is not None:
        raise failed


def save_state(
    manager: ocp.CheckpointManager, step: int, state: Any, seconds: dict[str, float]
) -> None:
    """Starts saving a state pytree as ``step``; returns before the disk is done.

    ``seconds`` is what the stage has taken so far, by phase.
    """
    args, metadata = ocp.args.StandardSave(state), {'seconds': dict(seconds)}
    manager.save(step, args=args, custom_metadata=metadata, force=True)


def saved_seconds(manager: ocp.CheckpointManager) -> dict[str, float]:
    """What the stage had taken, by phase, when its latest state was saved."""
    step = manager.latest_step()
    saved = {} if step is None else manager.metadata(step).custom_metadata or {}
    return dict(saved.get('seconds', {}))


def drop_state(manager: ocp.CheckpointManager, step: int) -> int | None:
    """Deletes a saved state, if it is there; the step of the latest that is left."""
    manager.wait_until_finished()
    if step in manager.all_steps():
        manager.delete(step)
    return manager.latest_step()


def restore_state(manager: ocp.CheckpointManager, like: Any) -> Any | None:
    """The latest saved state, laid out as ``like`` is; None when there is none.

    The arrays of ``like`` are let go before, or there would be two states at a time.

    Raises:
        ValueError: the checkpoint is of another model or optimizer, or, having no
            checksums, cannot be read.
    """
    step = manager.latest_step()
    if step is None:
        return None
    place = Path(f'{manager.directory}/{step}')
    mend = f'`rm -r {shlex.quote(str(place))}` and the same command again go on without'

    def saved() -> Any:
        if (tree := manager.item_metadata(step)) is None:
            raise ValueError('it holds no state')
        return tree

    _check_layout(_read(saved, place, mend), like, place)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    for array in jax.tree.leaves(like):
        array.delete()
    args = ocp.args.StandardRestore(target)
    return _read(lambda: manager.restore(step, args=args), place, mend)


@dataclasses.dataclass(frozen=True)
class ScoreFacts:
    """What the scores of a reward model mean, beside its Transformer."""

    heads: tuple[str, ...] = ()  # names of its scores; () for a single one
    step_separator: str | None = None  # set where it scores steps, which this parts


def save_params(
    stage_dir: Path,
    params: Params,
    models: dict[str, TransformerConfig],
    members: int = 1,
    facts: ScoreFacts | None = None,
) -> None:
    """Writes the result of a stage: ``params/`` and ``model.json``, and checksums of
    both, of the stage's own tokenizer and of its records, where it has them.

    Args:
        stage_dir: the stage's folder.
        params: ``{part: parameters}``; parts are 'policy', 'reward' or 'critic'; {}
            where the stage makes no model.
        models: the configuration of every part.
        members: of an ensemble, whose parameters are stacked.
        facts: of a reward model; None for one with a single score.
    """
    if params:
        with ocp.StandardCheckpointer() as checkpointer:
            path = epath.Path(stage_dir.absolute() / 'params')
            checkpointer.save(path, params, force=True)
    table = {part: dataclasses.asdict(config) for part, config in models.items()}
    if members > 1:
        table = {part: {**config, 'members': members} for part, config in table.items()}
    if facts not in (None, ScoreFacts()):
        more = dataclasses.asdict(facts)
        table = {part: {**config, **more} for part, config in table.items()}
    if table:
        write_json(stage_dir / 'model.json', table)
    _first_process(lambda: write_checksums(stage_dir, RESULT, RESULT_PARTS))


def check_result(stage_dir: Path) -> None:
    """Makes sure that the result of a finished stage is what the stage wrote. That of a
    version that wrote no checksums is used with a warning.

    Raises:
        ValueError: the stage has not finished, or a file is damaged or missing.
    """
    makes_models = (stage_dir / 'params').exists() or (
        stage_dir / 'model.json'
    ).exists()
    if makes_models or not has_checksums(stage_dir):  # those list a file that is gone
        load_model_configs(stage_dir)
    if not has_checksums(stage_dir):
        warnings.warn(
            f'{stage_dir} has no {CHECKSUMS} (an earlier version wrote none); its '
            'params/ are used unchecked',
            stacklevel=2,
        )
    elif damage := find_damage(stage_dir, RESULT, RESULT_PARTS):
        raise ValueError(f'{stage_dir} is damaged: {damage}; {remake(stage_dir)}')


def load_model_configs(stage_dir: Path) -> dict[str, TransformerConfig]:
    """The Transformer configuration of every part of a finished stage.

    Raises:
        ValueError: the stage has not finished, or its ``model.json`` is damaged.
    """
    table = _read_models(stage_dir)
    for config in table.values():
        for name in ('members', *ScoreFacts.__dataclass_fields__):
            config.pop(name, None)
    try:
        return {part: TransformerConfig(**config) for part, config in table.items()}
    except TypeError as error:
        path = stage_dir / 'model.json'
        raise ValueError(f'{path}: {error}; {remake(stage_dir)}') from error


def load_members(stage_dir: Path, part: str) -> int:
    """How many models are stacked in a part of a finished stage; 1 for a single one.

    Raises:
        ValueError: the stage has not finished.
    """
    config = _read_models(stage_dir).get(part, {})
    return config['members'] if 'members' in config else 1


def load_score_facts(stage_dir: Path, part: str) -> ScoreFacts:
    """What the scores of a part of a finished stage mean.

    Raises:
        ValueError: the stage has not finished.
    """
    config = _read_models(stage_dir).get(part, {})
    if 'heads' not in config:
        return ScoreFacts()
    return ScoreFacts(tuple(config['heads']), config['step_separator'])


def _read_models(stage_dir: Path) -> dict[str, dict[str, Any]]:
    path = stage_dir / 'model.json'
    if not (path.exists() or (stage_dir / 'done.json').exists()):
        raise ValueError(
            f'{stage_dir} holds no finished stage (no {path.name}); run it first'
        )
    if not (path.exists() or (stage_dir / 'params').exists()):
        raise ValueError(
            f'{stage_dir} is a stage that makes no model; name one that does'
        )
    table = read_json(path, remake(stage_dir))
    if has_checksums(stage_dir):
        if damage := find_damage(stage_dir, RESULT, RESULT_PARTS, only=path.name):
            raise ValueError(f'{stage_dir} is damaged: {damage}; {remake(stage_dir)}')
    if any(not isinstance(config, dict) for config in table.values()):
        raise ValueError(f'{path} lists no models; {remake(stage_dir)}')
    return table


def load_params(stage_dir: Path, part: str, like: Params) -> Params:
    """The parameters of one part of a finished stage, straight into the sharding of
    ``like``.

    Args:
        stage_dir: folder of a finished stage.
        part: 'policy', 'reward' or 'critic'.
        like: tree of arrays or ``ShapeDtypeStruct``s with shardings.

    Raises:
        ValueError: the stage has no such part, it is of another shape, or what the
            stage wrote is damaged.
    """
    parts = load_model_configs(stage_dir)
    if part not in parts:
        raise ValueError(
            f'{stage_dir} has no {part!r}; it holds {", ".join(sorted(parts))}'
        )
    check_result(stage_dir)
    path, mend = stage_dir.absolute() / 'params', remake(stage_dir)
    target = {part: jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}
    with ocp.PyTreeCheckpointer() as checkpointer:

        def saved() -> Any:
            return checkpointer.metadata(epath.Path(path)).item_metadata.tree[part]

        _check_layout(_read(saved, path, mend), like, path)
        args = ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        return _read(
            lambda: checkpointer.restore(epath.Path(path), args=args), path, mend
        )[part]


def _check_layout(saved: Any, like: Any, place: Path) -> None:
    """Refuses arrays that are not those asked for, by name and shape."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        name = functools.partial(jax.tree_util.keystr, simple=True, separator='/')
        return {name(path): tuple(leaf.shape) for path, leaf in leaves}

    there, now = shapes(saved), shapes(like)
    for name in sorted({*there, *now}):
        if there.get(name) != now.get(name):
            raise ValueError(
                f'checkpoint {place} was written by another model or optimizer: '
                f'{name} is {there.get(name, "missing")} there, and '
                f'{now.get(name, "missing")} now'
            )


def _read(read: Callable[[], Any], place: Path, mend: str) -> Any:
    """What Orbax reads; a disk that fails is no damage, and its error passes."""
    try:
        return read()
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        AssertionError,
    ) as error:
        lost = isinstance(error, (FileNotFoundError, NotADirectoryError))
        if isinstance(error, (OSError, ValueError)) and disk_error(error) and not lost:
            raise
        reason = str(error).split('. ')[0].split('\n')[0]
        raise ValueError(f'{place} cannot be read ({reason}); {mend}') from error
