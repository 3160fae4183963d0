"""Items and labels of files whose fields have another type or value."""

import json

import pytest

from rlhf_jax.agreement import agreement
from rlhf_jax.labels.records import read_items, read_labels, to_row
from tests.labels import folder as made

LABEL = {'item': 'pair-0', 'labeller': 'ann', 'probability': 1}
RANKING = {'item': 'pair-0', 'labeller': 'ann', 'ranks': [1, 2]}


def _written(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def test_what_is_written_is_read_as_it_was(tmp_path):
    facts = [{'by': 'a'}, {'score_x': 1.5}]
    more = {'facts': facts, 'templated': True, 'readable': 'text', 'why': None}
    rows = [*made.items(1, **more), *made.training(1), *made.gold(1)]
    items = read_items(_written(tmp_path / 'items.jsonl', rows))
    again = _written(tmp_path / 'again.jsonl', map(to_row, items))
    assert read_items(again) == items and items[0].facts == tuple(facts)
    full = {
        'strength': 4, 'dimension': 'd', 'order': [1, 0], 'repeat': 2, 'seconds': 0.5,
        'flagged': True, 'note': '',
    }  # fmt: skip
    none = {'strength': None, 'order': None, 'seconds': None, 'note': None}
    for row in (LABEL | full, LABEL | none, RANKING | {'order': [1, 0]}):
        [label] = read_labels(_written(tmp_path / 'labels.jsonl', [row]))
        again = _written(tmp_path / 'again.jsonl', [to_row(label)])
        assert read_labels(again) == [label]


@pytest.mark.parametrize(
    'row, field, value',
    [
        (LABEL, 'item', 3),
        (LABEL, 'labeller', None),
        (LABEL, 'probability', '1'),
        (LABEL, 'probability', float('nan')),
        (LABEL, 'verdict', ['judged']),
        (LABEL, 'strength', 5),
        (LABEL, 'dimension', 3),
        (LABEL, 'order', 5),
        (LABEL, 'order', [1, 2]),
        (LABEL, 'order', [0, '1']),
        (LABEL, 'order', [0, 1, 2]),
        (LABEL, 'repeat', -1),
        (LABEL, 'repeat', None),
        (LABEL, 'seconds', '3'),
        (LABEL, 'seconds', -1),
        (LABEL, 'flagged', 'no'),
        (LABEL, 'note', 3),
        (RANKING, 'ranks', [1, None]),
        (RANKING, 'ranks', [0, 1]),
        (RANKING, 'ranks', [1, 1.5]),
        (RANKING, 'ranks', ['q', 'r', 's']),
        (RANKING, 'ranks', [1]),
        (RANKING, 'ranks', 'ab'),
        (RANKING, 'order', [0, 1, 2]),
    ],
)
def test_a_label_is_told_by_its_line_and_field(tmp_path, row, field, value):
    rows = [{**row, 'labeller': 'bob'}, {**row, field: value}]
    path = _written(tmp_path / 'labels.jsonl', rows)
    with pytest.raises(ValueError, match=f'labels.jsonl:2: {field} is ') as error:
        agreement(path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'field, value',
    [
        ('completions', [1, 2]),
        ('completions', 'ab'),
        ('completions', None),
        ('form', {}),
        ('form', 'essay'),
        ('purpose', 'odd'),
        ('known', 5),
        ('why', 3),
        ('facts', ['a', 'b']),
        ('facts', {'by': 'a'}),
        ('templated', 'no'),
        ('readable', 3),
    ],
)
def test_an_item_is_told_by_its_line_and_field(tmp_path, field, value):
    rows = [*made.items(1), made.gold(1)[0] | {field: value}]
    _written(tmp_path / 'items.jsonl', rows)
    path = _written(tmp_path / 'labels.jsonl', [LABEL])
    with pytest.raises(ValueError, match=f'items.jsonl:2: {field} is .*; use '):
        agreement(path)


def test_facts_are_of_every_completion(tmp_path):
    path = _written(tmp_path / 'items.jsonl', made.items(1, facts=[{}]))
    with pytest.raises(ValueError, match='items.jsonl:1: facts of 1 of 2 completions'):
        read_items(path)
