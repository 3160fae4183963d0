"""Labels that are written to files, and those that are read from them."""

import dataclasses
import json

import pytest

from rlhf_jax.data.formats import to_comparison
from rlhf_jax.data.sources import SourceRecord
from rlhf_jax.labels.exchange import add_labels, comparisons, read_given
from rlhf_jax.labels.records import Label, to_row
from rlhf_jax.labels.store import labels_of, open_store, read_stage
from tests.labels import folder as made


def _written(tmp_path, rows):
    path = tmp_path / 'given.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


@pytest.fixture
def stage(tmp_path):
    return read_stage(made.write(tmp_path, [*made.items(3), *made.gold(1)]))


def _labels():
    return [
        Label(item='pair-0', labeller='ann', probability=1.0, strength=2, order=(1, 0)),
        Label(item='pair-1', labeller='ann', probability=0.0, note='odd', flagged=True),
        Label(item='pair-2', labeller='bob', probability=0.5),
        Label(item='pair-0', labeller='bob', verdict='skipped'),
        Label(item='gold-0', labeller='bob', probability=1.0),
    ]


def test_labels_come_back_as_they_were_and_once(tmp_path, stage):
    path = _written(tmp_path, map(to_row, _labels()))
    store = open_store(tmp_path / 'labels.db')
    given = read_given(path, *stage)
    assert given == _labels()
    assert add_labels(store, given) == 5 and add_labels(store, given) == 0
    assert labels_of(store.path) == _labels()


def test_labels_that_say_something_else_are_refused_all_together(tmp_path, stage):
    store = open_store(tmp_path / 'labels.db')
    add_labels(store, _labels()[:1])
    other = [_labels()[1], Label(item='pair-0', labeller='ann', probability=0.0)]
    with pytest.raises(ValueError, match='another label of the item .pair-0.'):
        add_labels(store, other)
    assert labels_of(store.path) == _labels()[:1]


def test_comparisons_of_labels_and_back(tmp_path, stage):
    rows = comparisons(stage[0], _labels())
    assert rows == [
        {
            'prompt': 'question 0',
            'chosen': 'good 0',
            'rejected': 'poor 0',
            'labeller': 'ann',
            'item': 'pair-0',
            'strength': 2,
        },
        {
            'prompt': 'question 1',
            'chosen': 'poor 1',
            'rejected': 'good 1',
            'labeller': 'ann',
            'item': 'pair-1',
            'flagged': True,
            'note': 'odd',
        },
        {
            'prompt': 'question 2',
            'chosen': 'good 2',
            'rejected': 'poor 2',
            'labeller': 'bob',
            'item': 'pair-2',
            'tie': True,
        },
    ]
    # A reward model reads them as they are.
    for i, row in enumerate(rows):
        pair = to_comparison(SourceRecord(row, f'row {i}'), None)
        assert pair.probability == (0.5 if i == 2 else 1.0) and pair.tied == (i == 2)
    for row in rows:
        del row['item']
    back = read_given(_written(tmp_path, rows), *stage)
    wanted = [(x.item, x.labeller, x.probability, x.note) for x in _labels()[:3]]
    assert [(x.item, x.labeller, x.probability, x.note) for x in back] == wanted


def test_what_was_exported_is_there_already(tmp_path, stage):
    """A comparison says nothing of the order, and is turned round where it is read."""
    store = open_store(tmp_path / 'labels.db')
    unsure = Label(item='pair-2', labeller='eve', probability=0.3, seconds=2.5)
    add_labels(store, [*_labels(), unsure])
    before = labels_of(store.path)
    rows = comparisons(stage[0], before)
    back = read_given(_written(tmp_path, rows), *stage)
    assert back[0].order is None and back[3].probability != 0.3
    assert add_labels(store, back) == 0 and labels_of(store.path) == before
    back = read_given(_written(tmp_path, map(to_row, before)), *stage)
    assert add_labels(store, back) == 0


@pytest.mark.parametrize(
    'change',
    [{'strength': 3}, {'probability': 0.9}, {'probability': None, 'verdict': 'bad'}],
)
def test_another_answer_is_not_taken_for_the_same(tmp_path, change):
    store = open_store(tmp_path / 'labels.db')
    add_labels(store, _labels()[:1])
    with pytest.raises(ValueError, match='another label of the item .pair-0.'):
        add_labels(store, [dataclasses.replace(_labels()[0], **change)])


def test_every_pair_of_a_ranking_is_a_comparison(tmp_path):
    rows = made.items(1, form='ranking', completions=['a', 'b', 'c'])
    items, _ = read_stage(made.write(tmp_path, rows, form='ranking'))
    labels = [Label(item='pair-0', labeller='ann', ranks=(2, 1, 2))]
    found = comparisons(items, labels)
    assert [(x['chosen'], x['rejected'], 'tie' in x) for x in found] == [
        ('b', 'a', False),
        ('a', 'c', True),
        ('b', 'c', False),
    ]


@pytest.mark.parametrize(
    'form, said, told',
    [
        ('rating', {'rating': 900.5}, 'rating is 900.5; use 1 to 5'),
        ('rating', {'rating': 0}, 'rating is 0; use 1 to 5'),
        ('ranking', {'ranks': [1, 2]}, '2 ranks of 3 completions'),
        ('ranking', {'ranks': [1, 2, 4]}, 'ranks is [1, 2, 4]; use 1 to 3'),
        ('ranking', {'ranks': ['q', 'r', 's']}, "ranks is ['q', 'r', 's']"),
        ('ranking', {'rating': 3}, 'is a ranking'),
    ],
)
def test_what_the_page_could_not_have_said_is_not_added(tmp_path, form, said, told):
    texts = ['a', 'b', 'c'] if form == 'ranking' else ['a']
    rows = made.items(1, form=form, completions=texts)
    stage = read_stage(made.write(tmp_path, rows, form=form))
    row = {'item': 'pair-0', 'labeller': 'ann'}
    with pytest.raises(ValueError) as error:
        read_given(_written(tmp_path, [row | said]), *stage)
    assert told in str(error.value) and 'given.jsonl:1' in str(error.value)
    good = {'rating': 5} if form == 'rating' else {'ranks': [1, 3, 1]}
    assert len(read_given(_written(tmp_path, [row | good]), *stage)) == 1


@pytest.mark.parametrize(
    'row, told',
    [
        ({'item': 'pair-9', 'labeller': 'ann', 'probability': 1}, "no item 'pair-9'"),
        ({'item': 'pair-0', 'labeller': 'ann', 'rating': 1}, 'is a comparison'),
        (
            {'item': 'pair-0', 'labeller': 'ann', 'probability': 1, 'dimension': 'x'},
            "dimension='x'",
        ),
        ({'prompt': 'a', 'completion': 'b'}, 'given.jsonl:1: label has no field'),
        (
            {
                'prompt': 'of another',
                'chosen': 'good 0',
                'rejected': 'poor 0',
                'labeller': '',
            },
            '0 items of the stage',
        ),
        (
            {'prompt': 'question 0', 'chosen': 'good 0', 'rejected': 'poor 0'},
            'name who chose',
        ),
    ],
)
def test_a_file_of_something_else_is_told_by_its_line(tmp_path, stage, row, told):
    with pytest.raises(ValueError) as error:
        read_given(_written(tmp_path, [row]), *stage)
    assert told in str(error.value) and 'given.jsonl:1' in str(error.value)
