"""The benchmark of the start: what it compares, and what it does not swallow."""

import sys

import pytest

from benchmarks import start


@pytest.fixture
def timed(monkeypatch):
    """Imports take 2 s; a start takes 10 s, and 5 s where something was kept."""
    monkeypatch.setattr(sys, 'argv', ['start', '--rounds', '2'])
    monkeypatch.setattr(start, 'imports', lambda: 2.0)
    calls = []

    def first_step(config, stage, folder):
        kept = folder / 'rlhf_jax' / 'xla' / 'step-cache'
        kept.parent.mkdir(parents=True, exist_ok=True)
        calls.append('warm' if kept.exists() else 'cold')
        kept.touch()
        return 5.0 if calls[-1] == 'warm' else 10.0

    monkeypatch.setattr(start, 'first_step', first_step)
    return calls


def test_every_round_has_a_cold_and_a_warm_start(timed, capsys):
    start.main()
    assert timed == ['cold', 'warm'] * 2
    assert capsys.readouterr().out.splitlines() == [
        'imports: 2.0 s, 1.00 × the imports alone',
        'cold: 10.0 s, 5.00 × the imports alone',
        'warm: 5.0 s, 2.50 × the imports alone',
    ]


def test_a_start_that_keeps_nothing_is_not_called_warm(timed, monkeypatch):
    monkeypatch.setattr(start, 'first_step', lambda *_: 1.0)
    with pytest.raises(SystemExit, match='nothing was kept'):
        start.main()


def test_the_first_row_ends_a_start_and_programs_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '')  # one device, whose programs are read back
    assert start.first_step('configs/quickstart.py:smoke', 'sft', tmp_path) > 1
    assert any(tmp_path.glob('rlhf_jax/xla/*-cache'))


def test_a_run_that_ends_before_its_first_step_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="names 'pretrian', but"):
        start.first_step('configs/quickstart.py', 'pretrian', tmp_path)
