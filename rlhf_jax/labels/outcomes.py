"""What becomes of labels: records that reward models and preference losses read.

Read ``agreement.py`` next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from rlhf_jax.labels.records import Item, Label

Aggregate = Literal['none', 'majority', 'dawid_skene', 'bradley_terry']
# Of a response, what stands in the record of a comparison.
KEPT = ('by', 'templated')


def to_records(
    items: Sequence[Item], labels: Sequence[Label], aggregate: Aggregate
) -> list[dict[str, Any]]:
    """Records of the items that somebody judged, in the order of the items.

    Args:
        items: those with the purpose 'main'.
        labels: of everybody; those of other items, and repeats, count nothing.
        aggregate: how several labels of a comparison become one, see
            ``aggregation.py``; 'none' makes a record of each. Ratings are averaged, but
            for 'none'; of a ranking each label is a record.

    Returns:
        By the form of an item:
        comparison: prompt, chosen, rejected, item, first_chosen, and where they are
            known probability, tie, strength, dimension, NAME_chosen and NAME_rejected
            of the scores;
        rating: prompt, completion, rating or ratings by dimension;
        ranking: prompt, completions, ranks or ranks by dimension, labeller.
    """
    by_name = {item.item: item for item in items}
    counted = [x for x in labels if x.item in by_name and not x.repeat]
    said: dict[str, list[Label]] = {name: [] for name in by_name}
    for label in counted:
        if label.verdict == 'judged':
            said[label.item].append(label)
    make = {'comparison': _comparisons, 'rating': _ratings, 'ranking': _rankings}
    return [
        record
        for item in items
        for record in make[item.form](item, said[item.item], aggregate)
    ]


def _comparisons(
    item: Item, labels: Sequence[Label], aggregate: Aggregate
) -> list[dict[str, Any]]:
    records = []
    for dimension in dict.fromkeys(label.dimension for label in labels):
        about = [label for label in labels if label.dimension == dimension]
        if aggregate == 'none':
            records += [_comparison(item, x.probability, [x]) for x in about]
        else:
            mean = float(np.mean([label.probability for label in about]))
            records.append(_comparison(item, mean, about))
    return records


def _comparison(
    item: Item, probability: float, labels: Sequence[Label]
) -> dict[str, Any]:
    first_chosen = probability >= 0.5
    chosen, rejected = (0, 1) if first_chosen else (1, 0)
    row = {
        'prompt': item.prompt,
        'chosen': item.completions[chosen],
        'rejected': item.completions[rejected],
        'item': item.item,
        'first_chosen': first_chosen,
        'labels': len(labels),
    }
    if probability == 0.5:
        row['tie'] = True
    elif (certainty := max(probability, 1 - probability)) < 1:
        row['probability'] = certainty
    if strengths := [label.strength for label in labels if label.strength is not None]:
        row['strength'] = float(np.mean(strengths))
    if len({label.labeller for label in labels}) == 1:
        row['labeller'] = labels[0].labeller
    row |= _common(item, labels)
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


def _common(item: Item, labels: Sequence[Label]) -> dict[str, Any]:
    common = {'templated': True} if item.templated else {}
    if labels[0].dimension is not None:
        common['dimension'] = labels[0].dimension
    return common


def _ratings(
    item: Item, labels: Sequence[Label], aggregate: Aggregate
) -> list[dict[str, Any]]:
    by_labeller = [[label] for label in labels]
    if aggregate == 'none' and labels and labels[0].dimension is not None:
        names = dict.fromkeys(label.labeller for label in labels)
        by_labeller = [[x for x in labels if x.labeller == name] for name in names]
    groups = by_labeller if aggregate == 'none' else [list(labels)] * bool(labels)
    records = []
    for group in groups:
        means: dict[str | None, float] = {
            dimension: float(
                np.mean([x.rating for x in group if x.dimension == dimension])
            )
            for dimension in dict.fromkeys(label.dimension for label in group)
        }
        rating = {'rating': means[None]} if None in means else {'ratings': means}
        row = {'prompt': item.prompt, 'completion': item.completions[0], **rating}
        row |= {'item': item.item, 'labels': len(group)}
        row |= {'templated': True} if item.templated else {}
        records.append(row)
    return records


def _rankings(
    item: Item, labels: Sequence[Label], aggregate: Aggregate
) -> list[dict[str, Any]]:
    records = []
    for label in labels:
        ranks: Any = list(label.ranks or ())
        if label.dimension is not None:
            ranks = {label.dimension: ranks}
        row = {'prompt': item.prompt, 'completions': list(item.completions)}
        row |= {'ranks': ranks, 'item': item.item, 'labeller': label.labeller}
        records.append(row | ({'templated': True} if item.templated else {}))
    return records
