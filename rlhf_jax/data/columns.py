"""Rows of data in a few flat arrays, instead of a Python object per number.

A list of token lists takes about 36 bytes per token, and as many objects as there are
tokens. :class:`Ragged` holds rows of any lengths in one array, with a second array that
says where each row begins; :class:`Table` holds NamedTuples, such as the examples of
``examples.py``, as one column per field; :class:`Packed` holds small JSON values. All
are read like lists, and a row is made when it is asked for. A large array is a file of
the cache folder that is mapped into memory, so that the system may write it back and
use the memory otherwise. Read ``examples.py`` next.
"""

from __future__ import annotations

import functools
import itertools
import json
import mmap
import sys
import tempfile
import warnings
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.config import cache_dir

BLOCK = 4096  # rows that are collected before they are written into the flat array
IN_MEMORY = 2**26  # bytes of a flat array, from which on it is a file
NARROW = np.dtype(np.uint16)  # what int32 is stored as while every number fits


class Ragged(Sequence):
    """Rows of different lengths, one behind the other in a flat array."""

    def __init__(
        self, values: np.ndarray | Ragged, starts: np.ndarray, dtype: np.dtype | None
    ) -> None:
        """Args:
        values: all rows; a Ragged where a row is itself several rows.
        starts: [N + 1] int64, where each row begins in ``values``, and the last ends.
        dtype: of a row that is read, which may be wider than what is stored; None
            where a row is a Ragged.
        """
        self.values, self.starts, self.dtype = values, starts, dtype

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            first, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(
                    f'a step of {step}: rows are taken one after the other'
                )
            starts = self.starts[first : max(first, stop) + 1]
            return Ragged(self.values, starts, self.dtype)
        if not -len(self) <= index < len(self):
            raise IndexError(f'row {index} of {len(self)}')
        index %= len(self)
        row = self.values[self.starts[index] : self.starts[index + 1]]
        return row if self.dtype is None else row.astype(self.dtype, copy=False)

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64, of the rows."""
        return np.diff(self.starts)

    @functools.cached_property
    def longest(self) -> int:
        """Items of the longest row."""
        return int(self.lengths.max(initial=0))

    @classmethod
    def of(cls, rows: Iterable[Any]) -> Ragged:
        """Rows as :class:`Growing` takes them."""
        growing = Growing()
        for row in rows:
            growing.append(row)
        return growing.finish()

    def reduce(self, fn: np.ufunc, values: np.ndarray) -> np.ndarray:
        """[N] ``fn`` (such as ``np.maximum``) over a number per item of every row; 0
        for a row without items.

        Args:
            fn: a binary function.
            values: one per item of ``self.values``.
        """
        first = self.starts[0]
        padded = np.append(values[first : self.starts[-1]], 0)
        found = fn.reduceat(padded, self.starts[:-1] - first)
        return np.where(self.lengths > 0, found, 0)

    def behind_first(self) -> np.ndarray:
        """[N] items from the first one that is true to the end of each row of bools; 0
        where there is none.
        """
        result = np.zeros(len(self), np.int64)
        for begin in range(0, len(self), BLOCK):
            starts = self.starts[begin : begin + BLOCK + 1]
            true = np.flatnonzero(self.values[starts[0] : starts[-1]]) + starts[0]
            true = np.append(true, starts[-1])
            first = true[np.searchsorted(true, starts[:-1])]
            result[begin : begin + BLOCK] = np.maximum(starts[1:] - first, 0)
        return result


class Growing:
    """Collects rows for a :class:`Ragged`: NumPy arrays of one kind, lists of token ids
    (int32), or tuples of such rows.
    """

    def __init__(self) -> None:
        self._rows: list[Any] = []
        self._starts = array('q', [0])
        self._flat = bytearray()
        self._file: Any = None  # what was in ``_flat`` before
        self._limit = IN_MEMORY
        self._inner: Growing | None = None  # of rows that are tuples of rows
        self._shape: tuple[int, ...] = ()  # of an item of a row
        self._dtype: np.dtype | None = None  # of a row
        self._stored: np.dtype | None = None  # in the flat array

    def append(self, row: np.ndarray | list[int] | tuple) -> None:
        """Adds a row."""
        self._rows.append(row)
        if len(self._rows) == BLOCK:
            self._write()

    def finish(self) -> Ragged:
        """All rows."""
        self._write()
        starts = np.frombuffer(self._starts, np.int64)
        if self._inner is not None:
            return Ragged(self._inner.finish(), starts, None)
        values = self._values().reshape(-1, *self._shape)
        return Ragged(values, starts, self._dtype)

    def _write(self) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        ends = itertools.accumulate(map(len, rows), initial=self._starts[-1])
        self._starts.extend(itertools.islice(ends, 1, None))
        if isinstance(rows[0], tuple):
            self._inner = self._inner or Growing()
            for part in itertools.chain.from_iterable(rows):
                self._inner.append(part)
            return
        if isinstance(rows[0], np.ndarray):
            block = np.concatenate(rows)
        else:
            size = self._starts[-1] - self._starts[-1 - len(rows)]
            block = np.fromiter(itertools.chain.from_iterable(rows), np.int32, size)
        if self._dtype is None:
            self._dtype, self._shape = block.dtype, block.shape[1:]
            self._stored = NARROW if block.dtype == np.int32 else block.dtype
        if self._stored == NARROW != self._dtype and not _fits(block):
            whole = self._values().astype(np.int32)
            self._file, self._stored = None, np.dtype(np.int32)
            self._flat = bytearray(whole)
        self._flat += memoryview(block.astype(self._stored, copy=False).reshape(-1))
        if len(self._flat) >= self._limit:
            self._to_file()

    def _values(self) -> np.ndarray:
        """All that is written so far, flat."""
        stored = self._stored or NARROW
        if self._file is None:
            return np.frombuffer(self._flat, stored)
        self._to_file()
        pages = mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ)
        return np.frombuffer(pages, stored)

    def _to_file(self) -> None:
        """Moves what is in memory behind the end of the file, which has no name."""
        if self._file is None:
            folder = cache_dir() / 'tokens'
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder)
            except OSError as error:
                warnings.warn(f'{folder}: data stay in memory ({error})', stacklevel=2)
                self._limit = sys.maxsize
                return
        try:
            self._file.write(self._flat)
            self._file.flush()
        except OSError as error:
            raise ValueError(
                f'{cache_dir()} has no room for the data ({error}); free some, or name '
                'another folder by XDG_CACHE_HOME'
            ) from error
        self._flat = bytearray()


def _fits(block: np.ndarray) -> bool:
    limits = np.iinfo(NARROW)
    return limits.min <= block.min(initial=0) and block.max(initial=0) <= limits.max


class Table(Sequence):
    """Rows of one kind of NamedTuple, as a column per field."""

    def __init__(self, kind: type, columns: dict[str, Any], size: int) -> None:
        """Args:
        kind: of the rows, a NamedTuple.
        columns: by field: a Ragged, an array [N, …], or None where every row has None.
        size: N.
        """
        self.kind, self.columns, self._size = kind, columns, size

    @classmethod
    def of(cls, rows: Iterable[Any]) -> Table:
        """A table of rows that are all of one kind."""
        growing = GrowingTable()
        for row in rows:
            growing.append(row)
        return growing.finish()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            columns = {
                name: x if x is None else x[index] for name, x in self.columns.items()
            }
            return Table(self.kind, columns, len(range(self._size)[index]))
        row = (None if x is None else x[index] for x in self.columns.values())
        return self.kind(*(x.item() if isinstance(x, np.generic) else x for x in row))

    def replace(self, **columns: Any) -> Table:
        """The table with other columns in the place of some."""
        return Table(self.kind, {**self.columns, **columns}, self._size)


class GrowingTable:
    """Collects rows for a :class:`Table`. What a field holds in the first row, it holds
    in all: an array, list or tuple as in :class:`Growing`, a number, or None.
    """

    def __init__(self) -> None:
        self._kind: type = tuple
        self._columns: list[Any] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, row: Any) -> None:
        """Adds a row."""
        if not self._size:
            self._kind = type(row)
            self._columns = [_column(value) for value in row]
        for column, value in zip(self._columns, row):
            if column is not None:
                column.append(value)
        self._size += 1

    def finish(self) -> Table:
        """All rows."""
        columns = [
            x.finish() if isinstance(x, Growing) else None if x is None else np.array(x)
            for x in self._columns
        ]
        names = getattr(self._kind, '_fields', ())
        return Table(self._kind, dict(zip(names, columns)), self._size)


def _column(value: Any) -> Growing | list | None:
    if value is None:
        return None
    # Numbers such as 0.0 and True are the same few objects in most data.
    return [] if isinstance(value, bool | int | float) else Growing()


class Packed(Sequence):
    """JSON values as text in a flat array, each decoded when it is asked for."""

    def __init__(self, rows: Ragged, make: Callable[..., Any]) -> None:
        """Args:
        rows: N of UTF-8 text, each a JSON list.
        make: the parts of the list → what a reader gets.
        """
        self._rows, self._make = rows, make

    @classmethod
    def of(cls, values: Iterable[Any], make: Callable[..., Any]) -> Packed:
        """Packs what ``json.dumps`` writes as lists."""
        return cls(Ragged.of(map(packed, values)), make)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Packed(self._rows[index], self._make)
        return self._make(*json.loads(self._rows[index].tobytes()))

    def take(self, indices: Iterable[int]) -> Packed:
        """Rows by index, in the order of the indices."""
        return Packed(Ragged.of(self._rows[i] for i in indices), self._make)


def packed(value: Any) -> np.ndarray:
    """A JSON list, for a row of :class:`Packed`."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)
