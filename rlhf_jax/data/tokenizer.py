"""Loading a tokenizer, what the package demands of one, and lists of ids.

A tokenizer is a Hugging Face ``PreTrainedTokenizerFast``. It must have an EOS token,
which ends every response; it may lack BOS and pad (padding is told by masks). Read
``data/sources.py`` next.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_jax.config import load_dotted


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer and checks that it can end a text and leave a prompt open.

    Args:
        spec: a Hugging Face directory, a hub name, or ``'package.module:function'``, a
            function without arguments that returns a tokenizer.

    Raises:
        ValueError: nothing can be loaded there, it is no fast tokenizer, it has no EOS
            token, or it appends tokens to every text.
    """
    folder = Path(spec).expanduser()
    if ':' in spec and not folder.exists():
        tokenizer = load_dotted(spec, 'tokenizer')()
    else:
        name = str(folder) if folder.exists() else spec
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[:1]
            raise ValueError(
                f'tokenizer={spec!r} cannot be loaded: it is neither a directory with '
                f'tokenizer files nor a hub name that can be reached '
                f'({"".join(reason)}); give a directory, a hub name or '
                'package.module:function'
            ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise ValueError(
            f'tokenizer={spec!r} gives a {type(tokenizer).__name__}; a '
            'PreTrainedTokenizerFast is needed'
        )
    eos_ids(tokenizer)
    bos_ids(tokenizer)
    return tokenizer


def eos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f'tokenizer {tokenizer.name_or_path!r} has no EOS token, so that no '
            "response could end; set one, for instance eos_token='</s>', in "
            'tokenizer_config.json'
        )
    return [tokenizer.eos_token_id]


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts before every text; usually BOS or nothing.

    Raises:
        ValueError: the tokenizer also puts tokens behind a text: a prompt that is to be
            continued must stay open.
    """
    bare = tokenizer.encode('a', add_special_tokens=False)
    full = tokenizer.encode('a')
    num_special = len(full) - len(bare)
    before = next(i for i in range(num_special + 1) if full[i : i + len(bare)] == bare)
    if behind := full[before + len(bare) :]:
        raise ValueError(
            f'tokenizer {tokenizer.name_or_path!r} appends '
            f'{tokenizer.convert_ids_to_tokens(behind)} to every text, but a prompt '
            'must stay open; turn that off (add_eos_token=false in '
            'tokenizer_config.json)'
        )
    return full[:before]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Checks that a model with ``vocab_size`` embeddings has one for every token.

    Raises:
        ValueError: the tokenizer has higher ids.
    """
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise ValueError(
            f'token {token!r} has id {highest}, the model has {vocab_size} embeddings '
            f'(0 to {vocab_size - 1}); use the tokenizer the model was trained with, '
            f'or a model with at least {highest + 1}'
        )


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of whole texts, with nothing added and nothing cut."""
    if not texts:
        return []
    return tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )['input_ids']


def opened(ids: list[int], bos: list[int]) -> list[int]:
    """Ids with BOS before them, once: chat templates write their own."""
    return ids if ids[: len(bos)] == bos else bos + ids


def truncate(
    prompt: list[int], answers: list[list[int]], limit: int, bos: list[int], eos: int
) -> tuple[list[int], list[list[int]]]:
    """Cuts a prompt and its answers so that each fits with it into ``limit`` tokens.

    The prompt is cut first, from the left, down to half of ``limit`` at most (to all of
    it where there is no answer); an answer too long even so is cut from the right.

    Args:
        prompt: ids that begin with ``bos``, which stays.
        answers: ids that end in ``eos``, which stays.
        limit: tokens of the prompt and the longest answer together.
        bos: ids that stand before every text; may be none.
        eos: the id that ends every answer.

    Returns:
        (prompt, answers).
    """
    longest = max(map(len, answers), default=0)
    room = max(limit - longest, limit // 2) if answers else limit
    if len(prompt) > room:
        prompt = bos + prompt[len(prompt) - (room - len(bos)) :]
    space = limit - len(prompt)
    return prompt, [a if len(a) <= space else a[: space - 1] + [eos] for a in answers]
