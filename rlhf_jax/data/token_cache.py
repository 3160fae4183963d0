"""The token cache: the ids of large data, on disk in the user's cache folder.

``loading.py`` reads a file in pieces of a few megabytes, and the ids of each piece are
cached in a file of their own. Its name is a digest of the texts and the tokenizer, so
that a hit is never of other data. After a change of a record its piece is tokenised
again, and so are later ones whose bounds have moved. Nothing is ever deleted; users may
delete the folder ``tokens`` of :func:`rlhf_jax.config.cache_dir` at any time. Read
``rows.py`` next.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zipfile
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from rlhf_jax.config import cache_dir
from rlhf_jax.data.tokenizer import encode

LEAST = 2**18  # characters together; fewer are not worth a file


def encode_cached(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], mark: str | None = None
) -> list[list[int]]:
    """:func:`rlhf_jax.data.tokenizer.encode` with a cache on disk; texts of fewer than
    ``LEAST`` characters together are not cached.

    Args:
        tokenizer: a fast one.
        texts: any.
        mark: :func:`tokenizer_mark` of the tokenizer, where it is known.

    Raises:
        ValueError: a file of the cache cannot be read.
    """
    if sum(map(len, texts)) < LEAST:
        return encode(tokenizer, texts)
    digest = _digest(mark or tokenizer_mark(tokenizer), texts)
    path = cache_dir() / 'tokens' / f'{digest}.npz'
    if path.exists():
        return _load(path)
    ids = encode(tokenizer, texts)
    try:
        _save(path, ids)
    except OSError as error:  # a full disk, a home that cannot be written
        warnings.warn(f'{path}: token ids cannot be kept ({error})', stacklevel=2)
    return ids


def tokenizer_mark(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything in a tokenizer that the ids of a text depend on; with a
    large vocabulary it takes a tenth of a second.
    """
    kind = type(tokenizer)
    about = repr(
        (
            f'{kind.__module__}.{kind.__qualname__}',
            tokenizer.split_special_tokens,  # which its description leaves out
            tokenizers.__version__,
            transformers.__version__,
        )
    )
    described = about + tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(described.encode('utf-8', 'surrogatepass')).hexdigest()


def _digest(mark: str, texts: list[str]) -> str:
    ends = np.cumsum([len(text) for text in texts])  # where a text ends counts
    digest = hashlib.sha256(mark.encode())
    digest.update(len(texts).to_bytes(8, 'little'))
    digest.update(ends.astype('<i8'))
    digest.update(''.join(texts).encode('utf-8', 'surrogatepass'))
    return digest.hexdigest()


def _save(path: Path, ids: list[list[int]]) -> None:
    lengths = np.asarray([len(row) for row in ids])
    flat = np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum()))
    kind = np.min_scalar_type(flat.max(initial=0))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all, whoever else writes it or is killed.
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            np.savez(file, ids=flat.astype(kind), lengths=lengths)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _load(path: Path) -> list[list[int]]:
    try:
        with np.load(path) as kept:
            flat, ends = kept['ids'].tolist(), np.cumsum(kept['lengths']).tolist()
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f'{path} cannot be read ({error}); remove it, and the texts are tokenised '
            'again'
        ) from error
    return [flat[begin:end] for begin, end in pairwise([0, *ends])]
