"""Damaged files of a finished run, and of checkpoints."""

import functools
import json
import random
import shutil
import tempfile
from pathlib import Path

from rlhf_jax import checkpoint
from rlhf_jax.sample import load_part
from tests.odd.cases import Case, changed, damaged, write
from tests.odd.settings import nothing_compiles
from tests.test_damage import resume, state

STAGES = ('sft', 'rm')


@functools.cache
def finished() -> Path:
    """A work directory whose stages are finished."""
    from rlhf_jax.main import launch

    folder = Path(tempfile.mkdtemp()) / 'run'
    launch(config(), folder)
    return folder


def config():
    """Two small stages."""
    from tests.odd.settings import _recipe

    whole = _recipe('quickstart').copy_and_resolve_references()
    whole.stages = STAGES
    for stage in STAGES:
        whole[stage].num_steps, whole[stage].num_epochs = 2, None
        whole[stage].batch_size = 8
        whole[stage].buckets = (32,)
    whole.model.preset = 'nano'
    return whole


@functools.cache
def names() -> list[Path]:
    """Files of the run, but for what checkpoints hold."""
    folder = finished()
    found = [path for path in sorted(folder.rglob('*')) if path.is_file()]
    found = [path for path in found if 'checkpoints' not in path.parts]
    small = [p for p in found if p.suffix in ('.json', '.jsonl')]
    # Each file of parameters once, those that are read as text often.
    return [path.relative_to(folder) for path in (*found, *small * 3)]


def odd_runs(rng: random.Random, folder: Path) -> Case:
    """A finished run of which a file is damaged; a stage may be to come."""
    copy = Path(shutil.copytree(finished(), folder / 'run'))
    name = rng.choice(names())
    about = _harm(rng, copy / name)
    chance = rng.random()
    if chance < 0.3 and (copy / 'rm' / 'done.json').is_file():
        (copy / 'rm' / 'done.json').unlink()
        about += ', rm to be resumed'
    elif chance < 0.9 and (copy / 'report.html').is_file():
        (copy / 'report.html').unlink()
        about += ', to be reported'
    sampled = rng.random() < 0.2
    return Case(
        f'{name} {about}',
        lambda: _go_on(copy, sampled),
        (str(copy), str(folder)),
        (OSError,),  # which main tells as one of the work directory
    )


def _harm(rng: random.Random, path: Path) -> str:
    kind = rng.randrange(6)
    if kind == 0:
        path.unlink()
        return 'missing'
    if kind == 1:
        path.unlink()
        path.mkdir()
        return 'a folder'
    data = path.read_bytes()
    if kind < 5 and path.suffix == '.json':
        about, value = changed(rng, json.loads(data))
        write(path, json.dumps(value, indent=1))
        return about
    if kind < 5 and path.suffix == '.jsonl' and data.strip():
        lines = data.splitlines()
        place = rng.randrange(len(lines))
        about, value = changed(rng, json.loads(lines[place]))
        lines[place] = json.dumps(value).encode()
        write(path, b'\n'.join(lines) + b'\n')
        return f'line {place + 1} {about}'
    about, data = damaged(rng, data)
    write(path, data)
    return about


def _go_on(workdir: Path, sampled: bool) -> None:
    from rlhf_jax.main import launch

    if sampled:
        load_part(workdir, 'sft', 'policy')
        return
    with nothing_compiles():
        launch(config(), workdir)


@functools.cache
def _saved() -> Path:
    stage = Path(tempfile.mkdtemp()) / 'sft'
    with checkpoint.open_checkpoints(stage, 2) as manager:
        for step in (6, 7):
            checkpoint.save_state(manager, step, state(step), {'train': float(step)})
    return stage


def odd_checkpoints(rng: random.Random, folder: Path) -> Case:
    """A stage of which files of one checkpoint, or of both, are damaged."""
    stage = Path(shutil.copytree(_saved(), folder / 'sft'))
    files = [path for path in sorted(stage.rglob('*')) if path.is_file()]
    chosen = [rng.choice(files) for _ in range(rng.choice((1, 1, 2, 4)))]
    about = []
    for path in dict.fromkeys(chosen):
        harm = 'missing'
        if rng.random() < 0.2:
            path.unlink()
        else:
            harm, data = damaged(rng, path.read_bytes())
            write(path, data)
        about.append(f'{path.relative_to(stage)} {harm}')
    return Case('; '.join(about), lambda: resume(stage), (str(stage),))
