"""Conversations as text, by the chat template of a Hugging Face tokenizer.

What a record says and the template would not write is refused, never left out. Used by
``formats.py``; read that first.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf_jax.data.clock import without_clock
from rlhf_jax.data.stops import check_closing, ends_of
from rlhf_jax.data.template_limits import TemplateStuck, limited, parse
from rlhf_jax.data.tokenizer import special_tokens

Messages = list[dict[str, Any]]  # [{'role': 'user', 'content': '…'}, …]

# Where a template says itself what the assistant writes: {% generation %}…
MARKS = re.compile(r'\{%-?\s*generation\s*-?%\}')
# Parts of a message that are said in it, beside its content. The names of reasoning are
# aliases: transformers gives a template all of them.
REASONING = ('reasoning_content', 'thinking', 'reasoning')
SAID = {'tool_calls': ('tool_calls',), **dict.fromkeys(REASONING, REASONING)}
# What a record may not set among the arguments of a template.
RESERVED = ('messages', 'add_generation_prompt', 'tools', 'documents', 'strftime_now')
PROBE = 'Zqx7'  # stands in for a content


class TemplateRefused(ValueError):
    """The template cannot render this conversation."""


class Told(NamedTuple):
    """What a template is told beside the messages."""

    tools: list[Any] | None = None
    documents: list[Any] | None = None
    arguments: Mapping[str, Any] = {}  # ``chat_template_kwargs`` of the record


NOTHING = Told()


def told(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Told:
    """What a record tells the template beside its messages: ``tools`` (a list, or one
    as JSON text), ``chat_template_kwargs``, and ``documents`` where the template reads
    them.

    Raises:
        TemplateRefused: the template does not read it, or it is of another kind.
        ValueError: the tokenizer has no chat template.
    """
    tools, extra = fields.get('tools'), fields.get('chat_template_kwargs') or {}
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise TemplateRefused(f'tools is text, but no JSON ({error})') from error
    tools = tools or None
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise TemplateRefused('tools must be a list of JSON schemas, as dicts')
    if not isinstance(extra, Mapping):
        raise TemplateRefused(
            f'chat_template_kwargs is a {type(extra).__name__}; it must be a dict'
        )
    words = _words(_template(tokenizer, tools))
    extra = {name: value for name, value in extra.items() if value is not None}
    for name in (*(['tools'] if tools else []), *extra):
        if name not in words.variables or (name in extra and name in RESERVED):
            what = name if name == 'tools' else f'chat_template_kwargs[{name!r}]'
            raise TemplateRefused(
                f'{what} is given, and the chat template of '
                f'{tokenizer.name_or_path!r} does not read it, so that the model would '
                'not see it; use a template that does, or remove it from the record'
            )
    documents = fields.get('documents') if 'documents' in words.variables else None
    return Told(tools, documents or None, extra)


def open_prompt(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    told: Told = NOTHING,
    *,
    goes_on: bool = False,
) -> str:
    """Text of a conversation up to where the assistant begins to write.

    Args:
        messages: the turns so far.
        tokenizer: whose template renders them.
        told: what else it is told.
        goes_on: the last turn is one of the assistant, and the answer goes on in it.

    Raises:
        TemplateRefused: the template raises on this conversation, or does not write all
            of it.
        ValueError: the tokenizer has no chat template, or one at whose turns' end
            nothing stops.
    """
    check_closing(tokenizer)
    how = 'continue_final_message' if goes_on else 'add_generation_prompt'
    return _render(messages, tokenizer, told, how)[0]


def split(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    told: Told = NOTHING,
    *,
    begun: dict[str, Any] | None = None,
) -> tuple[str, str]:
    """Prompt and completion of a conversation that ends in an assistant turn.

    The completion is all that the template writes behind the open prompt, up to the
    token that ends the turn (the first of ``stops.eos_ids``), where it writes one.

    Args:
        messages: the turns, the answer's included.
        tokenizer: whose template renders them.
        told: what else it is told.
        begun: the message with which the last turn begins, where that is a part of the
            prompt.

    Raises:
        TemplateRefused: the template raises on this conversation, does not write all of
            it, or renders the prompt in another way once an answer follows.
        ValueError: the tokenizer has no chat template.
    """
    if begun is None:
        prompt = open_prompt(messages[:-1], tokenizer, told)
    else:
        first = [*messages[:-1], begun]
        prompt = open_prompt(first, tokenizer, told, goes_on=True)
    whole, _ = _render(messages, tokenizer, told)
    if not whole.startswith(prompt):
        raise TemplateRefused(
            f'the chat template of {tokenizer.name_or_path!r} renders the prompt in '
            'another way once an answer follows, so that it cannot be split; use a '
            'template whose generation prompt is the beginning of an answered turn'
        )
    completion = whole[len(prompt) :]
    ends = ends_of(tokenizer)
    if completion.endswith(ends.closing.text + ends.closing.rest):
        completion = completion.removesuffix(ends.closing.rest)
    closed = completion.rstrip()
    known = (tokenizer.convert_ids_to_tokens(token) for token in ends.ids)
    is_closed = closed.endswith(tuple(token for token in known if token))
    return prompt, closed if is_closed else completion


def assistant_spans(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, told: Told = NOTHING
) -> tuple[str, list[tuple[int, int]]]:
    """Text of a conversation, and where in it the assistant writes.

    A span is what stands between ``{% generation %}`` marks; in a template without
    them, all that it writes for an assistant turn behind the open prompt, up to and
    including the token that ends the turn.

    Returns:
        (text, [(first character, character behind the last) of every assistant turn]).

    Raises:
        TemplateRefused: the template raises on this conversation, does not write all of
            it, or has no marks and renders a turn in another way once others follow.
        ValueError: the tokenizer has no chat template, or it ends no turn with a token
            of its own, so that nothing would teach the model to stop.
    """
    text, spans = _render(messages, tokenizer, told)
    if not MARKS.search(_template(tokenizer, told.tools)):
        spans = _nested_spans(messages, tokenizer, told, text)
    added = (str(token) for token in tokenizer.added_tokens_decoder.values())
    ends = tuple(token for token in added if token.strip())
    for start, end in spans:
        if not text[start:end].rstrip().endswith(ends):
            raise ValueError(
                f'the chat template of {tokenizer.name_or_path!r} ends an assistant '
                f'turn in {text[max(start, end - 20) : end]!r}, which is no token of '
                'its own: nothing would teach the model to stop; write the EOS token '
                'behind every assistant turn (and inside its generation marks), or use '
                "loss_on='response'"
            )
    return text, spans


def _nested_spans(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, told: Told, text: str
) -> list[tuple[int, int]]:
    spans = []
    for i, message in enumerate(messages):
        if message['role'] != 'assistant':
            continue
        before, _ = _render(messages[:i], tokenizer, told, 'add_generation_prompt')
        through, _ = _render(messages[: i + 1], tokenizer, told)
        if not (through.startswith(before) and text.startswith(through)):
            raise TemplateRefused(
                f'the chat template of {tokenizer.name_or_path!r} renders the turns up '
                f'to messages[{i}] in another way once others follow, so that it '
                'cannot be told what the assistant writes; put {% generation %} marks '
                "into it, or use loss_on='response'"
            )
        # Templates write a line break behind the token that ends a turn, for the next.
        spans.append((len(before), len(through.rstrip())))
    return spans


def rendered(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[bool]:
    """Which texts begin as a conversation does in the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        return [False] * len(texts)
    heads = []
    for role in ('user', 'system'):
        try:
            text, _ = _render([{'role': role, 'content': PROBE}], tokenizer)
        except TemplateRefused:
            continue
        head, found, _ = text.partition(PROBE)
        if found and head.strip():
            heads.append(head)
    shared = os.path.commonprefix(heads)
    if any(token and token in shared for token in special_tokens(tokenizer)):
        heads = [shared]
    return [text.startswith(tuple(heads)) for text in texts]


