"""The database of a stage that people label, and the settings that it is labelled by.

The folder of such a stage holds ``items.jsonl``, ``label.json`` (a :class:`LabelPlan`)
and ``labels.db``, an SQLite database with every answer, the links of the labellers, and
the items that are on somebody's screen. Every change is one transaction, written to the
disk before it is acknowledged; several threads and processes of one machine may work on
it at once. Nothing is ever deleted: an answer that was undone stays, marked so. Read
``queue.py`` next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import secrets
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from rlhf_jax import files
from rlhf_jax.config import build
from rlhf_jax.labels.records import (
    Form,
    Item,
    Label,
    read_items,
    to_label,
    to_row,
)
from rlhf_jax.ranges import at_least, between

ITEMS = 'items.jsonl'
PLAN = 'label.json'
DATABASE = 'labels.db'
DONE = 'done.json'  # is there once the run has used the labels

VERSION = 1  # of the tables
PATIENCE = 30.0  # seconds that a transaction waits for another one
# '' stands for the one dimension without a name, since NULLs differ from each other.
# The page makes the id of an answer, so that one that is sent twice is stored once; of
# a task (item, dimension, repeat) a labeller has one answer.
TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS labellers (
  name TEXT PRIMARY KEY, token TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS shown (
  serial INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE,
  labeller TEXT NOT NULL, item TEXT NOT NULL, dimension TEXT NOT NULL,
  repeat INTEGER NOT NULL, at REAL NOT NULL,
  UNIQUE (labeller, item, dimension, repeat));
CREATE TABLE IF NOT EXISTS answers (
  serial INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
  labeller TEXT NOT NULL, item TEXT NOT NULL, dimension TEXT NOT NULL,
  repeat INTEGER NOT NULL, verdict TEXT NOT NULL, label TEXT NOT NULL,
  at REAL NOT NULL, undone INTEGER NOT NULL DEFAULT 0);
CREATE UNIQUE INDEX IF NOT EXISTS one_answer
  ON answers (labeller, item, dimension, repeat) WHERE NOT undone;
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelPlan:
    """How the items of a stage are labelled: the fields of its ``label.json``."""

    labellers: tuple[str, ...]  # names; each has a link of their own
    form: Form = 'comparison'
    # Of a comparison: which one is better, or also how much (1 slightly to 4 far)
    scale: Literal['choice', 'strength'] = 'strength'
    overlap: Annotated[int, at_least(1)] = 1  # labels wanted of every main item
    # Share of a labeller's main items that are shown to the same labeller again
    repeats: Annotated[float, between(0, 1)] = 0.0
    gold_share: Annotated[float, between(0, 0.5)] = 0.1  # of the items shown
    dimensions: tuple[str, ...] = ()  # every item is asked for each; () for one
    guideline: dict[str, str] = dataclasses.field(default_factory=dict)  # Markdown
    rating_range: tuple[int, ...] = (1, 5)  # lowest and highest
    seed: int = 0  # of sides, repeats and the places of gold items

    def __post_init__(self):
        if not self.labellers or not all(name.strip() for name in self.labellers):
            raise ValueError("labellers: name at least one, as in ['ann', 'bob']")
        for field in ('labellers', 'dimensions'):
            twice = [n for n, k in Counter(getattr(self, field)).items() if k > 1]
            if twice:
                raise ValueError(f'{field}: {twice[0]!r} stands there twice')
        if self.overlap > len(self.labellers):
            raise ValueError(
                f'overlap={self.overlap} labels of every item from '
                f'{len(self.labellers)} labellers; name more labellers, or ask for '
                'fewer labels'
            )
        known = self.dimensions or tuple(self.guideline)[:1]
        if unknown := [name for name in self.guideline if name not in known]:
            raise ValueError(
                f'guideline: {unknown[0]!r} is none of dimensions={self.dimensions}'
            )
        low_high = self.rating_range
        if len(low_high) != 2 or low_high[0] >= low_high[1]:
            raise ValueError(
                f'rating_range={low_high}: write the lowest and the highest, as in '
                '[1, 5]'
            )

    @property
    def asked(self) -> tuple[str | None, ...]:
        """The dimensions, or None for the one without a name."""
        return self.dimensions or (None,)

    def guideline_of(self, dimension: str | None) -> str:
        """The Markdown of a dimension; '' where there is none."""
        if dimension is None:
            return next(iter(self.guideline.values()), '')
        return self.guideline.get(dimension, '')


def read_plan(path: Path) -> LabelPlan:
    """The ``label.json`` of a stage.

    Raises:
        ValueError: it is missing, no JSON, or has an unknown or an impossible setting.
    """
    fields = files.read_json(path, 'the command of the run writes it again')
    try:
        [plan] = build(fields, LabelPlan, where=path.name)
    except ValueError as error:
        raise ValueError(f'{path.parent}: {error}') from error
    return plan


def read_stage(folder: Path) -> tuple[list[Item], LabelPlan]:
    """What the stage in a folder asks.

    Raises:
        ValueError: the stage has not written it, an item of another form than the plan,
            or a gold or training item whose ``known`` is no label.
    """
    for name in (ITEMS, PLAN):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / name} is missing; a stage of kind 'label' by people writes "
                'it: give the command of the run first, with this --workdir, and the '
                'name of that stage as --stage'
            )
    plan, items = read_plan(folder / PLAN), read_items(folder / ITEMS)
    for item in items:
        where = f'{folder / ITEMS}: item {item.item!r}'
        if item.form != plan.form:
            raise ValueError(f'{where} is a {item.form}, and {PLAN} asks {plan.form}s')
        if item.purpose != 'main':
            if not item.known:
                raise ValueError(f'{where} is {item.purpose} and has no known label')
            known = {'labeller': item.purpose, **item.known, 'item': item.item}
            label = to_label(known, f'{where}, known')
            check_fits(label, item, plan, f'{where}, known')
            if label.dimension is not None and label.dimension not in plan.asked:
                raise ValueError(
                    f'{where}, known: dimension={label.dimension!r} is none of {PLAN}'
                )
    return items, plan


def check_fits(label: Label, item: Item, plan: LabelPlan, where: str) -> None:
    """Whether a label can be one of an item.

    Raises:
        ValueError: of another form, a rank beyond the number of completions, or a
            rating beyond the range of the plan; by ``where``.
    """
    count, (low, high) = len(item.completions), plan.rating_range
    says = {
        'comparison': label.probability is not None,
        'ranking': label.ranks is not None,
        'rating': label.rating is not None,
    }
    if label.verdict == 'judged' and not says[item.form]:
        raise ValueError(f'{where}: the item {item.item!r} is a {item.form}')
    if label.ranks is not None and len(label.ranks) != count:
        raise ValueError(f'{where}: {len(label.ranks)} ranks of {count} completions')
    if label.ranks is not None and max(label.ranks) > count:
        raise ValueError(f'{where}: ranks is {list(label.ranks)}; use 1 to {count}')
    if label.rating is not None and not low <= label.rating <= high:
        raise ValueError(f'{where}: rating is {label.rating}; use {low} to {high}')


# ---------------------------------------------------------------------------- database


class Unusable(ValueError):
    """The database cannot be read or written."""


@dataclasses.dataclass(frozen=True)
class Store:
    """A ``labels.db``, opened anew for every transaction."""

    path: Path

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection inside a transaction that nobody else writes beside; committed
        at the end, undone by an error.

        Raises:
            Unusable: the database cannot be read or written.
        """
        try:
            with contextlib.closing(_connect(self.path)) as db:
                db.execute('BEGIN IMMEDIATE')
                try:
                    yield db
                except BaseException:
                    db.execute('ROLLBACK')
                    raise
                db.execute('COMMIT')
        except sqlite3.Error as error:
            raise _unusable(self.path, error) from error

    def tokens(self, names: Sequence[str]) -> dict[str, str]:
        """The token in the link of each labeller, made where there is none yet."""
        with self.transaction() as db:
            for name in names:
                db.execute(
                    'INSERT OR IGNORE INTO labellers VALUES (?, ?)',
                    (name, secrets.token_urlsafe(24)),
                )
            rows = dict(db.execute('SELECT name, token FROM labellers'))
        return {name: rows[name] for name in names}

    def claim(self, items: Sequence[Item]) -> None:
        """Makes sure that the answers here are answers to these items.

        Raises:
            ValueError: they are answers to other items.
        """
        now = fingerprint(items)
        with self.transaction() as db:
            old = claimed(db)
            [answers] = db.execute('SELECT COUNT(*) FROM answers').fetchone()
            if old not in (None, now) and answers:
                raise ValueError(
                    f'{self.path} holds answers to other items than {ITEMS} beside it; '
                    f'put back the old {ITEMS}, or move the database away and begin '
                    'with none'
                )
            if old != now:
                db.execute('DELETE FROM shown')
                db.execute("INSERT OR REPLACE INTO facts VALUES ('items', ?)", (now,))

    def refuse(self) -> int:
        """Counts a request with a wrong token; returns how many there were."""
        with self.transaction() as db:
            db.execute(
                "INSERT INTO facts VALUES ('refused', '1') ON CONFLICT (name) "
                'DO UPDATE SET value = CAST(value AS INTEGER) + 1'
            )
        return self.refused()

    def refused(self) -> int:
        """How many requests had a wrong token."""
        with self.transaction() as db:
            row = db.execute("SELECT value FROM facts WHERE name = 'refused'")
            return int((row.fetchone() or ['0'])[0])


