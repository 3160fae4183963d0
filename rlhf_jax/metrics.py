"""Where the numbers of a running stage go: JSONL always, TensorBoard and W&B on demand.

A stage opens its writers once, calls ``write(step, values)`` with plain numbers and
closes them; of several processes only the first one does. ``progress`` draws the line a
person watches. ``stages`` call this file and ``report.py`` reads what it leaves: read
that next.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlhf_jax.config import nearest
from rlhf_jax.files import delete_line, without_rows

PLAIN_SECONDS = 60.0  # between two lines of progress where there is no terminal


class Writer(Protocol):
    """What every writer can do."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one row of metrics; values are Python, NumPy or JAX scalars."""

    def close(self) -> None:
        """Flushes and closes; nothing can be written afterwards."""


@dataclass(frozen=True)
class Writers:
    """Several writers that look like one; also a context manager that closes them."""

    writers: tuple[Writer, ...]

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the row to each of them."""
        for writer in self.writers:
            writer.write(step, values)

    def close(self) -> None:
        """Closes each of them."""
        for writer in self.writers:
            writer.close()

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_writers(
    directory: str | os.PathLike[str],
    names: tuple[str, ...],
    resume_step: int | None,
) -> Writers:
    """Opens the writers of one stage.

    Args:
        directory: folder of the stage; created when missing. Rows go to
            ``metrics.jsonl`` in it.
        names: any of ``'jsonl'`` (always there, named or not), ``'tensorboard'`` and
            ``'wandb'``.
        resume_step: step the stage resumes from, or None for a fresh start; see
            :class:`JsonlWriter`.

    Returns:
        One object with ``write`` and ``close``.

    Raises:
        ValueError: an unknown name, or a library that is not installed.
    """
    check_writers(names)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    writers: list[Writer] = []
    if 'tensorboard' in names:
        writers.append(TensorBoardWriter(directory, resume_step))
    if 'wandb' in names:
        writers.append(WandbWriter(directory, resume_step))
    # Opened last: a missing library must not have touched the rows of an earlier run.
    writers.append(JsonlWriter(directory / 'metrics.jsonl', resume_step))
    return Writers(tuple(writers))


def check_writers(names: tuple[str, ...]) -> None:
    """Raises ValueError for a writer that does not exist or is not installed."""
    packages = {'jsonl': None, 'tensorboard': 'tensorboardX', 'wandb': 'wandb'}
    for name in names:
        if name not in packages:
            raise ValueError(
                f'metrics writer {name!r} is unknown{nearest(name, packages)}'
            )
        if (package := packages[name]) is None:
            continue
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(_missing(name, package)) from error


def _number(name: str, value: Any) -> int | float | None:
    """A plain number; None for what is not finite, because JSON has no NaN."""
    if hasattr(value, 'item'):
        value = value.item()
    if isinstance(value, bool) or value is None:
        return value
    if not isinstance(value, (int, float)):
        kind = type(value).__name__
        raise ValueError(f'metric {name!r} is a {kind}; metrics are scalar numbers')
    return value if math.isfinite(value) else None


class JsonlWriter:
    """One JSON object a line: ``{"step": 3, "train/loss": 1.5}``, flushed at once.

    Opening with ``resume_step=k`` first drops every row whose step is beyond ``k``, and
    a last line that a crash cut short (which is said), so that a resumed run has no row
    twice.
    ``resume_step=None`` starts an empty file.

    Raises:
        ValueError: to be resumed, it is missing, or a line, other than a cut last one,
            is no metrics row.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int | None):
        self.path = Path(path)
        keep = b''
        if resume_step is not None:
            if not self.path.exists():
                raise ValueError(without_rows(self.path))
            keep = _rows_up_to(self.path, resume_step)
        # Written aside and renamed: a crash leaves the old file or the new one, whole.
        aside = self.path.with_name(self.path.name + '.tmp')
        aside.write_bytes(keep)
        os.replace(aside, self.path)
        self._file = self.path.open('a', encoding='utf-8')

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one row; values that are not finite become null.

        Raises:
            ValueError: ``'step'`` is among the values, or a value is no scalar number.
        """
        if 'step' in values:
            raise ValueError(
                "metrics hold their own 'step'; pass it as the first argument only"
            )
        row: dict[str, Any] = {'step': int(step)}
        row |= {name: _number(name, value) for name, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + '\n')
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _rows_up_to(path: Path, step: int) -> bytes:
    """The lines of a metrics file up to and including a step, with their line ends."""
    lines = path.read_bytes().split(b'\n')
    last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
    kept = []
    for i, line in enumerate(lines[: last + 1]):
        try:
            keep = json.loads(line)['step'] <= step
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if i == last:
                print(f'{path}:{i + 1} was cut while it was written, and is dropped')
                break
            raise ValueError(
                f'{path}:{i + 1} is no metrics row ({error!r}); {delete_line(path, i)}'
            ) from error
        if keep:
            kept.append(line + b'\n')
    return b''.join(kept)


class TensorBoardWriter:
    """TensorBoard event files in a folder, one scalar per metric."""

    def __init__(self, logdir: str | os.PathLike[str], resume_step: int | None):
        import tensorboardX

        # Events from purge_step on are hidden: TensorBoard drops what JSONL drops.
        purge_step = 0 if resume_step is None else resume_step + 1
        self._writer = tensorboardX.SummaryWriter(str(logdir), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds the finite values; TensorBoard has no mark for a missing one."""
        for name, value in values.items():
            number = _number(name, value)
            if number is not None:
                self._writer.add_scalar(name, number, int(step))
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run, whose id is kept beside the metrics for resuming.

    W&B itself ignores rows at steps it already has, so a resumed run shows none twice.
    Account, project and mode come from W&B's own settings (``WANDB_PROJECT``,
    ``WANDB_MODE``).
    """

    def __init__(self, directory: str | os.PathLike[str], resume_step: int | None):
        import wandb

        directory = Path(directory).resolve()
        id_file = directory / 'wandb_id.txt'
        if resume_step is None or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12], encoding='utf-8')
        self._run = wandb.init(
            dir=str(directory),
            id=id_file.read_text(encoding='utf-8').strip(),
            name=f'{directory.parent.name}/{directory.name}',
            resume='allow',
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs the finite values at a step."""
        numbers = {name: _number(name, value) for name, value in values.items()}
        finite = {
            name: number for name, number in numbers.items() if number is not None
        }
        self._run.log(finite, step=int(step))

    def close(self) -> None:
        """Finishes the run, which waits for its upload."""
        self._run.finish()


