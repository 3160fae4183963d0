"""What becomes of labels: the strength of a comparison."""

import pytest

from rlhf_jax.labels.outcomes import to_records
from rlhf_jax.labels.records import Label
from tests.labels.test_aggregation import items


def _strengths(said, method):
    """Of every record of one item; said are (probability, strength) by labeller."""
    labels = [
        Label(item='0', labeller=f'l{i}', probability=probability, strength=strength)
        for i, (probability, strength) in enumerate(said)
    ]
    records = to_records(items(1), labels, method)
    return [row.get('strength') for row in records]


@pytest.mark.parametrize('method', ['majority', 'share', 'dawid_skene'])
def test_the_strength_is_that_of_those_who_say_the_same(method):
    assert _strengths([(1, 4), (0, 1), (0, 2)], method) == [1.5]
    assert _strengths([(1, 4), (1, 3), (0, 1), (0.5, None)], method) == [3.5]


@pytest.mark.parametrize('method', ['majority', 'share'])
def test_where_neither_is_chosen_there_is_no_strength(method):
    assert _strengths([(1, 4), (0, 1)], method) == [None]
    assert _strengths([(0.5, None), (0.5, 2)], method) == [None]


def test_a_label_by_itself_keeps_its_strength():
    said = [(1, 4), (0, 1), (0.5, None), (0.8, 2)]
    assert _strengths(said, 'none') == [4, 1, None, 2]
