"""Reward functions: what they are given, tried before anything compiles, and called.

A function of the texts, ``fn(prompts, responses, …) -> [N]`` numbers, asks for more by
naming parameters. ``references`` gets the reference answers of the prompts' records;
any other parameter that is a field of theirs gets that field; both one per response.
What ``args`` sets is not asked for.

Before anything compiles the function is tried on the first prompt of every data set,
with its reference answer, or else an empty text, as the response. A function
``check_NAME`` beside a function ``NAME``, if there is one, gets what ``NAME`` asked for
of every record, one by one, and raises ValueError where a record will not do.
``rlhf_jax/verify.py`` has such functions; read ``stages/scoring.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.config import load_dotted, nearest
from rlhf_jax.data.examples import Dataset
from rlhf_jax.ranges import LARGEST_SCORE
from rlhf_jax.responses import Responses, Scored, field
from rlhf_jax.stages.settings import RewardSource

# fn(prompts, responses, **columns) -> scores [N], reward units.
TextReward = Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A checked function."""

    name: str  # for messages: its place in the config, and its dotted name
    fn: TextReward  # with its arguments
    columns: tuple[str, ...]  # its parameters that the records fill


def check_function(
    where: str, source: RewardSource, prompts: Sequence[Dataset]
) -> RewardFunction:
    """Checks a function before anything compiles.

    Args:
        where: the place of the source in the config.
        source: what the user wrote there.
        prompts: the data sets whose responses it will score.

    Raises:
        ValueError: it cannot be imported or called with these arguments, asks for a
            field that records lack, or fails on a prompt.
    """
    if source.tokenizer is not None:
        raise ValueError(
            f'{where}.tokenizer={source.tokenizer!r}, but a function gets texts; '
            'remove it, or name a model in the place of fn'
        )
    fn = load_dotted(source.fn, f'{where}.fn')
    try:
        columns = _columns(where, source, fn, prompts)
    except TypeError as error:
        raise ValueError(
            f'{where}: {source.fn} cannot be called with (prompts, responses) and '
            f'args={source.args}: {error}'
        ) from error
    bound = functools.partial(fn, **source.args)
    function = RewardFunction(f'{where} ({source.fn})', bound, columns)
    module, _, name = source.fn.partition(':')
    check = getattr(sys.modules[module], f'check_{name}', None)
    for data in prompts:
        first = data.records[0]
        asked = {name: [field(first, name)] for name in columns}
        _call(function, [first.prompt], [first.reference or ''], asked)
        for record in data.records if check else ():
            try:
                check(**{name: field(record, name) for name in columns})
            except ValueError as error:
                raise ValueError(f'{where}: {record.where}: {error}') from error
    return function


def _columns(
    where: str, source: RewardSource, fn: TextReward, prompts: Sequence[Dataset]
) -> tuple[str, ...]:
    """The parameters that the records fill, of those which nothing else does.

    Raises:
        TypeError: the function cannot be called so.
    """
    signature = inspect.signature(fn)
    known = signature.bind_partial([], [], **source.args).arguments
    records = [record for data in prompts for record in data.records]
    columns = []
    for name, parameter in signature.parameters.items():
        if name in known or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        lacking = [record for record in records if field(record, name) is None]
        if len(lacking) < len(records):
            if lacking:
                raise ValueError(
                    f'{where}: {source.fn} asks for {name!r}, which '
                    f'{len(lacking)} of {len(records)} prompts lack, the first of them '
                    f'at {lacking[0].where}; add it there, or set it for all in '
                    f'{where}.args'
                )
            columns.append(name)
        elif parameter.default is parameter.empty:
            raise _missing(where, source, name, prompts)
    signature.bind([], [], **source.args, **dict.fromkeys(columns))
    return tuple(columns)


def _missing(
    where: str, source: RewardSource, name: str, prompts: Sequence[Dataset]
) -> ValueError:
    records = [record for data in prompts for record in data.records]
    there = {key for record in records for key in record.meta}
    there |= {'references' for record in records if record.reference is not None}
    specs = ', '.join(data.counts.spec for data in prompts) or 'no data'
    found = nearest(name, there) if there else '; they have prompts alone'
    return ValueError(
        f'{where}: {source.fn} asks for {name!r}, which neither {where}.args nor the '
        f'records of {specs} have{found}'
    )


def score_by_function(function: RewardFunction, responses: Responses) -> Scored:
    """Scores the real rows, all in one call.

    Raises:
        ValueError: the function failed, or returned something else than one finite
            number per response.
    """
    columns = {name: responses.column(name) for name in function.columns}
    scores = _call(function, responses.prompts, responses.texts, columns)
    return Scored(responses.spread(scores))


def _call(
    function: RewardFunction,
    prompts: list[str],
    texts: list[str],
    columns: dict[str, list[Any]],
) -> np.ndarray:
    """What a function says, [N] float64; what it must not say is an error."""
    fn, name = function.fn, function.name
    given = {key: list(column) for key, column in columns.items()}
    try:
        scores = np.asarray(fn(list(prompts), list(texts), **given), np.float64)
    except Exception as error:
        example = _show(_culprit(fn, prompts, texts, columns), prompts, texts)
        raise ValueError(
            f'{name} failed with {type(error).__name__}: {error}{example}'
        ) from error
    if scores.shape != (len(texts),):
        raise ValueError(
            f'{name} returned shape {list(scores.shape)} for {len(texts)} responses; '
            'return one number per response, in their order'
        )
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise ValueError(
            f'{name} gave {scores[bad[0]]} to {bad.size} of {len(texts)} responses'
            f'{_show(int(bad[0]), prompts, texts)}; return finite numbers'
        )
    large = np.flatnonzero(np.abs(scores) > LARGEST_SCORE)
    if large.size:
        raise ValueError(
            f'{name} gave {scores[large[0]]:g} to {large.size} of {len(texts)} '
            f'responses{_show(int(large[0]), prompts, texts)}, which is beyond '
            f'±{LARGEST_SCORE:g}, and more than float32 can square; scale it'
        )
    return scores


def _culprit(
    fn: TextReward,
    prompts: list[str],
    texts: list[str],
    columns: dict[str, list[Any]],
) -> int | None:
    """The first response on which the function fails by itself."""
    for i, (prompt, text) in enumerate(zip(prompts, texts)):
        given = {key: [column[i]] for key, column in columns.items()}
        try:
            np.asarray(fn([prompt], [text], **given), np.float64)
        except Exception:
            return i
    return None


def _show(row: int | None, prompts: list[str], texts: list[str]) -> str:
    if row is None:
        return f' (on {len(texts)} responses together, on none of them alone)'
    prompt, text = (
        repr(x if len(x) <= 80 else f'{x[:40]}…{x[-40:]}')
        for x in (prompts[row], texts[row])
    )
    return f' (prompt {prompt}, response {text})'
