"""Reading records from files and TFDS: a data spec in, dicts with their places out.

    jsonl:PATH     one JSON object a line (.gz too)
    parquet:PATH   one record a row
    csv:PATH       likewise; the first line has the names, every value is text
    hh:PATH        jsonl of transcripts ``chosen`` and ``rejected`` (Anthropic HH-RLHF)
    text:PATH      documents between <|endoftext|>, or a directory of .txt files
    tfds:NAME[/CONFIG]:SPLIT
    python:PACKAGE.MODULE:FUNCTION[?KEY=VALUE&KEY=VALUE]
                   the dicts that a call of the function gives; values are text, quoted
                   as in a URL

Fields by other names: ``jsonl:PATH?prompt=question&completion=answer``, see
``renamed.py``. A file that does not exist may be one of a hub data set:
``hh:OWNER/NAME/FILE``. A spec may end in a slice as TFDS writes it: ``[:90%]``,
``[90%:]``, ``[:500]``. Several specs with `` + `` between them are read one after the
other. In a run ``stage:NAME`` is the file of records that a stage has written
(``stages/run.py``). What the fields mean is told by ``formats.py``; read it next.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from rlhf_jax.config import failure, load_dotted, nearest
from rlhf_jax.data.raw import parquet_rows, text_lines
from rlhf_jax.data.renamed import read_mapping, rename
from rlhf_jax.files import named_path

ASSISTANT = '\n\nAssistant:'  # opens an answer in an HH transcript
AND = ' + '  # between data specs that are read one after the other
SEPARATOR = '<|endoftext|>'  # between the documents of a text file
DEEPEST = 100  # levels of lists and objects in a record
TOGETHER = 1024  # records of TFDS are read so many at a time, which is faster

# A spec ends in one: group 1 the rest, groups 2 and 3 the ends.
SLICE = re.compile(r'(.*)\[(-?\d+%?)?:(-?\d+%?)?\]', re.DOTALL)


class NotWritten(ValueError):
    """The records of a stage, which it has still to write."""


@dataclasses.dataclass(frozen=True)
class SourceRecord:
    """A record as it was found."""

    fields: dict[str, Any]
    # 'file:line', 'file:row', 'module:function record 5' (all from 1), or
    # 'tfds name/config/split 17' (from 0)
    where: str

    @functools.cached_property
    def present(self) -> dict[str, Any]:
        """The fields that are not null."""
        return {name: x for name, x in self.fields.items() if x is not None}


@dataclasses.dataclass(frozen=True)
class Stream:
    """The records of a data spec, which are read anew at every pass."""

    begin: Callable[[], Iterator[SourceRecord]]

    def __iter__(self) -> Iterator[SourceRecord]:
        return self.begin()

    def field_names(self) -> set[str]:
        """The names of the fields that are not null in some record."""
        return set().union(*(record.present for record in self))


def read(spec: str) -> list[SourceRecord]:
    """All records of a data spec at once; raises what :func:`stream` and reading do."""
    return list(stream(spec))


def stream(spec: str) -> Stream:
    """The records of a data spec; the module docstring lists the specs.

    A file is read while its records are gone through; a function of ``python:`` is
    called once, here.

    Raises:
        ValueError: here or in reading: an unknown kind of spec, a missing, empty or
            broken file (with the line), a function that cannot be called or gives no
            records, a slice that is malformed, empty, or goes beyond the data.
    """
    readers: dict[str, Callable[[str], Iterator[SourceRecord]]] = {
        'jsonl': _read_jsonl,
        'parquet': _read_parquet,
        'csv': _read_csv,
        'hh': _read_hh,
        'text': _read_text,
    }
    if AND in spec:
        parts = [stream(part) for part in spec.split(AND)]
        return Stream(lambda: itertools.chain.from_iterable(parts))
    kinds = (*readers, 'python', 'tfds')
    kind, colon, rest = spec.partition(':')
    if kind == 'stage':
        raise NotWritten(f'data spec {spec!r}: the stage has written no records')
    if not colon or not rest or kind not in kinds:
        hint = nearest(kind, kinds)
        raise ValueError(
            f'data spec {spec!r} should read kind:path, such as jsonl:train.jsonl{hint}'
        )
    if kind == 'tfds':
        return Stream(functools.partial(_read_tfds, rest, spec))
    path, start, stop = rest, None, None
    if rest.endswith(']'):
        match = SLICE.fullmatch(rest)
        if match is None:
            raise ValueError(
                f'data spec {spec!r} ends in a malformed slice; write [:90%], [90%:] '
                'or [:500]'
            )
        path, start, stop = match.groups()
    if kind == 'python':
        records = Stream(functools.partial(_read_rows, path, _call(path)))
    else:
        file, mark, query = path.rpartition('?')
        if mark:
            mapping = read_mapping(query, spec)
            begin = functools.partial(_renamed, readers[kind], file, mapping)
            records = Stream(begin)
        else:
            records = Stream(functools.partial(readers[kind], path))
    if path == rest:
        return records
    size = sum(1 for _ in records)
    first = _place(start, 0, size, spec)
    last = _place(stop, size, size, spec)
    if first >= last:
        raise ValueError(
            f'data spec {spec!r} selects none of the {size} records of {path}'
        )
    return Stream(lambda: itertools.islice(records, first, last))


def _place(end: str | None, default: int, size: int, spec: str) -> int:
    """Position of one end of a slice; percentages are rounded to the nearest record."""
    if end is None:
        return default
    number = int(end.rstrip('%'))
    place = round(size * number / 100) if end.endswith('%') else number
    if not -size <= place <= size:
        raise ValueError(
            f'data spec {spec!r} asks for {end}, but there are {size} records; '
            f'use at most {"100%" if end.endswith("%") else size}'
        )
    return place + size if end.startswith('-') else place


def _decode(line: bytes, path: str, number: int) -> str:
    try:
        return line.decode('utf-8-sig' if number == 1 else 'utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(
            f'{path}:{number}: byte 0x{error.object[error.start]:02x} is not UTF-8; '
            'convert the file, for instance with iconv -f latin1 -t utf-8'
        ) from error


def _read_jsonl(path: str) -> Iterator[SourceRecord]:
    """Lines of white space alone are no records: files end in one."""
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        where = f'{path}:{number}'
        fields = _parse(_decode(line.removesuffix(b'\n'), path, number), where)
        if not isinstance(fields, dict):
            raise ValueError(
                f'{where}: a {type(fields).__name__}, not an object; every line must '
                'be one JSON object such as {"prompt": "…", "completion": "…"}'
            )
        yield SourceRecord(fields, where)


def _renamed(
    reader: Callable[[str], Iterator[SourceRecord]],
    path: str,
    mapping: dict[str, list[str]],
) -> Iterator[SourceRecord]:
    for record in reader(path):
        fields = rename(record.fields, mapping, record.where)
        yield SourceRecord(fields, record.where)


def _read_csv(path: str) -> Iterator[SourceRecord]:
    lines = enumerate(text_lines(path), start=1)
    rows = csv.reader((_decode(line, path, i) for i, line in lines), strict=True)
    try:
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise ValueError(f'{path}:1: a name stands twice among {", ".join(names)}')
        for row in rows:
            where = f'{path}:{rows.line_num}'
            if len(row) != len(names):
                raise ValueError(
                    f'{where}: {len(row)} values, and the first line has {len(names)} '
                    'names'
                )
            yield SourceRecord(dict(zip(names, row)), where)
    except csv.Error as error:
        raise ValueError(f'{path}:{rows.line_num}: no CSV ({error})') from error


def _parse(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{where}: not JSON ({error.msg} at column {error.colno}); '
            'every line must be one whole JSON object'
        ) from error
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f'{where}: not JSON that can be read ({error})') from error
    if text.count('{') + text.count('[') > DEEPEST:  # only then it may be too deep
        _check_depth(value, where)
    return value


def _check_depth(value: Any, where: str) -> None:
    """Refuses what functions that call themselves could not go through."""
    level, depth = [value], 0
    while level:
        if (depth := depth + 1) > DEEPEST:
            raise _too_deep(where)
        parts = (x.values() if isinstance(x, dict) else x for x in level)
        level = [y for part in parts for y in part if isinstance(y, dict | list)]


def _too_deep(where: str) -> ValueError:
    return ValueError(
        f'{where}: nested more than {DEEPEST} deep; no record needs to be'
    )


def _read_parquet(path: str) -> Iterator[SourceRecord]:
    for number, row in enumerate(parquet_rows(path), start=1):
        where = f'{path}:{number}'
        _check_depth(row, where)
        fields = {name: _without_nulls(value) for name, value in row.items()}
        yield SourceRecord(fields, where)


def _without_nulls(value: Any) -> Any:
    """Dicts without the keys that are null: Arrow gives every dict of a column the keys
    of all of them. Lists keep what is null in them.
    """
    if isinstance(value, dict):
        kept = {name: x for name, x in value.items() if x is not None}
        return {name: _without_nulls(x) for name, x in kept.items()}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


def _read_hh(path: str) -> Iterator[SourceRecord]:
    for record in _read_jsonl(path):
        pair = record.fields.get('chosen'), record.fields.get('rejected')
        fields = record.fields
        # Anything else than two transcripts is left for formats.py to complain about.
        if all(isinstance(side, str) for side in pair):
            prompt, chosen, rejected = split_transcripts(*pair)
            fields = fields | dict(prompt=prompt, chosen=chosen, rejected=rejected)
        yield SourceRecord(fields, record.where)


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""Splits two transcripts ``\n\nHuman: …\n\nAssistant: …`` into prompt and answers.

    The prompt is everything up to and including the last ``\n\nAssistant:`` of their
    common beginning; the answers are all that follows, with their leading spaces.

    Source: Bai et al. 2022, arXiv 2204.05862, the released data.

    Returns:
        (prompt, chosen answer, rejected answer); the prompt is empty when the
        transcripts share no assistant turn, which ``formats`` rejects as a bad record.
    """
    common = os.path.commonprefix([chosen, rejected])
    place = common.rfind(ASSISTANT)
    end = 0 if place < 0 else place + len(ASSISTANT)
    return chosen[:end], chosen[end:], rejected[end:]


