"""Judgements that only reward models learn from: rankings, ratings, steps.

    ranking   prompt + completions: [text, …] + ranks: [1, 2, 2, 3]
              1 is the best, equal ranks are a tie; by dimension
              {'safety': [1, 2, 2, 3], …}, where null is no judgement;
              gold: [number, …] are true rewards, which are never learned from;
              a completion that is null stands for the score 0 and has no text
    rating    prompt + completion + rating: 4 · … + ratings: {'safety': 4, …}
    steps     prompt + completions: [step, …] + labels: [true, false, …], as TRL has it

A comparison with a ``dimension`` is a ranking of two, with its ``probability`` or
``tie``. Comparisons themselves, and what
a prompt or an answer may be, are in ``formats.py``; read ``reward_data.py`` next, which
turns these records into tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_jax.data import formats
from rlhf_jax.data.formats import BadRecord, Judged
from rlhf_jax.data.sources import SourceRecord


def to_ranking(
    record: SourceRecord, tokenizer: PreTrainedTokenizerBase, heads: Sequence[str]
) -> Judged:
    """Reads a ranking, or a comparison with its ``dimension``.

    Args:
        record: as it was found.
        tokenizer: whose chat template renders messages.
        heads: the dimensions that are asked for; none for ``ranks`` without names.

    Raises:
        BadRecord: a field is missing, of the wrong type or empty, there are fewer than
            two completions with a text, two equal ones (or two that are null), one that
            is null without a rank, or ranks that do not count 1, 2, 3, …
        ValueError: messages, and the tokenizer has no chat template.
    """
    fields = record.present
    if 'completions' not in fields and 'chosen' in fields:
        return _compared(record, tokenizer, heads)
    completions = _list_of(record, 'completions', least=2)
    columns = [
        _checked_ranks(record, name, ranks, len(completions))
        for name, ranks in _by_head(record, 'ranks', heads)
    ]
    if all(rank is None for column in columns for rank in column):
        raise BadRecord(f'{record.where}: nothing is ranked in {", ".join(heads)}')
    _check_virtual(record, completions, columns)
    answers = []
    for i, completion in enumerate(completions):
        if completion is None:
            continue
        one = {name: fields.get(name) for name in ('prompt', *formats.TOLD)}
        one['completion'] = completion
        source = SourceRecord(one, f'{record.where}: completions[{i}]')
        answers.append(formats.prompt_and_answer(source, tokenizer, 'completion'))
    prompts, texts, templated = zip(*answers)
    if len(set(prompts)) > 1:
        raise BadRecord(f'{record.where}: the completions answer different prompts')
    if len(set(texts)) < len(texts):
        raise BadRecord(f'{record.where}: two completions are equal; leave one out')
    meta = formats.other_fields(fields, 'completions', 'ranks')
    if 'gold' in fields:
        gold = _list_of(record, 'gold', least=len(completions))
        meta['gold'] = [
            formats.number_of(record, f'gold[{i}]', value)
            for i, value in enumerate(gold)
        ]
        if len(gold) != len(completions):
            raise BadRecord(
                f'{record.where}: gold has {len(gold)} numbers for {len(completions)} '
                'completions'
            )
    rest = iter(texts)
    named = {
        f'completions[{i}]': None if completion is None else next(rest)
        for i, completion in enumerate(completions)
    }
    ranks = [list(row) for row in zip(*columns)]
    return Judged(prompts[0], named, ranks, meta, record.where, templated[0])


def _check_virtual(
    record: SourceRecord, completions: list[Any], columns: list[list[int | None]]
) -> None:
    places = [i for i, completion in enumerate(completions) if completion is None]
    names = ' and '.join(f'completions[{i}]' for i in places)
    if len(places) > 1:
        raise BadRecord(
            f'{record.where}: {names} are null; a single one can stand for the score 0'
        )
    if places and len(completions) < 3:
        raise BadRecord(
            f'{record.where}: beside {names}, which is null, there is one completion; '
            'give two or more, so that there is an order to learn'
        )
    if places and all(column[places[0]] is None for column in columns):
        raise BadRecord(
            f'{record.where}: {names} is null and has no rank; say where the score 0 '
            'lies among the others, or leave it out'
        )


def _compared(
    record: SourceRecord, tokenizer: PreTrainedTokenizerBase, heads: Sequence[str]
) -> Judged:
    """A comparison in one of the dimensions; with no heads, in the only one."""
    pair = formats.to_comparison(record, tokenizer)
    places = (1, 1) if pair.tied else (1, 2)
    dimension = formats.field_of(record, 'dimension') if heads else None
    if heads and dimension not in heads:
        raise BadRecord(
            f'{record.where}: dimension is {dimension!r}, and the heads are '
            f'{", ".join(heads)}'
        )
    ranks = [
        [place if name == dimension else None for name in heads or (None,)]
        for place in places
    ]
    return dataclasses.replace(pair, labels=ranks)


def _checked_ranks(
    record: SourceRecord, name: str, ranks: Any, count: int
) -> list[int | None]:
    if ranks is None:
        return [None] * count
    if not isinstance(ranks, list) or len(ranks) != count:
        raise BadRecord(
            f'{record.where}: {name} is {ranks!r} for {count} completions; give one '
            'rank for each'
        )
    given = [rank for rank in ranks if rank is not None]
    if any(type(rank) is not int for rank in given):
        raise BadRecord(f'{record.where}: {name} is {ranks!r}; ranks are whole numbers')
    known = sorted(set(given))
    if known != list(range(1, len(known) + 1)):
        dense = [rank if rank is None else known.index(rank) + 1 for rank in ranks]
        raise BadRecord(
            f'{record.where}: {name} is {ranks!r}, which does not count 1, 2, 3, … '
            f'from the best without a gap; is {dense} meant?'
        )
    if len(given) == 1:
        raise BadRecord(f'{record.where}: {name} ranks a single completion')
    return ranks


def to_rating(
    record: SourceRecord,
    tokenizer: PreTrainedTokenizerBase,
    heads: Sequence[str],
    bounds: tuple[float, float],
) -> Judged:
    """Reads a rating.

    Args:
        record: as it was found.
        tokenizer: whose chat template renders messages.
        heads: the dimensions that are asked for; none for a single ``rating``.
        bounds: the lowest and the highest rating that there can be.

    Raises:
        BadRecord: a field is missing, of the wrong type or empty, no dimension that is
            asked for is rated, or a rating lies out of bounds.
        ValueError: messages, and the tokenizer has no chat template.
    """
    name = 'ratings' if heads else 'rating'
    given = _by_head(record, name, heads)
    for place, value in given:
        if value is None:
            continue
        formats.number_of(record, place, value)
        if not bounds[0] <= value <= bounds[1]:
            raise BadRecord(
                f'{record.where}: {place} is {value}, outside of rating_range='
                f'({bounds[0]:g}, {bounds[1]:g})'
            )
    ratings = [None if value is None else float(value) for _, value in given]
    if all(value is None for value in ratings):
        raise BadRecord(f'{record.where}: {name} has none of {", ".join(heads)}')
    pair = formats.prompt_and_answer(record, tokenizer, formats.answer_field(record))
    prompt, completion, templated = pair
    meta = formats.other_fields(record.present, name)
    only = {'completion': completion}
    return Judged(prompt, only, [ratings], meta, record.where, templated)


def to_steps(
    record: SourceRecord, tokenizer: PreTrainedTokenizerBase, separator: str
) -> Judged:
    """Reads a response in steps.

    Args:
        record: as it was found.
        tokenizer: whose chat template renders a prompt in messages.
        separator: what stands between two steps; at the end of a step it is left off.

    Raises:
        BadRecord: a field is missing, of the wrong type or empty, there are not as many
            labels as steps, or a step holds the separator.
        ValueError: messages, and the tokenizer has no chat template.
    """
    steps = [
        formats.text_of(record, f'completions[{i}]', step).removesuffix(separator)
        for i, step in enumerate(_list_of(record, 'completions', least=1))
    ]
    labels = _list_of(record, 'labels', least=1)
    if len(labels) != len(steps):
        raise BadRecord(f'{record.where}: {len(labels)} labels of {len(steps)} steps')
    if any(not isinstance(label, int) or label not in (0, 1) for label in labels):
        raise BadRecord(f'{record.where}: labels are {labels!r}; use true and false')
    for i, step in enumerate(steps):
        formats.text_of(record, f'completions[{i}]', step)
        if separator in step:
            raise BadRecord(
                f'{record.where}: completions[{i}] holds the separator {separator!r}, '
                'so that it would be scored as several steps; split it, or set another '
                'step_separator'
            )
    prompt = formats.to_prompt(record, tokenizer)
    meta = formats.other_fields(record.present, 'labels')
    named = {f'completions[{i}]': step for i, step in enumerate(steps)}
    labels = [[float(label)] for label in labels]
    return Judged(prompt.prompt, named, labels, meta, record.where, prompt.templated)


def _by_head(
    record: SourceRecord, name: str, heads: Sequence[str]
) -> list[tuple[str, Any]]:
    """A field's parts with their names: one for each head, or the field itself."""
    value = formats.field_of(record, name)
    if not heads:
        if isinstance(value, dict):
            raise BadRecord(
                f'{record.where}: {name} are by dimension ({", ".join(value)}); name '
                f'those to learn, heads={tuple(value)!r}'
            )
        return [(name, value)]
    if not isinstance(value, dict):
        raise BadRecord(
            f'{record.where}: {name} is {value!r}, and heads={tuple(heads)!r} needs '
            'one by dimension, such as '
            f'{{{heads[0]!r}: …}}'
        )
    return [(f'{name}[{head!r}]', value.get(head)) for head in heads]


def _list_of(record: SourceRecord, name: str, least: int) -> list[Any]:
    value = formats.field_of(record, name)
    if not isinstance(value, list) or len(value) < least:
        raise BadRecord(
            f'{record.where}: {name!r} must be a list of at least {least}, and is '
            f'{value!r:.80}'
        )
    return value