def _missing(name: str, package: str) -> str:
    return (
        f'metrics writer {name!r} needs {package}, which is not installed; '
        f"run pip install 'rlhf_jax[{name}]', or leave the writer out"
    )


@contextlib.contextmanager
def progress(stage: str, total: int, start: int = 0) -> Iterator[Callable[..., None]]:
    """Shows how far a stage is: one line of step, total, some numbers and time left.

    Where standard output is no terminal, a plain line comes now and then: after the
    first steps, and then every ``PLAIN_SECONDS``.

    Args:
        stage: the name in front of the line.
        total: steps of the whole stage.
        start: steps already done when the stage resumes.

    Yields:
        ``update(step, **fields)``: moves the line to ``step`` (steps done) and shows
        the fields, for example ``update(7, loss=1.9, tokens_per_second=5200)``.
    """
    if not sys.stdout.isatty():
        yield _plain_lines(stage, total)
        return
    columns = (
        TextColumn('[bold]{task.description}'),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn('{task.fields[numbers]}'),
        TimeElapsedColumn(),
        TextColumn('left'),
        TimeRemainingColumn(),
    )
    # A PPO step can take a minute; the default window of 30 s would then know no speed.
    with Progress(*columns, speed_estimate_period=600) as display:
        task = display.add_task(stage, total=total, completed=start, numbers='')

        def update(step: int, **fields: float) -> None:
            display.update(task, completed=step, numbers=_numbers(fields))

        yield update


def _numbers(fields: Mapping[str, float]) -> str:
    return '  '.join(
        f'{name.replace("_per_second", "/s").replace("_", " ")} {value:.4g}'
        for name, value in fields.items()
    )


def _plain_lines(stage: str, total: int) -> Callable[..., None]:
    if jax.process_index():
        return lambda step, **fields: None
    began = time.monotonic()
    last = began - PLAIN_SECONDS + 5.0  # the first line soon

    def update(step: int, **fields: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_SECONDS:
            return
        last = now
        spent = f'{(now - began) / 60:.1f} min'
        print(f'{stage} {step}/{total}  {_numbers(fields)}  {spent}', flush=True)

    return update
