"""The plan, the database, and how much is enough."""

import json
import multiprocessing
import sqlite3

import pytest

from rlhf_jax.labels.records import Label, read_items
from rlhf_jax.labels.session import insert
from rlhf_jax.labels.store import (
    LabelPlan,
    Unusable,
    labels_of,
    open_store,
    progress,
    read_plan,
    read_stage,
)
from tests.labels import folder as made


def _plan(tmp_path, **fields):
    path = tmp_path / 'label.json'
    path.write_text(json.dumps(fields))
    return read_plan(path)


def test_a_plan_is_read_with_its_defaults(tmp_path):
    plan = _plan(tmp_path, labellers=['ann'], dimensions=['helpful'], repeats=0.1)
    assert plan == LabelPlan(labellers=('ann',), dimensions=('helpful',), repeats=0.1)
    assert plan.asked == ('helpful',) and plan.overlap == 1
    assert _plan(tmp_path, labellers=['ann']).asked == (None,)


@pytest.mark.parametrize(
    'fields, told',
    [
        ({}, 'label.json.labellers is needed'),
        ({'labellers': []}, 'name at least one'),
        ({'labellers': ['ann', 'ann']}, "'ann' stands there twice"),
        ({'labellers': ['ann'], 'overlap': 2}, 'from 1 labellers'),
        ({'labellers': ['ann'], 'overlap': 0}, '1 or more'),
        ({'labellers': ['ann'], 'overlp': 1}, "did you mean 'overlap'"),
        ({'labellers': ['ann'], 'form': 'essay'}, 'form'),
        ({'labellers': ['ann'], 'rating_range': [5, 1]}, 'the lowest and the highest'),
        ({'labellers': ['ann'], 'gold_share': 0.9}, 'gold_share'),
        (
            {'labellers': ['ann'], 'dimensions': ['brief'], 'guideline': {'kind': ''}},
            "'kind' is none of dimensions",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_told(tmp_path, fields, told):
    with pytest.raises(ValueError) as error:
        _plan(tmp_path, **fields)
    assert told in str(error.value), error.value


def test_a_stage_that_has_not_begun_is_told(tmp_path):
    with pytest.raises(ValueError, match='give the command of the run first'):
        read_stage(tmp_path / 'nothing')


@pytest.mark.parametrize(
    'change, told',
    [
        ({'form': 'rating', 'completions': ['one']}, 'is a rating'),
        ({'purpose': 'gold'}, 'has no known label'),
        ({'purpose': 'gold', 'known': {'rating': 3}}, 'known: the item .* comparison'),
        ({'purpose': 'training', 'why': 3}, 'why is 3; use a text'),
        ({'purpose': 'gold', 'known': {'probability': 7}}, 'probability is 7'),
        (
            {'purpose': 'gold', 'known': {'probability': 1, 'dimension': 'odd'}},
            "dimension='odd'",
        ),
    ],
)
def test_items_that_the_page_cannot_ask_are_told(tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        read_stage(made.write(tmp_path, made.items(1, **change)))


def test_tokens_are_the_same_after_a_restart_and_differ(tmp_path):
    path = tmp_path / 'labels.db'
    tokens = open_store(path).tokens(['ann', 'bob'])
    assert open_store(path).tokens(['bob', 'ann', 'eve']) == {
        **tokens,
        'eve': open_store(path).tokens(['eve'])['eve'],
    }
    assert len({*tokens.values()}) == 2 and min(map(len, tokens.values())) >= 32


def test_a_link_that_is_deleted_is_replaced(tmp_path):
    store = open_store(tmp_path / 'labels.db')
    old = store.tokens(['ann', 'bob'])
    with store.transaction() as db:
        db.execute("DELETE FROM labellers WHERE name = 'bob'")
    new = store.tokens(['ann', 'bob'])
    assert new['ann'] == old['ann'] and new['bob'] != old['bob']


def test_no_database_has_no_labels_and_is_not_made(tmp_path):
    assert labels_of(tmp_path / 'labels.db') == []
    assert not (tmp_path / 'labels.db').exists()


def test_what_is_no_database_of_labels_is_told(tmp_path):
    path = tmp_path / 'labels.db'
    path.write_bytes(b'no database at all' * 100)
    with pytest.raises(Unusable, match='cannot be used'):
        labels_of(path)
    other = tmp_path / 'other.db'
    with sqlite3.connect(other) as db:
        db.execute('CREATE TABLE mine (x)')
    with pytest.raises(ValueError, match='no database of labels of this version'):
        open_store(other)


def test_answers_are_not_taken_for_other_items(tmp_path):
    items, _ = read_stage(made.write(tmp_path, made.items(2)))
    store = open_store(tmp_path / 'labels.db')
    store.claim(items[:1])
    store.claim(items)  # nothing is answered yet
    with store.transaction() as db:
        insert(db, 'a', Label(item='pair-0', labeller='ann', probability=1.0))
    store.claim(items)
    with pytest.raises(ValueError, match='answers to other items'):
        store.claim(items[:1])


def test_an_error_in_a_transaction_leaves_nothing(tmp_path):
    store = open_store(tmp_path / 'labels.db')
    label = Label(item='pair-0', labeller='ann', probability=1.0)
    with pytest.raises(KeyError), store.transaction() as db:
        insert(db, 'a', label)
        raise KeyError
    assert labels_of(store.path) == []
    # Of one task a labeller has one answer.
    with pytest.raises(Unusable), store.transaction() as db:
        insert(db, 'a', label)
        insert(db, 'b', label)
    assert labels_of(store.path) == []


def _write_many(path, name):
    store = open_store(path)
    for i in range(40):
        with store.transaction() as db:
            insert(db, f'{name}-{i}', Label(item=f'{i}', labeller=name, rating=1.0))


def test_processes_write_to_one_database_at_once(tmp_path):
    path = tmp_path / 'labels.db'
    context = multiprocessing.get_context('spawn')
    both = [context.Process(target=_write_many, args=(path, n)) for n in 'ab']
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted((x.labeller, int(x.item)) for x in labels_of(path)) == [
        (name, i) for name in 'ab' for i in range(40)
    ]


# ---------------------------------------------------------------------------- progress


def _said(item, labeller, **fields):
    fields = fields or {'probability': 1.0}
    return Label(item=f'pair-{item}', labeller=labeller, **fields)


def _progress(tmp_path, labels, count=2, **plan):
    rows = [*made.items(count), *made.gold(1)]
    made.write(tmp_path, rows)
    plan = LabelPlan(labellers=('ann', 'bob', 'eve'), overlap=2, **plan)
    return progress(read_items(tmp_path / 'items.jsonl'), labels, plan)


def test_progress_counts_items_with_all_their_labels(tmp_path):
    labels = [_said(0, 'ann'), _said(0, 'bob'), _said(1, 'ann')]
    state = _progress(tmp_path, labels)
    assert state.line == '1 of 2 items have 2 labels; labels of ann 2, bob 1, eve 0'
    assert (state.complete, state.total, state.done) == (1, 2, False)
    more = [*labels, _said(1, 'eve', verdict='bad')]
    assert _progress(tmp_path, more).done


def test_skips_repeats_and_gold_items_do_not_count(tmp_path):
    labels = [
        _said(0, 'ann'),
        _said(0, 'ann', probability=1.0, repeat=1),
        _said(0, 'bob', verdict='skipped'),
        Label(item='gold-0', labeller='bob', probability=1.0),
    ]
    state = _progress(tmp_path, labels, count=1)
    assert state.line.startswith('0 of 1 items have 2 labels') and not state.done


def test_an_item_that_too_many_skipped_is_not_waited_for(tmp_path):
    labels = [_said(0, 'ann', verdict='skipped'), _said(0, 'bob', verdict='skipped')]
    state = _progress(tmp_path, labels, count=1)
    assert state.done and state.complete == 0
    assert state.line.endswith('; 1 were skipped by too many to get as many')


def test_every_dimension_wants_its_labels(tmp_path):
    labels = [
        _said(0, name, probability=1.0, dimension='brief') for name in ('ann', 'bob')
    ]
    dimensions = {'dimensions': ('helpful', 'brief')}
    state = _progress(tmp_path, labels, count=1, **dimensions)
    assert not state.done and '2 labels by each of helpful, brief' in state.line
    labels += [
        _said(0, n, probability=0.5, dimension='helpful') for n in ('bob', 'eve')
    ]
    assert _progress(tmp_path, labels, count=1, **dimensions).done


def test_an_item_that_is_lost_by_one_dimension_is_not_waited_for(tmp_path):
    labels = [
        _said(0, name, verdict='skipped', dimension='brief') for name in ('ann', 'bob')
    ]
    state = _progress(tmp_path, labels, count=1, dimensions=('helpful', 'brief'))
    assert state.done and state.complete == 0
    assert state.line.endswith('; 1 were skipped by too many to get as many')


def test_a_label_of_an_unknown_item_is_told(tmp_path):
    with pytest.raises(ValueError, match="'pair-7', which is not in items.jsonl"):
        _progress(tmp_path, [_said(7, 'ann')])
