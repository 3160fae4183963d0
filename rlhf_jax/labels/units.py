"""Labels as a table: a row for every question, a column for every labeller.

A question is a pair of completions of an item (a comparison has one, a ranking one for
every two of its completions), or a completion to be rated. ``agreement.py`` and
``aggregation.py`` read the table; read ``coefficients.py`` next.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.labels.records import Item, Label

SECOND, TIE, FIRST = 0, 1, 2  # codes of answers to a pair


class Unit(NamedTuple):
    """A question."""

    item: str
    dimension: str | None
    pair: tuple[int, int] | None  # which completions are compared; None of a rating


@dataclasses.dataclass(frozen=True)
class Answers:
    """What every labeller said of every question, the first time that they had it."""

    units: list[Unit]  # U
    labellers: list[str]  # L, sorted
    # [U, L] float, NaN where nobody said: of a pair the probability that its first
    # completion is the better one, else the rating
    values: np.ndarray
    strengths: np.ndarray  # [U, L] float, 1 to 4, NaN where none is given

    @property
    def are_ratings(self) -> bool:
        """Whether the questions are completions to be rated."""
        return bool(self.units) and self.units[0].pair is None

    @property
    def clusters(self) -> np.ndarray:
        """[U] int, the number of the item that each question is of."""
        numbers: dict[str, int] = {}
        found = [numbers.setdefault(unit.item, len(numbers)) for unit in self.units]
        return np.asarray(found, int)

    def codes(self) -> np.ndarray:
        """[U, L] int: ``SECOND``, ``TIE`` or ``FIRST`` of a pair, whichever is the
        likelier, or the place of a rating among all; −1 where nobody said.
        """
        if self.are_ratings:
            return _places(self.values)
        return order_codes(self.values)

    def graded(self) -> np.ndarray:
        """[U, L] int: codes in an order that tells strengths apart, from the second far
        better to the first far better, where all who chose gave one; else ``codes()``.
        """
        signs = np.sign(self.values - 0.5)
        chose = np.isfinite(self.values) & (signs != 0)
        if self.are_ratings or np.isnan(self.strengths[chose]).any():
            return self.codes()
        return _places(signs * np.where(signs == 0, 0, self.strengths))


def order_codes(probability: np.ndarray) -> np.ndarray:
    """Codes of answers to pairs; −1 for NaN."""
    known = np.isfinite(probability)
    return np.where(known, 1 + np.sign(np.nan_to_num(probability) - 0.5), -1).astype(
        int
    )


def _places(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    codes = np.full(values.shape, -1)
    codes[known] = np.unique(values[known], return_inverse=True)[1].reshape(-1)
    return codes


def parts(
    fields: Label, count: int | None, where: str
) -> Iterator[tuple[tuple[int, int] | None, float]]:
    """Pair and probability of every pair that a label judges, or None and its rating.

    Args:
        fields: a label that is judged.
        count: completions of its item; None where that is not known.
        where: of what, for an error.

    Raises:
        ValueError: as many ranks as there are completions are not given.
    """
    if fields.rating is not None:
        yield None, float(fields.rating)
    elif fields.ranks is not None:
        if count is not None and len(fields.ranks) != count:
            raise ValueError(
                f'{where} has {len(fields.ranks)} ranks for {count} completions'
            )
        for i, j in itertools.combinations(range(len(fields.ranks)), 2):
            gap = fields.ranks[j] - fields.ranks[i]
            yield (i, j), 0.5 + 0.5 * float(np.sign(gap))
    elif fields.probability is not None:
        yield (0, 1), float(fields.probability)


def by_name(items: Sequence[Item]) -> dict[str, Item]:
    """Items by their names."""
    return {item.item: item for item in items}


def check_known(items: Sequence[Item], labels: Sequence[Label]) -> None:
    """Raises ValueError where a label is of no item, or of another form than its item.

    Args:
        items: all items.
        labels: of them.
    """
    known = by_name(items)
    strangers = sorted({label.item for label in labels} - known.keys())
    if strangers:
        count = sum(label.item not in known for label in labels)
        raise ValueError(
            f'{count} of {len(labels)} labels are of items that are not there, such as '
            f'{strangers[0]!r}; give the items that were labelled'
        )
    fields = {'comparison': 'probability', 'ranking': 'ranks', 'rating': 'rating'}
    for label in labels:
        form = known[label.item].form
        if label.verdict == 'judged' and getattr(label, fields[form]) is None:
            raise ValueError(
                f'the label of {label.item!r} by {label.labeller!r} has no '
                f'{fields[form]}, and the item is a {form}'
            )


def answers(labels: Sequence[Label], items: Sequence[Item] | None = None) -> Answers:
    """The table of labels; repeats, skipped items and those called bad are not in it.

    Args:
        labels: any.
        items: of the labels, whose order the rows then have; None where they are not
            known.

    Raises:
        ValueError: two labels of the same item by the same labeller, neither of which
            is a repeat; ratings beside comparisons; ranks that do not fit.
    """
    known = {} if items is None else by_name(items)
    found: dict[tuple[Unit, str], tuple[float, float]] = {}
    for label in labels:
        if label.repeat or label.verdict != 'judged':
            continue
        where = f'the label of {label.item!r} by {label.labeller!r}'
        item = known.get(label.item)
        count = None if item is None else len(item.completions)
        strength = np.nan if label.strength is None else float(label.strength)
        for pair, value in parts(label, count, where):
            key = Unit(label.item, label.dimension, pair), label.labeller
            if key in found:
                raise ValueError(
                    f'{where} stands there twice; mark the later one as a repeat '
                    '(repeat=1), or leave one out'
                )
            found[key] = value, strength
    order = {name: i for i, name in enumerate(known)}
    for unit, _ in found:
        order.setdefault(unit.item, len(order))
    units = sorted(
        {unit for unit, _ in found},
        key=lambda unit: (order[unit.item], unit.dimension or '', unit.pair or ()),
    )
    if len({unit.pair is None for unit in units}) > 1:
        raise ValueError(
            'there are ratings beside comparisons or rankings, which do not compare; '
            'give the labels of one kind'
        )
    labellers = sorted({labeller for _, labeller in found})
    return _table(found, units, labellers)


def _table(found: Any, units: list[Unit], labellers: list[str]) -> Answers:
    rows = {unit: i for i, unit in enumerate(units)}
    columns = {name: i for i, name in enumerate(labellers)}
    values = np.full((len(units), len(labellers)), np.nan)
    strengths = values.copy()
    for (unit, labeller), (value, strength) in found.items():
        place = rows[unit], columns[labeller]
        values[place], strengths[place] = value, strength
    return Answers(units, labellers, values, strengths)
