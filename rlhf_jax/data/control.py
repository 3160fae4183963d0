"""Control tokens that are spelt in a text: ``<|im_end|>`` in what a user writes.

A tokenizer makes the token of the spelling, wherever it stands, so that a message can
end its own turn and begin another's. What becomes of such records is a setting; what
the chat template writes itself is not touched. Read ``loading.py`` next.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_jax.data.formats import FIELDS, TOLD, BadRecord
from rlhf_jax.data.sources import SourceRecord
from rlhf_jax.data.tokenizer import encode, special_tokens

# 'refuse': the record is bad. 'escape': the text keeps its characters, with a word
# joiner behind the first of them, so that no tokenizer reads the token. 'allow': the
# token is made.
ControlTokens = Literal['refuse', 'escape', 'allow']

JOINER = '\u2060'  # U+2060, no width and no break
READ = (*FIELDS, 'completions')


def spelling(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """What a special token of a tokenizer looks like; None where there is none."""
    spelt = [token for token in special_tokens(tokenizer) if token.strip()]
    spelt.sort(key=len, reverse=True)  # of two that begin alike the longer is made
    return re.compile('|'.join(map(re.escape, spelt))) if spelt else None


def check_control_tokens(
    record: SourceRecord,
    tokenizer: PreTrainedTokenizerBase,
    pattern: re.Pattern[str] | None,
    how: ControlTokens | None,
) -> tuple[SourceRecord, bool]:
    """Looks for special tokens that are spelt in the texts of a record.

    Args:
        record: as it was found.
        tokenizer: whose special tokens are looked for.
        pattern: :func:`spelling` of the tokenizer.
        how: what becomes of the record; None refuses it where it has messages, which a
            template surrounds with its own control tokens, and allows it where all is
            text, whose author writes the control tokens too.

    Returns:
        (the record, escaped where that is asked for; whether something was found).

    Raises:
        BadRecord: something was found, and is refused or cannot be escaped.
    """
    if pattern is None:
        return record, False
    names = [name for name in (*READ, *TOLD) if name in record.fields]
    texts = [text for name in names for text in _texts(record.fields[name])]
    if pattern.search('\0'.join(texts)) is None:  # the usual case, by one search
        return record, False
    has_messages = any(_has_messages(record.fields[name]) for name in names)
    if not has_messages:  # a template is told nothing
        names = [name for name in names if name in READ]
    found = [
        (name, match[0])
        for name in names
        for text in _texts(record.fields[name])
        if (match := pattern.search(text))
    ]
    if not found:
        return record, False
    how = how or ('refuse' if has_messages else 'allow')
    if how == 'allow':
        return record, True
    name, token = found[0]
    if how == 'refuse':
        raise BadRecord(
            f'{record.where}: {name!r} spells the control token {token!r}, which the '
            "tokenizer would make of it; set control_tokens='escape' to keep it as "
            "plain text, or 'allow' where the token is meant"
        )
    fields = dict(record.fields)
    for name in {name for name, _ in found}:
        fields[name] = _escaped(fields[name], pattern)
        for text in _texts(fields[name]):
            made = set(encode(tokenizer, [text])[0]) - {tokenizer.unk_token_id}
            if made & set(special_tokens(tokenizer).values()):
                raise BadRecord(
                    f'{record.where}: {name!r} spells the control token {token!r}, and '
                    'the tokenizer makes it of the escaped text too; remove it there'
                )
    return SourceRecord(fields, record.where), True


def _has_messages(value: Any) -> bool:
    """Whether a field holds messages, or a list of lists of them."""
    if isinstance(value, list):
        return any(isinstance(x, dict) or _has_messages(x) for x in value)
    return False


def _texts(value: Any) -> list[str]:
    """All texts in a field; names of keys and of roles are none."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [part for name, part in value.items() if name != 'role']
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return []


def _escaped(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda m: m[0][0] + JOINER + m[0][1:], value)
    if isinstance(value, dict):
        return {
            name: part if name == 'role' else _escaped(part, pattern)
            for name, part in value.items()
        }
    return [_escaped(x, pattern) for x in value] if isinstance(value, list) else value
