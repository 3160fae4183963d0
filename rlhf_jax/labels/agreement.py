"""How far labellers agree: with each other, with gold items, and with themselves.

:func:`report` says it in numbers; ``python -m rlhf_jax.agreement`` prints them, and a
stage of kind ``label`` puts them into its ``eval.json``. Coefficients are in
``coefficients.py``, the table of labels is in ``units.py``. ``docs/agreement.md`` has
the equations. Read ``aggregation.py`` next.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.labels.aggregation import dawid_skene, soft_labels
from rlhf_jax.labels.coefficients import (
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    measured,
    percent_agreement,
    share_interval,
)
from rlhf_jax.labels.records import Item, Label, to_label
from rlhf_jax.labels.units import (
    TIE,
    Answers,
    answers,
    by_name,
    check_known,
    order_codes,
    parts,
)

ENOUGH = 5  # shared questions, before somebody is said never to agree
ENOUGH_FOR_CHANCE = 20  # and before somebody is said to agree by chance

COEFFICIENTS = {
    'agreement': percent_agreement,
    'cohen_kappa': cohen_kappa,
    'fleiss_kappa': fleiss_kappa,
    'alpha_nominal': functools.partial(krippendorff_alpha, level='nominal'),
}
SHARES = ('gold', 'others', 'self', 'first_shown', 'longer')


def report(items: Sequence[Item] | None, labels: Sequence[Label]) -> dict[str, Any]:
    """The numbers of a file of labels.

    Agreement is on the main items: gold items are chosen to be clear. What is said in
    training is not a judgement yet, and is in none of the numbers. A label that is not
    certain counts as the likelier answer. Skipped items and those called bad are
    counted and say nothing else.

    Args:
        items: that were labelled; None where they are not known, and then all are main
            items, and nothing is said of gold items and lengths.
        labels: of all labellers.

    Returns:
        Numbers by name, None where they do not exist; ``…_interval`` is 95%:

        counts ``labels``, ``labellers``, ``items``, ``items_shared`` (by at least two),
        ``skipped``, ``bad``, ``flagged``, and ``ties``, a share;
        ``agreement``, ``cohen_kappa``, ``fleiss_kappa``, ``alpha_nominal``,
        ``alpha_ordinal``, each with a bootstrap interval over items;
        ``ceiling`` with its interval, ``ceiling_least``, ``ceiling_dawid_skene``: see
        :func:`ceilings`;
        ``gold``, ``others``, ``self``, ``first_shown``, ``longer`` with Wilson
        intervals (:func:`share_interval`) and counts: shares over all labellers;
        ``by_labeller``: the same of each, their counts, ``chance`` (the agreement with
        others that is expected by chance) and ``seconds`` (median of an item);
        ``never_agree`` and ``near_chance``: labellers, by name.

    Raises:
        ValueError: no labels, or of training items alone; labels of unknown items; what
            ``units.answers`` refuses.
    """
    if not labels:
        raise ValueError('there are no labels')
    if items is not None:
        check_known(items, labels)
    purposes = {item.item: item.purpose for item in items or ()}
    asked = [x for x in labels if purposes.get(x.item, 'main') != 'training']
    if not asked:
        raise ValueError('all labels are of training items, which are left out')
    table = answers([x for x in asked if purposes.get(x.item, 'main') == 'main'], items)
    codes, clusters = table.codes(), table.clusters
    shared = clusters[(codes >= 0).sum(1) > 1]
    result: dict[str, Any] = {
        **_counts(asked),
        'labellers': len({label.labeller for label in asked}),
        'items': len(np.unique(clusters)),
        'items_shared': len(np.unique(shared)),
        'ties': None,
    }
    if table.units and not table.are_ratings:
        result['ties'] = float((codes == TIE).sum() / (codes >= 0).sum())
    for name, coefficient in COEFFICIENTS.items():
        found = measured(coefficient, codes, clusters)
        result[name], result[f'{name}_interval'] = found
    ordinal = functools.partial(krippendorff_alpha, level='ordinal')
    found = measured(ordinal, table.graded(), clusters)
    result['alpha_ordinal'], result['alpha_ordinal_interval'] = found
    result |= ceilings(table)
    cases = _cases(items, asked, table)
    every = {name: [x for of in cases.values() for x in of[name]] for name in SHARES}
    for name in SHARES:
        result |= _share(name, every[name])
    result['by_labeller'] = rows = [
        _of_labeller(name, [x for x in asked if x.labeller == name], cases, table)
        for name in sorted({label.labeller for label in asked})
    ]
    result['never_agree'] = [
        row['labeller']
        for row in rows
        if row['others'] == 0 and row['others_count'] >= ENOUGH
    ]
    result['near_chance'] = [
        row['labeller']
        for row in rows
        if row['others_count'] >= ENOUGH_FOR_CHANCE
        and row['others_interval'][0] <= row['chance']
    ]
    return result


def ceilings(table: Answers) -> dict[str, Any]:
    """The accuracy, on single labels, of whoever knows the better completion of each
    pair: no reward model can be surely above it.

    With a the share of equal labels among those that chose, and q_i how likely a label
    of pair i is right:

    a = E[q² + (1 − q)²]   a ≤ E[max(q, 1 − q)] ≤ (1 + √(2a − 1))/2

    The right end, ``ceiling``, is reached where all pairs are equally hard; the left
    one, ``ceiling_least``, where they are either clear to all or to nobody. ½ is the
    least of either. ``ceiling_dawid_skene`` takes labellers to be of different quality
    and pairs equally hard: the mean over labels of how likely, by Dawid and Skene's
    model, the labeller names the right one. It is given for three labellers or more.

    Args:
        table: of labels; of ratings there is no ceiling.

    Returns:
        ``ceiling``, ``ceiling_interval`` (bootstrap over items), ``ceiling_least``,
        ``ceiling_dawid_skene``; None where pairs were not labelled twice.
    """
    names = ('ceiling', 'ceiling_interval', 'ceiling_least', 'ceiling_dawid_skene')
    none: dict[str, Any] = dict.fromkeys(names)
    if table.are_ratings:
        return none
    codes = np.where(table.codes() == TIE, -1, table.codes())
    equal, interval = measured(percent_agreement, codes, table.clusters)
    if equal is None:
        return none
    found = none | {'ceiling': _largest(equal), 'ceiling_least': max(equal, 0.5)}
    if interval is not None:
        found['ceiling_interval'] = [_largest(end) for end in interval]
    if len(table.labellers) > 2:
        chose = np.where(codes < 0, np.nan, codes / 2)
        weights = soft_labels(chose)
        model = dawid_skene(weights)
        right = np.einsum('uc,lcc->ul', model.posterior, model.confusion)
        found['ceiling_dawid_skene'] = float(right[codes >= 0].mean())
    return found


def _largest(equal: float) -> float:
    return (1 + math.sqrt(max(2 * equal - 1, 0))) / 2


# ------------------------------------------------------------------ single labellers


def _counts(labels: Sequence[Label]) -> dict[str, int]:
    return {
        'labels': len(labels),
        'skipped': sum(label.verdict == 'skipped' for label in labels),
        'bad': sum(label.verdict == 'bad' for label in labels),
        'flagged': sum(label.flagged for label in labels),
    }


class Case(NamedTuple):
    """What a share is the mean of."""

    item: str
    value: float  # 0 to 1


Cases = dict[str, dict[str, list[Case]]]  # by labeller and share


def _share(name: str, cases: list[Case]) -> dict[str, Any]:
    """A share with its interval and its number of cases."""
    items, values = [case.item for case in cases], [case.value for case in cases]
    return {
        name: float(np.mean(values)) if cases else None,
        f'{name}_interval': share_interval(values, items) if cases else None,
        f'{name}_count': len(cases),
    }


def _of_labeller(
    name: str,
    labels: list[Label],
    cases: Cases,
    table: Answers,
) -> dict[str, Any]:
    judged = [label for label in labels if label.verdict == 'judged']
    seconds = [label.seconds for label in labels if label.seconds is not None]
    row: dict[str, Any] = {'labeller': name, **_counts(labels)}
    row['ties'] = sum(label.probability == 0.5 for label in judged)
    row['seconds'] = float(np.median(seconds)) if seconds else None
    for share in SHARES:
        row |= _share(share, cases[name][share])
    row['chance'] = _chance(name, table)
    return row


def _chance(name: str, table: Answers) -> float | None:
    """Σ_c p(c)·p_others(c), on the questions that others have answered too."""
    own, rest, _ = _against(name, table)
    if not len(own):
        return None
    size = max(own.max(), rest.max()) + 1
    mine = np.bincount(own, minlength=size) / len(own)
    theirs = np.bincount(rest[rest >= 0], minlength=size)
    return float(mine @ theirs / theirs.sum())


def _against(name: str, table: Answers) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Codes of a labeller [V] and of the others [V, L − 1] of what both answered, and
    the V items that it is of.
    """
    if name not in table.labellers:
        return np.zeros(0, int), np.zeros((0, 0), int), []
    column, codes = table.labellers.index(name), table.codes()
    rest = np.delete(codes, column, axis=1)
    both = (codes[:, column] >= 0) & (rest >= 0).any(1)
    items = [table.units[row].item for row in np.flatnonzero(both)]
    return codes[both, column], rest[both], items


