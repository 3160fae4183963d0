"""Conversations as text, by the chat template of a Hugging Face tokenizer.

Used by ``formats.py``; read that first.
"""

from __future__ import annotations

import jinja2
from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]  # [{'role': 'user', 'content': '…'}, …]


class TemplateRefused(ValueError):
    """The template cannot render this conversation."""


def open_prompt(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of a conversation up to where the assistant begins to write.

    Raises:
        TemplateRefused: the template raises on this conversation.
        ValueError: the tokenizer has no chat template.
    """
    return _render(messages, tokenizer, add_generation_prompt=True)


def split(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Prompt and completion of a conversation that ends in an assistant turn.

    The completion is all that the template writes behind the open prompt. An EOS token
    at its end is cut off: the pipeline writes EOS behind every completion.

    Raises:
        TemplateRefused: the template raises on this conversation, or renders the prompt
            in another way once an answer follows.
        ValueError: the tokenizer has no chat template.
    """
    prompt = open_prompt(messages[:-1], tokenizer)
    whole = _render(messages, tokenizer, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise TemplateRefused(
            'the chat template renders the prompt in another way once an answer '
            'follows, so that it cannot be split; use a template whose generation '
            'prompt is the beginning of an answered turn'
        )
    completion = whole[len(prompt) :]
    eos = tokenizer.eos_token
    if eos and completion.rstrip().endswith(eos):
        completion = completion.rstrip().removesuffix(eos)
    return prompt, completion


def _render(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            f'tokenizer {tokenizer.name_or_path!r} has no chat template, which '
            'messages need; set chat_template in its tokenizer_config.json, or give '
            'prompts and answers as text'
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        raise TemplateRefused(
            f'the chat template refuses the conversation: {error}'
        ) from error
