"""Which pairs of responses to a prompt are compared.

A response is a record of a ``sample`` stage: ``prompt``, ``completion`` and what is
known of it, such as ``score_NAME`` by a named reward and, of an ensemble,
``members_NAME``, the scores of its members. Read ``records.py`` next.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf_jax.config import nearest

Response = Mapping[str, Any]
Drawn = tuple[Response, ...]
Rule = Literal['random', 'near', 'far', 'uncertain', 'best_and_worst']


class Groups(NamedTuple):
    """Responses by prompt."""

    groups: list[list[Response]]  # the different responses to every prompt
    repeated: int  # responses that repeat one to the same prompt, and are left out


def group(responses: Iterable[Response]) -> Groups:
    """Responses to the same prompt, in the order in which the prompts first come."""
    found: dict[str, dict[str, Response]] = {}
    total = 0
    for response in responses:
        prompt = json.dumps(response['prompt'], sort_keys=True)
        found.setdefault(prompt, {}).setdefault(response['completion'], response)
        total += 1
    groups = [list(different.values()) for different in found.values()]
    return Groups(groups, total - sum(map(len, groups)))


def draw(
    groups: Sequence[Sequence[Response]],
    rng: np.random.Generator,
    *,
    size: int = 2,
    rule: Rule = 'random',
    score: str | None = None,
    per_prompt: int = 1,
    limit: int | None = None,
) -> list[Drawn]:
    """Pairs of different responses to the same prompt, or sets of another size.

    Args:
        groups: the different responses to every prompt; where there are fewer than
            ``size``, nothing is drawn.
        rng: draws the pairs of 'random', and everywhere which response is the first.
        size: responses that are drawn together; other than 2 for 'random' alone.
        rule: 'random'; 'near' and 'far' by the difference of a score; 'uncertain' by
            the standard deviation of that difference over an ensemble's members;
            'best_and_worst' of every prompt by a score.
        score: the name of the score; not for 'random'.
        per_prompt: sets of a prompt at most, all different.
        limit: sets of all prompts together at most, the first by the same rule; None
            for all of them.

    Returns:
        The pairs or sets, by prompt in the order of the groups.

    Raises:
        ValueError: a response without the score, or one that is no number.
    """
    ranked: list[tuple[float, int, Drawn]] = []  # how early, number of the prompt, set
    for number, responses in enumerate(groups):
        if len(responses) < size:
            continue
        for cost, pair in _of_prompt(responses, rng, size, rule, score, per_prompt):
            ranked.append((cost, number, pair))
    if limit is not None and len(ranked) > limit:
        if rule == 'random':
            chosen = rng.choice(len(ranked), limit, replace=False)
        else:
            chosen = np.argsort([cost for cost, *_ in ranked], kind='stable')[:limit]
        ranked = [ranked[i] for i in sorted(chosen.tolist())]
    return [pair for *_, pair in ranked]


def _of_prompt(
    responses: Sequence[Response],
    rng: np.random.Generator,
    size: int,
    rule: Rule,
    score: str | None,
    count: int,
) -> list[tuple[float, Drawn]]:
    """Pairs of one prompt, with a number that is lowest for those wanted most."""
    if rule == 'random':
        sets: dict[frozenset[int], list[int]] = {}
        while len(sets) < min(count, math.comb(len(responses), size)):
            chosen = rng.choice(len(responses), size, replace=False).tolist()
            sets.setdefault(frozenset(chosen), chosen)
        return [(0.0, tuple(responses[i] for i in one)) for one in sets.values()]
    prefix = 'members' if rule == 'uncertain' else 'score'
    values = _values(responses, prefix, score)
    if rule == 'best_and_worst':
        best, worst = int(values.argmax()), int(values.argmin())
        if values[best] == values[worst]:
            return []
        pair = (responses[best], responses[worst])
        return [(values[worst] - values[best], _turned(pair, rng))]
    costs = []
    for i, j in itertools.combinations(range(len(responses)), 2):
        gap = values[i] - values[j]
        cost = {
            'near': lambda gap: abs(gap),
            'far': lambda gap: -abs(gap),
            'uncertain': lambda gap: -gap.std(),
        }[rule](gap)
        costs.append((float(cost), i, j))
    costs.sort(key=lambda row: row[0])
    return [
        (cost, _turned((responses[i], responses[j]), rng))
        for cost, i, j in costs[:count]
    ]


def _turned(pair: Drawn, rng: np.random.Generator) -> Drawn:
    return pair if rng.random() < 0.5 else (pair[1], pair[0])


def _values(
    responses: Sequence[Response], prefix: str, score: str | None
) -> np.ndarray:
    """Scores [N], or [N, M] of an ensemble's members."""
    values = [_value(response, prefix, score) for response in responses]
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):  # texts, or lists of different lengths
        found = np.asarray(np.nan)
    if found.ndim != (2 if prefix == 'members' else 1) or not np.isfinite(found).all():
        raise ValueError(
            f'score={score!r}: {prefix}_{score} is {values[0]!r:.40} and '
            f'{values[1]!r:.40}; '
            + (
                'responses need finite numbers there, as many each'
                if prefix == 'members'
                else 'responses need a finite number there'
            )
        )
    return found


def _value(response: Response, prefix: str, score: str | None) -> Any:
    name = f'{prefix}_{score}'
    if name in response:
        return response[name]
    known = [
        key.removeprefix(f'{prefix}_') for key in response if key.startswith(prefix)
    ]
    what = 'of an ensemble' if prefix == 'members' else 'by that name'
    hint = nearest(str(score), known) if known else '; the responses have none'
    raise ValueError(
        f'score={score!r}: a response has no score {what}{hint}; name a reward of the '
        'sample stage'
    )
