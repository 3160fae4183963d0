"""The benchmark of cut microbatches runs, and refuses to time another update."""

import sys

import pytest

from benchmarks import length_buckets

SMALL = '--size tiny --rows 8 --microbatches 2 --prompt 4 --limit 8 --mean 3 --rounds 2'


@pytest.fixture(autouse=True)
def arguments(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['length_buckets', *SMALL.split()])


def test_updates_are_compared_on_the_same_rollout(capsys):
    length_buckets.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('8 responses: mean ') and 'longest' in lines[0]
    assert lines[1].startswith(
        'length buckets 1: 1.00 × as fast as whole rows (1.00–1.00), first call 1.00'
    )
    assert [line.split(':')[0] for line in lines[2:]] == [
        'length buckets 2',
        'length buckets 4',
    ]


def test_another_update_is_no_comparison(monkeypatch):
    whole = length_buckets.update

    def wrong(model, parts, buckets):
        run = whole(model, parts, 1)
        if buckets < 4:
            return run
        return lambda params, batch: run(
            params, batch.replace(advantages=-batch.advantages)
        )

    monkeypatch.setattr(length_buckets, 'update', wrong)
    with pytest.raises(SystemExit, match='4 buckets gave another update'):
        length_buckets.main()
