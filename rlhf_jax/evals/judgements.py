"""How good a reward model is on rankings, ratings and steps.

Each report is the ``rm/eval.json`` of its kind of data; comparisons are in
``preference.py``. Read ``evals/policy.py`` next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.evals.preference import agreement, pair_losses, preference_report
from rlhf_jax.types import Array, JudgedBatch, Params

RESAMPLES = 2000


def score_steps(
    compiled: Callable[[Params, JudgedBatch], Array],
    params: Params,
    batches: Iterable[JudgedBatch],
) -> list[np.ndarray]:
    """Scores at the ends of the steps, [S] for every response."""
    rows = []
    for batch in batches:
        scores, ends = np.asarray(compiled(params, batch)), np.asarray(batch.judged)
        real = np.asarray(batch.weight) > 0
        rows += [row[end] for row, end in zip(scores[real], ends[real])]
    return rows


def clustered_interval(
    hits: Sequence[float], counts: Sequence[float], seed: int = 0
) -> list[float]:
    """95% percentile bootstrap interval of Σ hits / Σ counts over whole groups.

    What was judged together (the pairs of a prompt, the steps of a response) is drawn
    together, because it is not independent.

    Args:
        hits: [N] of every group.
        counts: [N] likewise.
        seed: of the resamples.
    """
    hits, counts = np.asarray(hits, float), np.asarray(counts, float)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(hits), np.full(len(hits), 1 / len(hits)), RESAMPLES)
    total = drawn @ counts
    share = (drawn @ hits)[total > 0] / total[total > 0]
    return [float(x) for x in np.quantile(share, [0.025, 0.975])]


def ranking_report(
    scores: np.ndarray,
    ranks: np.ndarray,
    lengths: np.ndarray,
    gold: np.ndarray | None = None,
    heads: Sequence[str] = (),
    probability: np.ndarray | None = None,
) -> dict[str, Any]:
    """The numbers of a reward model on held-out rankings.

    All pairs of texts with an order, of all heads, are reported as comparisons are,
    each with the same weight; the interval is over prompts. Kendall's τ_b is the mean
    over rankings that have an order. Pairs with the virtual response count in the loss
    and in τ_b, and are reported by themselves: is a text on its side of 0?

    Args:
        scores: [N, K, H].
        ranks: [N, K, H], 1 is the best, equal is a tie, −1 is not ranked.
        lengths: [N, K] response tokens, 0 of the virtual response.
        gold: [N, K] true rewards where they are known.
        heads: their names, where there are several.
        probability: [N] of comparisons among them, see :func:`preference_report`.

    Returns:
        The fields of ``preference_report``, and more; where there is a virtual response
        also ``sign_accuracy``, ``sign_interval`` over prompts, and ``sign_baseline``,
        the share of the more frequent side.
    """
    from scipy import stats  # slow to import

    i, j = np.triu_indices(ranks.shape[1], 1)
    known = (ranks[:, i] > 0) & (ranks[:, j] > 0)  # [N, pairs, H]
    tied = known & (ranks[:, i] == ranks[:, j])
    decided = known & ~tied
    n, pair, h = np.nonzero(decided)
    first = ranks[n, i[pair], h] < ranks[n, j[pair], h]
    better = np.where(first, i[pair], j[pair])
    worse = np.where(first, j[pair], i[pair])

    def both(x: np.ndarray, *rest: np.ndarray) -> np.ndarray:
        return np.stack([x[n, better, *rest], x[n, worse, *rest]], axis=-1)

    chosen, tokens = both(scores, h), both(lengths)
    right = np.zeros(decided.shape)
    p = None if probability is None else probability[n]
    right[n, pair, h] = agreement(chosen[:, 0] - chosen[:, 1], p)
    texts = (tokens > 0).all(-1)
    report = preference_report(
        chosen[texts],
        tokens[texts],
        None if gold is None else both(gold)[texts],
        probability=None if p is None else p[texts],
    )
    report['loss'] = float(pair_losses(chosen[:, 0] - chosen[:, 1], p).mean())
    signs = decided & ((lengths[:, i] == 0) | (lengths[:, j] == 0))[..., None]
    decided = decided & ~signs
    counts = decided.sum((1, 2))
    report['interval'] = clustered_interval((right * decided).sum((1, 2)), counts)
    if signs.any():
        above = float((tokens[~texts, 1] == 0).mean())
        hits, of = (right * signs).sum((1, 2)), signs.sum((1, 2))
        report['sign_accuracy'] = float(hits.sum() / of.sum())
        report['sign_interval'] = clustered_interval(hits, of)
        report['sign_baseline'] = max(above, 1 - above)
    report['kind'], report['rankings'] = 'rankings', len(ranks)
    report['ties'] = float(tied.sum() / known.sum())
    taus = [
        stats.kendalltau(-r[r > 0], s[r > 0]).statistic
        for row, values in zip(ranks, scores)
        for r, s in zip(row.T, values.T)
        if (r > 0).sum() > 1 and r[r > 0].max() > 1
    ]
    # Equal scores have no order: τ is not defined there, and 0 is what it says.
    report['kendall_tau'] = float(np.mean(np.nan_to_num(taus)))
    if heads:
        report['by_head'] = [
            _of_head(head, right[..., k][decided[..., k]])
            for k, head in enumerate(heads)
        ]
    return report


def _of_head(head: str, right: np.ndarray) -> dict[str, Any]:
    accuracy = float(right.sum() / len(right)) if len(right) else None
    return {'head': head, 'pairs': len(right), 'accuracy': accuracy}


def rating_report(
    scores: np.ndarray, ratings: np.ndarray, rated: np.ndarray, heads: Sequence[str]
) -> dict[str, Any]:
    """The numbers of a reward model on held-out ratings.

    The baseline is the error of the mean of these very ratings. A correlation with a
    constant does not exist: None.

    Args:
        scores: [N, H].
        ratings: [N, H] in the unit of training.
        rated: [N, H] bool, there is a rating.
        heads: their names; () for a single score.

    Returns:
        ``ratings``, ``loss`` (mean squared error over all), ``rmse``, ``baseline_rmse``
        and ``by_head`` with Pearson's r and its 95% interval, Spearman's ρ, and errors.
    """
    from scipy import stats  # slow to import

    rows = []
    for k, head in enumerate(heads or ('score',)):
        x, y = scores[rated[:, k], k], ratings[rated[:, k], k]
        row = {
            'head': head,
            'ratings': len(x),
            'rmse': float(np.sqrt(np.mean((x - y) ** 2))),
            'baseline_rmse': float(y.std()),
            'pearson': None,
            'interval': [None, None],
            'spearman': None,
        }
        if len(x) > 3 and np.ptp(x) > 0 and np.ptp(y) > 0:
            pearson = stats.pearsonr(x, y)
            row['pearson'] = float(pearson.statistic)
            row['interval'] = [float(end) for end in pearson.confidence_interval()]
            row['spearman'] = float(stats.spearmanr(x, y).statistic)
        rows.append(row)
    squares = np.square(scores - ratings)[rated]
    spread = np.sum([row['ratings'] * row['baseline_rmse'] ** 2 for row in rows])
    return {
        'kind': 'ratings',
        'ratings': len(squares),
        'loss': float(squares.mean()),
        'rmse': float(np.sqrt(squares.mean())),
        'baseline_rmse': float(np.sqrt(spread / len(squares))),
        'by_head': rows,
    }


def step_report(
    scores: Sequence[np.ndarray], right: Sequence[np.ndarray]
) -> dict[str, Any]:
    """The numbers of a process reward model on held-out responses.

    A step is found wrong where its score is 0 or less. The first error of a response is
    found where the first step found wrong is the first one labelled so.

    Args:
        scores: [S] of every response, log-odds.
        right: [S] bool of every response.

    Returns:
        ``steps``, ``accuracy`` with its interval over responses, ``majority_baseline``,
        ``loss``, ``first_error_found`` (of responses with an error), ``faultless_kept``
        (of those without).
    """
    hits = [(s > 0) == r for s, r in zip(scores, right)]
    counts = [len(r) for r in right]
    flat, labels = np.concatenate(scores), np.concatenate(right)
    found = [_first_wrong(s > 0) == _first_wrong(r) for s, r in zip(scores, right)]
    faultless = np.asarray([bool(r.all()) for r in right])
    found = np.asarray(found)
    return {
        'kind': 'steps',
        'responses': len(right),
        'steps': len(labels),
        'accuracy': float(np.concatenate(hits).mean()),
        'interval': clustered_interval([h.sum() for h in hits], counts),
        'majority_baseline': float(max(labels.mean(), 1 - labels.mean())),
        'loss': float(np.logaddexp(0, np.where(labels, -flat, flat)).mean()),
        'first_error_found': _mean(found[~faultless]),
        'faultless_kept': _mean(found[faultless]),
    }


def _first_wrong(right: np.ndarray) -> int | None:
    places = np.flatnonzero(~right)
    return int(places[0]) if len(places) else None


def _mean(x: np.ndarray) -> float | None:
    return float(x.mean()) if len(x) else None