def _cases(
    items: Sequence[Item] | None, labels: Sequence[Label], table: Answers
) -> Cases:
    """Of every labeller, what the ``SHARES`` are means of."""
    known = by_name(items or ())
    firsts = {_question(x): x for x in labels if not x.repeat}
    cases: Cases = collections.defaultdict(lambda: {name: [] for name in SHARES})

    def count(label: Label, share: str, values: Iterable[float]) -> None:
        found = (Case(label.item, float(value)) for value in values)
        cases[label.labeller][share] += found

    for label in labels:
        if label.verdict != 'judged':
            continue
        item = known.get(label.item)
        if item is not None and item.known is not None and not label.repeat:
            fields = {'labeller': 'gold', **item.known, 'item': item.item}
            gold = to_label(fields, f'item {item.item!r}: known')
            if gold.dimension in (None, label.dimension):
                count(label, 'gold', _equal(label, gold))
        first = firsts.get(_question(label))
        if label.repeat and first is not None and first.verdict == 'judged':
            count(label, 'self', _equal(label, first))
        for chosen, other in _chosen(label):
            if label.order is not None:
                place = label.order.index
                count(label, 'first_shown', [place(chosen) < place(other)])
            if item is not None:
                gap = len(item.completions[chosen]) - len(item.completions[other])
                count(label, 'longer', [gap > 0] if gap else [])
    for name in table.labellers:
        own, rest, shared = _against(name, table)
        equal = (rest == own[:, None]).sum(1) / np.maximum((rest >= 0).sum(1), 1)
        cases[name]['others'] = list(map(Case, shared, equal.tolist()))
    return cases


def _question(label: Label) -> tuple[str, str, str | None]:
    return label.item, label.labeller, label.dimension


def _equal(one: Label, other: Label) -> list[float]:
    """Whether two labels of an item say the same, for every question."""
    where = f'the label of {one.item!r}'
    said, there = (dict(parts(label, None, where)) for label in (one, other))
    found = []
    for pair in said.keys() & there.keys():
        values = np.array([said[pair], there[pair]])
        codes = values if pair is None else order_codes(values)
        found.append(float(codes[0] == codes[1]))
    return found


def _chosen(label: Label) -> Iterator[tuple[int, int]]:
    """The better and the worse completion of every pair that a label decides."""
    for pair, value in parts(label, None, ''):
        if pair is not None and value != 0.5:
            yield pair if value > 0.5 else pair[::-1]
