"""Best-of-n from more samples than n: what it gains, how often it wins, its KL.

N ≥ n scored samples of a prompt say what the best of n would be, for every n at once:
all C(N, n) subsets are averaged in closed form. Samples of equal proxy score stand in
any order with equal probability, as if ties were broken by a coin; the averages over
those orders are exact too. NumPy and float64: binomials are ratios of large numbers.
Read ``evals/best_of_n.py`` next.
"""

from __future__ import annotations

import math

import numpy as np


def best_of_n_weights(proxy: np.ndarray, n: int) -> np.ndarray:
    """Probability that a sample is the best of n drawn from all N without replacement.

    w_i = [C(u_i, n) − C(l_i, n)] / [C(N, n)·(u_i − l_i)], with l_i samples below i and
    u_i samples not above it. Without ties this is C(rank_i − 1, n − 1)/C(N, n).

    Source: Nakano et al. 2021 (WebGPT), arXiv 2112.09332, appendix I; used by Gao et
        al. 2022, arXiv 2210.10760. Ties: ours.

    Args:
        proxy: [P, N] scores that choose.
        n: 1 to N.

    Returns:
        [P, N] float64, rows sum to 1.

    Raises:
        ValueError: n out of range, or scores that are not finite.
    """
    from scipy import stats  # as slow to import as this package

    size = _check(proxy, n)
    lower = stats.rankdata(proxy, 'min', axis=-1).astype(int) - 1
    upper = stats.rankdata(proxy, 'max', axis=-1).astype(int)
    total = math.comb(size, n)
    share = np.asarray([math.comb(k, n) / total for k in range(size + 1)])
    return (share[upper] - share[lower]) / (upper - lower)


