"""Records as tokens, and tokens as batches of a few static shapes.

``load_…`` reads a data spec into a :class:`Dataset` in memory; :func:`batches` shuffles
it for training, in an order that is a pure function of seed and step, so that resuming
needs no data state; :func:`eval_batches` goes through it once. Read ``rows.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import grain
import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data import formats
from rlhf_jax.data.columns import Growing, GrowingTable, Packed, Table, packed
from rlhf_jax.data.control import ControlTokens, spelling
from rlhf_jax.data.examples import (
    Batch,
    Counts,
    Dataset,
    Example,
    JudgedExample,
    Origin,
    PromptExample,
    TokenExample,
    collate,
    example_lengths,
    mismatched,
    response_lengths,
)
from rlhf_jax.data.formats import BadRecord
from rlhf_jax.data.loading import (
    Limits,
    OnBad,
    Overlong,
    check_order,
    judged_example,
    load_records,
    one_of,
    refuse_soft,
)
from rlhf_jax.data.rows import Row, conversation_rows, in_pieces, text_rows
from rlhf_jax.data.sources import Stream, stream
from rlhf_jax.data.stops import eos_ids as eos_ids
from rlhf_jax.data.token_cache import encode_cached, tokenizer_mark
from rlhf_jax.data.tokenizer import bos_ids, opened
from rlhf_jax.data.tokenizer import check_vocabulary as check_vocabulary

LossOn = Literal['response', 'all', 'assistant']
# The length of responses is static and rounded up to a multiple of so many tokens, so
# that much the same data, another part of them for instance, compile nothing.
RESPONSE_STEP = 16


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
    pattern, mark = spelling(tokenizer), tokenizer_mark(tokenizer)
    bos, eos = bos_ids(tokenizer), eos_ids(tokenizer)[0]
    examples, origins = GrowingTable(), Growing()
    size = cut = spelt = 0
    documents = (formats.to_text(record, tokenizer) for record in stream(spec))

    def tokenise(records: list[formats.Text]) -> list[list[int]]:
        return encode_cached(tokenizer, [record.text for record in records], mark)

    for record, ids in in_pieces(documents, tokenise):
        if not ids:
            raise BadRecord(f'{record.where}: the text gives no tokens')
        size += 1
        spelt += pattern is not None and pattern.search(record.text) is not None
        tokens = np.asarray(opened(ids, bos) + [eos], np.int32)
        cut += len(tokens) > max_length
        origin = packed((record.where,))
        for start in range(0, len(tokens) - 1, max_length - 1):
            part = tokens[start : start + max_length]
            examples.append(TokenExample(part, np.arange(len(part)) > 0))
            origins.append(origin)
    counts = Counts(
        spec,
        'texts',
        max_length,
        read=size,
        kept=size,
        truncated=cut,
        control_tokens=spelt,
    )
    return Dataset(examples.finish(), Packed(origins.finish(), Origin), counts)


def load_demonstrations(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: LossOn = 'response',
    overlong: Overlong = 'drop',
    on_bad: OnBad = 'error',
    control_tokens: ControlTokens | None = None,
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
        control_tokens: what becomes of a record that spells a control token of the
            tokenizer: 'refuse' makes it a bad one, 'escape' keeps it as plain text,
            'allow' makes the token; None refuses it in messages and allows it in
            records of text. They are counted.

    Raises:
        ValueError: a bad record (with its place), or nothing is left.
    """
    one_of('loss_on', loss_on, typing.get_args(LossOn))

    def build(record: Any, row: Row) -> Example:
        (answer,) = row.answers
        loss = np.full(len(row.prompt) + len(answer), loss_on == 'all')
        loss[len(row.prompt) :] = row.written[: len(answer)]
        loss[0] = False
        return TokenExample(row.prompt + answer, loss)

    convert, rows = formats.to_demonstration, text_rows
    if loss_on == 'assistant':
        convert, rows = formats.to_conversation, conversation_rows
    limits = Limits(max_length, overlong, on_bad, control_tokens)
    what = 'demonstrations'
    return load_records(
        spec, stream(spec), tokenizer, what, limits, convert, rows, build
    )


