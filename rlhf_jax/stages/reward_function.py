"""Reward functions: what they are given, tried before anything compiles, and called.

A function gives a number per response, and gets by name what its parameters name, a
value per response each: ``prompts``; ``responses``, which may be called ``completions``
too; ``references``, the reference answers of the prompts' records; and any other field
of theirs. ``**kwargs`` gets all that no parameter names, with None where a record has
no such field. What ``args`` sets is not asked for.

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

# fn(*, prompts, responses, …) -> scores [N], reward units.
TextReward = Callable[..., np.ndarray]
TEXTS = ('prompts', 'responses', 'completions')  # the last two are the same


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A checked function."""

    name: str  # for messages: its place in the config, and its dotted name
    fn: TextReward  # with its arguments
    texts: tuple[str, ...]  # of ``TEXTS``, those that it gets
    columns: tuple[str, ...]  # fields of the records that it gets


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
    texts, columns = _asked_for(where, source, _signature(where, source, fn), prompts)
    bound = functools.partial(fn, **source.args)
    function = RewardFunction(f'{where} ({source.fn})', bound, texts, columns)
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


def _signature(where: str, source: RewardSource, fn: TextReward) -> inspect.Signature:
    """The parameters of a function.

    Raises:
        ValueError: they cannot be told, or cannot be given by name.
    """
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'{where}.fn={source.fn!r} does not say which parameters it has; name a '
            'Python function that calls it'
        ) from error
    for name, parameter in signature.parameters.items():
        if parameter.kind == parameter.POSITIONAL_ONLY:
            raise ValueError(
                f'{where}: {source.fn} takes {name!r} by position only, and parameters '
                "are given by name; remove the '/'"
            )
    return signature


def _asked_for(
    where: str,
    source: RewardSource,
    signature: inspect.Signature,
    prompts: Sequence[Dataset],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The texts and the fields of the records that a function gets.

    Raises:
        ValueError: it asks for what is not there, or does not take ``args``.
    """
    records = [record for data in prompts for record in data.records]
    texts, columns, takes_all = [], [], False
    for name, parameter in signature.parameters.items():
        takes_all |= parameter.kind == parameter.VAR_KEYWORD
        variadic = (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if name in source.args or parameter.kind in variadic:
            continue
        if name in TEXTS:
            texts.append(name)
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
    if takes_all:
        known = {*texts, *source.args}
        texts += [] if 'prompts' in known else ['prompts']
        texts += [] if known & {'responses', 'completions'} else ['responses']
        columns += sorted(_fields(records) - {*known, *TEXTS, *columns})
    try:
        signature.bind(**source.args, **dict.fromkeys((*texts, *columns)))
    except TypeError as error:
        raise ValueError(
            f'{where}: {source.fn} does not take args={source.args}: {error}'
        ) from error
    return tuple(texts), tuple(columns)


def _fields(records: Sequence[Any]) -> set[str]:
    """What any of these records has, as :func:`field` calls it."""
    there = {key for record in records for key in record.meta}
    return there | {'references' for r in records if r.reference is not None}


def _missing(
    where: str, source: RewardSource, name: str, prompts: Sequence[Dataset]
) -> ValueError:
    there = _fields([record for data in prompts for record in data.records])
    specs = ', '.join(data.counts.spec for data in prompts) or 'no data'
    found = nearest(name, {*there, *TEXTS})
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
    name = function.name
    given = {n: prompts if n == 'prompts' else texts for n in function.texts} | columns
    try:
        scores = _answer(function, {key: list(x) for key, x in given.items()})
    except Exception as error:
        example = _show(_culprit(function, given, len(texts)), prompts, texts)
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


def _answer(function: RewardFunction, given: dict[str, list[Any]]) -> np.ndarray:
    return np.asarray(function.fn(**given), np.float64)


def _culprit(
    function: RewardFunction, given: dict[str, list[Any]], count: int
) -> int | None:
    """The first response on which the function fails by itself."""
    for i in range(count):
        try:
            _answer(function, {key: [column[i]] for key, column in given.items()})
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