def best_of_n_mean(proxy: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Unbiased estimate of E[value of the best of n by proxy], per prompt.

    Source: see :func:`best_of_n_weights`.

    Args:
        proxy: [P, N] scores that choose.
        values: [P, N] what the chosen sample is worth: the proxy itself, or gold.
        n: 1 to N; 1 gives the mean, N the value at the maximum.

    Returns:
        [P] float64.
    """
    return np.sum(best_of_n_weights(proxy, n) * values, axis=-1)


def best_of_n_win_rate(proxy: np.ndarray, gold: np.ndarray, n: int) -> np.ndarray:
    """Unbiased estimate of P(gold of the best of n > gold of one more sample).

    The mean over all subsets of n and all opponents outside of the subset; equal gold
    counts as half. A candidate of rank r is the best of C(r − 1, n − 1) subsets without
    an opponent above it, and of C(r − 2, n − 1) without one below it. Where gold is the
    proxy and there are no ties, it is n/(n + 1).

    Source: the same counting as Nakano et al. 2021, arXiv 2112.09332, appendix I;
        n/(n + 1) as the upper bound: Beirami et al. 2024, arXiv 2401.01879.

    Args:
        proxy: [P, N] scores that choose.
        gold: [P, N] scores that judge.
        n: 1 to N − 1: the opponent is a sample that was not among the n.

    Returns:
        [P] float64.

    Raises:
        ValueError: n out of range, or scores that are not finite.
    """
    size = _check(proxy, n)
    if n == size:
        raise ValueError(
            f'n={n} of {size} samples leaves none to compare with; draw more than n'
        )
    rank = np.arange(1, size + 1)
    above = np.asarray([math.comb(r - 1, n - 1) for r in rank], float)
    below = np.asarray([math.comb(r - 2, n - 1) if r > 1 else 0 for r in rank], float)
    count = np.where(rank > rank[:, None], above[:, None], below[:, None])
    np.fill_diagonal(count, 0)
    count /= math.comb(size, n) * (size - n)

    def one(proxy: np.ndarray, gold: np.ndarray) -> float:
        order = np.argsort(proxy)
        proxy, gold = proxy[order], gold[order]
        # Equal proxies may stand in any order: average over the places they may take.
        tied = (proxy[:, None] == proxy).astype(float)
        places = tied.sum(-1)
        pairs = places[:, None] * (places - tied)
        chance = tied @ count @ tied / np.maximum(pairs, 1)
        np.fill_diagonal(chance, 0)
        won = (gold[:, None] > gold) + (gold[:, None] == gold) / 2
        return np.sum(chance * won)

    return np.asarray([one(*row) for row in zip(proxy, np.asarray(gold))])


def best_of_n_kl_bound(n: int) -> float:
    """Upper bound on KL(best of n ‖ the policy sampled from), nats: log n − (n − 1)/n.

    An equality only where no two samples can tie: a response, or a score, that has a
    probability of its own makes the KL smaller (of a policy with two responses it never
    exceeds log 2).

    Source: Stiennon et al. 2020, arXiv 2009.01325, and Hilton & Gao 2022,
        https://openai.com/research/measuring-goodharts-law, as an equality; that it is
        a bound: Beirami et al. 2024, arXiv 2401.01879.
    """
    return math.log(n) - (n - 1) / n


def best_of_n_kl(
    proxy: np.ndarray, logps: np.ndarray, texts: np.ndarray, n: int
) -> np.ndarray:
    """Estimate of KL(best of n ‖ the policy sampled from), per prompt, nats.

    Let F be the probability of a score below that of y, and p the probability of the
    score itself. The best of n has it with probability (F + p)ⁿ − Fⁿ, so that

    KL = log n − (n − 1)/n − E[g(n·log(1 + p/F))],
    g(x) = log n + log(1 − e^(−x/n)) − log(1 − e^−x) − (1 − 1/n)·(1 − x/(eˣ − 1)),

    where g is the part of the bound that stays inside of a score, 0 at x = 0. The mean
    over the best of n is :func:`best_of_n_mean`; p is the sum over the distinct texts
    that were seen with that score; F is (1 − p)·(k + ½)/(m + 1), with k of the m other
    samples below.

    Source: ours, from the distribution of the best of n in Beirami et al. 2024, arXiv
        2401.01879, who estimate the KL from p alone, as if y were the best response.
    Deviations: consistent, not unbiased; texts of a score that were never drawn are
        missing in p, so that it errs towards the bound.

    Args:
        proxy: [P, N] scores that choose.
        logps: [P, N] log-probability of the response under the policy, nats.
        texts: [P, N] int, equal where the responses to a prompt are.
        n: 1 to N.

    Returns:
        [P] float64, from 0 to the bound.
    """
    weights = best_of_n_weights(proxy, n)

    def lost(row: int) -> float:
        _, level = np.unique(proxy[row], return_inverse=True)
        _, first = np.unique(texts[row], return_index=True)
        mass = np.bincount(level[first], np.exp(logps[row][first]), level.max() + 1)
        # Not 0 and not 1, which float sums may reach: both sides of a log stay open.
        mass = np.clip(mass, 1e-200, 1 - 1e-9)
        counts = np.bincount(level)
        below, others = np.cumsum(counts) - counts, counts.sum() - counts
        under = (1 - mass) * (below + 0.5) / (others + 1)
        inside = _inside(n * np.log1p(mass / under), n)
        return np.sum(np.bincount(level, weights[row]) * inside)

    rows = np.asarray([lost(row) for row in range(len(proxy))])
    bound = best_of_n_kl_bound(n)
    return np.clip(bound - rows, 0, bound)


def _inside(x: np.ndarray, n: int) -> np.ndarray:
    """g of :func:`best_of_n_kl`: KL of the density ∝ u^(n−1) from the uniform one on an
    interval whose ends have the ratio e^(x/n).
    """
    atom = np.log(n) + np.log(-np.expm1(-x / n)) - np.log(-np.expm1(-x))
    # Beyond 500 the last term is 0 in any case, and exp overflows.
    return atom - (1 - 1 / n) * (1 - x / np.expm1(np.minimum(x, 500)))


def _check(proxy: np.ndarray, n: int) -> int:
    """N of scores [P, N]; refuses an n that is not in 1 to N."""
    if np.ndim(proxy) != 2:
        raise ValueError(f'scores of shape {np.shape(proxy)}; give [prompts, samples]')
    size = np.shape(proxy)[1]
    if not 1 <= n <= size:
        raise ValueError(f'n={n} of {size} samples per prompt; use 1 to {size}')
    if bad := np.sum(~np.isfinite(proxy)):
        raise ValueError(f'{bad} of {np.size(proxy)} scores are not finite')
    return size
