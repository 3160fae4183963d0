"""The bytes and the rows of data files, unpacked within bounds.

What a damaged, or a malicious, file would unpack to has no bound of its own: reading
stops where it becomes far more than text packs. Read ``sources.py`` next.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_jax.files import named_path

# Text packs 3 to 10 times, and the same record over and over about 100 times.
LARGEST_RATIO = 200
ALWAYS = 2**26  # bytes that anything may unpack to
PIECE = 2**20  # bytes that are unpacked at a time
ROWS = 1024  # of a Parquet file, read at a time
# How files begin that are no text.
BINARY = {
    b'\x1f\x8b': 'packed by gzip: rename it to end in .gz',
    b'\x28\xb5\x2f\xfd': 'packed by zstd: unpack it, or pack it by gzip',
    b'BZh': 'packed by bzip2: unpack it, or pack it by gzip',
    b'\xfd7zXZ\x00': 'packed by xz: unpack it, or pack it by gzip',
    b'PK\x03\x04': 'a zip archive: unpack it',
    b'PAR1': 'a Parquet file: write parquet:PATH',
    b'ARROW1': 'an Arrow file: convert it to Parquet or to JSON lines',
}


def find(path: str) -> Path:
    """The file that a data spec names: a local one, or one of a hub data set.

    Raises:
        ValueError: there is none.
    """
    file = named_path(path)
    if file.is_dir():
        raise ValueError(f'{path} is a directory (seen from {Path.cwd()}); name a file')
    if file.exists():
        if not file.is_file():
            raise ValueError(f'{path} is a device or a pipe; name a file')
        return file
    return _download(path)


def _download(path: str) -> Path:
    """The cached file of a data set on the Hugging Face hub, named owner/name/file."""
    missing = f'{path} does not exist (seen from {Path.cwd()}); name a file'
    owner, _, rest = path.partition('/')
    name, _, inside = rest.partition('/')
    if not (owner and name and inside) or path.startswith(('.', '/', '~')):
        raise ValueError(missing)
    import huggingface_hub  # slow, and seldom needed

    try:
        return Path(
            huggingface_hub.hf_hub_download(
                f'{owner}/{name}', inside, repo_type='dataset'
            )
        )
    except (OSError, ValueError) as error:  # every error of the hub and of the network
        reason = str(error).splitlines()[0]
        raise ValueError(
            f'{missing}. As a file of the hub data set {owner}/{name} it cannot be '
            f'fetched either ({type(error).__name__}: {reason})'
        ) from error


def text_lines(path: str) -> Iterator[bytes]:
    """The lines of a text file, which end in a line feed, unpacked where its name ends
    in .gz.

    Raises:
        ValueError: it is missing, empty, damaged or no text file, or unpacks to more
            than ``LARGEST_RATIO`` times its size.
    """
    file, is_empty = find(path), True
    try:
        with file.open('rb') as opened:
            lines = _unpacked(path, opened) if file.suffix == '.gz' else opened
            for line in lines:
                if is_empty:
                    _check_text(path, line)
                is_empty = is_empty and not line.strip()
                yield line
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror or error})') from (
            error
        )
    if is_empty:
        raise ValueError(f'{path} is empty; it should hold at least one record')


def _check_text(path: str, line: bytes) -> None:
    for head, what in BINARY.items():
        if line.startswith(head):
            raise ValueError(f'{path} is no text, but {what}')


def _unpacked(path: str, packed: BinaryIO) -> Iterator[bytes]:
    rest = b''
    for piece in _pieces(path, packed):
        *lines, rest = (rest + piece).split(b'\n')
        yield from (line + b'\n' for line in lines)
    if rest:
        yield rest


def _pieces(path: str, packed: BinaryIO) -> Iterator[bytes]:
    size = 0
    try:
        with gzip.GzipFile(fileobj=packed) as archive:
            while piece := archive.read(PIECE):
                size += len(piece)
                _check_ratio(path, size, packed.tell())
                yield piece
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f'{path} is no whole gzip file ({error}); fetch it again'
        ) from error


def _check_ratio(path: str, unpacked: int, packed: int) -> None:
    """Args are bytes, so far."""
    if unpacked > ALWAYS + LARGEST_RATIO * packed:
        raise ValueError(
            f'{path} unpacks to more than {unpacked / 2**20:.0f} MiB, over '
            f'{LARGEST_RATIO} times its size, which no text does; if all of it is '
            'meant, unpack it first and name the unpacked file'
        )


def parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a local Parquet file.

    Raises:
        ValueError: it is missing, empty or damaged, a text in it is no UTF-8 (with its
            row), or it unpacks to more than ``LARGEST_RATIO`` times its size.
    """
    file = named_path(path)
    if not file.is_file():
        raise ValueError(f'{path} is no file (seen from {Path.cwd()}); name a file')
    number = size = 0
    packed = file.stat().st_size
    for batch in _batches(path, file):
        size += batch.nbytes
        _check_ratio(path, size, packed)
        if (bad := _first_damaged(batch)) is not None:
            row, reason = bad
            raise ValueError(
                f'{path}:{number + row + 1}: the row is damaged ({reason}); write '
                'the file anew'
            )
        yield from batch.to_pylist()
        number += batch.num_rows
    if not number:
        raise ValueError(f'{path} is empty; it should hold at least one record')


def _batches(path: str, file: Path) -> Iterator[Any]:
    import pyarrow  # slow, and seldom needed
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as table:
            yield from table.iter_batches(ROWS)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f'{path} is no readable Parquet file ({error})') from error


def _first_damaged(batch: Any) -> tuple[int, str] | None:
    """The first row with something that its column cannot hold, such as a text that is
    no UTF-8, and what is wrong.
    """
    try:
        batch.validate(full=True)
    except ValueError as error:  # the row is not said
        reason = str(error).partition(' at string index')[0]
    else:
        return None
    for row in range(batch.num_rows):
        try:
            batch.slice(row, 1).validate(full=True)
        except ValueError:
            return row, reason
    return 0, reason
