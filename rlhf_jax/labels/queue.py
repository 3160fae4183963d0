"""Which item a labeller sees next, and which completion stands where on the page.

By dimension, in this order: the training items; then main items as the file has them,
those first that others have begun, with gold items and repeats in between. What is on a
screen counts for half an hour, so that two labellers are not asked for the same last
label. What is drawn is a function of the plan's seed and of names, so that a restart
changes nothing. Read ``session.py`` next.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from rlhf_jax.labels.records import Item
from rlhf_jax.labels.store import LabelPlan

HELD = 1800.0  # seconds that an item on somebody's screen is kept from others
APART = 10  # answers between an item and its repeat, while other items are free


class Task(NamedTuple):
    """One question to one labeller; ``dimension`` as the database has it."""

    item: str
    dimension: str  # '' for the one without a name
    repeat: int


class Shown(NamedTuple):
    """A task on a labeller's screen."""

    key: str  # all that the page is told: nothing about the item
    task: Task


@dataclasses.dataclass(frozen=True)
class Book:
    """The items of a stage by name and by purpose, and the plan."""

    items: dict[str, Item]
    main: tuple[str, ...]
    gold: tuple[Item, ...]
    training: tuple[Item, ...]
    plan: LabelPlan


def book_of(items: Sequence[Item], plan: LabelPlan) -> Book:
    """Sorts items by their purpose."""
    return Book(
        {item.item: item for item in items},
        tuple(item.item for item in items if item.purpose == 'main'),
        tuple(item for item in items if item.purpose == 'gold'),
        tuple(item for item in items if item.purpose == 'training'),
        plan,
    )


def shown_order(book: Book, labeller: str, task: Task) -> tuple[int, ...]:
    """The completions of an item in the order in which this labeller sees them."""
    count = len(book.items[task.item].completions)
    order = list(range(count))
    seed = _number(book.plan.seed, 'order', task.item, labeller, task.repeat)
    random.Random(seed).shuffle(order)
    return tuple(order)


def current(
    db: sqlite3.Connection, book: Book, labeller: str, now: float | None = None
) -> Shown | None:
    """What is on the labeller's screen; chosen now where nothing is.

    Args:
        db: inside a transaction.
        book: of the stage.
        labeller: one of the plan.
        now: seconds since 1970; None for the clock.

    Returns:
        None where there is nothing left for this labeller.
    """
    now = time.time() if now is None else now
    rows = db.execute(
        'SELECT key, item, dimension, repeat FROM shown WHERE labeller = ? '
        'ORDER BY serial DESC',
        (labeller,),
    )
    asked = {dimension or '' for dimension in book.plan.asked}
    for key, *task in rows.fetchall():
        if task[0] in book.items and task[1] in asked:
            db.execute('UPDATE shown SET at = ? WHERE key = ?', (now, key))
            return Shown(key, Task(*task))
    for dimension in book.plan.asked:
        task = _next(db, book, labeller, dimension or '', now)
        if task is not None:
            return show(db, labeller, task, now)
    return None


def show(db: sqlite3.Connection, labeller: str, task: Task, now: float) -> Shown:
    """Puts a task onto the labeller's screen, before all others that are there."""
    key = secrets.token_urlsafe(12)
    db.execute(
        'INSERT OR REPLACE INTO shown (key, labeller, item, dimension, repeat, at) '
        'VALUES (?, ?, ?, ?, ?, ?)',
        (key, labeller, *task, now),
    )
    return Shown(key, task)


def remaining(db: sqlite3.Connection, book: Book, labeller: str) -> int:
    """About how many more items this labeller will see: their part of what is
    missing, with the gold items and repeats that come along.
    """
    plan, missing = book.plan, 0.0
    for dimension in plan.asked:
        counts = _judged(db, dimension or '')
        mine = {task.item for task, _ in _answers(db, labeller, dimension or '')}
        for name in book.main:
            count = counts[name]
            if count < plan.overlap and name not in mine:
                others = max(1, len(plan.labellers) - count)
                missing += min(1.0, (plan.overlap - count) / others)
    return round(missing * (1 + plan.repeats) / (1 - plan.gold_share * bool(book.gold)))


