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


def proportion_interval(successes: float, trials: int) -> list[float]:
    """95% Wilson interval of a proportion. Of numbers between 0 and 1 in the place of
    successes, whose sum is no whole number, it is at least as wide as it has to be.
    """
    from scipy import stats  # slow to import

    if float(successes).is_integer():
        test = stats.binomtest(int(successes), trials)
        interval = test.proportion_ci(method='wilson')
        return [float(interval.low), float(interval.high)]
    z, share = float(stats.norm.ppf(0.975)), successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = np.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    half *= z / (1 + z**2 / trials)
    return [float(centre - half), float(centre + half)]


def agreement(
    gap: np.ndarray,
    probability: np.ndarray | None = None,
    tied: np.ndarray | None = None,
) -> np.ndarray:
    """How often every label agrees with a model, those of ties left out.

    Args:
        gap: [N] what the model says of the chosen less the rejected text.
        probability: [N] that the chosen text is the better one; None: all are certain.
        tied: [N] bool, which pairs are ties; None for none.

    Returns:
        [≤ N]: whether the gap is above 0; with probabilities p where it is above 0,
        1 − p where it is below, and ½ where it is 0.
    """
    if probability is None:
        return gap > 0
    expected = np.where(gap > 0, probability, np.where(gap < 0, 1 - probability, 0.5))
    return expected if tied is None else expected[~tied]


def pair_losses(gap: np.ndarray, probability: np.ndarray | None = None) -> np.ndarray:
    """The Bradley–Terry loss of every pair [N], nats; arguments as of
    :func:`agreement`.
    """
    loss = np.logaddexp(0, -gap)
    if probability is None:
        return loss
    return probability * loss + (1 - probability) * np.logaddexp(0, gap)


def preference_report(
    scores: np.ndarray,
    lengths: np.ndarray,
    gold: np.ndarray | None = None,
    kinds: Sequence[str] | None = None,
    probability: np.ndarray | None = None,
    tied: np.ndarray | None = None,
) -> dict[str, Any]:
    """The numbers of a reward model on held-out comparisons.

    Accuracy is strict, equal scores are an error. The length baseline prefers the
    longer text and tosses a coin on equal lengths. The ceiling is the accuracy of the
    true order on the same (noisy) labels, ties again counted as half.

    With probabilities, accuracy and baselines are the agreement that is expected with a
    label drawn from them, equal scores counting ½, and ``label_ceiling`` is that of the
    likelier order. Ties count in the loss, as labels of one half, and in nothing else.

    Args:
        scores: [N, 2] of chosen and rejected.
        lengths: [N, 2] response tokens.
        gold: [N, 2] true rewards where they are known.
        kinds: N names, where the records name the kind of their pair; accuracy is then
            given for each.
        probability: [N] that the chosen text is the better one; None: all are certain.
        tied: [N] bool, which pairs are ties; None for none.

    Returns:
        The fields of ``rm/eval.json``.
    """
    gap = scores[:, 0] - scores[:, 1]
    loss, more = float(pair_losses(gap, probability).mean()), {}
    if tied is not None:
        more['ties'] = float(tied.mean())
        gap, lengths, probability = (x[~tied] for x in (gap, lengths, probability))
        gold = None if gold is None else gold[~tied]
        kinds = None if kinds is None else np.asarray(kinds)[~tied]
    right = agreement(gap, probability)
    longer = lengths[:, 0] - lengths[:, 1]
    if probability is not None:
        more['label_ceiling'] = float(np.maximum(probability, 1 - probability).mean())
    report = {
        'accuracy': float(right.mean()),
        'interval': proportion_interval(right.sum(), len(right)),
        'pairs': len(right),
        'loss': loss,
        'length_baseline': _baseline(longer, probability),
        'by_margin': _binned(np.abs(gap), right, MARGINS),
        'by_length_difference': _binned(longer, right, LENGTHS),
        'calibration': _calibration(gap, right),
        **more,
    }
    if gold is not None:
        order = gold[:, 0] - gold[:, 1]
        report['accuracy_ceiling'] = _baseline(order, probability)
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


def _baseline(order: np.ndarray, probability: np.ndarray | None) -> float:
    """The accuracy of an order that is given, which tosses a coin where it is 0."""
    if probability is None:
        return float((order > 0).mean() + (order == 0).mean() / 2)
    return float(agreement(order, probability).mean())


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


def _calibration(
    gap: np.ndarray, right: np.ndarray, bins: int = 8
) -> list[dict[str, Any]]:
    """Predicted against observed, for the preferred text of each pair, in equal-sized
    bins.

    The model's claim is σ(|Δ|) for the text it prefers; ``right`` says how far it is.
    """
    claim = 1 / (1 + np.exp(-np.abs(gap)))
    order = np.argsort(claim, kind='stable')
    return [
        {
            'predicted': float(claim[part].mean()),
            'observed': float(right[part].mean()),
            'count': len(part),
        }
        for part in np.array_split(order, bins)
        if len(part)
    ]
