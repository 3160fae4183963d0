"""Tokenised examples, and rows of them as batches: what a ``Dataset`` holds.

A kind of example goes with a kind of batch (``types.py``); what a stage computes once
per example (reference log-probabilities) stands beside the examples, in columns. The
examples themselves are a :class:`rlhf_jax.data.columns.Table`. ``pipeline.py`` makes
them and asks for the batches; read it next.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.columns import Ragged, Table
from rlhf_jax.ops.rows import pad_left, pad_right
from rlhf_jax.types import JudgedBatch, PromptBatch, TokenBatch

Batch = TokenBatch | JudgedBatch | PromptBatch

_ONE, _NONE = np.zeros(1, np.int32), np.zeros(0, np.int32)


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


class JudgedExample(NamedTuple):
    """Responses to a prompt with what was said of them; see ``types.JudgedBatch``."""

    prompt: np.ndarray  # [T] int32
    # K of [T] int32, EOS at their ends; one without a token is the virtual response
    answers: Sequence[np.ndarray]
    # [K, H] float32, NaN where nobody said; of steps [S, 1]; None of a comparison
    labels: np.ndarray | None = None
    margin: float = 0.0  # demanded score difference
    ends: np.ndarray | None = None  # [S] int32, places of the last tokens of the steps
    mismatched: np.ndarray | None = None  # [T] int32, the response to another prompt
    # Of a comparison, see ``types.JudgedBatch``; None in all examples of certain labels
    probability: float | None = None
    tied: bool | None = None


class PromptExample(NamedTuple):
    """A prompt to continue."""

    tokens: np.ndarray  # [T] int32


Example = TokenExample | JudgedExample | PromptExample


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
    answers, other = columns['answers'], columns['mismatched']
    longest = answers.reduce(np.maximum, answers.values.lengths)
    return longest if other is None else np.maximum(longest, other.lengths)


def response_lengths(examples: Table) -> np.ndarray | None:
    """[N] tokens from the first that a language-model loss counts to the end of each
    text; None where there is no such loss, or the rows are packed.
    """
    if examples.kind is JudgedExample:
        return _longest_answers(examples.columns)
    if examples.kind is TokenExample and examples.columns['segments'] is None:
        return examples.columns['loss'].behind_first()
    return None


def padded_labels(rows: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Labels [K, H] of examples as [N, ``size``, H]; NaN where there is none."""
    heads = max(row.shape[-1] for row in rows)
    labels = np.full((len(rows), size, heads), np.nan, np.float32)
    for place, row in zip(labels, rows):
        place[: len(row)] = row
    return labels


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
    filler, make = _KINDS[examples.kind]
    rows = [examples[i] if i >= 0 else filler for i in indices]
    real = index >= 0
    more = {
        name: np.where(real.reshape(-1, *(1,) * (x.ndim - 1)), x[index], 0)
        for name, x in columns.items()
    }
    if responses is not None:
        more['response_length'] = responses
    if examples.kind is JudgedExample:
        make = functools.partial(make, size=examples.columns['answers'].longest)
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


def _judged(
    rows: list[JudgedExample], index: np.ndarray, length: int, size: int
) -> JudgedBatch:
    texts = []
    for row in rows:
        texts += [
            np.concatenate([row.prompt, answer]) if len(answer) else _NONE
            for answer in row.answers
        ]
        texts += [_ONE] * (size - len(row.answers))
    tokens, mask = (x.reshape(-1, size, length) for x in pad_right(texts, length))
    behind = np.asarray([len(row.prompt) for row in rows])[:, None, None]
    labels, judged = _labels(rows, mask)
    mismatched = probability = tied = None
    if any(row.mismatched is not None for row in rows):
        mismatched = _mismatched(rows, length)
    if any(row.probability is not None for row in rows):
        probability = [1 if r.probability is None else r.probability for r in rows]
        probability = np.asarray(probability, np.float32)
    if any(row.tied is not None for row in rows):
        tied = np.asarray([bool(row.tied) for row in rows])
    return JudgedBatch(
        tokens=tokens,
        mask=mask,
        response_mask=mask & (np.arange(length) >= behind),
        labels=labels,
        judged=judged,
        margin=np.asarray([row.margin for row in rows], np.float32),
        probability=probability,
        tied=tied,
        weight=(index >= 0).astype(np.float32),
        mismatched=mismatched,
    )


def _labels(
    rows: list[JudgedExample], mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Labels and where there are some, [P, K, H], or of steps [P, K, T]."""
    if all(row.labels is None for row in rows):
        return None, None
    if any(row.ends is not None for row in rows):
        labels = np.full(mask.shape, np.nan, np.float32)
        for place, row in zip(labels, rows):
            if row.ends is not None:
                place[0, row.ends] = row.labels[:, 0]
    else:
        none = np.zeros((0, 1), np.float32)
        given = [none if row.labels is None else row.labels for row in rows]
        labels = padded_labels(given, mask.shape[1])
    return np.nan_to_num(labels), np.isfinite(labels)


def _mismatched(rows: list[JudgedExample], length: int) -> TokenBatch:
    others = [_NONE if row.mismatched is None else row.mismatched for row in rows]
    texts = [np.concatenate([row.prompt, x]) for row, x in zip(rows, others)]
    tokens, mask = pad_right(texts, length)
    behind = np.asarray([len(row.prompt) for row in rows])[:, None]
    counted = mask & (np.arange(length) >= behind)
    return TokenBatch(tokens=tokens, mask=mask, loss_mask=counted)


# An example that only fills up, of one real token, and what makes the batch.
_KINDS = {
    TokenExample: (TokenExample(_ONE, _ONE > 0), _tokens),
    PromptExample: (PromptExample(_ONE), _prompts),
    JudgedExample: (JudgedExample(_ONE, ()), _judged),
}
