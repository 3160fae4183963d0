"""From records to a ``Dataset``: what all kinds of data have in common.

Bad records, overlong examples, and what is counted of them. ``pipeline.py`` and
``reward_data.py`` say what sets the kinds apart; read them next.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_jax.config import nearest
from rlhf_jax.data.control import ControlTokens, check_control_tokens, spelling
from rlhf_jax.data.examples import Counts, Dataset, Example
from rlhf_jax.data.formats import BadRecord
from rlhf_jax.data.rows import Row
from rlhf_jax.data.sources import SourceRecord
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


def load_records(
    spec: str,
    sources: list[SourceRecord],
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    limits: Limits,
    convert: Callable[..., Any],  # of formats.py
    rows: Callable[..., list[Row | BadRecord]],  # of rows.py
    build: Callable[[Any, Row], Example],
) -> Dataset:
    """The examples of a kind; what the kinds differ in are the last three arguments."""
    one_of('overlong', limits.overlong, typing.get_args(Overlong))
    one_of('on_bad', limits.on_bad, typing.get_args(OnBad))
    if limits.control_tokens is not None:
        known = typing.get_args(ControlTokens)
        one_of('control_tokens', limits.control_tokens, known)
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

    good, num_spelt = [], 0
    control = spelling(tokenizer), limits.control_tokens
    for source in sources:
        try:
            source, has_spelt = check_control_tokens(source, tokenizer, *control)
            good.append(convert(source, tokenizer))
            num_spelt += has_spelt
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
            if len(set(map(tuple, cut))) < len(cut):
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
        control_tokens=num_spelt,
    )
    if not examples:
        span = f'{min(lengths)} to {max(lengths)}' if lengths else 'no'
        raise ValueError(
            f'nothing is left: {counts.describe()} (lengths: {span} tokens). Raise the '
            "longest bucket, set overlong='truncate', or mend the records"
        )
    return Dataset(examples, records, counts)
