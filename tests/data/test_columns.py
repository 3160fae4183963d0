"""Rows in flat arrays: the same rows as in lists, whatever their kind and number."""

from typing import NamedTuple

import numpy as np
import pytest

from rlhf_jax.data import columns
from rlhf_jax.data.columns import Growing, Packed, Ragged, Table


class Row(NamedTuple):
    ids: np.ndarray
    answers: tuple
    ranks: np.ndarray
    margin: float
    is_good: bool
    nothing: None = None


@pytest.fixture(autouse=True)
def small_blocks(tmp_path, monkeypatch):
    """Blocks of 4 rows, so that a few rows are many of them, and a cache of its own."""
    monkeypatch.setattr(columns, 'BLOCK', 4)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))


@pytest.fixture(params=['memory', 'file'])
def place(request, monkeypatch):
    if request.param == 'file':
        monkeypatch.setattr(columns, 'IN_MEMORY', 16)
    return request.param


def made(count, highest=1000, seed=0):
    rng = np.random.default_rng(seed)

    def ids():
        return rng.integers(0, highest + 1, rng.integers(0, 6)).tolist()

    return [
        Row(
            ids(),
            tuple(ids() for _ in range(rng.integers(0, 4))),
            rng.integers(-1, 4, (rng.integers(1, 4), 2)).astype(np.int32),
            float(rng.random()),
            bool(rng.integers(0, 2)),
        )
        for _ in range(count)
    ]


def plain(row):
    answers = [answer.tolist() for answer in row.answers]
    return [row.ids.tolist(), answers, row.ranks.tolist(), *row[3:]]


def expected(row):
    return [row.ids, list(row.answers), row.ranks.tolist(), *row[3:]]


@pytest.mark.parametrize('count', [1, 3, 4, 5, 23])
def test_a_table_gives_back_its_rows(count, place):
    rows = made(count)
    table = Table.of(rows)
    assert len(table) == count and table.kind is Row
    assert [plain(row) for row in table] == [expected(row) for row in rows]
    assert type(table[0].margin) is float and type(table[0].is_good) is bool
    assert table[0].ids.dtype == table[0].ranks.dtype == np.int32
    assert plain(table[-1]) == expected(rows[-1])
    with pytest.raises(IndexError):
        table[count]
    for part in (slice(1, 4), slice(2, None), slice(-2, None), slice(3, 1)):
        assert [plain(row) for row in table[part]] == [expected(r) for r in rows[part]]


@pytest.mark.parametrize('place_of_large', [0, 2, 11])
def test_ids_are_as_narrow_as_they_can_be(place_of_large, place):
    rows = [[1, 2], [], [65_535]] * 4
    small = Ragged.of(rows)
    assert small.values.dtype == np.uint16
    assert [row.tolist() for row in small] == rows
    for large in (65_536, -1, 2**31 - 1):
        rows[place_of_large] = [7, large]
        wide = Ragged.of(rows)
        assert wide.values.dtype == np.int32
        assert [row.tolist() for row in wide] == rows
        assert {row.dtype for row in wide} == {np.dtype(np.int32)}


def test_lengths_and_what_is_reduced_by_row(place):
    rows = made(23)
    table = Table.of(rows)
    for part, few in ((table, rows), (table[3:9], rows[3:9])):
        answers = part.columns['answers']
        assert part.columns['ids'].lengths.tolist() == [len(row.ids) for row in few]
        assert answers.reduce(np.maximum, answers.values.lengths).tolist() == [
            max(map(len, row.answers), default=0) for row in few
        ]


def test_behind_the_first_that_is_true(place):
    rng = np.random.default_rng(1)
    rows = [rng.random(size) < 0.3 for size in rng.integers(1, 9, 30)]
    rows[4][:] = False
    wanted = [len(row) - row.tolist().index(True) if row.any() else 0 for row in rows]
    assert Ragged.of(rows).behind_first().tolist() == wanted
    assert Ragged.of(rows)[7:20].behind_first().tolist() == wanted[7:20]


def test_packed_values_are_read_when_they_are_asked_for(place):
    values = [(f'ä{i}', {'kind': None, 'gold': 0.1 * i}) for i in range(9)]
    found = Packed.of(values, lambda *parts: parts)
    assert list(found) == values and found[-1] == values[-1]
    assert list(found[2:5]) == values[2:5]
    assert list(found.take([5, 5, 0])) == [values[5], values[5], values[0]]


def test_a_large_array_is_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, 'IN_MEMORY', 64)
    rows = [[i] * (i % 5) for i in range(100)]
    found = Ragged.of(rows)
    assert list((tmp_path / 'rlhf_jax' / 'tokens').iterdir()) == []
    assert not found.values.flags.writeable
    assert [row.tolist() for row in found] == rows


def test_a_cache_that_cannot_be_written_is_told_and_costs_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(columns, 'IN_MEMORY', 16)
    (tmp_path / 'rlhf_jax').write_text('a file where a folder should be')
    rows = [[i] * (i % 5) for i in range(100)]
    with pytest.warns(UserWarning, match='data stay in memory'):
        found = Ragged.of(rows)
    assert [row.tolist() for row in found] == rows


def test_a_full_disk_is_told(monkeypatch):
    class Full:
        def write(self, _):
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(columns, 'IN_MEMORY', 16)
    monkeypatch.setattr(columns.tempfile, 'TemporaryFile', lambda dir: Full())
    growing = Growing()
    with pytest.raises(ValueError, match='no room for the data .*; free some'):
        for _ in range(99):
            growing.append([1, 2, 3])
