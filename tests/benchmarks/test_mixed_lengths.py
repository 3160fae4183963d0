"""The benchmark of continuous batching runs, and says what it decoded."""

import sys

import pytest

from benchmarks import mixed_lengths

SMALL = '--size tiny --prompts 8 --rows 4 --prompt 4 --limit 8 --mean 4 --rounds 2'


def test_three_ways_are_compared_on_the_same_samples(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['mixed_lengths', *SMALL.split()])
    mixed_lengths.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('8 responses: mean ') and 'longest' in lines[0]
    assert lines[2] == 'batches of 4: 1.00 × as fast as the batches (1.00–1.00)'
    assert [line.split(':')[0] for line in lines[3:]] == [
        'continuous, 4 rows',
        'all rows at once',
    ]


def test_other_samples_are_no_comparison(monkeypatch):
    whole = mixed_lengths.ways

    def wrong(model, rows, limit):
        ways = whole(model, rows, limit)
        right = ways[f'continuous, {rows} rows']
        ways[f'continuous, {rows} rows'] = lambda params, tokens, *rest: right(
            params, tokens[::-1], *rest
        )
        return ways

    monkeypatch.setattr(mixed_lengths, 'ways', wrong)
    monkeypatch.setattr(sys, 'argv', ['mixed_lengths', *SMALL.split()])
    with pytest.raises(SystemExit, match='continuous, 4 rows wrote other samples'):
        mixed_lengths.main()
