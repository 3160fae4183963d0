"""Items, and labels of them: what a stage asks, and what a labeller says.

``items.jsonl`` and ``labels.jsonl`` of a stage hold one JSON object a line, with the
fields of :class:`Item` and :class:`Label`. A labeller is a person, a model, a function
or a simulated person: all write the same. Nothing is averaged here; ``aggregation.py``
makes comparisons of labels. Read ``agreement.py`` next.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
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
        ValueError: a line that is no item, or a name that stands twice.
    """
    items, seen = [], {}
    for record in sources.read(f'jsonl:{path}'):
        where = record.where
        item = _built(Item, record.fields, where)
        least = {'comparison': 2, 'ranking': 2, 'rating': 1}.get(item.form)
        if least is None or item.purpose not in ('main', 'gold', 'training'):
            raise ValueError(
                f'{where}: form={item.form!r} and purpose={item.purpose!r}; use '
                "'comparison', 'ranking' or 'rating', and 'main', 'gold' or 'training'"
            )
        if len(item.completions) < least or (
            item.form != 'ranking' and len(item.completions) > least
        ):
            raise ValueError(
                f'{where}: a {item.form} of {len(item.completions)} completions'
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
    if label.verdict not in ('judged', 'bad', 'skipped'):
        raise ValueError(
            f"{where}: verdict={label.verdict!r}; use 'judged', 'bad' or 'skipped'"
        )
    if sum(x is not None for x in said) != (label.verdict == 'judged'):
        raise ValueError(
            f'{where}: a label has one of probability, ranks and rating, and none '
            f'where it is {label.verdict}'
        )
    for name, low, high in (('probability', 0, 1), ('strength', 1, 4)):
        value = getattr(label, name)
        if value is not None and not (_is_number(value) and low <= value <= high):
            raise ValueError(f'{where}: {name} is {value!r}; use {low} to {high}')
    if label.rating is not None and not _is_number(label.rating):
        raise ValueError(f'{where}: rating is {label.rating!r}, which is no number')
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
    for name in ('item', 'labeller'):
        if name in values and not isinstance(values[name], str):
            raise ValueError(f'{where}: {name} is {values[name]!r}, which is no text')
    return cls(**values)
