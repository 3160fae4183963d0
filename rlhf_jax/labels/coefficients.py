"""Coefficients of agreement between labellers, each with a bootstrap interval.

All take ``codes`` [U, L]: which category every labeller (column) put every unit (row)
into, −1 where they did not say. All take ``weights`` too, how often each unit counts,
[…, U], and then give […]: so a coefficient is computed of many resamples at once.
A coefficient that does not exist (nothing was labelled twice, or there is one category
alone) is NaN. Read ``agreement.py`` next.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

RESAMPLES = 1000
DIGITS = 10  # of what is reported: the last ones depend on where arrays lie
AT_ONCE = 2_000_000  # weights of resamples that are held in memory together

Level = Literal['nominal', 'ordinal']


def percent_agreement(
    codes: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Share of the pairs of labels of the same unit that are equal.

    Args:
        codes: [U, L].
        weights: […, U]; None counts every unit once.

    Returns:
        […].
    """
    weights, (size, equal) = _weights(codes, weights), _pairs(codes)
    return _ratio(weights @ equal, weights @ (size * (size - 1)))


def cohen_kappa(codes: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Cohen's κ of two labellers, on the units that both have labelled.

    κ = (p_o − p_e)/(1 − p_e),   p_e = Σ_c p_1(c)·p_2(c)

    **Source** Cohen 1960, Educational and Psychological Measurement 20. With more than
    two labellers the mean over all pairs of them (Light 1971, Psychological Bulletin
    76), weighted by the units that a pair shares; pairs of which there is no κ are left
    out.

    Args:
        codes: [U, L].
        weights: as in :func:`percent_agreement`.
    """
    weights = _weights(codes, weights)
    total = shared = np.zeros(weights.shape[:-1])
    for one, other in itertools.combinations(codes.T, 2):
        both = (one >= 0) & (other >= 0)
        drawn, size = weights[..., both], codes.max(initial=0) + 1
        of_one, of_other = (
            drawn @ _counts(column[both, None], size) for column in (one, other)
        )
        count = drawn.sum(-1)
        observed = drawn @ (one == other)[both]
        expected = _ratio((of_one * of_other).sum(-1), count)
        kappa = _ratio(observed - expected, count - expected)
        total = total + np.where(np.isfinite(kappa), count * kappa, 0)
        shared = shared + np.where(np.isfinite(kappa), count, 0)
    return _ratio(total, shared)


def fleiss_kappa(codes: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Fleiss' κ, for which it does not matter who gave which label.

    κ = (P̄ − P_e)/(1 − P_e),   P_e = Σ_c p_c²

    P̄ is the mean over units of the share of equal pairs, p_c the share of category c.

    **Source** Fleiss 1971, Psychological Bulletin 76. **Deviations** units may have
    different numbers of labels; those with fewer than two are left out.

    Args:
        codes: [U, L].
        weights: as in :func:`percent_agreement`.
    """
    codes, weights = _several(codes, _weights(codes, weights))
    size, equal = _pairs(codes)
    observed = _ratio(weights @ (equal / (size * (size - 1))), weights.sum(-1))
    shares = _ratio(weights @ _counts(codes), (weights @ size)[..., None])
    expected = (shares**2).sum(-1)
    return _ratio(observed - expected, 1 - expected)


def krippendorff_alpha(
    codes: np.ndarray, level: Level, weights: np.ndarray | None = None
) -> np.ndarray:
    """Krippendorff's α, which takes any number of labels of a unit.

    α = 1 − D_o/D_e,   D_o = 1/n·Σ_ck o_ck·δ²_ck,   D_e = 1/(n(n−1))·Σ_ck n_c·n_k·δ²_ck

    o is the matrix of coincidences, n_c its sums. δ² is 1 for two different nominal
    categories; of ordinal ones (Σ_{g=c..k} n_g − (n_c + n_k)/2)².

    **Source** Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".

    Args:
        codes: [U, L]; ordinal categories in their order.
        level: 'nominal' or 'ordinal'.
        weights: as in :func:`percent_agreement`.
    """
    codes, weights = _several(codes, _weights(codes, weights))
    size, equal = _pairs(codes)
    counts = weights @ _counts(codes)  # […, C] n_c
    total = counts.sum(-1)
    if level == 'nominal':
        seen = weights @ ((size * (size - 1) - equal) / (size - 1))
        chance = total**2 - (counts**2).sum(-1)
        return 1 - _ratio(seen * (total - 1), chance)
    # δ²_ck = (m_c − m_k)², and Σ_ij (m_i − m_j)² = 2·(n·Σ m² − (Σ m)²) for n numbers.
    middle = np.cumsum(counts, -1) - counts / 2
    sums = squares = np.zeros(weights.shape)
    for column in codes.T:
        m = np.where(column >= 0, middle[..., column], 0)
        sums, squares = sums + m, squares + m**2
    seen = (weights * (size * squares - sums**2) / (size - 1)).sum(-1)
    chance = total * (counts * middle**2).sum(-1) - (counts * middle).sum(-1) ** 2
    return 1 - _ratio(seen * (total - 1), chance)


def bootstrap_interval(
    coefficient: Callable[[np.ndarray], np.ndarray],
    clusters: np.ndarray,
    seed: int = 0,
) -> list[float] | None:
    """95% percentile interval over resampled items.

    The units of an item are drawn together: the pairs of a ranking are not independent.

    Args:
        coefficient: weights [R, U] -> [R].
        clusters: [U] int, the item of each unit.
        seed: of the resamples.

    Returns:
        Its ends; None where fewer than two items were labelled, or the coefficient
        exists in no resample.
    """
    items = int(clusters.max(initial=-1)) + 1
    if items < 2:
        return None
    rng, found = np.random.default_rng(seed), []
    step = max(AT_ONCE // len(clusters), 1)
    for first in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - first)
        drawn = rng.integers(items, size=(size, items))
        drawn += items * np.arange(size)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=size * items)
        weights = counts.reshape(size, items)[:, clusters].astype(float)
        found.append(coefficient(weights))
    values = np.concatenate(found)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    return [round(float(x), DIGITS) for x in np.quantile(values, [0.025, 0.975])]


