"""Rows that a stage writes batch by batch, for which a kill costs one batch at most.

A stage that is started again goes on behind its last whole batch and, as every batch
has a key of its own, comes to the same rows. Read ``stages/sample.py`` next.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax import files

ROWS = 'batches.jsonl'  # of the batches so far
PROGRESS = 'progress.json'  # how many they are, and their bytes


class Batch(NamedTuple):
    """What came of a batch."""

    rows: list[dict[str, Any]]
    counts: Mapping[str, int] = {}  # summed over the batches


def write_batches(
    folder: Path,
    make: Callable[[int], Iterable[Batch]],
    about: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """All rows of a stage.

    Args:
        folder: of the stage; the rows stand there until :func:`remove_batches`.
        make: the batches from a number on.
        about: by name, what every batch depends on and a file may have changed, in
            JSON's types.

    Returns:
        (rows, counts), of batches from before a kill too.

    Raises:
        ValueError: ``about`` has changed since the first batch.
    """
    path, progress = folder / ROWS, folder / PROGRESS
    marks = {name: _digest(content) for name, content in about.items()}
    done = {'batches': 0, 'bytes': 0, 'counts': {}, 'about': marks}
    again = f'`rm {progress}` to begin anew'
    if path.exists() and progress.exists():
        done = files.read_json(progress, again)
        for name, mark in marks.items():
            if done['about'].get(name) != mark:
                raise ValueError(
                    f'{name} has changed since {path} was begun; put it back, or '
                    f'{again}'
                )
    counts = Counter(done['counts'])
    with path.open('a+b') as file:
        file.truncate(done['bytes'])
        file.seek(done['bytes'])
        for number, batch in enumerate(make(done['batches']), done['batches']):
            for row in batch.rows:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b'\n')
            file.flush()
            counts.update(batch.counts)
            done |= {'batches': number + 1, 'bytes': file.tell(), 'counts': counts}
            files.write_json(progress, done)
    with path.open(encoding='utf-8') as file:
        return [json.loads(line) for line in file], counts


def remove_batches(folder: Path) -> None:
    """Removes them, if there are any, once what the stage makes of them is written."""
    for name in (PROGRESS, ROWS):
        (folder / name).unlink(missing_ok=True)


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