def _read_text(path: str) -> Iterator[SourceRecord]:
    folder = named_path(path)
    files = [path]
    if folder.is_dir():
        files = [str(file) for file in sorted(folder.glob('*.txt'))]
        if not files:
            raise ValueError(f'{path} is a directory without .txt files')
    is_empty = True
    for file in files:
        for number, part in _documents(file):
            blank = part[: len(part) - len(part.lstrip())]
            if text := part.strip():
                is_empty = False
                yield SourceRecord(
                    {'text': text}, f'{file}:{number + blank.count(chr(10))}'
                )
    if is_empty:
        raise ValueError(f'{path} is empty; it holds separators alone')


def _documents(file: str) -> Iterator[tuple[int, str]]:
    """What stands between the separators, with the line in which it begins."""
    parts, begun = [], 1
    for number, line in enumerate(text_lines(file), start=1):
        part, *others = _decode(line, file, number).split(SEPARATOR)
        parts.append(part)
        for other in others:
            yield begun, ''.join(parts)
            parts, begun = [other], number
    yield begun, ''.join(parts)


def _call(call: str) -> Iterable[Any]:
    """The rows that a function gives, which can be gone through several times; what it
    raises itself is told with the line that raised it.
    """
    name, _, query = call.partition('?')
    function = load_dotted(name, 'function')
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ValueError(
            f'python:{call}: {error}; write ?key=value&key=value behind the function'
        ) from error
    arguments = dict(pairs)
    if len(arguments) < len(pairs):
        raise ValueError(f'python:{call}: an argument is given twice')
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f'python:{call}: {error}; {name} takes {inspect.signature(function)}'
        ) from error
    try:
        rows = function(**arguments)
        if isinstance(rows, Iterator):
            return list(rows)
    except Exception as error:
        raise ValueError(f'python:{call} failed with {failure(error)}') from error
    if not isinstance(rows, Iterable):
        raise ValueError(
            f'python:{call} gave a {type(rows).__name__}; it should return an iterable '
            'of dicts'
        )
    return rows


