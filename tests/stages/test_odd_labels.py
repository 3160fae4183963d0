"""What a label stage is given that it cannot use, and what it says of it."""

import json

import numpy as np
import pytest

from rlhf_jax.labels.records import read_items, read_labels
from rlhf_jax.main import launch
from tests.stages.test_label import answered, labelled, people, rows
from tests.test_main import fails

pytestmark = pytest.mark.usefixtures('one_device')

HERE = 'tests.stages.test_odd_labels'


def longer(prompts, firsts, seconds, rng):
    return np.asarray([len(a) > len(b) for a, b in zip(firsts, seconds)])


def broken(prompts, firsts, seconds, rng):
    raise KeyError('no such prompt')


def written(folder, found, name='responses.jsonl'):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(''.join(json.dumps(row) + '\n' for row in found))
    return f'jsonl:{folder / name}'


def responses(*completions, prompt='p', **fields):
    return [{'prompt': prompt, 'completion': c, **fields} for c in completions]


def message(**fields):
    return [{'role': 'user', **fields}]


@pytest.mark.parametrize(
    'found, words',
    [
        (responses('a', 'b', prompt=message()), 'prompt[0] must be'),
        (responses('a', 'b', prompt=['p']), 'prompt[0] must be'),
        (responses('a', 'b', prompt=[]), 'a list of messages with at least one'),
        (responses('a', ' '), "'completion' is empty"),
        (responses('a', '\ud800'), 'half a surrogate pair'),
        (responses('a', 'b', score_x=None), 'score_x is None; it must be a finite'),
        (responses('a'), 'a comparison is of 2 different responses'),
        (responses('a', 'a'), '(1 equal ones were left out)'),
        ([{'prompt': 'p', 'chosen': 'a', 'rejected': 'a'}], 'nothing to label'),
        ([{'prompt': 'p', 'completions': ['a', 'b']}], 'completion is no text'),
    ],
)
def test_records_that_cannot_be_labelled_are_told(found, words, tmp_path):
    config = labelled(fn=f'{HERE}:longer', responses=written(tmp_path, found))
    fails(config, tmp_path / 'run', words)


@pytest.mark.parametrize(
    'rule, fields, words',
    [
        ('near', [{'score_x': 'high'}] * 2, "score_x is 'high'; it must be a finite"),
        ('uncertain', [{'members_x': 1.0}] * 2, 'need finite numbers there'),
        (
            'uncertain',
            [{'members_x': [1.0, 2.0]}, {'members_x': [1.0]}],
            'need finite numbers there, as many each',
        ),
        ('far', [{}] * 2, "config.said.score='x': a response has no score"),
        ('best_and_worst', [{'score_x': 1.0}] * 2, 'have the same score_x'),
    ],
)
def test_scores_that_no_rule_can_use_are_told(rule, fields, words, tmp_path):
    found = [{**row, **more} for row, more in zip(responses('a', 'b'), fields)]
    spec = written(tmp_path, found)
    config = labelled(fn=f'{HERE}:longer', rule=rule, score='x', responses=spec)
    fails(config, tmp_path / 'run', words)


def test_a_function_that_fails_is_told_with_its_line(tmp_path):
    where = "config.said.fn='tests.stages.test_odd_labels:broken' failed with KeyError"
    fails(labelled(fn=f'{HERE}:broken'), tmp_path, where, 'test_odd_labels.py:')


def test_limit_counts_comparisons_too_and_equal_ones_are_left_out(tmp_path):
    found = [{'prompt': f'p{i}', 'chosen': 'aa', 'rejected': 'b'} for i in range(8)]
    found += [{'prompt': 'q', 'chosen': 'c', 'rejected': 'c'}]
    spec = written(tmp_path, found + responses('dd', 'e', prompt='r'))
    config = labelled(fn=f'{HERE}:longer', responses=spec, limit=4)
    said = launch(config, tmp_path / 'run')['stages']['said']
    assert said['records'] == 4 and said['repeated'] == 1
    config = labelled(fn=f'{HERE}:longer', responses=spec, rule='near', score='x')
    fails(config, tmp_path / 'again', 'responses are comparisons; use')


def test_odd_texts_are_texts(tmp_path):
    texts = ['</script><script>alert(1)</script>', 'م' * 20_000, '\u202e{second}\0']
    calls = {'role': 'assistant', 'tool_calls': [{'id': 1}]}
    turns = [*message(content='שלום'), calls, {'role': 'tool', 'content': '2'}]
    found = responses(*texts, prompt='{prompt} </script>')
    found += responses(*texts, prompt=turns)
    spec = written(tmp_path, found)
    config = labelled(fn=f'{HERE}:longer', responses=spec, per_prompt=3)
    launch(config, tmp_path / 'run')
    kept = rows(tmp_path / 'run' / 'said' / 'records.jsonl')
    assert {row['chosen'] for row in kept} | {row['rejected'] for row in kept} == {
        *texts
    }
    assert '<script>alert(1)' not in (tmp_path / 'run' / 'report.html').read_text()


@pytest.mark.parametrize(
    'form, method, others',
    [
        ('rating', 'dawid_skene', "'none' or 'majority' or 'share'"),
        ('ranking', 'majority', "'none' or 'share'"),
    ],
)
def test_what_cannot_be_aggregated_is_told_before_anybody_labels(
    form, method, others, tmp_path
):
    spec = written(tmp_path, responses('a', 'b', 'c', 'd'))
    config = people(form, responses=spec, aggregate=method)
    fails(config, tmp_path / 'run', f'aggregate={method!r} is not for {form}s', others)


def test_answers_to_other_responses_are_not_taken_for_answers_to_these(tmp_path):
    old = [row for i in range(3) for row in responses('a', 'bb', prompt=f'p{i}')]
    config = people(responses=written(tmp_path, old))
    folder = tmp_path / 'run' / 'said'
    with pytest.raises(SystemExit):
        launch(config, tmp_path / 'run')
    before = read_items(folder / 'items.jsonl')
    answered(folder, lambda item, name: [{'probability': 1.0}])
    written(tmp_path, responses('x', 'yy', prompt='other'))
    fails(config, tmp_path / 'run', 'labels.db holds answers to other items')
    assert read_items(folder / 'items.jsonl') == before
    written(tmp_path, old)
    launch(config, tmp_path / 'run')
    assert len(read_labels(folder / 'labels.jsonl')) == 6


@pytest.mark.parametrize('verdict', ['skipped', 'bad'])
def test_items_that_nobody_judged_are_counted(verdict, tmp_path):
    config = people()
    with pytest.raises(SystemExit):
        launch(config, tmp_path)
    answered(tmp_path / 'said', lambda item, name: [{'verdict': verdict}])
    counts = {'skipped': 0, 'bad': 0, verdict: 24}
    told = '24 labels of 12 items ({skipped} skipped, {bad} called bad)'
    fails(config, tmp_path, told.format(**counts))
