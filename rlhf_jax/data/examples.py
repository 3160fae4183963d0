"""Tokenised examples, and rows of them as batches: what a ``Dataset`` holds.

A kind of example goes with a kind of batch (``types.py``); what a stage computes once
per example (reference log-probabilities) stands beside the examples, in columns. The
examples themselves are a :class:`rlhf_jax.data.columns.Table`. ``pipeline.py`` makes
them and asks for the batches; read it next.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.columns import Ragged, Table
from rlhf_jax.ops.rows import pad_left, pad_right
from rlhf_jax.types import (
    PairBatch,
    PreferencePairs,
    PreferenceSingles,
    PromptBatch,
    RankingBatch,
    RatingBatch,
    StepBatch,
    TokenBatch,
)

Batch = (
    TokenBatch
    | PairBatch
    | RankingBatch
    | RatingBatch
    | StepBatch
    | PromptBatch
    | PreferencePairs
    | PreferenceSingles
)

_ONE, _NONE = np.zeros(1, np.int32), np.zeros(0, np.int32)
VIRTUAL = _NONE  # the answer of a ranking whose score is 0: it has no tokens


class Origin(NamedTuple):
    """Where an example comes from: what is kept of a record whose texts are not read
    again.
    """

    where: str  # e.g. 'file:line'
    meta: dict[str, Any] = {}  # other scalar fields of the record


class TokenExample(NamedTuple):
    """A sequence for a language-model loss."""

    tokens: np.ndarray  # [T] int32
    loss: np.ndarray  # [T] bool, the tokens in the loss; the first is never one
    segments: np.ndarray | None = None  # [T] int32, of a packed row: which document


class PairExample(NamedTuple):
    """A comparison for a reward model."""

    prompt: np.ndarray  # [T] int32
    chosen: np.ndarray  # [T] int32, the answer alone, EOS at its end
    rejected: np.ndarray  # [T] int32, likewise
    margin: float


class RankingExample(NamedTuple):
    """Completions of a prompt in order, for a reward model."""

    prompt: np.ndarray  # [T] int32
    answers: tuple[np.ndarray, ...]  # [T] int32 each, EOS at its end, or VIRTUAL
    ranks: (
        np.ndarray
    )  # [K, H] int32, K of the longest ranking; 1 is the best, −1 not ranked
    margin: float


class RatingExample(NamedTuple):
    """A text with what labellers gave it, for a reward model."""

    tokens: np.ndarray  # [T] int32, EOS at its end
    ratings: np.ndarray  # [H] float32, 0 where there is none
    rated: np.ndarray  # [H] bool


class StepExample(NamedTuple):
    """A text in steps, for a process reward model."""

    tokens: np.ndarray  # [T] int32, EOS at its end
    ends: np.ndarray  # [S] int32, places of the last tokens of the steps
    right: np.ndarray  # [S] bool


class PreferencePair(NamedTuple):
    """A comparison for a preference loss."""

    prompt: np.ndarray  # [T] int32
    chosen: np.ndarray  # [T] int32, the answer alone, EOS at its end
    rejected: np.ndarray  # [T] int32, likewise


class PreferenceSingle(NamedTuple):
    """A response with its verdict for a preference loss."""

    prompt: np.ndarray  # [T] int32
    response: np.ndarray  # [T] int32, EOS at its end
    is_desirable: bool
    mismatched: np.ndarray = _NONE  # [T] int32, the response to another prompt


class PromptExample(NamedTuple):
    """A prompt to continue."""

    tokens: np.ndarray  # [T] int32


Example = (
    TokenExample
    | PairExample
    | RankingExample
    | RatingExample
    | StepExample
    | PreferencePair
    | PreferenceSingle
    | PromptExample
)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the records of a spec: read = kept + dropped + skipped."""

    spec: str
    what: str  # e.g. 'demonstrations', 'comparisons', 'prompts', 'texts'
    max_length: int  # tokens
    read: int
    kept: int
    dropped_overlong: int = 0
    truncated: int = 0  # of the kept, cut to max_length (texts: cut into pieces)
    responses_cut: int = 0  # of the truncated, those whose answer lost its end
    skipped_bad: int = 0
    first_bad: str | None = None  # why and where
    taken: int | None = None  # the first so many examples alone are used
    rows: int | None = None  # that the kept were packed into (packing.py)
    row_length: int | None = None  # tokens
    control_tokens: int = 0  # records that spell a control token, and are not bad

    def describe(self) -> str:
        """A sentence for people."""
        text = f'{self.read} {self.what} read from {self.spec}, {self.kept} kept'
        if self.truncated and self.what == 'texts':
            text += f' ({self.truncated} cut into pieces of {self.max_length} tokens)'
        elif self.truncated:
            text += f' ({self.truncated} truncated to {self.max_length} tokens'
            text += f', {self.responses_cut} of them in the answer)'
        if self.dropped_overlong:
            text += f', {self.dropped_overlong} dropped as longer than '
            text += f'{self.max_length} tokens'
        if self.skipped_bad:
            text += f', {self.skipped_bad} skipped as bad (first: {self.first_bad})'
        if self.control_tokens:
            text += f'; {self.control_tokens} spell control tokens'
        if self.taken is not None:
            text += f'; the first {self.taken} are used'
        if self.rows is not None:
            text += f'; packed into {self.rows} rows of {self.row_length} tokens'
        return text


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Tokenised examples, the records they come from, and what was left out."""

    examples: Table  # of Examples of one kind
    # In the same order: of prompts the records of formats.py, their texts uncut; of
    # other kinds an Origin each
    records: Sequence[Any]
    counts: Counts
    # What stands in the batches beside the examples, by field: [N, …] each.
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def take(self, num_examples: int) -> Dataset:
        """The first ``num_examples`` examples, or all when there are fewer."""
        if num_examples < 1:
            raise ValueError(f'take({num_examples}): at least one example is needed')
        if num_examples >= len(self.examples):
            return self
        return Dataset(
            self.examples[:num_examples],
            self.records[:num_examples],
            dataclasses.replace(self.counts, taken=num_examples),
            {name: x[:num_examples] for name, x in self.columns.items()},
        )


def mismatched(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], max_length: int
) -> Ragged:
    """For every prompt the response of another example, the same at every call.

    The examples are put into a random order, and each takes the response of the next
    one with another prompt, cut at its end where both together are too long.

    Args:
        prompts: N of [T] int32.
        responses: N of [T] int32.
        max_length: tokens of prompt and response.

    Raises:
        ValueError: all prompts are the same.
    """
    texts = [hashlib.sha256(prompt.tobytes()).digest() for prompt in prompts]
    if len(set(texts)) < 2:
        raise ValueError(
            'all examples have the same prompt, so that there is no response to '
            'another one; use data with several prompts'
        )
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    result = np.zeros(len(texts), int)
    # Backwards: the next one with another prompt is that of the next, or the next.
    after = next(i for i in order if texts[i] != texts[order[0]])
    following = order[0]
    for i in reversed(order):
        after = following if texts[following] != texts[i] else after
        result[i] = after
        following = i
    return Ragged.of(
        responses[j][: max_length - len(prompts[i])] for i, j in enumerate(result)
    )


def example_lengths(examples: Table) -> np.ndarray:
    """[N] tokens of the longest row that each example becomes."""
    columns = examples.columns
    if 'tokens' in columns:
        return columns['tokens'].lengths
    return columns['prompt'].lengths + _longest_answers(columns)


def _longest_answers(columns: Mapping[str, Any]) -> np.ndarray:
    """[N] tokens of the longest of the responses of each example."""
    if 'answers' in columns:
        answers = columns['answers']
        return answers.reduce(np.maximum, answers.values.lengths)
    names = ('chosen', 'rejected', 'response', 'mismatched')
    found = [columns[name].lengths for name in names if name in columns]
    return np.max(found, axis=0)


def response_lengths(examples: Table) -> np.ndarray | None:
    """[N] tokens from the first that a language-model loss counts to the end of each
    text; None where the loss is another, or the rows are packed.
    """
    if examples.kind is TokenExample and examples.columns['segments'] is None:
        return examples.columns['loss'].behind_first()
    if examples.kind in (PreferencePair, PreferenceSingle):
        return _longest_answers(examples.columns)
    return None


def collate(
    examples: Table,
    columns: Mapping[str, np.ndarray],
    indices: Sequence[int],
    length: int,
    responses: int | None = None,
) -> Batch:
    """Rows by index, padded to ``length``; index −1 is a row that only fills up.

    Args:
        examples: of one kind.
        columns: [N, …] further fields of the batch, by name; a filling row has zeros.
        indices: of the rows.
        length: tokens.
        responses: the batch's ``response_length``; None where it has none.
    """
    index = np.asarray(indices, np.int32)
    filler, make = next(k for k in _KINDS if examples.kind is type(k[0]))
    rows = [examples[i] if i >= 0 else filler for i in indices]
    real = index >= 0
    more = {
        name: np.where(real.reshape(-1, *(1,) * (x.ndim - 1)), x[index], 0)
        for name, x in columns.items()
    }
    if responses is not None:
        more['response_length'] = responses
    return make(rows, index, length).replace(**more)


def _tokens(rows: list[TokenExample], index: np.ndarray, length: int) -> TokenBatch:
    tokens, mask = pad_right([row.tokens for row in rows], length)
    loss_mask = np.zeros_like(mask)
    loss_mask[mask] = np.concatenate([row.loss for row in rows])
    segments = None
    if any(row.segments is not None for row in rows):
        # Padding belongs to a document of its own, behind the others.
        segments = np.full(mask.shape, np.iinfo(np.int32).max, np.int32)
        of = [
            np.zeros_like(r.tokens) if r.segments is None else r.segments for r in rows
        ]
        segments[mask] = np.concatenate(of)
    return TokenBatch(tokens=tokens, mask=mask, loss_mask=loss_mask, segments=segments)


def _prompts(rows: list[PromptExample], index: np.ndarray, length: int) -> PromptBatch:
    tokens, mask = pad_left([row.tokens for row in rows], length)
    return PromptBatch(tokens=tokens, mask=mask, index=index)


def _pairs(rows: list[PairExample], index: np.ndarray, length: int) -> PairBatch:
    sides = [np.concatenate([row.prompt, side]) for row in rows for side in row[1:3]]
    tokens, mask = (x.reshape(-1, 2, length) for x in pad_right(sides, length))
    margin = np.asarray([row.margin for row in rows], np.float32)
    return PairBatch(tokens=tokens, mask=mask, margin=margin, weight=_weight(index))


def _rankings(
    rows: list[RankingExample], index: np.ndarray, length: int
) -> RankingBatch:
    size, heads = next(row.ranks.shape for row in rows if row.answers)
    ranks = np.full((len(rows), size, heads), -1, np.int32)
    texts = []
    for place, row in zip(ranks, rows):
        if row.answers:
            place[:] = row.ranks
        texts += [
            np.concatenate([row.prompt, answer]) if len(answer) else VIRTUAL
            for answer in row.answers
        ]
        texts += [_ONE] * (size - len(row.answers))
    tokens, mask = (x.reshape(-1, size, length) for x in pad_right(texts, length))
    return RankingBatch(
        tokens=tokens,
        mask=mask,
        ranks=ranks,
        margin=np.asarray([row.margin for row in rows], np.float32),
        weight=_weight(index),
    )


def _ratings(rows: list[RatingExample], index: np.ndarray, length: int) -> RatingBatch:
    tokens, mask = pad_right([row.tokens for row in rows], length)
    size = max(len(row.rated) for row in rows)
    filler = np.zeros(size, np.float32)
    return RatingBatch(
        tokens=tokens,
        mask=mask,
        ratings=np.stack([row.ratings if len(row.ratings) else filler for row in rows]),
        rated=np.stack([row.rated if len(row.rated) else filler > 0 for row in rows]),
        weight=_weight(index),
    )


def _steps(rows: list[StepExample], index: np.ndarray, length: int) -> StepBatch:
    tokens, mask = pad_right([row.tokens for row in rows], length)
    step_mask, right = np.zeros_like(mask), np.zeros_like(mask)
    for i, row in enumerate(rows):
        step_mask[i, row.ends] = True
        right[i, row.ends] = row.right
    return StepBatch(
        tokens=tokens,
        mask=mask,
        step_mask=step_mask,
        right=right,
        weight=_weight(index),
    )


def _preference_pairs(
    rows: list[PreferencePair], index: np.ndarray, length: int
) -> PreferencePairs:
    sides = [(row.prompt, side) for row in rows for side in row[1:]]
    parts = (x.reshape(-1, 2, length) for x in _pad_responses(sides, length))
    tokens, mask, response_mask = parts
    return PreferencePairs(
        tokens=tokens, mask=mask, response_mask=response_mask, weight=_weight(index)
    )


def _preference_singles(
    rows: list[PreferenceSingle], index: np.ndarray, length: int
) -> PreferenceSingles:
    own = _pad_responses([(row.prompt, row.response) for row in rows], length)
    other = _pad_responses([(row.prompt, row.mismatched) for row in rows], length)
    tokens, mask, response_mask = own
    return PreferenceSingles(
        tokens=tokens,
        mask=mask,
        response_mask=response_mask,
        desirable=np.asarray([row.is_desirable for row in rows]),
        weight=_weight(index),
        mismatched=TokenBatch(tokens=other[0], mask=other[1], loss_mask=other[2]),
    )


# An example that only fills up, of one real token, and what makes the batch.
_KINDS = (
    (TokenExample(_ONE, _ONE > 0), _tokens),
    (PromptExample(_ONE), _prompts),
    (PairExample(_ONE, _NONE, _NONE, 0.0), _pairs),
    (RankingExample(_ONE, (), _NONE, 0.0), _rankings),
    (RatingExample(_ONE, _NONE, _NONE), _ratings),
    (StepExample(_ONE, _NONE, _NONE), _steps),
    (PreferencePair(_ONE, _NONE, _NONE), _preference_pairs),
    (PreferenceSingle(_ONE, _NONE, False), _preference_singles),
)


def _weight(index: np.ndarray) -> np.ndarray:
    return (index >= 0).astype(np.float32)


def _pad_responses(
    rows: list[tuple[np.ndarray, np.ndarray]], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mask and response mask [B, T] of prompts with their responses."""
    tokens, mask = pad_right([np.concatenate(row) for row in rows], length)
    behind = np.asarray([len(prompt) for prompt, _ in rows])[:, None]
    return tokens, mask, mask & (np.arange(length) >= behind)
