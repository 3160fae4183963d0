"""What the page is sent, and what becomes of what it sends: answers and their undoing.

The page knows places (what stands first, second, … on the screen) and the key of a
task; here they become completions and items. It is not told which items are gold or
repeats. Read ``server.py`` next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rlhf_jax.labels.queue import (
    Book,
    Shown,
    Task,
    current,
    remaining,
    show,
    shown_order,
)
from rlhf_jax.labels.records import Item, Label, to_label, to_row
from rlhf_jax.labels.store import DATABASE, DONE, Store, claimed, fingerprint

LONGEST_NOTE = 2000  # characters
LONGEST_ID = 64
DAY = 86400.0  # seconds; a longer time on an item is written as this


class Conflict(ValueError):
    """An answer to what is no longer on the labeller's screen."""


class Closed(ValueError):
    """No answers are taken: the stage is finished, or asks other items by now."""


@dataclasses.dataclass(frozen=True)
class Session:
    """The labelling of one stage. All that changes or shows anything raises
    :class:`Closed` where no answers are taken.
    """

    store: Store
    book: Book

    def why_closed(self) -> str | None:
        """Why no answers are taken; None where they are."""
        with self.store.transaction() as db:
            return self._why_closed(db)

    def _why_closed(self, db: sqlite3.Connection) -> str | None:
        if self.store.path.with_name(DONE).exists():
            return 'this stage is finished, and its labels have been used'
        if claimed(db) != self._fingerprint:
            return (
                'the items of this stage have changed, and the server must be started '
                'again to show the new ones'
            )
        return None

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint([*self.book.items.values()])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self.store.transaction() as db:
            if why := self._why_closed(db):
                raise Closed(f'no answers are taken: {why}')
            yield db

    def begin(self, labeller: str) -> dict[str, Any]:
        """All that the page needs: the plan and the state."""
        plan = self.book.plan
        return {
            'labeller': labeller,
            'scale': plan.scale,
            'rating_range': plan.rating_range,
            'guidelines': {d or '': plan.guideline_of(d) for d in plan.asked},
            **self.state(labeller),
        }

    def state(self, labeller: str) -> dict[str, Any]:
        """The item on the labeller's screen, and how far the labeller is."""
        with self._transaction() as db:
            return self._state(db, labeller)

    def answer(self, labeller: str, sent: Mapping[str, Any]) -> dict[str, Any]:
        """Stores an answer, once, however often it is sent.

        Args:
            labeller: whose link it came by.
            sent: ``id`` made by the page, ``key`` of the task, ``said`` (see
                :func:`read_said`), ``seconds``, ``flagged``, ``note``.

        Returns:
            The state behind it, with ``feedback`` where it was a training item.

        Raises:
            Conflict: the task is not on this labeller's screen.
            ValueError: it is no such answer.
        """
        name = _text(sent, 'id', LONGEST_ID)
        key = _text(sent, 'key', LONGEST_ID)
        with self._transaction() as db:
            stored = db.execute(
                'SELECT labeller, label FROM answers WHERE id = ?', (name,)
            ).fetchone()
            if stored is not None:
                if stored[0] != labeller:
                    raise Conflict('this answer is by another labeller')
                label = _label(stored[1])
            else:
                row = db.execute(
                    'SELECT item, dimension, repeat FROM shown '
                    'WHERE key = ? AND labeller = ?',
                    (key, labeller),
                ).fetchone()
                if row is None or row[0] not in self.book.items:
                    raise Conflict('this item has been answered already')
                label = self._read(labeller, Task(*row), sent)
                insert(db, name, label)
                db.execute('DELETE FROM shown WHERE key = ?', (key,))
            return self._state(db, labeller) | self._feedback(label)

    def undo(self, labeller: str, sent: Mapping[str, Any]) -> dict[str, Any]:
        """Takes the labeller's last answer back and shows its item again; sent twice it
        does nothing more.

        Args:
            labeller: whose link it came by.
            sent: ``id`` of the answer.

        Raises:
            Conflict: it is not the last answer.
        """
        name = _text(sent, 'id', LONGEST_ID)
        with self._transaction() as db:
            row = db.execute(
                'SELECT undone FROM answers WHERE id = ? AND labeller = ?',
                (name, labeller),
            ).fetchone()
            if row is None or not row[0]:
                if name != self._last(db, labeller):
                    raise Conflict('only the last answer can be undone')
                task = db.execute(
                    'SELECT item, dimension, repeat FROM answers WHERE id = ?', (name,)
                ).fetchone()
                db.execute('UPDATE answers SET undone = 1 WHERE id = ?', (name,))
                show(db, labeller, Task(*task), time.time())
            return self._state(db, labeller)

    def _state(self, db: sqlite3.Connection, labeller: str) -> dict[str, Any]:
        shown = current(db, self.book, labeller)
        return {
            'task': None if shown is None else self._task(db, labeller, shown),
            'undo': self._last(db, labeller),
            'answered': _answered(db, self.book, labeller),
            'remaining': 0
            if shown is None
            else max(1, remaining(db, self.book, labeller)),
        }

    def _task(
        self, db: sqlite3.Connection, labeller: str, shown: Shown
    ) -> dict[str, Any]:
        task = shown.task
        item = self.book.items[task.item]
        before = db.execute(
            'SELECT label FROM answers WHERE undone AND labeller = ? AND item = ? AND '
            'dimension = ? AND repeat = ? ORDER BY serial DESC LIMIT 1',
            (labeller, *task),
        ).fetchone()
        order = shown_order(self.book, labeller, task)
        return {
            'key': shown.key,
            'form': item.form,
            'dimension': task.dimension,
            'prompt': messages(item.prompt if item.readable is None else item.readable),
            'completions': [item.completions[index] for index in order],
            'training': item.purpose == 'training',
            'before': None if before is None else said_of(_label(before[0]), order),
        }

    def _last(self, db: sqlite3.Connection, labeller: str) -> str | None:
        """The answer that can be undone: the last one that was given on the page, if it
        is not to a training item, whose right answer was told.
        """
        row = db.execute(
            'SELECT id, item FROM answers WHERE NOT undone AND labeller = ? '
            "AND id NOT LIKE 'import:%' ORDER BY serial DESC LIMIT 1",
            (labeller,),
        ).fetchone()
        if row is None:
            return None
        item = self.book.items.get(row[1])
        return None if item is None or item.purpose == 'training' else row[0]

    def _read(self, labeller: str, task: Task, sent: Mapping[str, Any]) -> Label:
        item = self.book.items[task.item]
        order = shown_order(self.book, labeller, task)
        seconds, note = sent.get('seconds'), sent.get('note') or None
        if not isinstance(seconds, int | float) or not -DAY < seconds < 1000 * DAY:
            raise ValueError('seconds is no number of seconds')
        if note is not None and not isinstance(note, str):
            raise ValueError('note is no text')
        if note is not None and len(note) > LONGEST_NOTE:
            raise ValueError(f'note has more than {LONGEST_NOTE} characters')
        return Label(
            item=item.item,
            labeller=labeller,
            dimension=task.dimension or None,
            order=order if len(order) > 1 else None,
            repeat=task.repeat,
            seconds=round(min(max(float(seconds), 0.0), DAY), 2),
            flagged=sent.get('flagged') is True,
            note=note,
            **read_said(sent.get('said'), item, order, self.book),
        )

    def _feedback(self, label: Label) -> dict[str, Any]:
        item = self.book.items[label.item]
        if item.purpose != 'training':
            return {}
        known = {**item.known, 'item': item.item, 'labeller': 'training'}
        expected = to_label(known, item.item)
        feedback = {
            'right': agrees(label, expected),
            'expected': said_of(expected, label.order or (0,)),
            'why': item.why or '',
        }
        return {'feedback': feedback}


