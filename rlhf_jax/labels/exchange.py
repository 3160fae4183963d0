"""Labels in and out of a database: as they are, and as comparisons.

A file to read has labels (fields of :class:`~rlhf_jax.labels.records.Label`) or
comparisons (``prompt``, ``chosen``, ``rejected``), which are matched with the main
items by their texts. Read ``label.py`` of the package next.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data import sources
from rlhf_jax.labels.records import Item, Label, to_label
from rlhf_jax.labels.session import insert
from rlhf_jax.labels.store import LabelPlan, Store, check_fits

# Fields of a comparison that a label has by the same name.
SHARED = ('strength', 'dimension', 'repeat', 'seconds', 'flagged', 'note')


def comparisons(items: Sequence[Item], labels: Sequence[Label]) -> list[dict[str, Any]]:
    """One comparison for every label of a main item that says which completion is
    better, or that neither is (``tie``); nothing is averaged. Repeats, skipped items
    and pairs of which both are bad are left out. Of a ranking: every pair.
    """
    by_name = {item.item: item for item in items if item.purpose == 'main'}
    rows = []
    for label in labels:
        item = by_name.get(label.item)
        if item is None or label.repeat or label.verdict != 'judged':
            continue
        for first, second, probability in _pairs(label):
            if probability < 0.5:
                first, second, probability = second, first, 1 - probability
            row = {
                'prompt': item.prompt,
                'chosen': item.completions[first],
                'rejected': item.completions[second],
                'labeller': label.labeller,
                'item': item.item,
            }
            if probability == 0.5:
                row['tie'] = True
            elif probability < 1:
                row['probability'] = probability
            if item.templated:
                row['templated'] = True
            for name in SHARED:
                if getattr(label, name):
                    row[name] = getattr(label, name)
            rows.append(row)
    return rows


def _pairs(label: Label) -> list[tuple[int, int, float]]:
    """(completion, completion, how likely the first one is better)."""
    if label.probability is not None:
        return [(0, 1, float(label.probability))]
    ranks = label.ranks or ()
    return [
        (i, j, 1.0 if ranks[i] < ranks[j] else 0.5 if ranks[i] == ranks[j] else 0.0)
        for i in range(len(ranks))
        for j in range(i + 1, len(ranks))
    ]


def read_given(path: Path, items: Sequence[Item], plan: LabelPlan) -> list[Label]:
    """Labels of a file that is to be added.

    Args:
        path: JSON lines of labels, or of comparisons with ``prompt``, ``chosen``,
            ``rejected``, ``labeller`` and what else :func:`comparisons` writes.
        items: of the stage.
        plan: of the stage.

    Raises:
        ValueError: a line that is neither, of an item that the stage does not have, by
            a dimension that the plan does not have, or what ``check_fits`` refuses.
    """
    by_name = {item.item: item for item in items}
    by_text: dict[tuple[str, frozenset[str]], list[Item]] = {}
    for item in items:
        key = (json.dumps(item.prompt), frozenset(item.completions))
        if item.purpose == 'main':
            by_text.setdefault(key, []).append(item)
    labels = []
    for record in sources.read(f'jsonl:{path}'):
        fields, where = record.present, record.where
        if 'chosen' in fields:
            fields = _of_comparison(fields, by_text, where)
        label = to_label(fields, where)
        item = by_name.get(label.item)
        if item is None:
            raise ValueError(f'{where}: the stage has no item {label.item!r}')
        if label.dimension not in plan.asked:
            raise ValueError(
                f'{where}: dimension={label.dimension!r} is none of the stage, which '
                f'asks by {", ".join(map(str, plan.asked))}'
            )
        check_fits(label, item, plan, where)
        labels.append(label)
    return labels


def _of_comparison(
    fields: dict[str, Any],
    by_text: dict[tuple[str, frozenset[str]], list[Item]],
    where: str,
) -> dict[str, Any]:
    chosen, rejected = fields.get('chosen'), fields.get('rejected')
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise ValueError(f'{where}: chosen and rejected are no texts')
    key = (json.dumps(fields.get('prompt')), frozenset((chosen, rejected)))
    found = [x for x in by_text.get(key, []) if fields.get('item', x.item) == x.item]
    if len(found) != 1 or found[0].form != 'comparison':
        raise ValueError(
            f'{where}: {len(found)} items of the stage compare these texts for this '
            'prompt; give labels with the name of their item instead'
        )
    labeller = fields.get('labeller', fields.get('annotator'))
    if not isinstance(labeller, str):
        raise ValueError(f'{where}: labeller is {labeller!r}; name who chose')
    probability = fields.get('probability', 0.5 if fields.get('tie') else 1.0)
    if found[0].completions[0] != chosen and isinstance(probability, int | float):
        probability = 1 - probability
    own = {name: fields[name] for name in SHARED if name in fields}
    own |= {'item': found[0].item, 'labeller': labeller, 'probability': probability}
    return own


def _same(one: Label, other: Label) -> bool:
    """Whether two labels of a labeller say the same of a question. A comparison has no
    ``order``, and 1 − (1 − p) of it is p but for rounding.
    """

    def said(label: Label) -> tuple[Any, ...]:
        probability = label.probability
        rounded = None if probability is None else round(probability, 9)
        return label.verdict, rounded, label.ranks, label.rating, label.strength

    return said(one) == said(other)


def add_labels(store: Store, labels: Sequence[Label]) -> int:
    """Adds labels, all or none; those that are there already are left as they are, with
    their order, seconds, flags and notes.

    Returns:
        How many were added.

    Raises:
        ValueError: a label that differs from what the same labeller said there.
    """
    added = 0
    with store.transaction() as db:
        for label in labels:
            row = db.execute(
                'SELECT label FROM answers WHERE NOT undone AND labeller = ? AND '
                'item = ? AND dimension = ? AND repeat = ?',
                (label.labeller, label.item, label.dimension or '', label.repeat),
            ).fetchone()
            if row is None:
                insert(db, f'import:{secrets.token_urlsafe(12)}', label)
                db.execute(  # it is no longer asked on a page that shows it
                    'DELETE FROM shown WHERE labeller = ? AND item = ? AND '
                    'dimension = ? AND repeat = ?',
                    (label.labeller, label.item, label.dimension or '', label.repeat),
                )
                added += 1
            elif not _same(to_label(json.loads(row[0]), str(store.path)), label):
                raise ValueError(
                    f'{label.labeller!r} has another label of the item {label.item!r} '
                    f'in {store.path} already; nothing was added'
                )
    return added