def open_store(path: Path) -> Store:
    """The database at a path, made where there is none.

    Raises:
        ValueError: it cannot be made, or the file is something else.
    """
    try:
        with contextlib.closing(_connect(path)) as db:
            _begin_log(db)
            db.execute('BEGIN IMMEDIATE')
            [version] = db.execute('PRAGMA user_version').fetchone()
            [tables] = db.execute('SELECT COUNT(*) FROM sqlite_master').fetchone()
            if version != (VERSION if tables else 0):
                raise ValueError(
                    f'{path} is no database of labels of this version (it says '
                    f'{version}, not {VERSION}); move it away'
                )
            for statement in TABLES.split(';'):
                db.execute(statement)
            db.execute(f'PRAGMA user_version = {VERSION}')
            db.execute('COMMIT')
    except sqlite3.Error as error:
        raise _unusable(path, error) from error
    return Store(path)


def fingerprint(items: Sequence[Item]) -> str:
    """A hash of items: of their names, their texts and all else that they have."""
    rows = [json.dumps(to_row(item), sort_keys=True) for item in items]
    return hashlib.sha256('\n'.join(rows).encode()).hexdigest()


def claimed(db: sqlite3.Connection) -> str | None:
    """The :func:`fingerprint` of the items that the answers are answers to."""
    row = db.execute("SELECT value FROM facts WHERE name = 'items'").fetchone()
    return None if row is None else row[0]


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
    db.execute('PRAGMA synchronous = FULL')  # on the disk before COMMIT returns
    return db