def insert(db: sqlite3.Connection, name: str, label: Label) -> None:
    """Writes an answer, inside a transaction."""
    text = json.dumps(to_row(label))
    db.execute(
        'INSERT INTO answers '
        '(id, labeller, item, dimension, repeat, verdict, label, at) '
        'VALUES (?, ?, ?, ?, ?, ?, ?, ?)',
        (
            name,
            label.labeller,
            label.item,
            label.dimension or '',
            label.repeat,
            label.verdict,
            text,
            time.time(),
        ),
    )


def read_said(
    said: Any, item: Item, order: tuple[int, ...], book: Book
) -> dict[str, Any]:
    """The fields of a :class:`Label` that an answer of the page fills.

    Args:
        said: ``verdict`` and, where it is 'judged': of a comparison ``place`` of the
            better one (0, 1, or None for a tie) and ``strength``; of a rating
            ``rating``; of a ranking ``ranks``, place by place.
        item: what was asked.
        order: the completions, place by place.
        book: of the stage.

    Raises:
        ValueError: it is no answer to this item.
    """
    if not isinstance(said, Mapping):
        raise ValueError('said is no object')
    verdict = said.get('verdict')
    if verdict == 'skipped' or (verdict == 'bad' and item.form != 'rating'):
        return {'verdict': verdict}
    if verdict != 'judged':
        raise ValueError('verdict is none of judged, bad and skipped')
    if item.form == 'rating':
        low, high = book.plan.rating_range
        rating = said.get('rating')
        if not _is_whole(rating) or not low <= rating <= high:
            raise ValueError(f'rating is no whole number from {low} to {high}')
        return {'rating': float(rating)}
    if item.form == 'ranking':
        ranks = said.get('ranks')
        if not isinstance(ranks, list) or len(ranks) != len(order):
            raise ValueError(f'ranks are not {len(order)} numbers')
        whole = all(_is_whole(rank) and 1 <= rank <= len(order) for rank in ranks)
        if not whole or {*ranks} != {*range(1, max(ranks) + 1)}:
            raise ValueError('ranks are not 1, 2, …, with ties and without gaps')
        by_completion = dict(zip(order, ranks))
        return {'ranks': tuple(by_completion[i] for i in range(len(order)))}
    place, strength = said.get('place'), said.get('strength')
    if place is None:
        return {'probability': 0.5}
    if not _is_whole(place) or place not in (0, 1):
        raise ValueError('place is none of 0, 1 and null')
    probability = 1.0 if order[place] == 0 else 0.0
    if book.plan.scale == 'choice':
        return {'probability': probability}
    if not _is_whole(strength) or not 1 <= strength <= 4:
        raise ValueError('strength is no whole number from 1 to 4')
    return {'probability': probability, 'strength': strength}


