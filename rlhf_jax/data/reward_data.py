"""Data for a reward model: comparisons, rankings, ratings or steps as a ``Dataset``.

What the loss learns from is asked for, what the records hold is seen in their fields,
and a mismatch is an error that names both. Read ``stages/reward_model.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data import judgements
from rlhf_jax.data.columns import Ragged
from rlhf_jax.data.examples import (
    Dataset,
    JudgedExample,
)
from rlhf_jax.data.joining import Encoder
from rlhf_jax.data.loading import Limits, judged_example, load_records
from rlhf_jax.data.pipeline import load_comparisons
from rlhf_jax.data.rows import step_rows, text_rows
from rlhf_jax.data.sources import Stream, stream

# Fields that tell what a record is.
SIGNS = {
    'pairs': ('chosen', 'ranks'),
    'ratings': ('rating', 'ratings'),
    'steps': ('labels',),
}
LOSSES = {'pairs': 'bradley_terry', 'ratings': 'squared', 'steps': 'stepwise'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a stage asks of its data."""

    kind: Literal['pairs', 'ratings', 'steps']
    by: str  # how the user knows the loss, e.g. "config.rm.loss='squared'"
    heads: tuple[str, ...]  # dimensions; none for the one score
    rating_range: tuple[float, float] | None  # lowest and highest, for ratings
    rating_unit: Literal['given', 'range']  # 'range': the range becomes 0 to 1
    step_separator: str


def load_judgements(
    spec: str, tokenizer: PreTrainedTokenizerBase, wanted: Wanted, limits: Limits
) -> Dataset:
    """Loads data for a reward model.

    Args:
        spec: see ``sources.py``.
        tokenizer: with EOS.
        wanted: what the loss and the heads need.
        limits: as in :func:`rlhf_jax.data.pipeline.load_comparisons`.

    Raises:
        ValueError: data of another kind, a bad record (with its place), nothing is
            left, or a head that nothing was judged for.
    """
    sources = stream(spec)
    found = sources.field_names()
    if not found & set(SIGNS[wanted.kind]):
        other = next((k for k, signs in SIGNS.items() if found & set(signs)), None)
        use = f'loss={LOSSES[other]!r}' if other else 'other data'
        raise ValueError(
            f'{spec} has {", ".join(sorted(found))} in its records, and {wanted.by} '
            f'needs {" or ".join(SIGNS[wanted.kind])} (data/judgements.py); use {use}'
        )
    if wanted.kind == 'pairs' and not wanted.heads and 'dimension' in found:
        raise ValueError(
            f'{spec} has a dimension in its records, and there is one score for all; '
            'name the dimensions in heads, or leave the field out of the data'
        )
    if wanted.kind == 'pairs' and not wanted.heads and 'ranks' not in found:
        return load_comparisons(
            spec,
            tokenizer,
            max_length=limits.length,
            overlong=limits.overlong,
            on_bad=limits.on_bad,
            control_tokens=limits.control_tokens,
        )
    load = {'pairs': _rankings, 'ratings': _ratings, 'steps': _steps}[wanted.kind]
    return load(spec, sources, tokenizer, wanted, limits)


def _rankings(
    spec: str,
    sources: Stream,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Wanted,
    limits: Limits,
) -> Dataset:
    convert = functools.partial(judgements.to_ranking, heads=wanted.heads)
    data = load_records(
        spec, sources, tokenizer, 'rankings', limits, convert, text_rows, judged_example
    )
    _check_heads(spec, wanted, data)
    if not any(_has_order(example) for example in data.examples):
        count = len(data.examples)
        raise ValueError(f'{spec}: all {count} rankings are ties: there is no order')
    return data


def _has_order(example: JudgedExample) -> bool:
    """Whether a head tells two texts apart."""
    texts = example.labels[[len(answer) > 0 for answer in example.answers]]
    return any(len(np.unique(r[np.isfinite(r)])) > 1 for r in texts.T)


def _ratings(
    spec: str,
    sources: Stream,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Wanted,
    limits: Limits,
) -> Dataset:
    low, high = wanted.rating_range
    convert = functools.partial(
        judgements.to_rating, heads=wanted.heads, bounds=(low, high)
    )
    data = load_records(
        spec, sources, tokenizer, 'ratings', limits, convert, text_rows, judged_example
    )
    _check_heads(spec, wanted, data)
    if wanted.rating_unit == 'given':
        return data
    given = data.examples.columns['labels']
    labels = Ragged((given.values - low) / (high - low), given.starts, given.dtype)
    return dataclasses.replace(data, examples=data.examples.replace(labels=labels))


def _steps(
    spec: str,
    sources: Stream,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Wanted,
    limits: Limits,
) -> Dataset:
    if limits.overlong == 'truncate':
        raise ValueError(
            "overlong='truncate' would cut steps off that have a verdict; use 'drop'"
        )

    separator = wanted.step_separator
    convert = functools.partial(judgements.to_steps, separator=separator)

    def rows(records: list[Any], tokenizer: Any, encoder: Encoder) -> list[Any]:
        return step_rows(records, tokenizer, separator, encoder)

    how = 'responses in steps', limits, convert, rows, judged_example
    data = load_records(spec, sources, tokenizer, *how)
    verdicts = data.examples.columns['labels'].values > 0
    if verdicts.all() or not verdicts.any():
        raise ValueError(
            f'{spec}: all steps are labelled {verdicts[0, 0]}, which leaves nothing to '
            'tell apart; add responses with steps of the other kind'
        )
    return data


def _check_heads(spec: str, wanted: Wanted, data: Dataset) -> None:
    judged = np.isfinite(data.examples.columns['labels'].values)
    for head, count in zip(wanted.heads, np.sum(judged, axis=0)):
        if not count:
            raise ValueError(
                f'{spec} has no judgement in the dimension {head!r} of '
                f'heads={wanted.heads!r}; mend its name, or leave it out'
            )
