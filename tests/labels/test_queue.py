"""Who sees what next, and on which side."""

import itertools

import pytest

from rlhf_jax.labels.queue import HELD, Task, book_of, current, shown_order
from rlhf_jax.labels.records import Label
from rlhf_jax.labels.session import insert
from rlhf_jax.labels.store import open_store, read_stage
from tests.labels import folder as made


class _Desk:
    """Labellers at one database, who answer without a page."""

    def __init__(self, folder, rows, **plan):
        items, plan = read_stage(made.write(folder, rows, **plan))
        self.book, self.names = book_of(items, plan), itertools.count()
        self.store = open_store(folder / 'labels.db')

    def sees(self, labeller, now=None):
        with self.store.transaction() as db:
            shown = current(db, self.book, labeller, now)
        return None if shown is None else shown.task

    def answers(self, labeller, verdict='judged', now=None):
        """Answers what the labeller sees, which is returned."""
        with self.store.transaction() as db:
            shown = current(db, self.book, labeller, now)
            if shown is None:
                return None
            item, dimension, repeat = shown.task
            label = Label(
                item=item,
                labeller=labeller,
                dimension=dimension or None,
                repeat=repeat,
                verdict=verdict,
                probability=1.0 if verdict == 'judged' else None,
            )
            insert(db, f'{next(self.names)}', label)
            db.execute('DELETE FROM shown WHERE key = ?', (shown.key,))
        return shown.task

    def all_of(self, labeller):
        return list(iter(lambda: self.answers(labeller), None))


def test_training_comes_first_then_every_main_item_once(tmp_path):
    desk = _Desk(tmp_path, [*made.items(3), *made.training(2)])
    seen = [task.item for task in desk.all_of('ann')]
    assert seen == ['training-0', 'training-1', 'pair-0', 'pair-1', 'pair-2']
    # Of one label each, none is left; training is for everybody.
    assert [task.item for task in desk.all_of('bob')] == ['training-0', 'training-1']


def test_what_is_on_a_screen_stays_there_and_is_kept_from_others(tmp_path):
    desk = _Desk(tmp_path, made.items(2))
    assert desk.sees('ann', 0.0) == desk.sees('ann', 1.0) == Task('pair-0', '', 0)
    assert desk.sees('bob', 2.0).item == 'pair-1'
    assert desk.answers('bob', now=3.0).item == 'pair-1'
    assert desk.sees('bob', 4.0) is None
    assert desk.sees('bob', 2.0 + HELD).item == 'pair-0'
    assert desk.answers('ann').item == 'pair-0'  # who comes back later may still answer


def test_begun_items_are_finished_before_new_ones(tmp_path):
    desk = _Desk(tmp_path, made.items(6), overlap=2)
    assert desk.answers('ann', 'skipped').item == 'pair-0'
    assert [desk.answers('ann').item for _ in range(2)] == ['pair-1', 'pair-2']
    seen = [desk.answers('bob').item for _ in range(4)]
    assert seen == ['pair-1', 'pair-2', 'pair-0', 'pair-3']
    assert desk.sees('ann').item == 'pair-3'


def test_no_item_gets_more_labels_than_wanted(tmp_path):
    names = ['ann', 'bob', 'eve']
    desk = _Desk(tmp_path, made.items(7), overlap=2, labellers=names)
    seen = []
    while tasks := [task for name in names if (task := desk.answers(name))]:
        seen += tasks
    assert sorted(task.item for task in seen) == sorted(
        2 * [f'pair-{i}' for i in range(7)]
    )


def test_a_skipped_item_goes_to_somebody_else(tmp_path):
    desk = _Desk(tmp_path, made.items(1))
    assert desk.answers('ann', 'skipped').item == 'pair-0'
    assert desk.sees('ann') is None
    assert desk.answers('bob').item == 'pair-0'


def test_gold_items_are_mixed_in_at_their_share(tmp_path):
    rows = [*made.items(90), *made.gold(20)]
    desk = _Desk(tmp_path, rows, overlap=2, gold_share=0.1)
    places = {}
    for name in ('ann', 'bob'):
        seen = [task.item for task in desk.all_of(name)]
        assert len(seen) == len({*seen})
        golds = [item for item in seen if item.startswith('gold')]
        assert 9 <= len(golds) <= 10
        places[name] = [i for i, item in enumerate(seen) if item in golds]
        gaps = [b - a for a, b in zip(places[name], places[name][1:])]
        assert len({*gaps}) > 2, 'nobody can count the items until the next one'
    assert places['ann'] != places['bob']


def test_without_a_share_there_is_no_gold(tmp_path):
    desk = _Desk(tmp_path, [*made.items(20), *made.gold(5)], gold_share=0.0)
    assert all(task.item.startswith('pair') for task in desk.all_of('ann'))


@pytest.mark.parametrize('share', [0.07, 0.1, 0.15, 0.35, 0.4, 0.45, 0.5])
def test_every_share_of_gold_is_met(tmp_path, share):
    rows = [*made.items(100), *made.gold(100)]
    desk = _Desk(tmp_path, rows, gold_share=share)
    seen = [desk.answers('ann').item for _ in range(100)]
    assert sum(item.startswith('gold') for item in seen) == round(100 * share)


def test_a_repeat_comes_sooner_where_nothing_else_is_free(tmp_path):
    desk = _Desk(tmp_path, made.items(2), repeats=1.0)
    assert desk.sees('bob').item == 'pair-0'  # and so it is kept from ann
    assert desk.all_of('ann') == [Task('pair-1', '', 0), Task('pair-1', '', 1)]


def test_repeats_come_later_and_once(tmp_path):
    desk = _Desk(tmp_path, made.items(100), repeats=0.3)
    seen = desk.all_of('ann')
    repeats = [task.item for task in seen if task.repeat]
    assert 20 <= len(repeats) == len({*repeats}) <= 40
    for place, task in enumerate(seen[:100]):
        if task.repeat:
            assert place - seen.index(task._replace(repeat=0)) > 10


def test_every_dimension_is_asked_after_the_other(tmp_path):
    rows = [*made.items(2), *made.training(1)]
    rows[-1]['known']['dimension'] = 'brief'
    desk = _Desk(tmp_path, rows, dimensions=['helpful', 'brief'])
    assert [task[:2] for task in desk.all_of('ann')] == [
        ('pair-0', 'helpful'),
        ('pair-1', 'helpful'),
        ('training-0', 'brief'),
        ('pair-0', 'brief'),
        ('pair-1', 'brief'),
    ]


@pytest.mark.parametrize('form, count', [('comparison', 2), ('ranking', 4)])
def test_sides_are_drawn_evenly_by_item_and_labeller_and_stay(tmp_path, form, count):
    rows = made.items(400, form=form, completions=list('abcd'[:count]))
    items, plan = read_stage(made.write(tmp_path, rows, form=form))
    book = book_of(items, plan)
    orders = {
        name: [shown_order(book, name, Task(item.item, '', 0)) for item in items]
        for name in plan.labellers
    }
    assert orders['ann'] != orders['bob']
    again = book_of(items, plan)
    assert orders['ann'][7] == shown_order(again, 'ann', Task(items[7].item, '', 0))
    first = [order[0] for order in orders['ann']]
    for index in range(count):  # four standard deviations
        expected = 400 / count
        assert (
            abs(first.count(index) - expected) < 4 * (expected * (1 - 1 / count)) ** 0.5
        )
