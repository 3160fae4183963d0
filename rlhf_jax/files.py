"""Files of a work directory: written whole, with checksums, and read with errors that
name the command that mends them.

``checksums.json`` in a folder lists the size and the SHA-256 of the files below it. It
is written when they are complete and compared before anything is restored from them.
Hashing takes about a second per 1.5 GB and thread, of up to eight threads, from files
that were just written and are still in memory: a fraction of what writing them took.
Read ``checkpoint.py`` next.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

CHECKSUMS = 'checksums.json'

# ----------------------------------------------------------------------------- writing


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of
    one.
    """
    text = json.dumps(value, indent=1, sort_keys=True, default=str) + '\n'
    _write(path, lambda file: file.write(text.encode()))


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Writes JSON lines so that a reader sees the old file or the new one."""

    def write(file: BinaryIO) -> None:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b'\n')

    _write(path, write)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an ``.npz`` so that a reader sees a whole file or none; ``names`` in it
    lists the others.
    """
    names = np.asarray(sorted(arrays))
    _write(path, lambda file: np.savez(file, **arrays, names=names))


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    partial = path.with_name(f'{path.name}.partial')
    with partial.open('wb') as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


# ----------------------------------------------------------------------------- reading


def named_path(text: str | Path) -> Path:
    """A path that the user wrote, with ``~`` expanded; nothing needs to be there.

    Raises:
        ValueError: no path can be like that, or it may not be looked at.
    """
    try:
        if '\0' in str(text):
            raise ValueError('it holds a zero byte')
        path = Path(text).expanduser()
        path.exists()  # which raises where there can be none
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        shown = str(text) if len(str(text)) < 200 else f'{str(text)[:200]}…'
        raise ValueError(f'{shown!r} cannot be looked up ({reason})') from error
    return path


def remake(stage_dir: Path) -> str:
    """The commands that make the result of a finished stage anew, for an error."""
    folder = shlex.quote(str(stage_dir))
    return (
        f'`rm -rf {folder}/params {folder}/*.json` and the command of its run again '
        f'make it anew, from the last state in {stage_dir / "checkpoints"}'
    )


def remake_config(path: Path) -> str:
    """The commands that make a ``config.json`` anew, for an error."""
    return (
        f'`echo \'{{"config": null}}\' > {shlex.quote(str(path))}` and the same '
        'command again take its config for the one that the run was begun with'
    )


def without_rows(path: Path) -> str:
    """The error of a stage whose rows of metrics are gone."""
    return (
        f'{path} is missing; put it back, or `touch {shlex.quote(str(path))}` to do '
        'without the rows written so far'
    )


def delete_line(path: Path, index: int) -> str:
    """The command that deletes a line of a file, counted from 0, for an error."""
    return f'`sed -i {index + 1}d {shlex.quote(str(path))}` deletes that line'


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        mend: what the error says is to be done.

    Raises:
        ValueError: it is missing, cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise ValueError(f'{path} is missing; {mend}') from error
    except PermissionError as error:
        raise _not_allowed(path) from error
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror}); {mend}') from error
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is no UTF-8 ({error.reason}); {mend}') from error
    except json.JSONDecodeError as error:
        where = f'{path}:{error.lineno}'
        raise ValueError(f'{where} is no JSON ({error.msg}); {mend}') from error
    except RecursionError as error:
        raise ValueError(f'{path}: its JSON is nested too deep; {mend}') from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f'{path}:1 holds a {kind}, not an object; {mend}')
    return value


def read_arrays(path: Path, mend: str) -> dict[str, np.ndarray]:
    """The arrays that :func:`write_arrays` wrote; the checksums of the ``.npz`` and the
    names are compared.

    Args:
        path: the file.
        mend: what the error says is to be done.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f'the checksum of {damaged} differs')
        with np.load(path) as file:
            arrays = dict(file)
        if arrays.pop('names').tolist() != sorted(arrays):
            raise ValueError('it lacks arrays')
        return arrays
    except PermissionError as error:
        raise _not_allowed(path) from error
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        RuntimeError,  # encrypted, or compressed by an unknown method
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f'{path} cannot be read ({error}); {mend}') from error


def _not_allowed(path: Path) -> ValueError:
    return ValueError(
        f'{path} may not be read (permission denied); give this user the right to, '
        f'e.g. `chmod -R u+rwX {shlex.quote(str(path))}`'
    )


# --------------------------------------------------------------------------- checksums


def write_checksums(folder: Path, about: str, parts: Sequence[str] = ('',)) -> None:
    """Writes ``checksums.json``, once the files are complete.

    Args:
        folder: where it goes.
        about: what the files are, e.g. 'step 7': files of another step in their place
            are found even if they are whole.
        parts: files and folders in ``folder`` that are covered, where they exist; ''
            for all of it.
    """
    names = _below(folder, parts)
    files = dict(zip(names, _sums(folder, names)))
    write_json(folder / CHECKSUMS, {'about': about, 'files': files})


def has_checksums(folder: Path) -> bool:
    """Whether a folder has a ``checksums.json``.

    Raises:
        ValueError: the folder may not be read.
    """
    try:
        return (folder / CHECKSUMS).exists()
    except PermissionError as error:
        raise _not_allowed(folder) from error


def find_damage(
    folder: Path, about: str, parts: Sequence[str] = ('',), only: str | None = None
) -> str | None:
    """What is wrong with the files of a folder that has checksums; None where they are
    what was written.

    Args:
        folder: as for :func:`write_checksums`.
        about: likewise.
        parts: likewise.
        only: the only file to compare; None for all.

    Raises:
        ValueError: a file may not be read.
    """
    try:
        saved = json.loads((folder / CHECKSUMS).read_text(encoding='utf-8'))
        if saved['about'] != about:
            return f'it was written as {saved["about"]}'
        pairs = saved['files'].items()
        expected = {name: (size, total) for name, (size, total) in pairs}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f'{CHECKSUMS} is no list of checksums'
    except OSError as error:
        return _unreadable(folder / CHECKSUMS, error)
    try:
        names = _below(folder, parts)
        if only is not None:
            names, expected = [only], {only: expected.get(only)}
        for name in expected:
            if name not in names or not (folder / name).is_file():
                return f'{name} is missing'
        for name in names:
            if expected.get(name) is None:
                return f'{name} was not written with it'
            size = (folder / name).stat().st_size
            if size != expected[name][0]:
                return f'{name} has {size} bytes in place of {expected[name][0]}'
        for name, found in zip(names, _sums(folder, names)):
            if found != expected[name]:
                return f'{name} is not what was written: its checksum differs'
    except OSError as error:
        return _unreadable(folder, error)
    return None


def _unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, PermissionError):
        raise _not_allowed(path) from error
    return f'{error.filename or path} cannot be read ({error.strerror})'


def _below(folder: Path, parts: Sequence[str]) -> list[str]:
    """Names of the files of some parts; hidden ones are other programs' business."""

    def stop(error: OSError) -> None:
        raise error

    found = [folder / part for part in parts if (folder / part).is_file()]
    for part in parts:
        if (folder / part).is_dir():
            for place, _, names in os.walk(folder / part, onerror=stop):
                found += [Path(place, name) for name in names]
    names = {path.relative_to(folder).as_posix() for path in found if path.is_file()}
    return sorted(name for name in names - {CHECKSUMS} if '/.' not in f'/{name}')


def _sums(folder: Path, names: Sequence[str]) -> list[tuple[int, str]]:
    """(bytes, SHA-256) of every file."""

    def of(name: str) -> tuple[int, str]:
        with (folder / name).open('rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
            return file.tell(), digest

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(of, names))
