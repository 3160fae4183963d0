"""Fields of a record, and what is wrong with them: read ``formats.py`` next."""

from __future__ import annotations

import difflib
import math
from typing import Any

from rlhf_jax.data.sources import SourceRecord
from rlhf_jax.ranges import LARGEST_SCORE

FIELDS = ('prompt', 'completion', 'chosen', 'rejected', 'messages', 'text')


class BadRecord(ValueError):
    """A record that cannot be used as asked; ``on_bad='skip'`` leaves it out."""


def field_of(record: SourceRecord, name: str) -> Any:
    """A field that has to be there; BadRecord where it is not."""
    fields = record.present
    if name not in fields:
        close = difflib.get_close_matches(name, fields, n=1)
        hint = f'; is {close[0]!r} meant? Rename it' if close else ''
        found = ', '.join(fields) or 'none'
        raise BadRecord(
            f'{record.where}: the field {name!r} is missing; found: {found}{hint}'
        )
    return fields[name]


def other_fields(fields: dict[str, Any], *used: str) -> dict[str, Any]:
    """The scalar fields that mean nothing here and are kept all the same."""
    return {
        name: value
        for name, value in fields.items()
        if name not in (*FIELDS, *used) and isinstance(value, str | int | float)
    }


def number_of(record: SourceRecord, name: str, value: Any) -> float:
    """A value that has to be a number that float32 can hold and square; BadRecord where
    it is not.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and -LARGEST_SCORE <= value <= LARGEST_SCORE:
        return float(value)
    if not is_number or not abs(value) < math.inf:
        raise BadRecord(
            f'{record.where}: {name} is {value!r:.80}; it must be a finite number'
        )
    shown = f'{value:.3g}' if abs(value) < 1e300 else 'above 1e300'
    raise BadRecord(
        f'{record.where}: {name} is {shown}, which is beyond ±{LARGEST_SCORE:g}, and '
        'more than float32 can square; scale it'
    )


def text_of(record: SourceRecord, name: str, value: Any) -> str:
    """A value that has to be a text which is not empty; BadRecord where it is not."""
    if not isinstance(value, str):
        raise BadRecord(
            f'{record.where}: {name!r} is a {type(value).__name__}, not text or a list '
            'of messages'
        )
    if not value.strip():
        raise BadRecord(f'{record.where}: {name!r} is empty')
    try:
        value.encode('utf-8')
    except UnicodeEncodeError as error:
        raise BadRecord(
            f'{record.where}: {name!r} holds half a surrogate pair at character '
            f'{error.start}, which is no text'
        ) from error
    return value
