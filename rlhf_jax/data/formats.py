"""Records of known meaning: demonstrations, comparisons, prompts, texts.

    demonstration   prompt + completion · messages · the chosen side of a comparison
    conversation    a demonstration in messages, all of whose assistant turns count
    comparison      prompt + chosen + rejected · chosen + rejected as conversations;
                    perhaps margin, and either probability (that chosen is the better
                    one, 0 to 1) or tie: true (judged equal)
    unpaired        a demonstration + label: true (or 1) desirable, false (or 0) not
    prompt          any record with a prompt
    text            text

``judgements.py`` has more, for reward models alone. A prompt or an answer is text or a
list of messages ``{'role', 'content'}``; messages are rendered by the tokenizer's chat
template (``chat.py``), which is told ``tools`` and ``chat_template_kwargs`` too. A
prompt in messages that ends in an assistant turn is one that the answer goes on in.
Fields that are null count as absent, and so do keys of messages. Read ``pipeline.py``
next, which turns these records into tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_jax.data import chat
from rlhf_jax.data.sources import SourceRecord
from rlhf_jax.data.template_limits import TemplateStuck
from rlhf_jax.ranges import LARGEST_SCORE

FIELDS = ('prompt', 'completion', 'chosen', 'rejected', 'messages', 'text')
GOLD = ('gold_chosen', 'gold_rejected')  # true rewards, which are never learned from
TOLD = ('tools', 'documents', 'chat_template_kwargs')  # for the chat template


class BadRecord(ValueError):
    """A record that cannot be used as asked; ``on_bad='skip'`` leaves it out."""


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A prompt and an answer to imitate."""

    prompt: str
    completion: str  # with its own leading space where the style has one
    where: str
    templated: bool = False  # a chat template wrote it, with BOS where it wants one

    @property
    def texts(self) -> dict[str, str]:
        """What is tokenised, by its name; so in all kinds of records."""
        return {'prompt': self.prompt, 'completion': self.completion}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns of several parties, of which those of the assistant are to be imitated."""

    text: str
    spans: list[tuple[int, int]]  # what the assistant writes: first, behind the last
    where: str

    @property
    def texts(self) -> dict[str, str]:
        return {'text': self.text}


@dataclasses.dataclass(frozen=True)
class Judged:
    """Completions of a prompt with what was said of them: comparisons and unpaired
    responses here; rankings, ratings and responses in steps in ``judgements.py``.
    """

    prompt: str
    # By the name of their field; None is the virtual response, whose score is 0
    completions: dict[str, str | None]
    # [K][H] ranks, ratings or 1 and 0, of steps [S][1]; None where nobody said. Of a
    # comparison, whose first completion is the chosen one, there are none.
    labels: list[list[float | None]] | None
    meta: dict[str, Any]  # other scalar fields, e.g. annotator, gold_chosen
    where: str
    templated: bool = False
    margin: float = 0.0  # demanded score difference, 0 where labellers gave none
    # Of a comparison: that the chosen completion is the better one; ½ where it is tied
    probability: float = 1.0
    tied: bool = False

    @property
    def texts(self) -> dict[str, str]:
        there = {name: x for name, x in self.completions.items() if x is not None}
        return {'prompt': self.prompt, **there}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to continue."""

    prompt: str
    reference: str | None  # an answer by someone else
    meta: dict[str, Any]  # other fields, for reward functions
    where: str
    templated: bool = False

    @property
    def texts(self) -> dict[str, str]:
        return {'prompt': self.prompt}


@dataclasses.dataclass(frozen=True)
class Text:
    """A document."""

    text: str
    where: str

    @property
    def texts(self) -> dict[str, str]:
        return {'text': self.text}


