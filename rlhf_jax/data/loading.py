"""From records to a ``Dataset``: what all kinds of data have in common.

Bad records, overlong examples, and what is counted of them. ``pipeline.py`` and
``reward_data.py`` say what sets the kinds apart; read them next.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_jax.config import nearest
from rlhf_jax.data.columns import Growing, GrowingTable, Packed, Table, packed
from rlhf_jax.data.control import ControlTokens, check_control_tokens, spelling
from rlhf_jax.data.examples import Counts, Dataset, Example, JudgedExample, Origin
from rlhf_jax.data.formats import BadRecord, Judged
from rlhf_jax.data.rows import Row, in_pieces
from rlhf_jax.data.sources import SourceRecord
from rlhf_jax.data.token_cache import encode_cached, tokenizer_mark
from rlhf_jax.data.tokenizer import frame, truncate

Overlong = Literal['drop', 'truncate']
OnBad = Literal['error', 'skip']


class Limits(NamedTuple):
    """How long an example may be, and what becomes of others."""

    length: int  # in tokens
    overlong: Overlong
    on_bad: OnBad
    control_tokens: ControlTokens | None = None  # see ``control.py``


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Raises ValueError unless ``value`` is known."""
    if value not in known:
        raise ValueError(f'{name}={value!r} is unknown{nearest(value, known)}')


class _Left:
    """What became of the records of a spec, counted while they are read."""

    def __init__(self, limits: Limits) -> None:
        self.read = self.spelt = self.truncated = self.responses_cut = 0
        self.bad, self.first_bad = 0, None
        self.lengths: tuple[int, int] | None = None  # shortest and longest, in tokens
        self._on_bad = limits.on_bad

    def note(self, error: BadRecord) -> None:
        """Counts a bad record, or raises what says so."""
        if self._on_bad == 'error':
            raise ValueError(
                f"{error}; mend the record, or set on_bad='skip' to leave such records "
                'out and have them counted'
            ) from error
        self.bad += 1
        self.first_bad = self.first_bad or str(error)

    def measure(self, row: Row) -> int:
        """Tokens of a row."""
        size = len(row.prompt) + max(map(len, row.answers), default=0)
        least, most = self.lengths or (size, size)
        self.lengths = min(least, size), max(most, size)
        return size

    def counts(self, spec: str, what: str, limit: int, kept: int) -> Counts:
        """In the words of the report."""
        return Counts(
            spec,
            what,
            limit,
            read=self.read,
            kept=kept,
            dropped_overlong=self.read - kept - self.bad,
            truncated=self.truncated,
            responses_cut=self.responses_cut,
            skipped_bad=self.bad,
            first_bad=self.first_bad,
            control_tokens=self.spelt,
        )


def load_records(
    spec: str,
    sources: Iterable[SourceRecord],
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    limits: Limits,
    convert: Callable[..., Any],  # of formats.py
    rows: Callable[..., list[Row | BadRecord]],  # of rows.py
    build: Callable[[Any, Row], Example],
) -> Dataset:
    """The examples of a kind; what the kinds differ in are the last three arguments.

    The records are read, tokenised and written into flat arrays piece by piece. Of
    those that are no prompts the texts are not kept.
    """
    one_of('overlong', limits.overlong, typing.get_args(Overlong))
    one_of('on_bad', limits.on_bad, typing.get_args(OnBad))
    if limits.control_tokens is not None:
        known = typing.get_args(ControlTokens)
        one_of('control_tokens', limits.control_tokens, known)
    bos, _ = frame(tokenizer)
    least = (len(bos) + 1) * (1 if what == 'prompts' else 2)
    if (limit := limits.length) < least:
        raise ValueError(f'a limit of {limit} tokens is too short; use ≥ {least}')
    left = _Left(limits)
    encoder = functools.partial(encode_cached, mark=tokenizer_mark(tokenizer))
    examples, origins, prompts = GrowingTable(), Growing(), []
    records = _converted(sources, tokenizer, limits, convert, left)
    tokenised = in_pieces(records, lambda piece: rows(piece, tokenizer, encoder))
    for record, row in tokenised:
        if isinstance(row, BadRecord):
            left.note(row)
            continue
        if left.measure(row) > limit:
            row = _cut(row, limits, bos, left)
        if row is None:
            continue
        examples.append(build(record, row))
        if what == 'prompts':
            prompts.append(record)
        else:
            meta = getattr(record, 'meta', {})
            origins.append(packed((record.where, meta)))
    counts = left.counts(spec, what, limit, len(examples))
    if not len(examples):
        span = 'no' if left.lengths is None else '{} to {}'.format(*left.lengths)
        raise ValueError(
            f'nothing is left: {counts.describe()} (lengths: {span} tokens). Raise the '
            "longest bucket, set overlong='truncate', or mend the records"
        )
    kept = prompts or Packed(origins.finish(), Origin)
    return Dataset(_without_certain(examples.finish()), kept, counts)


