"""GSM8K's format: prompts, worked answers, final numbers, and lines that are bad."""

import json

import pytest

from rlhf_jax.data.formats import to_demonstration, to_prompt
from rlhf_jax.data.sources import SourceRecord, read
from rlhf_jax.verify import numeric_answer

# In the format of the released files; the problems are ours.
PROBLEMS = [
    {
        'question': 'A box holds 48 pens. Half are red. How many pens are red?',
        'answer': '48/2 = <<48/2=24>>24 pens are red.\n#### 24',
    },
    {
        'question': 'A car costs $1,000 more than a boat of $500. What is its price?',
        'answer': '500 + 1000 = $<<500+1000=1500>>1,500.\n#### 1,500',
    },
    {'question': 'It is {hot}. It cools by 5 from 2. How cold?', 'answer': '#### -3'},
]
RECORDS = 'python:rlhf_jax.datasets.gsm8k:records'


@pytest.fixture
def file(tmp_path):
    path = tmp_path / 'train.jsonl'
    path.write_text('\n'.join(map(json.dumps, PROBLEMS)) + '\n')
    return path


def fields(spec):
    return [record.fields for record in read(spec)]


def test_a_problem_is_a_demonstration_and_a_prompt(file):
    first, second, third = fields(f'{RECORDS}?data=jsonl:{file}')
    question = PROBLEMS[0]['question']
    assert first == {
        'prompt': f'Question: {question}\nAnswer:',
        'completion': ' 48/2 = <<48/2=24>>24 pens are red.\n#### 24',
        'reference': '24',
    }
    assert second['reference'] == '1500' and third['reference'] == '-3'
    assert '{hot}' in third['prompt']
    record = SourceRecord(first, 'here')
    assert to_demonstration(record, None).completion == first['completion']
    assert to_prompt(record, None).reference == '24'


def test_annotations_template_and_worked_examples(file):
    spec = f'{RECORDS}?data=jsonl:{file}%5B1:%5D&annotations=strip'
    second, _ = fields(spec)
    assert second['completion'] == ' 500 + 1000 = $1,500.\n#### 1,500'
    spec += f'&shots=jsonl:{file}%5B:1%5D&template=Q: {{question}}%0AA:'
    second, _ = fields(spec)
    shown, asked = PROBLEMS[0]['question'], PROBLEMS[1]['question']
    assert second['prompt'] == (
        f'Q: {shown}\nA: 48/2 = 24 pens are red.\n#### 24\n\nQ: {asked}\nA:'
    )


def test_worked_answers_are_right_by_their_own_references(file):
    rows = fields(f'{RECORDS}?data=jsonl:{file}')
    columns = [[r[k] for r in rows] for k in ('prompt', 'completion', 'reference')]
    assert numeric_answer(*columns, where=['####']).tolist() == [1, 1, 1]
    prompts, completions, references = columns
    wrong = numeric_answer(prompts, completions[1:] + completions[:1], references)
    assert wrong.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ('row', 'parts'),
    [
        ({'question': 'q'}, ["'answer' is missing", 'found: question']),
        ({'question': ' ', 'answer': '#### 1'}, ["'question' is missing, empty"]),
        ({'question': 'q', 'answer': 7}, ["'answer'", 'no text']),
        ({'question': 'q', 'answer': 'It is 7.'}, ['#### 72', "'It is 7.'"]),
        ({'question': 'q', 'answer': 'So\n#### many'}, ['#### many']),
    ],
)
def test_a_bad_line_has_its_place(file, row, parts):
    with file.open('a') as lines:
        lines.write(json.dumps(row) + '\n')
    with pytest.raises(ValueError) as caught:
        read(f'{RECORDS}?data=jsonl:{file}')
    for part in (f'{file}:4', *parts):
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ('argument', 'part'),
    [
        ('template=question', r"template='question' has no \{question\}"),
        ('annotations=no', "annotations='no'"),
        ('shots=jsonl:FILE', r'FILE:1: this problem is also an example'),
    ],
)
def test_arguments_are_checked(file, argument, part):
    argument, part = (text.replace('FILE', str(file)) for text in (argument, part))
    with pytest.raises(ValueError, match=part):
        read(f'{RECORDS}?data=jsonl:{file}&{argument}')