def said_of(label: Label, order: tuple[int, ...]) -> dict[str, Any]:
    """The inverse of :func:`read_said`: a label in terms of places."""
    said: dict[str, Any] = {'verdict': label.verdict}
    if label.probability is not None:
        first = order.index(0)
        tie = label.probability == 0.5
        said['place'] = None if tie else first if label.probability > 0.5 else 1 - first
        said['strength'] = label.strength
    if label.ranks is not None:
        said['ranks'] = [label.ranks[index] for index in order]
    if label.rating is not None:
        said['rating'] = label.rating
    return said


def agrees(label: Label, expected: Label) -> bool:
    """Whether a label says what is expected; the strength does not matter."""

    def told(x: Label) -> tuple[Any, ...]:
        side = (
            None
            if x.probability is None
            else (x.probability > 0.5) - (x.probability < 0.5)
        )
        return x.verdict, side, x.ranks, x.rating

    return told(label) == told(expected)


class Message(NamedTuple):
    """A part of a prompt."""

    role: str  # '' for a prompt that is a text
    text: str


def messages(prompt: Any) -> list[Message]:
    """A prompt as the page shows it: a text, or one part per message; what is no text
    in a message (tool calls, parts) is shown as JSON.
    """
    if isinstance(prompt, str):
        return [Message('', prompt)]
    if not isinstance(prompt, list):
        return [Message('', json.dumps(prompt, ensure_ascii=False, indent=1))]
    parts = []
    for message in prompt:
        if not isinstance(message, Mapping):
            parts.append(Message('', str(message)))
            continue
        content = message.get('content')
        rest = {k: v for k, v in message.items() if k not in ('role', 'content')}
        texts = [content] if isinstance(content, str) else []
        if content is not None and not texts:
            rest = {'content': content, **rest}
        if rest:
            code = json.dumps(rest, ensure_ascii=False, indent=1)
            texts.append(f'```json\n{code}\n```')
        parts.append(Message(str(message.get('role', '')), '\n\n'.join(texts)))
    return parts


def _answered(db: sqlite3.Connection, book: Book, labeller: str) -> int:
    rows = db.execute(
        'SELECT item FROM answers WHERE NOT undone AND labeller = ?', (labeller,)
    )
    items = (book.items.get(name) for [name] in rows.fetchall())
    return sum(item is not None and item.purpose != 'training' for item in items)


def _label(text: str) -> Label:
    return to_label(json.loads(text), DATABASE)


def _text(sent: Mapping[str, Any], name: str, longest: int) -> str:
    value = sent.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        raise ValueError(f'{name} is no text of 1 to {longest} characters')
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
