"""The writers: valid JSON, no row twice after a resume, clear errors; progress."""

import io
import json
import sys
import types

import numpy as np
import pytest

from rlhf_jax.metrics import JsonlWriter, open_writers, progress


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_flushed_and_valid_json(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    writer = JsonlWriter(path, resume_step=None)
    writer.write(1, {'train/loss': np.float32(0.5), 'n': 3})
    writer.write(2, {'train/loss': float('nan'), 'kl': np.array(-np.inf)})
    text = path.read_text()  # before close: every row is flushed at once
    assert 'NaN' not in text and 'Infinity' not in text
    assert rows(path) == [
        {'step': 1, 'train/loss': 0.5, 'n': 3},
        {'step': 2, 'train/loss': None, 'kl': None},
    ]
    writer.close()


def test_resume_drops_later_rows_and_a_cut_last_line(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text(
        '{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3}\n{"step": 4, "a'
    )
    writer = JsonlWriter(path, resume_step=2)
    writer.write(3, {'a': 3.5})
    writer.close()
    assert [row['step'] for row in rows(path)] == [1, 2, 3]
    assert rows(path)[2] == {'step': 3, 'a': 3.5}
    assert list(tmp_path.iterdir()) == [path]  # nothing of the atomic rewrite stays


def test_resume_completes_a_last_line_without_its_end(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n{"step": 2}')  # whole, only the line end is missing
    with open_writers(tmp_path, (), resume_step=2) as writers:
        writers.write(3, {})
    assert [row['step'] for row in rows(path)] == [1, 2, 3]


def test_fresh_start_empties_the_file(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 0}\n')
    JsonlWriter(path, resume_step=None).close()
    assert path.read_text() == ''


@pytest.mark.parametrize(
    'bad', ['{"step": 1, ', '{"loss": 1}', '[1]', '{"step": null}']
)
def test_a_bad_line_in_the_middle_is_an_error_with_its_place(tmp_path, bad):
    path = tmp_path / 'metrics.jsonl'
    before = f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n'
    path.write_text(before)
    with pytest.raises(ValueError, match=r'metrics\.jsonl:2 '):
        JsonlWriter(path, resume_step=5)
    assert path.read_text() == before  # the error destroyed nothing


@pytest.mark.parametrize('values', [{'step': 1}, {'loss': 'high'}, {'loss': [1.0]}])
def test_write_refuses_what_is_no_metric(tmp_path, values):
    writer = JsonlWriter(tmp_path / 'metrics.jsonl', resume_step=None)
    with pytest.raises(ValueError):
        writer.write(1, values)
    writer.close()


def test_unknown_writer_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'tensorboard'"):
        open_writers(tmp_path, ('tensorbord',), resume_step=None)


@pytest.mark.parametrize(
    ('name', 'module'), [('tensorboard', 'tensorboardX'), ('wandb', 'wandb')]
)
def test_missing_library_names_the_extra(tmp_path, monkeypatch, name, module):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 9}\n')
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    with pytest.raises(ValueError, match=rf'pip install .rlhf_jax\[{name}\]'):
        open_writers(tmp_path, (name,), resume_step=2)
    assert rows(tmp_path / 'metrics.jsonl') == [{'step': 9}]


class _FakeSummaryWriter:
    def __init__(self, logdir, purge_step):
        self.purge_step = purge_step
        self.scalars = []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        pass

    def close(self):
        self.scalars.append('closed')


class _FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__('wandb')
        self.ids, self.rows = [], []

    def init(self, *, dir, id, name, resume):
        assert resume == 'allow'
        self.ids.append(id)
        return self

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.rows.append('finished')


def test_tensorboard_and_wandb_get_the_finite_numbers(tmp_path, monkeypatch):
    board = types.ModuleType('tensorboardX')
    made = []
    board.SummaryWriter = lambda *a, **k: (
        made.append(_FakeSummaryWriter(*a, **k)) or made[-1]
    )
    wandb = _FakeWandb()
    monkeypatch.setitem(sys.modules, 'tensorboardX', board)
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    for resume_step in (None, 4, None):
        with open_writers(tmp_path, ('tensorboard', 'wandb'), resume_step) as writers:
            writers.write(5, {'loss': 1.5, 'kl': float('inf')})
    assert [fake.purge_step for fake in made] == [0, 5, 0]
    assert made[0].scalars == [('loss', 1.5, 5), 'closed']
    assert wandb.rows[:2] == [(5, {'loss': 1.5}), 'finished']
    assert wandb.ids[0] == wandb.ids[1]  # a resumed run goes on under its id
    assert wandb.ids[1] != wandb.ids[2]  # a fresh start is another run
    assert rows(tmp_path / 'metrics.jsonl') == [{'step': 5, 'loss': 1.5, 'kl': None}]


def test_progress_is_a_plain_line_now_and_then_without_a_terminal(capfd, monkeypatch):
    now = [100.0]
    monkeypatch.setattr('rlhf_jax.metrics.time.monotonic', lambda: now[0])
    with progress('sft', total=9) as update:
        for step, seconds in enumerate((0.0, 6.0, 30.0, 65.0, 67.0, 300.0), start=1):
            now[0] = 100.0 + seconds
            update(step, loss=2.0 / step, tokens_per_second=5200.0)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split('  ')[0] for line in lines] == ['sft 2/9', 'sft 5/9', 'sft 6/9']
    assert lines[0] == 'sft 2/9  loss 1  tokens/s 5200  0.1 min'


def test_progress_shows_step_and_numbers_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, 'stdout', terminal)
    monkeypatch.setenv('COLUMNS', '120')
    monkeypatch.setenv('TERM', 'xterm')
    with progress('ppo', total=8, start=4) as update:
        update(5, reward=1.25, tokens_per_second=5200.0)
    text = terminal.getvalue()
    assert 'ppo' in text and '5/8' in text
    assert 'reward 1.25' in text and 'tokens/s 5200' in text