def _read_rows(call: str, rows: Iterable[Any]) -> Iterator[SourceRecord]:
    """The rows of a function as records."""
    name, number = call.partition('?')[0], 0
    for number, row in enumerate(rows, start=1):
        where = f'{name} record {number}'
        if not isinstance(row, dict):
            raise ValueError(
                f'{where}: a {type(row).__name__}, not a dict of fields such as '
                "{'prompt': '…', 'completion': '…'}"
            )
        try:
            row = _unwrapped(row)
        except RecursionError as error:
            raise _too_deep(where) from error
        except TypeError as error:
            raise ValueError(f'{where}: {error}') from error
        _check_depth(row, where)
        yield SourceRecord(row, where)
    if not number:
        raise ValueError(f'python:{call} gave no records; it should give at least one')


def _read_tfds(rest: str, spec: str) -> Iterator[SourceRecord]:
    """Array records give random access and need no TensorFlow."""
    import tensorflow_datasets as tfds

    name, _, split = rest.partition(':')
    if not split:
        raise ValueError(f'data spec {spec!r} names no split; write tfds:{name}:train')
    dataset = name.partition('/')[0]
    module = f'rlhf_jax.data.{dataset}'
    if dataset.isidentifier() and importlib.util.find_spec(module):
        importlib.import_module(module)  # registers the builder
    try:
        if not sys.stdout.isatty():
            tfds.disable_progress_bar()
        builder = tfds.builder(name, file_format='array_record')
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        known = ''
        found = not isinstance(error, tfds.core.DatasetNotFoundError)
        with contextlib.suppress(tfds.core.DatasetNotFoundError):
            if found and dataset.isidentifier():
                configs = tfds.builder_cls(dataset).builder_configs
                known = f'; its configs are {", ".join(configs)}'
        raise ValueError(f'data spec {spec!r}: TFDS has no {name!r}{known}') from error
    try:
        builder.download_and_prepare()
    except Exception as error:  # of the network, the disk, or the set's own code
        raise ValueError(
            f'data spec {spec!r}: TFDS cannot prepare it: {failure(error)}'
        ) from error
    try:
        source = builder.as_data_source(split=split)
    except ValueError as error:
        raise ValueError(
            f'data spec {spec!r}: nothing in split {split!r} '
            f'({str(error).splitlines()[0]}); '
            f'the splits of {name} are {", ".join(builder.info.splits)}, each with or '
            'without a slice such as [:90%]'
        ) from error
    for start in range(0, len(source), TOGETHER):
        indices = range(start, min(start + TOGETHER, len(source)))
        for index, row in zip(indices, source.__getitems__(list(indices)), strict=True):
            where = f'tfds {name}/{split} {index}'
            yield SourceRecord(_plain(row, where), where)


def _unwrapped(value: Any) -> Any:
    """NumPy scalars, which rows of pandas hold, as Python's own; TypeError for what no
    JSON could say so that it would be read again.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, int) and value.bit_length() > 10_000:
        raise TypeError('a number of thousands of digits')
    if isinstance(value, dict):
        if odd := [name for name in value if not isinstance(name, str)]:
            raise TypeError(f'the key {odd[0]!r} is no text')
        return {name: _unwrapped(part) for name, part in value.items()}
    return [_unwrapped(part) for part in value] if type(value) is list else value


def _plain(value: Any, where: str) -> Any:
    """bytes as str, NumPy values as Python's own."""
    if isinstance(value, bytes):
        try:
            return value.decode('utf-8')
        except UnicodeDecodeError as error:
            raise ValueError(f'{where}: a field of bytes is not UTF-8 text') from error
    if hasattr(value, 'tolist'):
        return _plain(value.tolist(), where)
    if isinstance(value, dict):
        return {name: _plain(part, where) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, where) for part in value]
    return value