def to_demonstration(
    record: SourceRecord, tokenizer: PreTrainedTokenizerBase
) -> Demonstration:
    """Reads a demonstration; the module docstring lists the fields.

    Raises:
        BadRecord: a field is missing, of the wrong type or empty, or the conversation
            does not end in an assistant turn; a comparison whose chosen answer is
            judged the worse one.
        ValueError: messages, and the tokenizer has no chat template.
    """
    name = answer_field(record)
    if name == 'chosen' and (probability := how_sure(record)[0]) < 0.5:
        raise BadRecord(
            f'{record.where}: chosen is the worse answer (probability '
            f'{probability:g}); swap chosen and rejected, or leave it out'
        )
    prompt, completion, templated = prompt_and_answer(record, tokenizer, name)
    return Demonstration(prompt, completion, record.where, templated)


def to_conversation(
    record: SourceRecord, tokenizer: PreTrainedTokenizerBase
) -> Conversation:
    """Reads a demonstration in messages; it may end in a turn of any role.

    Raises:
        BadRecord: a field is missing, of the wrong type or empty, a prompt and an
            answer are text, or the assistant writes nothing, or first.
        ValueError: the tokenizer has no chat template, or none that can be learned.
    """
    found = _turns(record, answer_field(record))
    if found is None:
        raise BadRecord(
            f'{record.where}: prompt and answer are text, of which the answer alone '
            "counts: give messages, or use loss_on='response'"
        )
    turns = found.messages
    written = [i for i, turn in enumerate(turns) if turn['role'] == 'assistant']
    if not written:
        raise BadRecord(f'{record.where}: no turn is of the assistant')
    if written[0] == 0:
        raise BadRecord(f'{record.where}: nothing stands before the answer')
    for i in written:
        _check_written(record, f'messages[{i}]', turns[i])
    with _placed(record):
        told = chat.told(record.present, tokenizer)
        text, spans = chat.assistant_spans(turns, tokenizer, told)
    return Conversation(text_of(record, 'messages', text), spans, record.where)


def to_comparison(record: SourceRecord, tokenizer: PreTrainedTokenizerBase) -> Judged:
    """Reads a comparison; the module docstring lists the fields.

    Raises:
        BadRecord: a field is missing, of the wrong type or empty, both answers are
            equal, or they answer different prompts, a probability is none, or stands
            beside a tie.
        ValueError: messages, and the tokenizer has no chat template.
    """
    fields = record.present
    prompt, chosen, templated = prompt_and_answer(record, tokenizer, 'chosen')
    other, rejected, _ = prompt_and_answer(record, tokenizer, 'rejected')
    if prompt != other:
        raise BadRecord(f'{record.where}: chosen and rejected answer different prompts')
    if chosen == rejected:
        raise BadRecord(f'{record.where}: chosen and rejected are equal')
    margin = number_of(record, 'margin', fields.get('margin', 0.0))
    for name in GOLD:
        number_of(record, name, fields.get(name, 0.0))
    probability, tied = how_sure(record)
    meta = other_fields(fields, 'margin', 'probability', 'tie')
    sides = {'chosen': chosen, 'rejected': rejected}
    how = margin, probability, tied
    return Judged(prompt, sides, None, meta, record.where, templated, *how)


def how_sure(record: SourceRecord) -> tuple[float, bool]:
    """How sure it is that the chosen answer of a comparison is the better one.

    Returns:
        (probability, ½ of a tie; whether it is a tie).

    Raises:
        BadRecord: no such probability, or a tie that has one.
    """
    fields = record.present
    tie = fields.get('tie', False)
    if not isinstance(tie, bool):
        raise BadRecord(f'{record.where}: tie is {tie!r:.80}; use true or false')
    if tie and 'probability' in fields:
        raise BadRecord(
            f'{record.where}: a tie has no probability; leave one of both out'
        )
    given = fields.get('probability', 0.5 if tie else 1.0)
    probability = number_of(record, 'probability', given)
    if not 0 <= probability <= 1:
        raise BadRecord(
            f'{record.where}: probability is {probability:g}; it is that of chosen '
            'being the better one, from 0 to 1'
        )
    return probability, tie