def readable(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A conversation as its chat template writes it, without the special tokens: what
    another model can be told of it. Roles and contents stay.
    """
    known = sorted(filter(None, special_tokens(tokenizer)), key=len, reverse=True)
    return re.sub('|'.join(map(re.escape, known)), '', text) if known else text


# --------------------------------------------------------------------------- rendering


def _render(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    told: Told = NOTHING,
    how: str | None = None,  # 'add_generation_prompt' or 'continue_final_message'
) -> tuple[str, list[tuple[int, int]]]:
    """Text, and the spans between generation marks, as (start, end) characters."""
    template = _template(tokenizer, told.tools)
    messages = [_said(message, template, tokenizer) for message in messages]

    def write(messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        return _written(messages, template, tokenizer, told, how)

    for i, message in enumerate(messages):
        if message.get('tool_calls') and message['content']:
            rest = [*messages[:i], {**message, 'content': ''}, *messages[i + 1 :]]
            if write(rest) == write(messages):
                raise TemplateRefused(
                    f'messages[{i}] has content beside its tool_calls, and the chat '
                    f'template of {tokenizer.name_or_path!r} leaves the content out; '
                    'use a template that writes both, or remove one of them'
                )
    if all(message['content'] is not None for message in messages):
        return write(messages)
    # Beside tool calls a content may be null. Some templates ask whether it is, others
    # fail, or write it out as 'None': these get a text without characters.
    empty = write([{**m, 'content': m['content'] or ''} for m in messages])
    try:
        text, spans = write(messages)
    except TemplateRefused:
        return empty
    if text.replace('None', '') == empty[0].replace('None', ''):
        return empty
    return text, spans


def _said(
    message: dict[str, Any], template: str, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """A message without the keys that are null (Arrow gives every message every key),
    all of whose parts the template reads.
    """
    spoken = _words(template).spoken
    result = {name: x for name, x in message.items() if x is not None}
    result.setdefault('content', None)  # beside tool calls; formats.py wants one else
    for name, aliases in SAID.items():
        if not result.get(name):
            continue
        heard = next((a for a in (name, *aliases) if a in spoken), None)
        if heard is None:
            raise TemplateRefused(
                f'a message of the role {message["role"]!r} has {name}, which the chat '
                f'template of {tokenizer.name_or_path!r} does not read, so that the '
                'model would not see it; use a template that does, or remove it from '
                'the record'
            )
        result[heard] = result.pop(name)
    return result


def _written(
    messages: Messages,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    told: Told,
    how: str | None,
) -> tuple[str, list[tuple[int, int]]]:
    try:
        with limited(template):
            # What apply_chat_template calls; it alone tells the marks as characters.
            texts, spans = render_jinja_template(
                [messages],
                tools=told.tools,
                documents=told.documents,
                chat_template=template,
                return_assistant_tokens_mask=bool(MARKS.search(template)),
                **{how: True} if how else {},
                **{**tokenizer.special_tokens_map, **told.arguments},
            )
    except TemplateStuck:
        raise
    except Exception as error:  # a template is a program, and can fail in any way
        reason = str(error)
        if not isinstance(error, jinja2.TemplateError | TypeError | ValueError):
            reason = f'{type(error).__name__}: {error}'
        raise TemplateRefused(
            f'the chat template refuses the conversation: {reason}'
        ) from error
    return texts[0], spans[0] if spans else []


def _template(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None) -> str:
    """The chat template, the one for tools where there are several, at the run's
    date.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f'tokenizer {tokenizer.name_or_path!r} has no chat template, which '
            'messages need; set chat_template in its tokenizer_config.json, or give '
            'prompts and answers as text'
        )
    return without_clock(tokenizer.get_chat_template(tools=tools), tokenizer)


class _Words(NamedTuple):
    """What a template may read."""

    variables: frozenset[str]
    spoken: frozenset[str]  # attributes, and texts such as a key in brackets


@functools.lru_cache(maxsize=16)
def _words(template: str) -> _Words:
    try:
        tree = parse(template)
    except ValueError as error:
        raise TemplateRefused(str(error)) from error
    names, texts = tree.find_all(nodes.Name), tree.find_all(nodes.Const)
    keys = {node.value for node in texts if isinstance(node.value, str)}
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    variables = frozenset(node.name for node in names if node.ctx == 'load')
    return _Words(variables, frozenset(keys | attributes))
