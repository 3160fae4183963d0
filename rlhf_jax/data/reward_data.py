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
from rlhf_jax.data.examples import (
    Dataset,
    Example,
    RankingExample,
    RatingExample,
    StepExample,
)
from rlhf_jax.data.joining import Encoder
from rlhf_jax.data.judgements import NOT_RANKED
from rlhf_jax.data.loading import Limits, load_records
from rlhf_jax.data.pipeline import load_comparisons
from rlhf_jax.data.rows import Row, step_rows, text_rows
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
    def build(record: Any, row: Row) -> Example:
        texts = iter(row.answers)
        answers = tuple([] if x is None else next(texts) for x in record.completions)
        ranks = np.asarray(record.ranks, np.int32)
        return RankingExample(row.prompt, answers, ranks, record.margin)

    convert = functools.partial(judgements.to_ranking, heads=wanted.heads)
    data = load_records(
        spec, sources, tokenizer, 'rankings', limits, convert, text_rows, build
    )
    ranks = data.examples.columns['ranks']
    _check_heads(spec, wanted, ranks.values != NOT_RANKED)
    if not any(_has_order(example) for example in data.examples):
        raise ValueError(
            f'{spec}: all {len(ranks)} rankings are ties: there is no order'
        )
    # One shape for all batches.
    shape = (len(ranks), ranks.lengths.max(), *ranks.values.shape[1:])
    padded = np.full(shape, NOT_RANKED, np.int32)
    padded[np.arange(shape[1]) < ranks.lengths[:, None]] = ranks.values
    return dataclasses.replace(data, examples=data.examples.replace(ranks=padded))


def _has_order(example: RankingExample) -> bool:
    """Whether a head tells two texts apart."""
    texts = example.ranks[[len(answer) > 0 for answer in example.answers]]
    return any(len(np.unique(r[r != NOT_RANKED])) > 1 for r in texts.T)


def _ratings(
    spec: str,
    sources: Stream,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Wanted,
    limits: Limits,
) -> Dataset:
    low, high = wanted.rating_range
    shift, scale = (low, high - low) if wanted.rating_unit == 'range' else (0.0, 1.0)

    def build(record: Any, row: Row) -> Example:
        tokens = row.prompt + row.answers[0]
        given = [np.nan if value is None else value for value in record.ratings]
        ratings = (np.asarray(given, np.float32) - shift) / scale
        return RatingExample(tokens, np.nan_to_num(ratings), np.isfinite(ratings))

    convert = functools.partial(
        judgements.to_rating, heads=wanted.heads, bounds=(low, high)
    )
    data = load_records(
        spec, sources, tokenizer, 'ratings', limits, convert, text_rows, build
    )
    rated = data.examples.columns['rated'].values
    _check_heads(spec, wanted, rated.reshape(len(data.examples), -1))
    return data


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

    def build(record: Any, row: Row) -> Example:
        tokens = row.prompt + row.answers[0]
        ends = len(row.prompt) + np.asarray(row.steps, np.int32)
        return StepExample(tokens, ends, np.asarray(record.labels, bool))

    separator = wanted.step_separator
    convert = functools.partial(judgements.to_steps, separator=separator)

    def rows(records: list[Any], tokenizer: Any, encoder: Encoder) -> list[Any]:
        return step_rows(records, tokenizer, separator, encoder)

    data = load_records(
        spec, sources, tokenizer, 'responses in steps', limits, convert, rows, build
    )
    verdicts = data.examples.columns['right'].values
    if verdicts.all() or not verdicts.any():
        raise ValueError(
            f'{spec}: all steps are labelled {verdicts[0]}, which leaves nothing to '
            'tell apart; add responses with steps of the other kind'
        )
    return data


def _check_heads(spec: str, wanted: Wanted, judged: np.ndarray) -> None:
    """Checks that every head has a judgement; ``judged`` is [·, H] bool."""
    for head, count in zip(wanted.heads, np.sum(judged, axis=0)):
        if not count:
            raise ValueError(
                f'{spec} has no judgement in the dimension {head!r} of '
                f'heads={wanted.heads!r}; mend its name, or leave it out'
            )
