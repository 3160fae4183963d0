"""The benchmark of memory: its files, its line through two sizes, one measurement."""

import json
import pathlib

import pytest

from benchmarks import data_memory

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize('kind', data_memory.ROWS)
def test_the_records_are_the_same_every_time_and_of_the_size_that_is_said(
    tmp_path, kind
):
    sizes = [data_memory.write(tmp_path / name, kind, 100) for name in 'ab']
    one, other = ((tmp_path / name).read_text() for name in 'ab')
    assert one == other and sizes == [len(one)] * 2
    assert 640 < len(one) / 100 < 700
    records = [json.loads(line) for line in one.splitlines()]
    assert {*records[0]} == {*data_memory.FIELDS[kind], 'number'}
    assert len({str(record) for record in records}) == 100


def test_a_peak_is_extrapolated_on_a_line():
    rows = [{'rows': n, 'cold': {'peak': 5 + 3 * n}} for n in (10, 20, 40)]
    assert data_memory.extrapolated(rows) == 5 + 3 * data_memory.FULL


def test_a_measurement_is_one_of_this_checkout(tmp_path):
    data_memory.train_tokenizer(tmp_path / 'tokenizer')
    data_memory.write(tmp_path / 'a.jsonl', 'comparisons', 100)
    what = 'comparisons', str(tmp_path / 'a.jsonl'), str(tmp_path / 'tokenizer')
    result = data_memory.measure(ROOT, tmp_path / 'cache', *what)
    assert result['kept'] == 100 and result['seconds'] > 0 and result['batch'] > 0
    assert 0 < result['peak'] < 2**30