def load_comparisons(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: Overlong = 'drop',
    on_bad: OnBad = 'error',
    control_tokens: ControlTokens | None = None,
) -> Dataset:
    """Loads comparisons; both answers follow the same prompt and end in EOS.

    Args:
        spec: see ``sources.py``.
        tokenizer: with EOS.
        max_length: tokens of the prompt and the longer answer, EOS included.
        overlong: as in :func:`load_demonstrations`; the prompt is cut for the longer
            answer. Pairs that truncation makes equal are dropped.
        on_bad: as in :func:`load_demonstrations`.
        control_tokens: likewise.

    Raises:
        ValueError: a bad record (with its place), or nothing is left.
    """

    limits = Limits(max_length, overlong, on_bad, control_tokens)
    return _load_comparisons(spec, stream(spec), tokenizer, limits)


def _load_comparisons(
    spec: str,
    sources: Stream,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
) -> Dataset:
    how = 'comparisons', limits, formats.to_comparison, text_rows, judged_example
    return check_order(load_records(spec, sources, tokenizer, *how))


def load_preferences(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: Literal['pairs', 'unpaired'],
    wanted_by: str,
    max_length: int,
    overlong: Overlong = 'drop',
    on_bad: OnBad = 'error',
    control_tokens: ControlTokens | None = None,
) -> Dataset:
    """Loads data for a preference loss.

    Args:
        spec: see ``sources.py``.
        tokenizer: with EOS.
        kind: 'pairs' needs comparisons; 'unpaired' needs responses with a ``label``, or
            takes comparisons apart into a desirable and an undesirable response, and
            puts the response of another example beside each (``examples.mismatched``).
        wanted_by: how the user knows the loss, e.g. "config.preference.name='kto'".
        max_length: as in :func:`load_comparisons`.
        overlong: likewise.
        on_bad: as in :func:`load_demonstrations`.
        control_tokens: likewise.

    Raises:
        ValueError: data of the other kind, a bad record (with its place), nothing is
            left, or, of single responses, all have the same verdict or prompt, or a
            comparison to take apart is not certain.
    """
    sources, limits = stream(spec), Limits(max_length, overlong, on_bad, control_tokens)
    found = sources.field_names()
    is_compared = bool({'chosen', 'rejected'} & found)
    if not is_compared and (kind == 'pairs' or 'label' not in found):
        need, use = 'a label with every response', 'other data'
        if kind == 'pairs':
            need = 'a chosen and a rejected response'
        if 'label' in found:
            use = "a loss on single responses, such as 'kto'"
        raise ValueError(
            f'{spec} has {", ".join(sorted(found))} in its records, and {wanted_by} '
            f'needs {need}; use {use}'
        )
    if not is_compared:
        return _with_mismatched(_load_unpaired(spec, sources, tokenizer, limits))
    data = _load_comparisons(spec, sources, tokenizer, limits)
    if kind == 'pairs':
        return data
    refuse_soft(data, wanted_by, 'needs responses that are good or bad for certain')
    labels = np.asarray([[[1]], [[0]]], np.float32)
    examples = Table.of(
        JudgedExample(example.prompt, (answer,), label)
        for example in data.examples
        for answer, label in zip(example.answers, labels)
    )
    owners = data.records.take(i for i in range(len(data.records)) for _ in range(2))
    return _with_mismatched(Dataset(examples, owners, data.counts))


def _load_unpaired(
    spec: str,
    sources: Stream,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
) -> Dataset:
    how = 'unpaired responses', limits, formats.to_unpaired, text_rows, judged_example
    data = load_records(spec, sources, tokenizer, *how)
    verdicts = data.examples.columns['labels'].values > 0
    if verdicts.all() or not verdicts.any():
        raise ValueError(
            f'{spec}: all {len(verdicts)} labels are {verdicts[0, 0]}, which '
            'leaves nothing to tell apart; add responses with the other label'
        )
    return data


def _with_mismatched(data: Dataset) -> Dataset:
    columns, longest = data.examples.columns, data.counts.max_length
    try:
        responses = columns['answers'].values  # one to a prompt
        others = mismatched(columns['prompt'], responses, longest)
    except ValueError as error:
        raise ValueError(f'{data.counts.spec}: {error}') from error
    examples = data.examples.replace(mismatched=others)
    return dataclasses.replace(data, examples=examples)


