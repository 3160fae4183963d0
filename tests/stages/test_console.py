"""What is said of data when they are read."""

import json
from types import SimpleNamespace

import pytest

from rlhf_jax.data.examples import Counts, Dataset
from rlhf_jax.main import launch
from rlhf_jax.stages.console import tell_left_out, tell_shared
from tests.small_config import get_config


def said(capsys, what='demonstrations', **counts):
    data = Dataset([], [], Counts('jsonl:a.jsonl', what, 8, **counts))
    assert tell_left_out(data) is data
    return capsys.readouterr().out


def test_a_file_that_is_used_whole_is_not_mentioned(capsys):
    assert said(capsys, read=10, kept=10) == ''
    assert said(capsys, 'texts', read=10, kept=10, truncated=4) == ''  # in pieces


@pytest.mark.parametrize(
    ('counts', 'words'),
    [
        ({'kept': 9, 'dropped_overlong': 1}, '1 dropped as longer than 8 tokens'),
        ({'kept': 10, 'truncated': 3}, '3 truncated to 8 tokens'),
        ({'kept': 9, 'skipped_bad': 1, 'first_bad': 'x:3'}, '1 skipped as bad (first'),
    ],
)
def test_drops_cuts_and_skips_are_one_line(capsys, counts, words):
    line = said(capsys, read=10, **counts)
    assert line.startswith('data: 10 demonstrations read from jsonl:a.jsonl')
    assert words in line and line.count('\n') == 1


def test_most_of_a_file_left_out_is_a_warning(capsys):
    line = said(capsys, read=10, kept=4, dropped_overlong=6)
    assert line.startswith('warning: most of a file is left out: 10 demonstrations')
    assert 'raise the longest bucket' in line
    line = said(capsys, read=10, kept=4, skipped_bad=6, first_bad='x:3')
    assert line.startswith('warning: ') and 'bucket' not in line


def test_prompts_on_both_sides_are_a_warning(capsys):
    def data(*prompts):
        records = [SimpleNamespace(prompt=prompt) for prompt in prompts]
        return Dataset(
            [], records, Counts('jsonl:a.jsonl', 'prompts', 8, read=9, kept=9)
        )

    tell_shared(data('a', 'b'), data('c'))
    assert capsys.readouterr().out == ''
    tell_shared(data('a', 'b'), data('c', 'b', 'b'))
    assert 'warning: 2 of the 3 prompts of jsonl:a.jsonl' in capsys.readouterr().out


def test_it_is_said_before_anything_trains(tmp_path, capsys, monkeypatch):
    path = tmp_path / 'd.jsonl'
    long = [' very' * 100] * 9
    rows = [{'prompt': 'a', 'completion': text} for text in (' b', *long)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    config = get_config()
    config.stages = ('sft',)
    config.sft.init = 'scratch'
    config.sft.train = f'jsonl:{path}'

    def refuse(*_, **__):
        raise RuntimeError('trains')

    monkeypatch.setattr('rlhf_jax.stages.sft.train', refuse)
    with pytest.raises(RuntimeError, match='trains'):
        launch(config, tmp_path / 'run')
    line = f'10 demonstrations read from jsonl:{path}, 1 kept, 9 dropped as longer'
    assert line in capsys.readouterr().out