def _without_certain(examples: Table) -> Table:
    """Labels that are all certain need no probability: with and without the field, data
    give the same batches.
    """
    if examples.kind is not JudgedExample:
        return examples
    probability, tied = (examples.columns[name] for name in ('probability', 'tied'))
    return examples.replace(
        probability=None if np.all(probability == 1) else probability,
        tied=tied if np.any(tied) else None,
    )


def check_order(data: Dataset) -> Dataset:
    """The data; ValueError where no comparison says which of two is better."""
    probability = data.examples.columns['probability']
    if probability is not None and np.all(probability == 0.5):
        raise ValueError(
            f'{data.counts.spec}: all {len(probability)} comparisons are ties (or have '
            'probability 0.5): there is no order to learn'
        )
    return data


def refuse_soft(data: Dataset, wanted_by: str, why: str) -> None:
    """Raises ValueError where a comparison is a tie or less than certain.

    Args:
        data: comparisons.
        wanted_by: how the user knows the loss.
        why: it cannot learn from such, e.g. 'compares all pairs of a batch'.
    """
    probability = data.examples.columns['probability']
    if probability is None:
        return
    places = np.flatnonzero(probability != 1)
    first = data.records[int(places[0])].where
    raise ValueError(
        f'{data.counts.spec}: {len(places)} of {len(probability)} comparisons are ties '
        f'or have a probability below 1 (first: {first}), and {wanted_by} {why}; use '
        "another loss, such as 'dpo', or certain labels"
    )


def judged_example(record: Judged, row: Row) -> JudgedExample:
    """The example of a judged record."""
    answers, ends = tuple(row.answers), None
    if row.steps:
        ends = len(row.prompt) + np.asarray(row.steps, np.int32)
    elif None in record.completions.values():
        rest = iter(answers)
        texts = record.completions.values()
        answers = tuple([] if text is None else next(rest) for text in texts)
    labels = record.labels
    if labels is not None:
        labels = np.asarray(labels, np.float32)  # NaN for None
    how_sure = {'probability': record.probability, 'tied': record.tied}
    return JudgedExample(row.prompt, answers, labels, record.margin, ends, **how_sure)


def _converted(
    sources: Iterable[SourceRecord],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    convert: Callable[..., Any],
    left: _Left,
) -> Iterator[Any]:
    """The records that can be used, with a meaning, one by one."""
    pattern, how = spelling(tokenizer), limits.control_tokens
    for source in sources:
        left.read += 1
        try:
            source, has_spelt = check_control_tokens(source, tokenizer, pattern, how)
            record = convert(source, tokenizer)
        except BadRecord as error:
            left.note(error)
            continue
        left.spelt += has_spelt
        yield record


def _cut(row: Row, limits: Limits, bos: list[int], left: _Left) -> Row | None:
    """A row that is too long, cut to length; None where it is to be left out."""
    if limits.overlong == 'drop':
        return None
    prompt, cut = truncate(row.prompt, row.answers, limits.length, bos, row.end)
    if len(set(map(tuple, cut))) < len(cut):
        return None
    left.truncated += 1
    left.responses_cut += cut != row.answers
    return row._replace(prompt=prompt, answers=cut)
