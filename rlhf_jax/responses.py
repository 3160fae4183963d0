"""A batch of responses, as tokens and as texts, and what a scorer says of it.

Training and evaluation both score responses; read ``rewards.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.types import Array, Generation, PromptBatch

GOLD = 'gold'  # the name of the scorer that judges; the others are rewards
FEW_END = 0.05  # where a smaller share of the responses ends, practically none does
# (tokenizer, last id before each row, rows of ids) -> texts without special tokens.
Decode = Callable[[Any, Sequence[int], Sequence[np.ndarray]], list[str]]


@dataclasses.dataclass(frozen=True)
class Responses:
    """A batch of responses, as tokens on the device and as text for whoever asks.

    Rows that only fill up the batch have no text.
    """

    tokenizer: Any  # of the policy
    records: Sequence[Any]  # of the prompts' data set, with their uncut ``prompt``
    batch: PromptBatch
    generation: Generation
    decode: Decode  # e.g. data.joining.decode_behind

    @functools.cached_property
    def real(self) -> np.ndarray:
        """[B] bool, the rows that stand for a prompt."""
        return np.asarray(self.batch.index) >= 0

    @functools.cached_property
    def prompts(self) -> list[str]:
        """The prompts of the real rows."""
        rows = np.asarray(self.batch.index)[self.real]
        return [self.records[i].prompt for i in rows]

    @functools.cached_property
    def templated(self) -> list[bool]:
        """Which prompts of the real rows a chat template has written."""
        rows = np.asarray(self.batch.index)[self.real]
        return [self.records[i].templated for i in rows]

    @functools.cached_property
    def texts(self) -> list[str]:
        """The responses of the real rows as they go on behind their prompts, without
        special tokens; decoded once.
        """
        tokens, mask = jax.device_get(
            (self.generation.tokens, self.generation.response_mask)
        )
        real = np.flatnonzero(self.real)
        rows = [tokens[i, mask[i]] for i in real]
        # Prompts are padded on the left: the last column is their last token.
        before = np.asarray(self.batch.tokens)[real, -1].tolist()
        return self.decode(self.tokenizer, before, rows)

    def column(self, name: str) -> list[Any]:
        """A field of the real rows' records; :func:`field` says which there are."""
        rows = np.asarray(self.batch.index)[self.real]
        return [field(self.records[i], name) for i in rows]

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Values [R, …] of the real rows as rows [B, …]; rows that fill up repeat
        one.
        """
        return values[np.cumsum(self.real) - 1]


def field(record: Any, name: str) -> Any:
    """A field of a prompt's record, None where it has none: ``references`` is its
    reference answer, and any other name one of ``meta``.
    """
    return record.reference if name == 'references' else record.meta.get(name)


class Scored(NamedTuple):
    """What a scorer says of a batch."""

    scores: Array  # [B] reward units, unshaped; rows that fill up count nothing
    truncated: int | None = None  # texts cut to fit its model; None: none could be
    # [B] standard deviation over an ensemble's members; None of a single model
    deviation: Array | None = None
    members: Array | None = None  # [B, M] what each member of an ensemble said


Scorer = Callable[[Responses], Scored]