def load_prompts(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    overlong: Overlong = 'drop',
    on_bad: OnBad = 'error',
    control_tokens: ControlTokens | None = None,
) -> Dataset:
    """Loads prompts.

    Args:
        spec: see ``sources.py``; any record with a prompt is one.
        tokenizer: with EOS.
        max_prompt_length: tokens.
        overlong: 'truncate' cuts from the left (BOS stays).
        on_bad: as in :func:`load_demonstrations`.
        control_tokens: likewise.

    Raises:
        ValueError: a bad record (with its place), or nothing is left.
    """

    def build(record: Any, row: Row) -> Example:
        return PromptExample(row.prompt)

    limits = Limits(max_prompt_length, overlong, on_bad, control_tokens)
    sources, convert = stream(spec), formats.to_prompt
    return load_records(
        spec, sources, tokenizer, 'prompts', limits, convert, text_rows, build
    )


# ---------------------------------------------------------------------------- batching


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int,
    buckets: tuple[int, ...],
    start_step: int = 0,
    sort_batches: int | None = None,
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
        sort_batches: batches whose rows are sorted by length together, so that a batch
            has rows of similar length; their order is random. None sorts nothing.
        process_index: of this process.
        process_count: every process yields its contiguous share of the rows.

    Returns:
        An iterator of NumPy batches: TokenBatch and JudgedBatch right-padded,
        PromptBatch left-padded. Padding holds 0.

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
    padded = _padded(dataset, lengths, buckets)
    share = batch_size // process_count
    mine = slice(process_index * share, (process_index + 1) * share)

    def rows_of(indices: Sequence[int]) -> Batch:
        rows = [int(i) for i in indices]
        return padded(rows[mine], rows)

    order = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
    if sort_batches is None:
        steps = order.batch(batch_size, drop_remainder=True, batch_fn=rows_of)
    else:
        steps = _sorted(order, lengths, batch_size, sort_batches, seed).map(rows_of)
    steps = steps[start_step:]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(steps.to_iter_dataset(options))


def _sorted(
    order: grain.MapDataset,
    lengths: np.ndarray,
    batch_size: int,
    window: int,
    seed: int,
) -> grain.MapDataset:
    """The rows [batch_size] of every step, sorted by length within ``window`` steps."""

    @functools.lru_cache(maxsize=2)  # steps are asked for about in order
    def batches_of(number: int) -> np.ndarray:
        first = number * window * batch_size
        rows = [order[i] for i in range(first, first + window * batch_size)]
        rows = np.asarray(rows)[np.argsort(lengths[rows], kind='stable')]
        shuffle = np.random.default_rng((seed, number)).permutation(window)
        return rows.reshape(window, batch_size)[shuffle]

    steps = grain.MapDataset.range(sys.maxsize // (window * batch_size))
    return steps.map(lambda step: batches_of(step // window)[step % window])


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
    padded = _padded(dataset, lengths, buckets)

    def batch(start: int) -> Batch:
        rows = list(range(start, min(start + batch_size, len(lengths))))
        return padded(rows + [-1] * (batch_size - len(rows)), rows)

    return map(batch, range(0, len(lengths), batch_size))


def _checked_lengths(dataset: Dataset, buckets: tuple[int, ...]) -> np.ndarray:
    """[N] tokens of every example, all of which fit the longest bucket."""
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise ValueError(f'buckets={tuple(buckets)} must be positive and ascending')
    lengths = example_lengths(dataset.examples)
    longest = int(lengths.argmax())
    if lengths[longest] > buckets[-1]:
        raise ValueError(
            f'the example of {dataset.records[longest].where} has {lengths[longest]} '
            f'tokens, the longest of buckets={tuple(buckets)} is {buckets[-1]}; load '
            f'with a limit of {buckets[-1]} tokens, or add a bucket'
        )
    return lengths


def _padded(
    dataset: Dataset, lengths: np.ndarray, buckets: tuple[int, ...]
) -> Callable[[list[int], list[int]], Batch]:
    """Makes batches of rows by index, of the first bucket that fits all ``others``.

    Their ``response_length`` is that of all examples that fit the bucket, so that a
    bucket is one shape.
    """
    known = response_lengths(dataset.examples)
    longest: dict[int, int] = {}
    if known is not None:
        for bucket in buckets:
            most = int(known[lengths <= bucket].max(initial=0))
            rounded = -(-most // RESPONSE_STEP) * RESPONSE_STEP
            if 0 < rounded < bucket:
                longest[bucket] = rounded

    def batch(rows: list[int], others: list[int]) -> Batch:
        length = next(b for b in buckets if b >= lengths[others].max())
        responses = longest.get(length)
        return collate(dataset.examples, dataset.columns, rows, length, responses)

    return batch
