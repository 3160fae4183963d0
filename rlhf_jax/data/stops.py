"""What ends a response: the ids, decided once per run, and what tokens are as bytes.

The ids are those that the tokenizer, the generation config of its model and its chat
template end a text or a turn with, and the ``extra_eos_ids`` of the run. They are
decided when a tokenizer is loaded, and kept in the ``generation_config.json`` beside
the tokenizer that a run saves: training, sampling, evaluation, ``sample`` and
``export`` have the same ones. Read ``chat.py`` next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from rlhf_jax.data.template_limits import TemplateStuck, limited

GENERATION_CONFIG = 'generation_config.json'
# What stands in for an answer where a template is asked how it closes a turn.
_ANSWER = 'Zqx7'


class Closing(NamedTuple):
    """What a chat template writes behind the last answer of a conversation."""

    text: str  # up to the token that ends the turn, included; all where there is none
    rest: str  # what follows, e.g. a line break
    token: int | None  # the one that ends the turn; None where no token of its own does

    @property
    def is_open(self) -> bool:
        """Whether text is written that no token of its own ends."""
        return self.token is None and bool(self.text.strip())


class Ends(NamedTuple):
    """What ends the responses of a tokenizer's model."""

    ids: tuple[int, ...]  # the tokenizer's EOS is the first, where it has one
    closing: Closing


def decide_ends(tokenizer: PreTrainedTokenizerBase, extra: Sequence[int] = ()) -> None:
    """Decides what ends a response, from here on, for this tokenizer.

    Args:
        tokenizer: which keeps what was decided.
        extra: ids of its own, beside those that :func:`find_ends` finds.

    Raises:
        ValueError: see :func:`find_ends`.
    """
    ends = find_ends(tokenizer)
    ids = tuple(dict.fromkeys([*ends.ids, *sorted(extra)]))
    tokenizer.decided_ends = ends._replace(ids=ids)


def ends_of(tokenizer: PreTrainedTokenizerBase) -> Ends:
    """What was decided for this tokenizer, or would be without ``extra``."""
    decided = vars(tokenizer)
    if 'decided_ends' in decided:
        return decided['decided_ends']
    return find_ends(tokenizer)


def eos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response. Where one has to be appended to a text, the first is:
    the tokenizer's EOS.

    Raises:
        ValueError: the tokenizer has no EOS token; or see :func:`find_ends`.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f'tokenizer {tokenizer.name_or_path!r} has no EOS token, so that no '
            "response could end; set one, for instance eos_token='</s>', in "
            'tokenizer_config.json'
        )
    return list(ends_of(tokenizer).ids)


def find_ends(tokenizer: PreTrainedTokenizerBase) -> Ends:
    """The tokenizer's EOS, the ``eos_token_id`` of the generation config that comes
    with it, and the token with which its chat template closes an assistant turn.

    Raises:
        ValueError: the generation config lists something else than ids.
    """
    closing = _closing(tokenizer)
    ids = [tokenizer.eos_token_id, *_listed(tokenizer), closing.token]
    return Ends(tuple(dict.fromkeys(i for i in ids if i is not None)), closing)