def _begin_log(db: sqlite3.Connection) -> None:
    """Switches to a write-ahead log. Of two processes that do it at once SQLite refuses
    one without waiting.
    """
    for attempt in range(100):
        try:
            db.execute('PRAGMA journal_mode = WAL')
            return
        except sqlite3.OperationalError:
            if attempt == 99:
                raise
            time.sleep(0.02)


def _unusable(path: Path, error: sqlite3.Error) -> Unusable:
    return Unusable(
        f'{path} cannot be used ({error}); make room or change its rights, or put back '
        'a copy where it is damaged'
    )


def labels_of(path: Path) -> list[Label]:
    """All labels in a database, in the order of their answers: none where there is no
    database yet. Skipped items, gold items, training and repeats are among them.

    Raises:
        ValueError: the file is no database of labels.
    """
    if not path.exists():
        return []
    with open_store(path).transaction() as db:
        rows = db.execute(
            'SELECT serial, label FROM answers WHERE NOT undone ORDER BY serial'
        ).fetchall()
    return [to_label(json.loads(label), f'{path}:{serial}') for serial, label in rows]


# ---------------------------------------------------------------------------- progress


@dataclasses.dataclass(frozen=True)
class Progress:
    """How much of a stage is labelled."""

    line: str  # '12 of 200 items have 2 labels; …'
    done: bool  # every main item has the labels that it can get
    complete: int  # main items with all labels that the plan wants
    total: int  # main items


def progress(
    items: Sequence[Item], labels: Sequence[Label], plan: LabelPlan
) -> Progress:
    """What is labelled, and whether it is enough.

    An item is complete when ``plan.overlap`` labellers have judged it (or called both
    completions bad) by every dimension. Answers that skip do not count; an item that so
    many have skipped that it cannot become complete is not waited for. Gold items,
    training items and repeats do not count.

    Raises:
        ValueError: a label of an item that is not among them.
    """
    names = {item.item: item.purpose for item in items}
    judged: Counter[tuple[str, str | None]] = Counter()
    asked: dict[tuple[str, str | None], set[str]] = defaultdict(set)
    by_labeller = Counter({name: 0 for name in plan.labellers})
    for label in labels:
        if label.item not in names:
            raise ValueError(
                f'a label by {label.labeller!r} is of the item {label.item!r}, which '
                f'is not in {ITEMS}'
            )
        if names[label.item] != 'main' or label.repeat:
            continue
        task = (label.item, label.dimension)
        asked[task].add(label.labeller)
        if label.verdict != 'skipped':
            judged[task] += 1
            by_labeller[label.labeller] += 1
    states: Counter[str] = Counter()
    for item in items:
        if item.purpose == 'main':
            tasks = [(item.item, dimension) for dimension in plan.asked]
            missing = [task for task in tasks if judged[task] < plan.overlap]
            left = [judged[t] + len({*plan.labellers} - asked[t]) for t in missing]
            given_up = any(most < plan.overlap for most in left)
            states['given up' if given_up else 'open'] += bool(missing)
            states['complete'] += not missing
    people = ', '.join(f'{name} {count}' for name, count in by_labeller.items())
    each = f' by each of {", ".join(plan.dimensions)}' if plan.dimensions[1:] else ''
    line = (
        f'{states["complete"]} of {states.total()} items have {plan.overlap} '
        f'label{"s" * (plan.overlap > 1)}{each}; labels of {people}'
    )
    if states['given up']:
        line += f'; {states["given up"]} were skipped by too many to get as many'
    return Progress(line, not states['open'], states['complete'], states.total())
