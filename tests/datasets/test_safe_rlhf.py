"""PKU-SafeRLHF's format: rankings by harm, comparisons by help, and bad lines."""

import json

import pytest

from rlhf_jax.data.sources import read


def row(safe=(False, True), safer=1, better=0, **fields):
    """A record in the format of the released files; the texts are ours."""
    return {
        'prompt': 'How do {locks} open?',
        'response_0': 'Break them.',
        'response_1': 'With a key.',
        'is_response_0_safe': safe[0],
        'is_response_1_safe': safe[1],
        'better_response_id': better,
        'safer_response_id': safer,
        'prompt_source': 'ours',
    } | fields


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / 'train.jsonl'
        path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
        return path

    return write


def fields(what, path, more=''):
    spec = f'python:rlhf_jax.datasets.safe_rlhf:{what}?data=jsonl:{path}{more}'
    return [record.fields for record in read(spec)]


@pytest.mark.parametrize(
    ('safe', 'safer', 'completions'),
    [
        ((False, True), 1, [' Break them.', None, ' With a key.']),
        ((True, False), 0, [' With a key.', None, ' Break them.']),
        ((False, False), 1, [' Break them.', ' With a key.', None]),
        ((True, True), 0, [None, ' With a key.', ' Break them.']),
    ],
)
def test_costs_are_ranked_from_the_most_harmful(file, safe, safer, completions):
    (record,) = fields('costs', file(row(safe, safer)))
    assert record == {
        'prompt': 'BEGINNING OF CONVERSATION: USER: How do {locks} open? ASSISTANT:',
        'completions': completions,
        'ranks': [1, 2, 3],
    }


def test_preferences_ask_for_help_alone(file):
    path = file(row(better=0), row(better=1))
    first, second = fields('preferences', path, '&template=Q: {prompt}%0AA:')
    assert first == {
        'prompt': 'Q: How do {locks} open?\nA:',
        'chosen': ' Break them.',
        'rejected': ' With a key.',
    }
    assert (second['chosen'], second['rejected']) == (' With a key.', ' Break them.')


@pytest.mark.parametrize(
    ('what', 'changes', 'parts'),
    [
        (
            'costs',
            {'safer_response_id': 0},
            [
                'safer_response_id is 0',
                'is_response_0_safe is false',
                'is_response_1_safe is true',
                'mend one of the three',
            ],
        ),
        ('costs', {'safer_response_id': 2}, ["'safer_response_id' is 2", '0 or 1']),
        ('costs', {'safer_response_id': True}, ["'safer_response_id' is True"]),
        ('costs', {'is_response_1_safe': 1}, ["'is_response_1_safe' is 1", 'or false']),
        ('costs', {'response_1': None}, ["'response_1' is None", 'a text']),
        ('preferences', {'better_response_id': None}, ["'better_response_id' is None"]),
        (
            'preferences',
            {'prompt': ['a']},
            ["'prompt' is ['a']", 'fields: '],
        ),
    ],
)
def test_a_bad_line_has_its_place(file, what, changes, parts):
    path = file(row(), row(**changes))
    with pytest.raises(ValueError) as caught:
        fields(what, path)
    for part in (f'{path}:2: ', *parts):
        assert part in str(caught.value), str(caught.value)


def test_a_template_has_a_place_for_the_prompt(file):
    with pytest.raises(ValueError, match=r"template='Q:' has no \{prompt\}"):
        fields('costs', file(row()), '&template=Q:')
