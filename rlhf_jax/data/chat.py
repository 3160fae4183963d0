"""Conversations as text, by the chat template of a Hugging Face tokenizer.

Used by ``formats.py``; read that first.
"""

from __future__ import annotations

import re
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf_jax.data.stops import check_closing, ends_of

Messages = list[dict[str, Any]]  # [{'role': 'user', 'content': '…'}, …]

# Where a template says itself what the assistant writes: {% generation %}…
MARKS = re.compile(r'\{%-?\s*generation\s*-?%\}')


class TemplateRefused(ValueError):
    """The template cannot render this conversation."""


def open_prompt(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of a conversation up to where the assistant begins to write.

    Raises:
        TemplateRefused: the template raises on this conversation.
        ValueError: the tokenizer has no chat template, or one at whose turns' end
            nothing stops.
    """
    check_closing(tokenizer)
    return _render(messages, tokenizer, add_generation_prompt=True)[0]


def split(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Prompt and completion of a conversation that ends in an assistant turn.

    The completion is all that the template writes behind the open prompt, up to the
    token that ends the turn (the first of ``stops.eos_ids``), where it writes one.

    Raises:
        TemplateRefused: the template raises on this conversation, or renders the prompt
            in another way once an answer follows.
        ValueError: the tokenizer has no chat template.
    """
    prompt = open_prompt(messages[:-1], tokenizer)
    whole, _ = _render(messages, tokenizer)
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
    is_closed = closed.endswith(tuple(tokenizer.convert_ids_to_tokens(ends.ids)))
    return prompt, closed if is_closed else completion


def assistant_spans(
    messages: Messages, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """Text of a conversation, and where in it the assistant writes.

    A span is what stands between ``{% generation %}`` marks; in a template without
    them, all that it writes for an assistant turn behind the open prompt, up to and
    including the token that ends the turn.

    Returns:
        (text, [(first character, character behind the last) of every assistant turn]).

    Raises:
        TemplateRefused: the template raises on this conversation, or has no marks and
            renders a turn in another way once others follow.
        ValueError: the tokenizer has no chat template, or it ends no turn with a token
            of its own, so that nothing would teach the model to stop.
    """
    text, spans = _render(messages, tokenizer)
    if not MARKS.search(tokenizer.get_chat_template()):
        spans = _nested_spans(messages, tokenizer, text)
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
    messages: Messages, tokenizer: PreTrainedTokenizerBase, text: str
) -> list[tuple[int, int]]:
    spans = []
    for i, message in enumerate(messages):
        if message['role'] != 'assistant':
            continue
        before, _ = _render(messages[:i], tokenizer, add_generation_prompt=True)
        through, _ = _render(messages[: i + 1], tokenizer)
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


def _render(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Text, and the spans between generation marks, as (start, end) characters."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f'tokenizer {tokenizer.name_or_path!r} has no chat template, which '
            'messages need; set chat_template in its tokenizer_config.json, or give '
            'prompts and answers as text'
        )
    template = tokenizer.get_chat_template()
    try:
        # What apply_chat_template calls; it alone tells the marks as characters.
        texts, spans = render_jinja_template(
            [messages],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=bool(MARKS.search(template)),
            **tokenizer.special_tokens_map,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise TemplateRefused(
            f'the chat template refuses the conversation: {error}'
        ) from error
    return texts[0], spans[0] if spans else []