def _next(
    db: sqlite3.Connection, book: Book, labeller: str, dimension: str, now: float
) -> Task | None:
    answers = _answers(db, labeller, dimension)
    done = {task.item for task, _ in answers}
    for item in book.training:
        if item.item not in done and _asks(item, dimension):
            return Task(item.item, dimension, 0)
    purposes = [(book.items[task.item].purpose, task) for task, _ in answers]
    place = sum(purpose != 'training' for purpose, _ in purposes)
    gold = _gold(book, labeller, dimension, done, place)
    repeats = _repeats(book, labeller, answers)
    main = _main(db, book, labeller, dimension, done, now)
    if main is None:
        return repeats[0] if repeats else None
    if gold is not None:
        return gold
    recent = {task.item for task, _ in answers[-APART:]}
    return next((task for task in repeats if task.item not in recent), main)


def _asks(item: Item, dimension: str) -> bool:
    """Whether a gold or training item is asked by this dimension."""
    named = (item.known or {}).get('dimension')
    return named is None or named == dimension


def _gold(
    book: Book, labeller: str, dimension: str, done: set[str], place: int
) -> Task | None:
    """The gold item that is due: one at a place drawn out of every ``1/gold_share``,
    which are blocks of two lengths where that is no whole number.
    """
    share = Fraction(book.plan.gold_share).limit_denominator(10**6)
    if not share:
        return None
    block = math.floor(place * share)
    start, end = math.ceil(block / share), math.ceil((block + 1) / share)
    seed = book.plan.seed
    drawn = _number(seed, 'gold', labeller, dimension, block) % (end - start)
    left = [
        item.item
        for item in book.gold
        if item.item not in done and _asks(item, dimension)
    ]
    if place - start != drawn or not left:
        return None
    first = min(left, key=lambda name: _number(seed, 'which', labeller, name))
    return Task(first, dimension, 0)


def _repeats(book: Book, labeller: str, answers: list[tuple[Task, str]]) -> list[Task]:
    """Main items that this labeller has still to see again, the oldest first."""
    if not book.plan.repeats:
        return []
    again = {task.item for task, _ in answers if task.repeat}
    return [
        task._replace(repeat=1)
        for task, verdict in answers
        if not task.repeat
        and verdict != 'skipped'
        and task.item not in again
        and book.items[task.item].purpose == 'main'
        and _fraction(book.plan.seed, 'repeat', labeller, *task[:2]) < book.plan.repeats
    ]


def _main(
    db: sqlite3.Connection,
    book: Book,
    labeller: str,
    dimension: str,
    done: set[str],
    now: float,
) -> Task | None:
    counts = _judged(db, dimension)
    rows = db.execute(
        'SELECT item, COUNT(*) FROM shown WHERE labeller != ? AND dimension = ? AND '
        'NOT repeat AND at > ? GROUP BY item',
        (labeller, dimension, now - HELD),
    )
    counts.update(dict(rows.fetchall()))
    best = None
    for name in book.main:
        if name not in done and counts[name] < book.plan.overlap:
            if best is None or counts[name] > counts[best]:
                best = name
    return None if best is None else Task(best, dimension, 0)


def _judged(db: sqlite3.Connection, dimension: str) -> Counter[str]:
    """How many labels an item has."""
    rows = db.execute(
        "SELECT item, COUNT(*) FROM answers WHERE NOT undone AND verdict != 'skipped' "
        'AND NOT repeat AND dimension = ? GROUP BY item',
        (dimension,),
    )
    return Counter(dict(rows.fetchall()))


def _answers(
    db: sqlite3.Connection, labeller: str, dimension: str
) -> list[tuple[Task, str]]:
    """A labeller's answers and their verdicts, in order."""
    rows = db.execute(
        'SELECT item, dimension, repeat, verdict FROM answers WHERE NOT undone '
        'AND labeller = ? AND dimension = ? ORDER BY serial',
        (labeller, dimension),
    )
    return [(Task(*task), verdict) for *task, verdict in rows.fetchall()]


def _number(*parts: object) -> int:
    """A number that is a function of the parts, evenly drawn from 0 to 2⁶⁴ - 1."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], 'big')


def _fraction(*parts: object) -> float:
    return _number(*parts) / 2**64
