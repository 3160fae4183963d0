"""What becomes of labels: records that reward models and preference losses read.

Read ``agreement.py`` next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.labels.aggregation import Judgement, Method, aggregate
from rlhf_jax.labels.records import Item, Label
from rlhf_jax.labels.units import by_name

# Of a response, what stands in the record of a comparison.
KEPT = ('by', 'templated')


def to_records(
    items: Sequence[Item], labels: Sequence[Label], method: Method
) -> list[dict[str, Any]]:
    """Records of the items that somebody judged, in the order of the items.

    Args:
        items: those with the purpose 'main'.
        labels: of everybody; those of other items, and repeats, count nothing.
        method: how several labels of an item become one, see ``aggregation.py``. Of a
            ranking each label is a record, whatever it is.

    Returns:
        By the form of an item:
        comparison: prompt, chosen, rejected, item, first_chosen, labels, and where they
            are known probability, tie, strength (mean of the labels that say the same,
            none where the probability is ½), labeller, dimension, NAME_chosen and
            NAME_rejected of the scores;
        rating: prompt, completion, item, labels, rating or ratings by dimension;
        ranking: prompt, completions, ranks or ranks by dimension, labeller.
    """
    known = by_name(items)
    judged = [
        label
        for label in labels
        if label.item in known and not label.repeat and label.verdict == 'judged'
    ]
    if items and items[0].form == 'ranking':
        return [_ranking(known[label.item], label) for label in judged]
    judgements = aggregate(items, judged, method)
    if items and items[0].form == 'rating':
        return _ratings(known, judgements)
    about: dict[Any, list[Label]] = {}
    for label in judged:
        about.setdefault((label.item, label.dimension), []).append(label)
    return [
        _comparison(known[one.item], one, about[one.item, one.dimension])
        for one in judgements
    ]


def _comparison(
    item: Item, judgement: Judgement, labels: Sequence[Label]
) -> dict[str, Any]:
    probability = judgement.probability
    first_chosen = probability >= 0.5
    chosen, rejected = (0, 1) if first_chosen else (1, 0)
    row = {
        'prompt': item.prompt,
        'chosen': item.completions[chosen],
        'rejected': item.completions[rejected],
        'item': item.item,
        'first_chosen': first_chosen,
        'labels': judgement.labels,
    }
    if judgement.tie:
        row['tie'] = True
    elif (certainty := max(probability, 1 - probability)) < 1:
        row['probability'] = certainty
    if judgement.labeller is not None:
        labels = [x for x in labels if x.labeller == judgement.labeller]
    if probability != 0.5 and (strengths := _strengths(labels, first_chosen)):
        row['strength'] = float(np.mean(strengths))
    if len({label.labeller for label in labels}) == 1:
        row['labeller'] = labels[0].labeller
    row |= _common(item, judgement.dimension)
    for side, index in (('chosen', chosen), ('rejected', rejected)):
        facts: Mapping[str, Any] = item.facts[index] if item.facts else {}
        for name, value in facts.items():
            if name.startswith('score_'):
                row[f'{name.removeprefix("score_")}_{side}'] = value
    if item.facts:
        row |= {k: item.facts[chosen][k] for k in KEPT if k in item.facts[chosen]}
        if 'known' in item.facts[chosen]:
            row['was_chosen'] = item.facts[chosen]['known']
    return row


def _strengths(labels: Sequence[Label], first_chosen: bool) -> list[float]:
    """How much better the chosen one is, by those who chose it."""
    return [
        label.strength
        for label in labels
        if label.strength is not None
        and (label.probability > 0.5 if first_chosen else label.probability < 0.5)
    ]


def _common(item: Item, dimension: str | None) -> dict[str, Any]:
    common: dict[str, Any] = {'templated': True} if item.templated else {}
    return common if dimension is None else common | {'dimension': dimension}


def _ratings(
    items: Mapping[str, Item], judgements: Sequence[Judgement]
) -> list[dict[str, Any]]:
    """A record per item, and where labels stand by themselves per labeller."""
    rows: dict[tuple[str, str | None], dict[str, Any]] = {}
    for one in judgements:
        item = items[one.item]
        row = rows.setdefault(
            (one.item, one.labeller),
            {
                'prompt': item.prompt,
                'completion': item.completions[0],
                'item': one.item,
                'labels': one.labels,
                **_common(item, None),
            },
        )
        if one.dimension is None:
            row['rating'] = one.rating
        else:
            row.setdefault('ratings', {})[one.dimension] = one.rating
    return list(rows.values())


def _ranking(item: Item, label: Label) -> dict[str, Any]:
    ranks: Any = list(label.ranks)
    if label.dimension is not None:
        ranks = {label.dimension: ranks}
    return {
        'prompt': item.prompt,
        'completions': list(item.completions),
        'ranks': ranks,
        'item': item.item,
        'labeller': label.labeller,
        **_common(item, None),
    }