def to_unpaired(record: SourceRecord, tokenizer: PreTrainedTokenizerBase) -> Judged:
    """Reads an answer with its ``label``; the module docstring lists the fields.

    Raises:
        BadRecord: a field is missing, of the wrong type or empty, or the label is
            neither true or 1 nor false or 0.
        ValueError: messages, and the tokenizer has no chat template.
    """
    label = field_of(record, 'label')
    if not isinstance(label, int) or label not in (0, 1):  # a bool is an int
        raise BadRecord(
            f'{record.where}: label is {label!r}, which is no verdict; use true or '
            'false, or 1 or 0'
        )
    name = answer_field(record)
    prompt, completion, templated = prompt_and_answer(record, tokenizer, name)
    meta = other_fields(record.present, 'label')
    only = {'completion': completion}
    return Judged(prompt, only, [[float(label)]], meta, record.where, templated)


class Turns(NamedTuple):
    """What a record asks, before any template."""

    messages: chat.Messages | None  # up to the answer; None where the prompt is text
    goes_on: bool  # the last message is of the assistant, and the answer goes on in it
    answer: Any  # that the record has; None where it has none


def to_turns(record: SourceRecord) -> Turns:
    """The messages of a prompt and an answer to it; BadRecord where the prompt is
    missing or of the wrong type.
    """
    fields = record.present
    name = next((name for name in ('completion', 'chosen') if name in fields), None)
    if 'messages' in fields and 'prompt' not in fields:
        name = 'messages'
    answer = fields.get(name)
    if name != 'messages' and not isinstance(answer, list):
        prompt = field_of(record, 'prompt')
        turns = _messages(record, 'prompt') if isinstance(prompt, list) else None
        return Turns(turns, turns is not None and _goes_on(record, turns), answer)
    (turns, begun), answer = _turns(record, name), None
    if turns[-1]['role'] == 'assistant':
        *turns, last = turns
        answer = last.get('content')
    if begun is not None:
        turns = [*turns, begun]
        answer = (answer or '').removeprefix(begun['content'])
    if not turns:
        raise BadRecord(f'{record.where}: nothing stands before the answer')
    return Turns(turns, begun is not None, answer)


