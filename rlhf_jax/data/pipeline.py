"""Records as tokens, and tokens as batches of a few static shapes.

``load_…`` reads a data spec into a :class:`Dataset` in memory; :func:`batches` shuffles
it for training, in an order that is a pure function of seed and step, so that resuming
needs no data state; :func:`eval_batches` goes through it once. Read ``rows.py`` next.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_jax.config import nearest
from rlhf_jax.data import formats
from rlhf_jax.data.formats import BadRecord
from rlhf_jax.data.rows import Row, conversation_rows, text_rows
from rlhf_jax.data.sources import read
from rlhf_jax.data.tokenizer import bos_ids, encode, frame, opened, truncate
from rlhf_jax.data.tokenizer import check_vocabulary as check_vocabulary
from rlhf_jax.data.tokenizer import eos_ids as eos_ids
from rlhf_jax.types import PairBatch, PromptBatch, TokenBatch

Overlong = Literal['drop', 'truncate']
OnBad = Literal['error', 'skip']
LossOn = Literal['response', 'all', 'assistant']
Batch = TokenBatch | PairBatch | PromptBatch


class TokenExample(NamedTuple):
    """A sequence for a language-model loss."""

    tokens: np.ndarray  # [T] int32
    loss: np.ndarray  # [T] bool, the tokens in the loss; the first is never one


class PairExample(NamedTuple):
    """A comparison."""

    prompt: np.ndarray  # [T] int32
    chosen: np.ndarray  # [T] int32, the answer alone, EOS at its end
    rejected: np.ndarray  # [T] int32, likewise
    margin: float


class PromptExample(NamedTuple):
    """A prompt to continue."""

    tokens: np.ndarray  # [T] int32


Example = TokenExample | PairExample | PromptExample


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the records of a spec: read = kept + dropped + skipped."""

    spec: str
    what: str  # 'demonstrations', 'comparisons', 'prompts', 'texts'
    max_length: int  # tokens
    read: int
    kept: int
    dropped_overlong: int = 0
    truncated: int = 0  # of the kept, cut to max_length (texts: cut into pieces)
    responses_cut: int = 0  # of the truncated, those whose answer lost its end
    skipped_bad: int = 0
    first_bad: str | None = None  # why and where
    taken: int | None = None  # the first so many examples alone are used

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
        if self.taken is not None:
            text += f'; the first {self.taken} are used'
        return text


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Tokenised examples, the records they come from, and what was left out."""

    examples: list[Example]  # all of one kind
    records: list[Any]  # of formats.py, in the same order, their texts uncut
    counts: Counts

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
        )


# ----------------------------------------------------------------------------- loading


def load_texts(
    spec: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Dataset:
    """Loads documents: BOS (if the tokenizer has one) + tokens + EOS, all in the loss.

    A document longer than ``max_length`` is cut into pieces that overlap by one token,
    so that every token but the first is predicted exactly once; EOS ends the last
    piece, and ``records`` names the same document for each.

    Args:
        spec: see ``sources.py``.
        tokenizer: with EOS.
        max_length: tokens, ≥ 2.

    Raises:
        ValueError: a record without text, or ``max_length`` < 2.
    """
    if max_length < 2:
        raise ValueError(f'max_length={max_length} leaves nothing to predict; use ≥ 2')
    records = [formats.to_text(record, tokenizer) for record in read(spec)]
    bos, eos = bos_ids(tokenizer), eos_ids(tokenizer)[0]
    examples, owners, cut = [], [], 0
    for record, ids in zip(records, encode(tokenizer, [r.text for r in records])):
        if not ids:
            raise BadRecord(f'{record.where}: the text gives no tokens')
        tokens = np.asarray(opened(ids, bos) + [eos], np.int32)
        cut += len(tokens) > max_length
        for start in range(0, len(tokens) - 1, max_length - 1):
            piece = tokens[start : start + max_length]
            examples.append(TokenExample(piece, np.arange(len(piece)) > 0))
            owners.append(record)
    size = len(records)
    counts = Counts(spec, 'texts', max_length, read=size, kept=size, truncated=cut)
    return Dataset(examples, owners, counts)


def load_demonstrations(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: LossOn = 'response',
    overlong: Overlong = 'drop',
    on_bad: OnBad = 'error',
) -> Dataset:
    """Loads demonstrations as prompt + completion + EOS.

    Args:
        spec: see ``sources.py``.
        tokenizer: with EOS.
        max_length: tokens of prompt, completion and EOS.
        loss_on: 'response' counts completion and EOS; 'all' the prompt too, but for the
            first token, before which nothing stands; 'assistant' wants messages and
            counts all that the assistant writes, the tokens that end its turns
            included, leaving out what follows the last of them.
        overlong: what becomes of an example longer than ``max_length``: 'drop' leaves
            it out; 'truncate' cuts the prompt from the left (BOS stays), down to half
            of ``max_length`` at most, and then the completion from the right, whose
            last token is EOS all the same (a conversation is cut from the right behind
            its first prompt, and no EOS is written). Both are counted.
        on_bad: 'error' stops at a record that cannot be used, 'skip' counts it.

    Raises:
        ValueError: a bad record (with its place), or nothing is left.
    """
    _one_of('loss_on', loss_on, typing.get_args(LossOn))

    def build(record: Any, row: Row) -> Example:
        tokens = np.asarray(row.prompt + row.answers[0], np.int32)
        loss = [loss_on == 'all'] * len(row.prompt) + row.written[: len(row.answers[0])]
        return TokenExample(tokens, np.asarray(loss) & (np.arange(len(tokens)) > 0))

    convert, rows = formats.to_demonstration, text_rows
    if loss_on == 'assistant':
        convert, rows = formats.to_conversation, conversation_rows
    limits = _Limits(max_length, overlong, on_bad)
    return _load(spec, tokenizer, 'demonstrations', limits, convert, rows, build)


def load_comparisons(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: Overlong = 'drop',
    on_bad: OnBad = 'error',
) -> Dataset:
    """Loads comparisons; both answers follow the same prompt and end in EOS.

    Args:
        spec: see ``sources.py``.
        tokenizer: with EOS.
        max_length: tokens of the prompt and the longer answer, EOS included.
        overlong: as in :func:`load_demonstrations`; the prompt is cut for the longer
            answer. Pairs that truncation makes equal are dropped.
        on_bad: as in :func:`load_demonstrations`.

    Raises:
        ValueError: a bad record (with its place), or nothing is left.
    """

    def build(record: Any, row: Row) -> Example:
        ids = (np.asarray(ids, np.int32) for ids in (row.prompt, *row.answers))
        return PairExample(*ids, record.margin)

    limits, convert = _Limits(max_length, overlong, on_bad), formats.to_comparison
    return _load(spec, tokenizer, 'comparisons', limits, convert, text_rows, build)


def load_prompts(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    overlong: Overlong = 'drop',
    on_bad: OnBad = 'error',
) -> Dataset:
    """Loads prompts.

    Args:
        spec: see ``sources.py``; any record with a prompt is one.
        tokenizer: with EOS.
        max_prompt_length: tokens.
        overlong: 'truncate' cuts from the left (BOS stays).
        on_bad: as in :func:`load_demonstrations`.

    Raises:
        ValueError: a bad record (with its place), or nothing is left.
    """

    def build(record: Any, row: Row) -> Example:
        return PromptExample(np.asarray(row.prompt, np.int32))

    limits, convert = _Limits(max_prompt_length, overlong, on_bad), formats.to_prompt
    return _load(spec, tokenizer, 'prompts', limits, convert, text_rows, build)


class _Limits(NamedTuple):
    length: int  # in tokens
    overlong: Overlong
    on_bad: OnBad


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f'{name}={value!r} is unknown{nearest(value, known)}')


def _load(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    limits: _Limits,
    convert: Callable[..., Any],  # of formats.py
    rows: Callable[..., list[Row | BadRecord]],  # of rows.py
    build: Callable[[Any, Row], Example],
) -> Dataset:
    _one_of('overlong', limits.overlong, typing.get_args(Overlong))
    _one_of('on_bad', limits.on_bad, typing.get_args(OnBad))
    bos, _ = frame(tokenizer)
    least = (len(bos) + 1) * (1 if what == 'prompts' else 2)
    if (limit := limits.length) < least:
        raise ValueError(f'a limit of {limit} tokens is too short; use ≥ {least}')
    bad: list[str] = []

    def note(error: BadRecord) -> None:
        if limits.on_bad == 'error':
            raise ValueError(
                f"{error}; mend the record, or set on_bad='skip' to leave such records "
                'out and have them counted'
            ) from error
        bad.append(str(error))

    sources = read(spec)
    good = []
    for source in sources:
        try:
            good.append(convert(source, tokenizer))
        except BadRecord as error:
            note(error)
    examples, records, lengths = [], [], []
    truncated = responses_cut = 0
    for record, row in zip(good, rows(good, tokenizer)):
        if isinstance(row, BadRecord):
            note(row)
            continue
        lengths.append(len(row.prompt) + max(map(len, row.answers), default=0))
        if lengths[-1] > limit:
            if limits.overlong == 'drop':
                continue
            prompt, cut = truncate(row.prompt, row.answers, limit, bos, row.end)
            if len(cut) == 2 and cut[0] == cut[1]:
                continue
            truncated += 1
            responses_cut += cut != row.answers
            row = row._replace(prompt=prompt, answers=cut)
        examples.append(build(record, row))
        records.append(record)
    counts = Counts(
        spec,
        what,
        limit,
        read=len(sources),
        kept=len(records),
        dropped_overlong=len(sources) - len(records) - len(bad),
        truncated=truncated,
        responses_cut=responses_cut,
        skipped_bad=len(bad),
        first_bad=bad[0] if bad else None,
    )
    if not examples:
        span = f'{min(lengths)} to {max(lengths)}' if lengths else 'no'
        raise ValueError(
            f'nothing is left: {counts.describe()} (lengths: {span} tokens). Raise the '
            "longest bucket, set overlong='truncate', or mend the records"
        )
    return Dataset(examples, records, counts)


# ---------------------------------------------------------------------------- batching


def epoch_steps(dataset: Dataset, batch_size: int) -> int:
    """Batches that see every example at least once: ⌈examples / batch_size⌉."""
    return -(-len(dataset.examples) // batch_size)


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int,
    buckets: tuple[int, ...],
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Shuffled batches without end; batch k is a pure function of (seed, k).

    Every epoch has an order of its own and holds every example exactly once. Where
    ``batch_size`` does not divide the data set, the batch in which an epoch ends goes
    on with the next epoch, and may hold an example twice.

    Args:
        dataset: of any kind.
        batch_size: rows over all processes.
        seed: of the order.
        buckets: lengths in tokens, ascending; a batch is padded to the first that fits
            its longest row (over all processes, so that all see the same shape).
        start_step: the first batch to give, to resume a run.
        process_index: of this process.
        process_count: every process yields its contiguous share of the rows.

    Returns:
        An iterator of NumPy batches: TokenBatch and PairBatch right-padded, PromptBatch
        left-padded. Padding holds 0.

    Raises:
        ValueError: sizes do not divide, the data set is smaller than a batch, or an
            example does not fit the longest bucket.
    """
    if batch_size < 1 or batch_size % process_count:
        below = max(batch_size // process_count, 1) * process_count
        raise ValueError(
            f'batch_size={batch_size} cannot be split over {process_count} processes; '
            f'use {below} or {below + process_count}'
        )
    if not 0 <= process_index < process_count or start_step < 0:
        raise ValueError(
            f'process_index={process_index} of {process_count} processes, start_step='
            f'{start_step}: indices count from 0'
        )
    size = len(dataset.examples)
    if size < batch_size:
        raise ValueError(
            f'batch_size={batch_size}, but there are {size} examples '
            f'({dataset.counts.describe()}); use batch_size ≤ {size} or more data'
        )
    lengths = _checked_lengths(dataset, buckets)
    share = batch_size // process_count
    mine = slice(process_index * share, (process_index + 1) * share)

    def collate(indices: Sequence[int]) -> Batch:
        rows = [int(i) for i in indices]
        return _collate(dataset.examples, rows[mine], _bucket(lengths[rows], buckets))

    order = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
    steps = order.batch(batch_size, drop_remainder=True, batch_fn=collate)[start_step:]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(steps.to_iter_dataset(options))


def eval_batches(
    dataset: Dataset, batch_size: int, buckets: tuple[int, ...]
) -> Iterator[Batch]:
    """All examples once, in order; rows that count nothing fill up the last batch.

    In a run of several processes each goes through the whole set, so that every one
    gets the same numbers; the work is repeated there, not shared. A filling row has one
    real token (id 0, so that nothing downstream is a mean over no token), no True in
    ``loss_mask``, weight 0 or index −1.

    Args:
        dataset: of any kind.
        batch_size: rows.
        buckets: as in :func:`batches`.

    Raises:
        ValueError: batch_size < 1, or an example does not fit the longest bucket.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size} must be at least 1')
    lengths = _checked_lengths(dataset, buckets)

    def batch(start: int) -> Batch:
        rows = list(range(len(lengths)))[start : start + batch_size]
        fill = [-1] * (batch_size - len(rows))
        return _collate(dataset.examples, rows + fill, _bucket(lengths[rows], buckets))

    return map(batch, range(0, len(lengths), batch_size))


def _checked_lengths(dataset: Dataset, buckets: tuple[int, ...]) -> np.ndarray:
    """[N] tokens of every example, all of which fit the longest bucket."""
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise ValueError(f'buckets={tuple(buckets)} must be positive and ascending')
    lengths = np.asarray([_length(example) for example in dataset.examples])
    longest = int(lengths.argmax())
    if lengths[longest] > buckets[-1]:
        raise ValueError(
            f'the example of {dataset.records[longest].where} has {lengths[longest]} '
            f'tokens, the longest of buckets={tuple(buckets)} is {buckets[-1]}; load '
            f'with a limit of {buckets[-1]} tokens, or add a bucket'
        )
    return lengths


def _length(example: Example) -> int:
    if isinstance(example, PairExample):
        return len(example.prompt) + max(len(example.chosen), len(example.rejected))
    return len(example.tokens)


def _bucket(lengths: np.ndarray, buckets: tuple[int, ...]) -> int:
    return next(bucket for bucket in buckets if bucket >= lengths.max())


def _collate(examples: list[Example], indices: list[int], length: int) -> Batch:
    """Rows by index, padded to ``length``; index −1 is a filling row."""
    zero = np.zeros(1, np.int32)
    index = np.asarray(indices, np.int32)
    if isinstance(examples[0], PromptExample):
        rows = [examples[i].tokens[::-1] if i >= 0 else zero for i in indices]
        tokens, mask = (x[:, ::-1].copy() for x in _pad(rows, length))
        return PromptBatch(tokens=tokens, mask=mask, index=index)
    if isinstance(examples[0], TokenExample):
        filler = TokenExample(zero, zero > 0)
        chosen = [examples[i] if i >= 0 else filler for i in indices]
        tokens, mask = _pad([example.tokens for example in chosen], length)
        loss_mask = np.zeros_like(mask)
        loss_mask[mask] = np.concatenate([example.loss for example in chosen])
        return TokenBatch(tokens=tokens, mask=mask, loss_mask=loss_mask)
    filler = PairExample(zero, zero[:0], zero[:0], 0.0)
    pairs = [examples[i] if i >= 0 else filler for i in indices]
    rows = [np.concatenate([p.prompt, side]) for p in pairs for side in p[1:3]]
    tokens, mask = (x.reshape(-1, 2, length) for x in _pad(rows, length))
    margin = np.asarray([pair.margin for pair in pairs], np.float32)
    weight = (index >= 0).astype(np.float32)
    return PairBatch(tokens=tokens, mask=mask, margin=margin, weight=weight)


def _pad(rows: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens [B, T] int32 and mask [B, T] bool."""
    mask = np.arange(length) < np.asarray([len(row) for row in rows])[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask
