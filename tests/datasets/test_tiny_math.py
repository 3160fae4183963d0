"""The embedded word problems: true, disjoint, deterministic, and wrong on purpose."""

import itertools
import re

import pytest

from rlhf_jax.data.sources import read
from rlhf_jax.datasets import tiny_math
from rlhf_jax.verify import numeric_answer

GAINED = re.compile(r'(?:buys|finds|wins|gets) (\d+)')
LOST = re.compile(r'(?:sells|loses|gives|breaks) (\d+)')


def solve(prompt):
    """Reads a problem again, by other means than it was written."""
    start = int(re.search(r' has (\d+) ', prompt)[1])
    return (
        start
        + sum(map(int, GAINED.findall(prompt)))
        - sum(map(int, LOST.findall(prompt)))
    )


def first(kind, split, count=600):
    return list(itertools.islice(getattr(tiny_math, kind)(split), count))


def test_references_are_right():
    for record in first('prompts', 'train'):
        assert record['reference'] == str(solve(record['prompt']))
        assert len(re.findall(r'\d+', record['prompt'])) == record['steps'] + 1
    assert {record['steps'] for record in first('prompts', 'train', 50)} == {1, 2}


def test_sums_in_the_texts_are_right():
    for record in first('texts', 'train', 200):
        sums = re.findall(r'(\d+) ([+-]) (\d+) = (\d+)\.', record['text'])
        assert len(sums) == tiny_math.SUMS
        for a, sign, b, result in sums:
            assert int(a) + int(sign + b) == int(result) >= 0


def test_demonstrations_are_wrong_as_often_as_they_say():
    records = first('demonstrations', 'train', 2000)
    prompts = [record['prompt'] for record in records]
    right = numeric_answer(
        prompts,
        [record['completion'] for record in records],
        [str(solve(prompt)) for prompt in prompts],
        where=['####'],
    )
    # exactly those of another kind than 'right' have another number
    assert [bool(r) for r in right] == [r['kind'] == 'right' for r in records]
    # 2,000 draws: standard deviation √(0.3·0.7/2000) = 0.010
    assert 1 - right.mean() == pytest.approx(tiny_math.WRONG, abs=0.04)
    kinds = {record['kind'] for record in records}
    assert kinds == {'right', 'slip', 'wrong way', 'early'}


def test_no_test_problem_is_in_a_training_split():
    training = {
        record['prompt']
        for kind in ('demonstrations', 'prompts')
        for record in first(kind, 'train', None)
    }
    for kind in ('demonstrations', 'prompts'):
        records = first(kind, 'test', None)
        assert len(records) == tiny_math.SIZES[kind]['test']
        assert not training & {record['prompt'] for record in records}


def test_records_are_the_same_every_time_and_read_by_a_spec():
    once, again = first('prompts', 'test'), first('prompts', 'test')
    assert once == again
    spec = 'python:rlhf_jax.datasets.tiny_math:prompts?split=test[:3]'
    assert [record.fields for record in read(spec)] == once[:3]
    with pytest.raises(ValueError, match="no split 'tset'; did you mean 'test'"):
        read('python:rlhf_jax.datasets.tiny_math:prompts?split=tset')


def test_the_tokenizer_spells_numbers_and_loses_nothing():
    tokenizer = tiny_math.tokenizer()
    assert len(tokenizer) < 320
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(' 12 + 7')) == [
        'Ġ', '1', '2', 'Ġ+', 'Ġ', '7',
    ]  # fmt: skip
    for record in first('demonstrations', 'train', 50):
        text = record['prompt'] + record['completion']
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        words = [p for p in tokenizer.convert_ids_to_tokens(ids) if len(p) > 1]
        assert len(ids) - len(words) < 50 and len(ids) <= 66