def to_prompt(record: SourceRecord, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Reads a prompt; ``reference``, else an answer in the record, is its reference.

    An empty reference is none: the prompt can be used all the same.

    Raises:
        BadRecord: the prompt is missing, of the wrong type or empty.
        ValueError: messages, and the tokenizer has no chat template.
    """
    fields, (turns, goes_on, reference) = record.present, to_turns(record)
    prompt = fields.get('prompt')
    if turns is not None:
        with _placed(record):
            told = chat.told(fields, tokenizer)
            prompt = chat.open_prompt(turns, tokenizer, told, goes_on=goes_on)
    reference = fields.get('reference', reference)
    if reference is not None and not isinstance(reference, str):
        raise BadRecord(
            f'{record.where}: the reference is a {type(reference).__name__}, not text'
        )
    text_of(record, 'prompt', prompt)
    is_given = reference is not None and reference.strip()
    reference = text_of(record, 'reference', reference) if is_given else None
    meta = {k: v for k, v in fields.items() if k not in (*FIELDS, 'reference')}
    templated = turns is not None or _templated(record)
    return Prompt(prompt, reference, meta, record.where, templated)


def to_text(record: SourceRecord, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Reads a document.

    Raises:
        BadRecord: ``text`` is missing, no text or empty.
    """
    return Text(text_of(record, 'text', field_of(record, 'text')), record.where)


def other_fields(fields: dict[str, Any], *used: str) -> dict[str, Any]:
    """The scalar fields that mean nothing here and are kept all the same."""
    return {
        name: value
        for name, value in fields.items()
        if name not in (*FIELDS, *used) and isinstance(value, str | int | float)
    }


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


def _messages(record: SourceRecord, name: str) -> chat.Messages:
    value = field_of(record, name)
    if not isinstance(value, list) or not value:
        raise BadRecord(
            f'{record.where}: {name!r} must be a list of messages with at least one'
        )
    for i, message in enumerate(value):
        parts = message if isinstance(message, dict) else {}
        odd = [p for p in ('role', 'content') if not isinstance(parts.get(p), str)]
        if odd and not (odd == ['content'] and parts.get('tool_calls')):
            raise BadRecord(
                f"{record.where}: {name}[{i}] must be {{'role': text, 'content': text}}"
                f', and its {odd[0]} is no text'
            )
    return value


def answer_field(record: SourceRecord) -> str:
    """The field with the answer of a demonstration; 'completion' if there is none."""
    fields = record.present
    names = ('completion', 'messages', 'chosen')
    return next((name for name in names if name in fields), 'completion')


class _Turns(NamedTuple):
    """A conversation with its answer."""

    messages: chat.Messages
    # The message of the prompt with which the last turn begins; None where the answer
    # is a turn of its own.
    begun: dict[str, Any] | None = None


def _turns(record: SourceRecord, name: str) -> _Turns | None:
    """The conversation with its answer in field ``name``; None where all is text."""
    answer = field_of(record, name)
    if name == 'messages' or isinstance(answer, list):
        turns = _messages(record, name)
        if name == 'messages' or turns[0]['role'] != 'assistant':
            return _Turns(turns)  # a whole conversation, prompt included
    else:
        turns = [{'role': 'assistant', 'content': text_of(record, name, answer)}]
    prompt = field_of(record, 'prompt')
    if isinstance(prompt, list):
        before = _messages(record, 'prompt')
        if not _goes_on(record, before):
            return _Turns(before + turns)
        *before, begun = before
        first, *rest = turns
        _check_written(record, f'{name}[0]', first)
        content = begun['content'] + (first.get('content') or '')
        turns = [*before, {**begun, **first, 'content': content}, *rest]
        return _Turns(turns, None if rest else begun)
    if not isinstance(answer, list):
        return None
    question = {'role': 'user', 'content': text_of(record, 'prompt', prompt)}
    return _Turns([question, *turns])


def _goes_on(record: SourceRecord, prompt: chat.Messages) -> bool:
    """Whether a prompt ends in an assistant turn, which the answer then goes on."""
    if prompt[-1]['role'] != 'assistant':
        return False
    if prompt[-1].get('tool_calls'):
        raise BadRecord(
            f'{record.where}: the prompt ends in an assistant turn with tool_calls, '
            'which is over; put the results of the tools behind it, or leave it to the '
            'answer'
        )
    return True


def prompt_and_answer(
    record: SourceRecord, tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[str, str, bool]:
    """Prompt, answer (of field ``name``), whether the chat template wrote them; else
    BadRecord.
    """
    found = _turns(record, name)
    if found is None:
        prompt, answer = field_of(record, 'prompt'), field_of(record, name)
    else:
        turns = found.messages
        if turns[-1]['role'] != 'assistant':
            raise BadRecord(
                f'{record.where}: the conversation ends in a turn of '
                f'{turns[-1]["role"]!r}; the last one must be of the assistant'
            )
        if len(turns) < 2:
            raise BadRecord(f'{record.where}: nothing stands before the answer')
        _check_written(record, 'the last turn', turns[-1])
        with _placed(record):
            told = chat.told(record.present, tokenizer)
            prompt, answer = chat.split(turns, tokenizer, told, begun=found.begun)
    text_of(record, 'prompt', prompt)
    return (
        prompt,
        text_of(record, name, answer),
        found is not None or _templated(record),
    )


def _templated(record: SourceRecord) -> bool:
    """Whether a chat template has written a prompt that is a text."""
    fields = record.present
    return 'templated' in fields and fields['templated'] is True


def _check_written(record: SourceRecord, name: str, turn: dict[str, Any]) -> None:
    if not turn.get('tool_calls'):
        text_of(record, name, turn['content'])


@contextlib.contextmanager
def _placed(record: SourceRecord) -> Iterator[None]:
    try:
        yield
    except chat.TemplateRefused as error:
        raise BadRecord(f'{record.where}: {error}') from error
    except TemplateStuck as error:  # skipping such records would take seconds for each
        raise ValueError(f'{record.where}: {error}') from error
