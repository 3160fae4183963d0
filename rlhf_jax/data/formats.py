"""Records of known meaning: demonstrations, comparisons, prompts, texts.

    demonstration   prompt + completion · messages · the chosen side of a comparison
    comparison      prompt + chosen + rejected · chosen + rejected as conversations
    prompt          any record with a prompt
    text            text

A prompt or an answer is text or a list of messages ``{'role', 'content'}``; messages
are rendered by the tokenizer's chat template (``chat.py``). Fields that are null count
as absent. Read ``pipeline.py`` next, which turns these records into tokens.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_jax.data import chat
from rlhf_jax.data.sources import SourceRecord

PARTS = ('prompt', 'completion', 'chosen', 'rejected', 'messages', 'text')


class BadRecord(ValueError):
    """A record that cannot be used as asked; ``on_bad='skip'`` leaves it out."""


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A prompt and an answer to imitate."""

    prompt: str
    completion: str  # with its own leading space where the style has one; without EOS
    where: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt, of which a labeller chose one."""

    prompt: str
    chosen: str
    rejected: str
    margin: float  # demanded score difference, 0 where labellers gave none
    meta: dict[str, Any]  # other scalar fields, e.g. annotator, gold_chosen
    where: str


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to continue."""

    prompt: str
    reference: str | None  # an answer by someone else
    meta: dict[str, Any]  # other scalar fields
    where: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A document."""

    text: str
    where: str


def to_demonstration(
    record: SourceRecord, tokenizer: PreTrainedTokenizerBase
) -> Demonstration:
    """Reads a demonstration; the module docstring lists the fields.

    Raises:
        BadRecord: a field is missing, of the wrong type or empty, or the conversation
            does not end in an assistant turn.
        ValueError: messages, and the tokenizer has no chat template.
    """
    fields = _present(record)
    if 'messages' in fields and 'completion' not in fields:
        pair = _render(record, tokenizer, _messages(record, 'messages'))
    else:
        name = 'chosen' if 'completion' not in fields and 'chosen' in fields else None
        pair = _answered(record, tokenizer, name or 'completion')
    prompt, completion = pair
    _text(record, 'prompt', prompt)
    _text(record, 'completion', completion)
    return Demonstration(prompt, completion, record.where)


def to_comparison(
    record: SourceRecord, tokenizer: PreTrainedTokenizerBase
) -> Comparison:
    """Reads a comparison; the module docstring lists the fields.

    Raises:
        BadRecord: a field is missing, of the wrong type or empty, both answers are
            equal, or they answer different prompts.
        ValueError: messages, and the tokenizer has no chat template.
    """
    fields = _present(record)
    prompt, chosen = _answered(record, tokenizer, 'chosen')
    other, rejected = _answered(record, tokenizer, 'rejected')
    if prompt != other:
        raise BadRecord(f'{record.where}: chosen and rejected answer different prompts')
    _text(record, 'prompt', prompt)
    _text(record, 'chosen', chosen)
    _text(record, 'rejected', rejected)
    if chosen == rejected:
        raise BadRecord(f'{record.where}: chosen and rejected are equal')
    margin = fields.get('margin', 0.0)
    number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if not number or not math.isfinite(margin):
        raise BadRecord(
            f'{record.where}: margin is {margin!r}; it must be a finite number'
        )
    meta = _meta(fields, 'margin')
    return Comparison(prompt, chosen, rejected, float(margin), meta, record.where)


def to_prompt(record: SourceRecord, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Reads a prompt; ``reference``, else an answer in the record, is its reference.

    An empty reference is none: the prompt can be used all the same.

    Raises:
        BadRecord: the prompt is missing, of the wrong type or empty.
        ValueError: messages, and the tokenizer has no chat template.
    """
    fields = _present(record)
    answer = next((name for name in ('completion', 'chosen') if name in fields), None)
    reference = None
    if 'messages' in fields and 'prompt' not in fields:
        messages = _messages(record, 'messages')
        if messages[-1]['role'] == 'assistant':
            prompt, reference = _render(record, tokenizer, messages)
        else:
            prompt = _render_open(record, tokenizer, messages)
    elif answer is not None and isinstance(fields[answer], list):
        prompt, reference = _answered(record, tokenizer, answer)
    elif isinstance(fields.get('prompt'), list):
        prompt = _render_open(record, tokenizer, _messages(record, 'prompt'))
        reference = fields.get(answer)
    else:
        prompt = _field(record, 'prompt')
        reference = fields.get(answer)
    reference = fields.get('reference', reference)
    if reference is not None and not isinstance(reference, str):
        raise BadRecord(
            f'{record.where}: the reference is a {type(reference).__name__}, not text'
        )
    _text(record, 'prompt', prompt)
    if reference is not None and not reference.strip():
        reference = None
    return Prompt(prompt, reference, _meta(fields, 'reference'), record.where)