def _listed(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids in the ``generation_config.json`` of the directory or hub name that the
    tokenizer was loaded from; none where there is no such file. Where the hub cannot be
    reached, its cache is asked, as for the tokenizer itself.
    """
    name = tokenizer.name_or_path
    if not name:  # made by a function
        return []
    path = Path(name) / GENERATION_CONFIG
    if not Path(name).is_dir():
        path = _from_hub(name)
    if path is None or not path.exists():
        return []
    try:
        listed = json.loads(path.read_text(encoding='utf-8')).get('eos_token_id')
    except (ValueError, AttributeError, OSError, RecursionError) as error:
        raise ValueError(f'{path} is no JSON object ({error}); repair it') from error
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
        raise ValueError(
            f'{path}: eos_token_id is {listed!r}; it must be an id or a list of ids'
        )
    return ids


def _from_hub(name: str) -> Path | None:
    try:
        found = cached_file(
            name,
            GENERATION_CONFIG,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no name of a repository: a name that somebody gave it
        return None
    return None if found is None else Path(found)


def _closing(tokenizer: PreTrainedTokenizerBase) -> Closing:
    """How the chat template closes the assistant turn that ends a conversation."""
    nothing = Closing('', '', None)
    if tokenizer.chat_template is None:
        return nothing
    turns = [
        {'role': 'user', 'content': 'a'},
        {'role': 'assistant', 'content': _ANSWER},
    ]
    try:
        template = tokenizer.get_chat_template()
        with limited(template):
            text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateStuck as error:
        raise ValueError(f'tokenizer {tokenizer.name_or_path!r}: {error}') from error
    except Exception:  # a template is a program, and can fail in any way
        return nothing  # conversations that it does render are refused one by one
    if _ANSWER not in text:
        return nothing
    behind = text.rpartition(_ANSWER)[2]
    if any('\ud800' <= char <= '\udfff' for char in behind):
        return nothing  # no text: the records that it writes so are refused
    encoding = tokenizer(behind, add_special_tokens=False, return_offsets_mapping=True)
    own = tokenizer.added_tokens_decoder
    for token, (start, end) in zip(encoding['input_ids'], encoding['offset_mapping']):
        written = behind[start:end].strip()
        # What the vocabulary lacks may be read as a token that stands for anything.
        if written and token in own and str(own[token]).strip() == written:
            return Closing(behind[:end], behind[end:], token)
    return Closing(behind, '', None)


def check_closing(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a template whose turns end in text at which no response would stop.

    Raises:
        ValueError: it closes an assistant turn with text, and with no token of its own.
    """
    closing = ends_of(tokenizer).closing
    if closing.is_open:
        raise ValueError(
            f'the chat template of {tokenizer.name_or_path!r} ends an assistant turn '
            f'in {closing.text[-20:]!r}, which is no token of its own, so that no '
            'response would stop there; write eos_token behind every assistant turn of '
            'the template, or add what it ends in to the tokenizer as a special token'
        )


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """What every token adds to a text, as UTF-8, by id: what ``ops.stop_table`` reads.

    A token is read as it stands behind another one: with the space that it begins with.
    A special token stands for its name, though decoding may leave it out of the text.
    An id without a token adds nothing.

    Raises:
        ValueError: the tokenizer does not write its texts token by token.
    """
    vocabulary, own = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    backend = tokenizer.backend_tokenizer
    decoder = json.dumps(json.loads(backend.to_str())['decoder'])
    has_bytes, has_fallback = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder
    pieces = [b''] * (max(vocabulary.values()) + 1)
    others = []
    for piece, token in vocabulary.items():
        if token in own:
            pieces[token] = str(own[token]).encode()
        elif has_bytes and set(piece) <= _BYTES.keys():
            pieces[token] = bytes(_BYTES[char] for char in piece)
        elif has_fallback and re.fullmatch('<0x[0-9A-F]{2}>', piece):
            pieces[token] = bytes.fromhex(piece[3:5])
        else:
            others.append(token)
    before = tokenizer.encode('a', add_special_tokens=False)
    rows = [before, *([*before, token] for token in others)]
    start, *texts = backend.decode_batch(rows, skip_special_tokens=False)
    for token, text in zip(others, texts):
        if not text.startswith(start):
            raise ValueError(
                f'tokenizer {tokenizer.name_or_path!r} writes {start!r} and then token '
                f'{token} as {text!r}, so that stop_sequences cannot be told by its '
                'tokens; use extra_eos_ids'
            )
        pieces[token] = text[len(start) :].encode()
    return pieces


def _byte_characters() -> dict[str, int]:
    """The characters for which byte-level vocabularies have the 256 bytes.

    Source: Radford et al. 2019 (GPT-2): a byte that is a visible character of Latin-1
        stands for itself, the others for those from 256 on, in order.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {
        **{chr(byte): byte for byte in visible},
        **{chr(256 + i): byte for i, byte in enumerate(hidden)},
    }


_BYTES = _byte_characters()
