"""How good a reward model is: accuracy, by margin and by length, calibration,
baselines.

Read ``evals/policy.py`` next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.types import Array, JudgedBatch, Params

KINDS = {'inputs': ('params', 'batch'), 'outputs': ('batch',), 'donate': ()}

MARGINS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, np.inf)  # reward units
LENGTHS = (-np.inf, -10, -5, -1, 0, 1, 5, 10, np.inf)  # tokens, chosen minus rejected


def score_pairs(
    compiled: Callable[..., Array],
    params: Params,
    batches: Iterable[JudgedBatch],
    *frozen: Params,
) -> np.ndarray:
    """Scores of all pairs by ``compiled(params, batch, *frozen)``, [N, 2] float32; rows
    that only fill a batch are left out.
    """
    rows = []
    for batch in batches:
        scores = np.asarray(compiled(params, batch, *frozen))
        rows.append(scores[np.asarray(batch.weight) > 0])
    return np.concatenate(rows)


def proportion_interval(successes: int, trials: int) -> list[float]:
    """95% Wilson interval of a proportion."""
    from scipy import stats  # slow to import

    interval = stats.binomtest(successes, trials).proportion_ci(method='wilson')
    return [float(interval.low), float(interval.high)]


def preference_report(
    scores: np.ndarray,
    lengths: np.ndarray,
    gold: np.ndarray | None = None,
    kinds: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The numbers of a reward model on held-out comparisons.

    Accuracy is strict, a tie is an error. The length baseline prefers the longer text
    and tosses a coin on equal lengths. The ceiling is the accuracy of the true order on
    the same (noisy) labels, ties again counted as half.

    Args:
        scores: [N, 2] of chosen and rejected.
        lengths: [N, 2] response tokens.
        gold: [N, 2] true rewards where they are known.
        kinds: N names, where the records name the kind of their pair; accuracy is then
            given for each.

    Returns:
        The fields of ``rm/eval.json``.
    """
    gap = scores[:, 0] - scores[:, 1]
    right = gap > 0
    longer = lengths[:, 0] - lengths[:, 1]
    report = {
        'accuracy': float(right.mean()),
        'interval': proportion_interval(int(right.sum()), len(right)),
        'pairs': len(right),
        'loss': float(np.logaddexp(0, -gap).mean()),
        'length_baseline': float((longer > 0).mean() + (longer == 0).mean() / 2),
        'by_margin': _binned(np.abs(gap), right, MARGINS),
        'by_length_difference': _binned(longer, right, LENGTHS),
        'calibration': _calibration(gap),
    }
    if gold is not None:
        order = gold[:, 0] - gold[:, 1]
        report['accuracy_ceiling'] = float((order > 0).mean() + (order == 0).mean() / 2)
        report['gold_agreement'] = float(
            (np.sign(gap) == np.sign(order))[order != 0].mean()
        )
    if kinds is not None:
        named = np.asarray(kinds)
        report['by_kind'] = [
            {
                'kind': kind,
                'count': int((named == kind).sum()),
                'accuracy': float(right[named == kind].mean()),
            }
            for kind in sorted(set(kinds))
        ]
    return report


def _binned(
    x: np.ndarray, right: np.ndarray, edges: Sequence[float]
) -> list[dict[str, Any]]:
    rows = []
    for low, high in zip(edges, edges[1:]):
        inside = (x >= low) & (x < high)
        rows.append(
            {
                'lo': float(low) if np.isfinite(low) else None,
                'hi': float(high) if np.isfinite(high) else None,
                'count': int(inside.sum()),
                'accuracy': float(right[inside].mean()) if inside.any() else None,
            }
        )
    return rows


def _calibration(gap: np.ndarray, bins: int = 8) -> list[dict[str, Any]]:
    """Predicted against observed, for the preferred text of each pair, in equal-sized
    bins.

    The model's claim is σ(|Δ|) for the text it prefers; it is right where Δ > 0.
    """
    claim = 1 / (1 + np.exp(-np.abs(gap)))
    order = np.argsort(claim, kind='stable')
    return [
        {
            'predicted': float(claim[part].mean()),
            'observed': float((gap[part] > 0).mean()),
            'count': len(part),
        }
        for part in np.array_split(order, bins)
        if len(part)
    ]
