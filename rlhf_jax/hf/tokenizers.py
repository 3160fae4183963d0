"""The tokenizer of an exported directory: a pad token that ends no text, and files that
transformers 4 and 5 read alike. Used by ``writer.py``; read that next.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # slow to import, and only named here
    from transformers import PreTrainedTokenizerBase

NEW_PAD = '<|pad|>'
# Special tokens that a vocabulary holds for padding, then those it keeps in reserve.
SPARE = (r'\W*pad(ding)?\W*|.*right_pad.*', r'.*(reserved|unused).*')


def with_pad(
    tokenizer: PreTrainedTokenizerBase, ends: Collection[int], pad: int | None = None
) -> PreTrainedTokenizerBase:
    """A copy that pads on the right, by a token that ends no text.

    That is the first of: the token ``pad``; the tokenizer's own pad token; a special
    token whose name says that it is for padding, or in reserve; the unknown token of a
    tokenizer that spells what it does not know in bytes, and so never writes it; a new
    token, whose id is the first behind the vocabulary.

    Args:
        tokenizer: a fast one; it stays as it is.
        ends: ids that may end a text.
        pad: a known id to use, None to choose one.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = 'right'
    if pad is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return tokenizer
    name = _spare_token(tokenizer, ends)
    if name is None:
        name = NEW_PAD
        while name in tokenizer.get_vocab():
            name = f'<{name}>'
    tokenizer.add_special_tokens({'pad_token': name})
    return tokenizer


def _spare_token(
    tokenizer: PreTrainedTokenizerBase, ends: Collection[int]
) -> str | None:
    special = [
        str(token)
        for i, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and i not in ends
    ]
    for pattern in SPARE:
        for name in special:
            if re.fullmatch(pattern, name, re.IGNORECASE):
                return name
    unknown = tokenizer.unk_token_id
    in_bytes = getattr(tokenizer.backend_tokenizer.model, 'byte_fallback', False)
    if in_bytes and unknown is not None and unknown not in ends:
        return tokenizer.unk_token
    return None


def save_tokenizer_files(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the tokenizer's files, in a spelling that transformers 4 knows too.

    The class is the one that takes ``tokenizer.json`` as it is in both versions. The
    names of the model's inputs have another default in version 4, and additional
    special tokens another key.
    """
    tokenizer.save_pretrained(folder)
    path = folder / 'tokenizer_config.json'
    entries = json.loads(path.read_text(encoding='utf-8'))
    entries['tokenizer_class'] = 'PreTrainedTokenizerFast'
    entries['model_input_names'] = list(tokenizer.model_input_names)
    entries['padding_side'] = tokenizer.padding_side
    entries.pop('backend', None)
    if isinstance(entries.get('extra_special_tokens'), list):
        entries['additional_special_tokens'] = entries.pop('extra_special_tokens')
    text = json.dumps(entries, indent=2, sort_keys=True, ensure_ascii=False) + '\n'
    path.write_text(text, encoding='utf-8')
