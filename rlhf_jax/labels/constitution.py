"""A constitution: principles that a model's responses are criticised and judged by.

A file in one of three forms:

* JSON: a list of principles, or ``{"principles": […]}``, each an object with ``id``,
  ``critique_request``, ``revision_request``, ``preference_question``, ``weight``;
* Markdown: a section ``## id`` for every principle, and in it lines that begin with
  ``Critique request:``, ``Revision request:``, ``Preference question:`` or ``Weight:``;
  such a text goes on up to the next empty line. Other lines are remarks;
* prose, a text without such lines: one principle, named after the file, with requests
  that quote it.

Source: Bai et al. 2022, arXiv 2212.08073, §3.1 (critique and revision requests) and
§4.1 (questions of preference). Read ``critique.py`` next.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.config import nearest
from rlhf_jax.files import named_path

TEXTS = ('critique_request', 'revision_request', 'preference_question')
# Of a principle in prose.
QUOTING = {
    'critique_request': 'Say where the response does not follow this principle: {}',
    'revision_request': 'Write the response again so that it follows this principle: '
    '{}',
    'preference_question': 'Which response follows this principle better? {}',
}
_HEADING = re.compile(r' {0,3}(#{1,6})\s+(.*?)\s*#*\s*')
_FIELD = re.compile(
    r'\s*(?:[-*+]\s+)?[*_]*(weight|critique request|revision request|'
    r'preference question)[*_]*\s*:[*_]*\s*(.*)',
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Principle:
    """A principle; what a file does not say of it is None."""

    id: str
    where: str  # file:line
    weight: float = 1.0  # how often it is drawn, relative to the others
    critique_request: str | None = None
    revision_request: str | None = None
    preference_question: str | None = None  # which of two responses follows it better


def read_constitution(path: str | Path, needed: Sequence[str]) -> list[Principle]:
    """The principles of a file; the module docstring has its forms.

    Args:
        path: of a text file in UTF-8; JSON where its name ends in ``.json``.
        needed: what every principle must have, of ``TEXTS``.

    Raises:
        ValueError: it cannot be read or holds no principle; a principle lacks what is
            needed, has the id of another one, an unknown field or a weight below 0; or
            all weights are 0. With file and line.
    """
    file = named_path(path)
    try:
        text = file.read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'constitution {file} cannot be read ({error})') from error
    if not text.strip():
        raise ValueError(f'{file} is empty; a constitution has at least one principle')
    if file.suffix.lower() == '.json':
        found = _of_json(text, file)
    elif any(_FIELD.fullmatch(line) for line in text.splitlines()):
        found = _of_markdown(text, file)
    else:
        words = ' '.join(line.lstrip('#').strip() for line in text.split('\n')).split()
        quoted = {name: how.format(' '.join(words)) for name, how in QUOTING.items()}
        found = [({'id': file.stem, **quoted}, f'{file}:1')]
    if not found:
        raise ValueError(f'{file} holds no principle; a constitution has at least one')
    principles = [_principle(fields, where, needed) for fields, where in found]
    seen: dict[str, str] = {}
    for principle in principles:
        if principle.id in seen:
            raise ValueError(
                f'{principle.where}: the id {principle.id!r} stands at '
                f'{seen[principle.id]} too; every principle needs one of its own'
            )
        seen[principle.id] = principle.where
    if not any(principle.weight for principle in principles):
        raise ValueError(f'{file}: all weights are 0, so that none would be drawn')
    return principles


def draw(principles: Sequence[Principle], rng: np.random.Generator) -> Principle:
    """One of the principles, each as likely as its weight says."""
    weights = np.asarray([principle.weight for principle in principles])
    return principles[int(rng.choice(len(principles), p=weights / weights.sum()))]


def _principle(fields: dict[str, Any], where: str, needed: Sequence[str]) -> Principle:
    known = ('id', 'weight', *TEXTS)
    for name in fields.keys() - {*known}:
        raise ValueError(f'{where}: unknown field {name!r}{nearest(name, known)}')
    given = {name: value for name, value in fields.items() if value is not None}
    if 'id' not in given:
        raise ValueError(f'{where}: a principle without id')
    for name, value in given.items():
        if name != 'weight' and not (isinstance(value, str) and value.strip()):
            raise ValueError(f'{where}: {name} is {value!r}, which is no text')
    for name in needed:
        if name not in given:
            raise ValueError(
                f'{where}: the principle {given["id"]!r} has no '
                f'{name.replace("_", " ")}, which is needed here; add it'
            )
    weight = given.get('weight', 1.0)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight < math.inf:
        raise ValueError(
            f'{where}: the weight of {given["id"]!r} is {weight!r}; use a number of 0 '
            'or more'
        )
    return Principle(where=where, **given)


def _of_json(text: str, file: Path) -> list[tuple[dict[str, Any], str]]:
    """Fields and place of every principle."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'{file}:{error.lineno}: no JSON ({error.msg})') from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f'{file}: no JSON that can be read ({error})') from error
    start = re.search(r'\s*\[', text)
    if isinstance(value, dict):
        for name in value.keys() - {'principles'}:
            raise ValueError(f"{file}: unknown field {name!r}; known is 'principles'")
        start = re.search(r'"principles"\s*:\s*\[', text)
        value = value.get('principles')
    if not isinstance(value, list) or start is None:
        raise ValueError(
            f'{file}: neither a list of principles nor {{"principles": […]}}'
        )
    found, place, decoder = [], start.end(), json.JSONDecoder()
    for fields in value:  # decoded again one by one, for the lines that they begin in
        while text[place] in ' \t\r\n,':
            place += 1
        where = f'{file}:{text.count(chr(10), 0, place) + 1}'
        if not isinstance(fields, dict):
            raise ValueError(f'{where}: a {type(fields).__name__}, no object')
        found.append((fields, where))
        _, place = decoder.raw_decode(text, place)
    return found


def _of_markdown(text: str, file: Path) -> list[tuple[dict[str, Any], str]]:
    """Fields and place of every principle."""
    found: list[tuple[dict[str, Any], str]] = []
    name = None  # of the field whose text goes on
    for number, line in enumerate(text.splitlines(), start=1):
        where = f'{file}:{number}'
        if heading := _HEADING.fullmatch(line):
            name = None
            if len(heading[1]) > 1:  # one '#' is the title of the file
                found.append(({'id': heading[2]}, where))
        elif field := _FIELD.fullmatch(line):
            name = field[1].lower().replace(' ', '_')
            if not found:
                raise ValueError(f'{where}: it stands below no heading ## id')
            fields, _ = found[-1]
            if name in fields:
                raise ValueError(f'{where}: {field[1]} of {fields["id"]!r} again')
            fields[name] = field[2].strip()
        elif not line.strip():
            name = None
        elif name is not None:
            found[-1][0][name] = f'{found[-1][0][name]} {line.strip()}'.strip()
    for fields, where in found:
        if 'weight' in fields:
            try:
                fields['weight'] = float(fields['weight'])
            except ValueError:
                raise ValueError(
                    f'{where}: the weight of {fields["id"]!r} is '
                    f'{fields["weight"]!r}; use a number of 0 or more'
                ) from None
    return found
