"""Orbax: saving and resuming a stage, and handing its parameters to another.

A stage folder holds ``checkpoints/`` (the whole state, the last k of them, written
asynchronously and committed by an atomic rename) and, once the stage is finished,
``params/``: the parameters alone, which is what the next stage, the sampler and the
exporter read. Read ``stages/loop.py`` next.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.types import Params


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of
    one.
    """
    text = json.dumps(value, indent=1, sort_keys=True, default=str) + '\n'
    _write(path, lambda file: file.write(text.encode()))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an ``.npz`` so that a reader sees a whole file or none."""
    _write(path, lambda file: np.savez(file, **arrays))


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    partial = path.with_name(f'{path.name}.partial')
    with partial.open('wb') as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def disk_error(error: OSError | ValueError) -> str | None:
    """What the operating system said, where that is the cause of an error.

    Orbax raises a ValueError of TensorStore's for a disk that is full or gone.
    """
    if isinstance(error, OSError):
        return str(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return code and os.strerror(int(code[1]))


def open_checkpoints(stage_dir: Path, keep: int) -> ocp.CheckpointManager:
    """The checkpoint manager of a stage: asynchronous, atomic, the last ``keep``
    kept.
    """
    return ocp.CheckpointManager(
        epath.Path(stage_dir.absolute() / 'checkpoints'),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    )


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
        ValueError: the checkpoint is of another model or optimizer.
    """
    step = manager.latest_step()
    if step is None:
        return None
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    for array in jax.tree.leaves(like):
        array.delete()
    return _restore(
        lambda: manager.restore(step, args=ocp.args.StandardRestore(target)),
        f'{manager.directory}/{step}',
    )


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
    """Writes the result of a stage: ``params/`` and ``model.json``.

    Args:
        stage_dir: the stage's folder.
        params: ``{part: parameters}``; parts are 'policy', 'reward' or 'critic'.
        models: the configuration of every part.
        members: of an ensemble, whose parameters are stacked.
        facts: of a reward model; None for one with a single score.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        path = epath.Path(stage_dir.absolute() / 'params')
        checkpointer.save(path, params, force=True)
    table = {part: dataclasses.asdict(config) for part, config in models.items()}
    if members > 1:
        table = {part: {**config, 'members': members} for part, config in table.items()}
    if facts not in (None, ScoreFacts()):
        more = dataclasses.asdict(facts)
        table = {part: {**config, **more} for part, config in table.items()}
    write_json(stage_dir / 'model.json', table)


def load_model_configs(stage_dir: Path) -> dict[str, TransformerConfig]:
    """The Transformer configuration of every part of a finished stage.

    Raises:
        ValueError: the stage has not finished.
    """
    table = _read_models(stage_dir)
    for config in table.values():
        for name in ('members', *ScoreFacts.__dataclass_fields__):
            config.pop(name, None)
    return {part: TransformerConfig(**config) for part, config in table.items()}


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
    if not path.exists():
        raise ValueError(
            f'{stage_dir} holds no finished stage (no {path.name}); run it first'
        )
    return json.loads(path.read_text(encoding='utf-8'))


def load_params(stage_dir: Path, part: str, like: Params) -> Params:
    """The parameters of one part of a finished stage, straight into the sharding of
    ``like``.

    Args:
        stage_dir: folder of a finished stage.
        part: 'policy', 'reward' or 'critic'.
        like: tree of arrays or ``ShapeDtypeStruct``s with shardings.

    Raises:
        ValueError: the stage has no such part, or it is of another shape.
    """
    parts = load_model_configs(stage_dir)
    if part not in parts:
        raise ValueError(
            f'{stage_dir} has no {part!r}; it holds {", ".join(sorted(parts))}'
        )
    path = epath.Path(stage_dir.absolute() / 'params')
    target = {part: jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = _restore(
            lambda: checkpointer.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                ),
            ),
            str(path),
        )
    return restored[part]


def _restore(read: Callable[[], Any], place: str) -> Any:
    try:
        return read()
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).split('. ')[0]
        raise ValueError(
            f'checkpoint {place} was written by another model or optimizer: {reason}'
        ) from error
