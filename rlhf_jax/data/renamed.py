"""Records whose fields have other names: ``jsonl:a.jsonl?prompt=question``.

What stands behind the ``?`` of a data spec says where ours come from; several fields
with ``+`` between them become one text, with empty lines between those that are not
empty. Turns ``{'from', 'value'}``, as ShareGPT has them, become messages:

    jsonl:alpaca.jsonl?prompt=instruction+input&completion=output
    parquet:sharegpt.parquet?messages=conversations

Read ``sources.py`` next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

ROLES = {
    'human': 'user',
    'user': 'user',
    'gpt': 'assistant',
    'assistant': 'assistant',
    'system': 'system',
}


def read_mapping(query: str, spec: str) -> dict[str, list[str]]:
    """Our name → the names of the fields that it is made of.

    Raises:
        ValueError: what is behind the ``?`` cannot be read.
    """
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise ValueError(
            f'data spec {spec!r}: {error}; write ?prompt=question&completion=answer '
            'behind the file'
        ) from error
    mapping = {name: value.split() for name, value in pairs}
    if len(mapping) < len(pairs) or not all(mapping.values()):
        raise ValueError(
            f'data spec {spec!r}: every field has one name of its own and one there'
        )
    return mapping


def rename(
    fields: Mapping[str, Any], mapping: Mapping[str, list[str]], where: str
) -> dict[str, Any]:
    """The fields of a record under our names.

    Raises:
        ValueError: a field that is missing, or turns of an unknown role.
    """
    taken = {name for names in mapping.values() for name in names}
    result = {name: value for name, value in fields.items() if name not in taken}
    for ours, names in mapping.items():
        missing = [name for name in names if name not in fields]
        if missing:
            found = ', '.join(fields) or 'none'
            raise ValueError(f'{where}: no field {missing[0]!r}; it has {found}')
        values = [fields[name] for name in names]
        if len(values) == 1:
            result[ours] = _messages(values[0], where)
            continue
        if any(not isinstance(value, str | None) for value in values):
            raise ValueError(f'{where}: {" and ".join(names)} are not all texts')
        result[ours] = '\n\n'.join(value for value in values if value)
    return result


def _messages(value: Any, where: str) -> Any:
    """Turns of ShareGPT as messages; anything else as it is."""
    is_turns = isinstance(value, list) and all(
        isinstance(turn, dict) and {'from', 'value'} <= turn.keys() for turn in value
    )
    if not (is_turns and value):
        return value
    for turn in value:
        if turn['from'] not in ROLES:
            raise ValueError(
                f'{where}: a turn from {turn["from"]!r}; known are {", ".join(ROLES)}'
            )
    return [{'role': ROLES[turn['from']], 'content': turn['value']} for turn in value]