def to_text(record: SourceRecord, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Reads a document.

    Raises:
        BadRecord: ``text`` is missing, no text or empty.
    """
    return Text(_text(record, 'text', _field(record, 'text')), record.where)


def _present(record: SourceRecord) -> dict[str, Any]:
    return {name: value for name, value in record.fields.items() if value is not None}


def _meta(fields: dict[str, Any], *used: str) -> dict[str, Any]:
    return {
        name: value
        for name, value in fields.items()
        if name not in (*PARTS, *used) and isinstance(value, str | int | float)
    }


def _field(record: SourceRecord, name: str) -> Any:
    fields = _present(record)
    if name not in fields:
        close = difflib.get_close_matches(name, fields, n=1)
        hint = f'; is {close[0]!r} meant? Rename it' if close else ''
        found = ', '.join(fields) or 'none'
        raise BadRecord(
            f'{record.where}: the field {name!r} is missing; found: {found}{hint}'
        )
    return fields[name]


def _text(record: SourceRecord, name: str, value: Any) -> str:
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


def _messages(record: SourceRecord, name: str) -> list[dict[str, str]]:
    value = _field(record, name)
    if not isinstance(value, list) or not value:
        raise BadRecord(
            f'{record.where}: {name!r} must be a list of messages with at least one'
        )
    for i, message in enumerate(value):
        for part in ('role', 'content'):
            if not isinstance(message, dict) or not isinstance(message.get(part), str):
                raise BadRecord(
                    f'{record.where}: {name}[{i}] must be '
                    "{'role': text, 'content': text}, and its " + part + ' is no text'
                )
    return value


def _answered(
    record: SourceRecord, tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[str, str]:
    """Prompt and answer, as texts, of a record with its answer in field ``name``."""
    answer = _field(record, name)
    if isinstance(answer, list):
        turns = _messages(record, name)
        if turns[0]['role'] != 'assistant':  # a whole conversation, prompt included
            return _render(record, tokenizer, turns)
    else:
        turns = [{'role': 'assistant', 'content': _text(record, name, answer)}]
    prompt = _field(record, 'prompt')
    if isinstance(prompt, list):
        return _render(record, tokenizer, _messages(record, 'prompt') + turns)
    if isinstance(answer, list):
        opening = {'role': 'user', 'content': _text(record, 'prompt', prompt)}
        return _render(record, tokenizer, [opening] + turns)
    return prompt, answer


def _render(
    record: SourceRecord,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
) -> tuple[str, str]:
    if messages[-1]['role'] != 'assistant':
        raise BadRecord(
            f'{record.where}: the conversation ends in a turn of '
            f'{messages[-1]["role"]!r}; the last one must be of the assistant'
        )
    if len(messages) < 2:
        raise BadRecord(f'{record.where}: nothing stands before the answer')
    _text(record, "last turn's content", messages[-1]['content'])
    try:
        return chat.split(messages, tokenizer)
    except chat.TemplateRefused as error:
        raise BadRecord(f'{record.where}: {error}') from error


def _render_open(
    record: SourceRecord,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
) -> str:
    try:
        return chat.open_prompt(messages, tokenizer)
    except chat.TemplateRefused as error:
        raise BadRecord(f'{record.where}: {error}') from error
