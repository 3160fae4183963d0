"""Items, and labels of them: what a stage asks, and what a labeller says.

``items.jsonl`` and ``labels.jsonl`` of a stage hold one JSON object a line, with the
fields of :class:`Item` and :class:`Label`. A labeller is a person, a model, a function
or a simulated person: all write the same. Nothing is averaged here; ``aggregation.py``
makes comparisons of labels. Read ``agreement.py`` next.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.data import sources

Form = Literal['comparison', 'ranking', 'rating']
Purpose = Literal['main', 'gold', 'training']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """What one labeller said of one item.

    Of a comparison, ``probability`` says how likely the first completion of the item
    (whatever was shown first) is the better one: 1 and 0 where somebody chose, 0.5 for
    a tie, and anything between by a judge that says so. It is None where an item was
    skipped, and where both completions were called bad.
    """

    item: str
    labeller: str
    probability: float | None = None  # of a comparison
    ranks: tuple[int, ...] | None = None  # of a ranking: 1 is the best, equal is a tie
    rating: float | None = None  # of a rating
    verdict: Literal['judged', 'bad', 'skipped'] = 'judged'  # 'bad': both are
    strength: int | None = None  # 1 slightly to 4 far better
    dimension: str | None = None  # by which guideline; None for the only one
    order: tuple[int, ...] | None = None  # of the completions, as they were shown
    repeat: int = 0  # how often this labeller had this item before
    seconds: float | None = None
    flagged: bool = False
    note: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """What labellers are asked: one completion to rate, two to compare, several to
    rank.
    """

    item: str  # its name, which no other item of the file has
    prompt: Any  # text or messages
    completions: tuple[str, ...]
    form: Form = 'comparison'
    purpose: Purpose = 'main'
    known: Mapping[str, Any] | None = None  # fields of a Label: of gold and training
    why: str | None = None  # told after an answer to a training item
    # Of each completion: who wrote it, key, temperature, logprob, score_NAME, …
    facts: tuple[Mapping[str, Any], ...] = ()
    templated: bool = False  # a chat template wrote the prompt
    readable: str | None = None  # which labellers then read without control tokens


def read_items(path: Path) -> list[Item]:
    """Items of a file.

    Raises:
        ValueError: a line that is no item, with its place and the field; or a name that
            stands twice.
    """
    items, seen = [], {}
    for record in sources.read(f'jsonl:{path}'):
        where = record.where
        item = _built(Item, record.fields, where)
        least = {'comparison': 2, 'ranking': 2, 'rating': 1}[item.form]
        if len(item.completions) < least or (
            item.form != 'ranking' and len(item.completions) > least
        ):
            raise ValueError(
                f'{where}: a {item.form} of {len(item.completions)} completions'
            )
        if item.facts and len(item.facts) != len(item.completions):
            raise ValueError(
                f'{where}: facts of {len(item.facts)} of {len(item.completions)} '
                'completions'
            )
        if item.item in seen:
            raise ValueError(
                f'{where}: the item {item.item!r} stands in {seen[item.item]} too'
            )
        seen[item.item] = where
        items.append(item)
    return items


def read_labels(path: Path) -> list[Label]:
    """Labels of a file, in its order.

    Raises:
        ValueError: a line that is no label, with its place.
    """
    return [to_label(r.fields, r.where) for r in sources.read(f'jsonl:{path}')]


def to_label(fields: Mapping[str, Any], where: str) -> Label:
    """A label of JSON fields; those that a Label does not have are an error.

    Raises:
        ValueError: a field that is missing, unknown or no such value, by ``where``.
    """
    label = _built(Label, fields, where)
    said = [label.probability, label.ranks, label.rating]
    if sum(x is not None for x in said) != (label.verdict == 'judged'):
        raise ValueError(
            f'{where}: a label has one of probability, ranks and rating, and none '
            f'where it is {label.verdict}'
        )
    shown = None if label.order is None else len(label.order)
    if label.verdict == 'judged' and shown is not None:
        count = len(label.ranks or ()) or (1 if label.probability is None else 2)
        if shown != count:
            raise ValueError(f'{where}: order is of {shown} completions, not {count}')
    return label


def to_row(value: Item | Label) -> dict[str, Any]:
    """The JSON fields of an item or a label, but those that are at their default."""
    return {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    }


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _list_of(one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and all(map(one, value))


def _number_from(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: _is_number(value) and low <= value <= high


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    among = ' or '.join(map(repr, names))
    return lambda value: _is_text(value) and value in names, among


def _is_order(value: Any) -> bool:
    return _list_of(_is_whole)(value) and sorted(value) == list(range(len(value)))


def _are_ranks(value: Any) -> bool:
    return _list_of(_is_whole)(value) and len(value) > 1 and min(value) > 0


# Whether a value fits a field, and what does. None fits where it is the default.
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    'item': (_is_text, 'a text'),
    'labeller': (_is_text, 'a text'),
    'probability': (_number_from(0, 1), '0 to 1'),
    'ranks': (_are_ranks, 'whole numbers from 1, one for each completion'),
    'rating': (_is_number, 'a number'),
    'verdict': _one_of('judged', 'bad', 'skipped'),
    'strength': (_number_from(1, 4), '1 to 4'),
    'dimension': (_is_text, 'a text'),
    'order': (_is_order, 'the places 0, 1, … of all completions, as in [1, 0]'),
    'repeat': (lambda value: _is_whole(value) and value >= 0, 'a whole number from 0'),
    'seconds': (_number_from(0, math.inf), 'a number from 0'),
    'flagged': (_is_truth, 'true or false'),
    'note': (_is_text, 'a text'),
    'completions': (_list_of(_is_text), 'a list of texts'),
    'form': _one_of('comparison', 'ranking', 'rating'),
    'purpose': _one_of('main', 'gold', 'training'),
    'known': (_is_object, 'an object with fields of a label'),
    'why': (_is_text, 'a text'),
    'facts': (_list_of(_is_object), 'a list of objects, one for each completion'),
    'templated': (_is_truth, 'true or false'),
    'readable': (_is_text, 'a text'),
}


def _built(cls: type, fields: Mapping[str, Any], where: str) -> Any:
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [name for name in fields if name not in known]
    missing = [
        name
        for name, field in known.items()
        if name not in fields and field.default is dataclasses.MISSING
    ]
    if unknown or missing:
        what = f'has no field {unknown[0]!r}' if unknown else f'needs {missing[0]!r}'
        raise ValueError(f'{where}: {cls.__name__.lower()} {what}; see {__name__}')
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    if cls is Item and isinstance(fields.get('prompt'), list):
        values['prompt'] = fields['prompt']
    for name, value in values.items():
        fits, what = CHECKS.get(name, (lambda _: True, ''))  # a prompt is anything
        if not fits(value) and not (value is None and known[name].default is None):
            shown = reprlib.repr(fields[name])
            raise ValueError(f'{where}: {name} is {shown}; use {what}')
    return cls(**values)