def measured(
    coefficient: Callable[..., np.ndarray], codes: np.ndarray, clusters: np.ndarray
) -> tuple[float | None, list[float] | None]:
    """A coefficient and its bootstrap interval; None where it does not exist.

    Args:
        coefficient: (codes, weights=…) -> […].
        codes: [U, L].
        clusters: as in :func:`bootstrap_interval`.
    """
    value = float(coefficient(codes)) if len(codes) else math.nan
    if not math.isfinite(value):
        return None, None
    over = functools.partial(coefficient, codes)
    return round(value, DIGITS), bootstrap_interval(lambda w: over(weights=w), clusters)


def share_interval(values: Sequence[float], items: Sequence[str]) -> list[float]:
    """95% Wilson interval of a share whose cases within an item are not independent, as
    the pairs of a ranking are not.

    Of N cases x_ij of I items with the mean p, as many count as independent ones with
    the same variance of p would be:

    n = min(N, p(1 − p)/V),   V = I/(I − 1)·Σ_i (Σ_j (x_ij − p))²/N²

    With one case for every item n is N, and where V is 0 (all are equal) it is I.

    **Source** Korn & Graubard 1998, Survey Methodology 24 (there with the interval of
    Clopper and Pearson).

    Args:
        values: [N] 0 to 1, N ≥ 1.
        items: [N], what each is of.
    """
    value, number = np.asarray(values, float), np.unique(items, return_inverse=True)[1]
    share, cases, count = float(value.mean()), len(value), int(number.max()) + 1
    if count == cases:
        return wilson(share, cases)
    residual = np.bincount(number, value - share)
    variance = count / max(count - 1, 1) * float(residual @ residual) / cases**2
    equal = variance < 1e-12  # but for rounding
    independent = count if equal else share * (1 - share) / variance
    return wilson(share, min(cases, round(independent, DIGITS)))


def wilson(share: float, count: float) -> list[float]:
    """95% Wilson interval of a share of ``count`` ≥ 1 cases.

    **Source** Wilson 1927, JASA 22.
    """
    z = 1.959963984540054
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return [max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)]


def _counts(codes: np.ndarray, size: int | None = None) -> Any:
    """[U, C] labels of each category; sparse, since ratings may all be different."""
    from scipy import sparse  # slow to import

    unit, labeller = np.nonzero(codes >= 0)
    size = codes.max(initial=0) + 1 if size is None else size
    ones = np.ones(len(unit))
    shape = len(codes), size
    return sparse.csr_matrix((ones, (unit, codes[unit, labeller])), shape)


def _pairs(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[U] labels, and ordered pairs of equal labels, of every unit."""
    equal = np.zeros(len(codes))
    for one, other in itertools.combinations(codes.T, 2):
        equal += 2 * ((one == other) & (one >= 0))
    return (codes >= 0).sum(1).astype(float), equal


def _several(codes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Units with two labels or more."""
    several = (codes >= 0).sum(1) >= 2
    return codes[several], weights[..., several]


def _weights(codes: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    return np.ones(len(codes)) if weights is None else np.asarray(weights, float)


def _ratio(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """one/other; NaN where the other is 0 but for rounding."""
    small = np.abs(other) < 1e-12
    return np.where(small, np.nan, one / np.where(small, 1, other))
