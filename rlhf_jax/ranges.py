"""The numbers that a setting can be, beside the field that it is.

``kl_coef: Annotated[float, at_least(0)] = 0.05`` says it; :func:`check` reads it. A
dataclass whose ``__post_init__`` calls :func:`check_fields` checks itself, and
``config.build`` checks all of them, by the key that the user knows. Read ``config.py``
next.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

LARGEST_INTEGER = 2**63 - 1
# Of rewards, ratings and margins: float32 holds the sum of the squares of many.
LARGEST_SCORE = 1e18


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``; of a tuple, all of them."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False  # low itself is not one of them
    open_high: bool = False
    ascending: bool = False  # a tuple of one or more, each larger than the one before

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def describe(self) -> str:
        """What the user can write instead."""
        if math.isinf(self.high):
            text = f'above {self.low:g}' if self.open_low else f'{self.low:g} or more'
        else:
            left, right = '[('[self.open_low], '])'[self.open_high]
            text = f'a number in {left}{self.low:g}, {self.high:g}{right}'
        return f'numbers that ascend, {text}' if self.ascending else text


def at_least(low: float) -> Range:
    """``low`` or more."""
    return Range(low)


def above(low: float) -> Range:
    """More than ``low``."""
    return Range(low, open_low=True)


def between(low: float, high: float) -> Range:
    """From ``low`` to ``high``, both included."""
    return Range(low, high)


def range_of(hint: Any) -> Range | None:
    """The range in a type hint such as ``Annotated[float | None, above(0)]``."""
    for part in (*getattr(hint, '__metadata__', ()), *typing.get_args(hint)):
        if isinstance(part, Range):
            return part
        if typing.get_origin(part) is typing.Annotated:
            return range_of(part)
    return None


def check(value: Any, hint: Any, where: str) -> None:
    """Refuses a number that is none, or that is outside the range of its type hint.

    Args:
        value: a number, or a tuple of them; anything else is as it should be.
        hint: with its extras.
        where: how the user knows it, e.g. ``'config.ppo.kl_coef'``.

    Raises:
        ValueError: with the range.
    """
    values = value if isinstance(value, tuple) else (value,)
    values = tuple(value.values()) if isinstance(value, dict) else values
    allowed = range_of(hint)
    for number in values:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if isinstance(number, int) and abs(number) > LARGEST_INTEGER:
            raise ValueError(f'{where} is beyond ±2⁶³; use a smaller number')
        if not math.isfinite(number):
            raise ValueError(f'{where}={value!r} is not finite; use a number')
        if allowed is not None and number not in allowed:
            raise ValueError(f'{where}={value!r}: use {allowed.describe()}')
    if allowed is not None and allowed.ascending:
        pairs = zip(values, values[1:])
        if not values or any(a >= b for a, b in pairs):
            raise ValueError(f'{where}={value!r}: use {allowed.describe()}')


def check_fields(settings: Any, where: str | None = None) -> None:
    """:func:`check` of all fields of a dataclass.

    Args:
        settings: the dataclass.
        where: how the user knows it; None for the names of the fields alone.

    Raises:
        ValueError: the first field that is outside its range.
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        place = field.name if where is None else f'{where}.{field.name}'
        check(getattr(settings, field.name), hints[field.name], place)
