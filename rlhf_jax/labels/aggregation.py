"""Labels of the same items become one comparison, or one rating, each.

    none            every label stays by itself
    majority        what most say; a tie where two answers are as frequent
    share           the mean of what was said, as a probability
    dawid_skene     posterior of the answer, by how often each labeller errs
    bradley_terry   utilities of completions, and a temperature for each labeller

Everything is deterministic. The first answer of a labeller counts, repeats do not.
Read ``records.py`` for the labels, ``units.py`` for the table of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from rlhf_jax.labels.records import Item, Label
from rlhf_jax.labels.units import Answers, answers, by_name, check_known

Method = Literal['none', 'majority', 'share', 'dawid_skene', 'bradley_terry']
METHODS = get_args(Method)

# How labellers are, before anything is known: pseudo-counts of every row of a confusion
# matrix, so that a labeller with few labels is taken for somewhat better than chance.
RIGHT, WRONG = 2.0, 1.0
MOST_ROUNDS, SMALL = 500, 1e-9  # of EM; the change of posteriors that ends it
DIGITS = 9  # of a probability
SPREAD = 1.5  # standard deviation of log(1/τ) before anything is known
LARGEST = 5.0  # of |log(1/τ)|
NODES = 40  # of the quadrature over the difference of two utilities


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What labels of an item say together: of two of its completions which is better,
    or of one how good it is.
    """

    item: str
    pair: tuple[int, int] | None  # the completions; None of a rating
    probability: float | None = None  # that the first of the pair is the better one
    tie: bool = False  # judged equal; the probability is then ½
    rating: float | None = None
    labels: int = 1  # how many there were
    labeller: str | None = None  # of a label by itself
    dimension: str | None = None


class Confusions(NamedTuple):
    """What Dawid and Skene's model says of pairs and labellers."""

    posterior: np.ndarray  # [U, C] of the answer
    confusion: np.ndarray  # [L, C, C] p(label | answer) of every labeller
    prior: np.ndarray  # [C] how frequent the answers are


class Utilities(NamedTuple):
    """What the Bradley–Terry model says of pairs and labellers."""

    probability: np.ndarray  # [U] that the median labeller says the first is better
    temperature: np.ndarray  # [L] of every labeller


def aggregate(
    items: Sequence[Item],
    labels: Sequence[Label],
    method: Method,
) -> list[Judgement]:
    """One judgement of every pair of completions that somebody judged, in the order of
    the items; of a ranking one for every two of its completions.

    Ratings are averaged by 'majority' and 'share'; the models are of comparisons.

    Args:
        items: that were labelled.
        labels: of them; skipped items and those called bad say nothing.
        method: see the module docstring.

    Raises:
        ValueError: an unknown method, labels of unknown items, ratings for a model of
            comparisons, or what ``units.answers`` refuses.
    """
    if method not in METHODS:
        raise ValueError(f'method={method!r}; use {", ".join(map(repr, METHODS))}')
    check_known(items, labels)
    table = answers(labels, items)
    if method == 'none':
        return _single(table)
    if table.are_ratings:
        if method in ('dawid_skene', 'bradley_terry'):
            raise ValueError(
                f'method={method!r} is for comparisons, and there are ratings; use '
                "'share' (their mean) or 'none'"
            )
        return _together(table, {'rating': np.nanmean(table.values, axis=1).tolist()})
    probability, tie = _pairs(items, table, method)
    # The last digits of a model depend on where its arrays lie in memory.
    probability = np.round(probability, DIGITS).tolist()
    return _together(table, {'probability': probability, 'tie': tie.tolist()})


def _pairs(
    items: Sequence[Item], table: Answers, method: str
) -> tuple[np.ndarray, np.ndarray]:
    """Probability [U], and whether the judgement is a tie [U]."""
    values = table.values
    if method == 'majority':
        codes = table.codes()
        votes = np.stack([(codes == code).sum(1) for code in range(3)], axis=1)
        first = (votes[:, 2] > votes[:, :2].max(1)).astype(float)
        second = (votes[:, 0] > votes[:, 1:].max(1)).astype(float)
        probability = 0.5 + (first - second) / 2
        return probability, probability == 0.5
    if method == 'share':
        probability = np.nanmean(values, axis=1) if values.size else np.zeros(0)
        return probability, np.nanmax(np.abs(values - 0.5), 1, initial=0) == 0
    if method == 'bradley_terry':
        probability = bradley_terry(values, *_completions(items, table)).probability
        return probability, np.zeros(len(values), bool)
    found = dawid_skene(soft_labels(values)).posterior
    return found[:, 1], np.zeros(len(found), bool)


def _single(table: Answers) -> list[Judgement]:
    """Every label by itself."""
    found = []
    for unit, row in zip(table.units, table.values):
        for labeller, value in zip(table.labellers, row.tolist()):
            if np.isnan(value):
                continue
            said: dict[str, Any] = {'rating': value}
            if unit.pair is not None:
                said = {'probability': value, 'tie': value == 0.5}
            found.append(
                Judgement(
                    item=unit.item,
                    pair=unit.pair,
                    dimension=unit.dimension,
                    labeller=labeller,
                    **said,
                )
            )
    return found


def _together(table: Answers, columns: dict[str, list[Any]]) -> list[Judgement]:
    counts = np.isfinite(table.values).sum(1).tolist()
    return [
        Judgement(
            item=unit.item,
            pair=unit.pair,
            dimension=unit.dimension,
            labels=counts[i],
            **{name: values[i] for name, values in columns.items()},
        )
        for i, unit in enumerate(table.units)
    ]


# ------------------------------------------------------------------------ Dawid, Skene


def soft_labels(values: np.ndarray) -> np.ndarray:
    """Labels of pairs as weights of the answers second and first, [U, L, 2]: a label p
    is (1 − p, p), a tie half a label for either; 0 where nobody said.

    Args:
        values: [U, L] probability that the first is the better one, NaN for no label.
    """
    known = np.isfinite(values)
    p = np.nan_to_num(values)
    return np.stack([1 - p, p], axis=-1) * known[..., None]


def dawid_skene(labels: np.ndarray) -> Confusions:
    """Posterior of the answer to every question and the errors of every labeller, by EM
    from the shares of the labels.

    T_uc ∝ p_c·Π_l Π_k π^l_ck^{n_ulk},   π^l_ck ∝ a_ck + Σ_u T_uc·n_ulk

    **Source** Dawid & Skene 1979, Applied Statistics 28. **Deviations** pseudo-counts
    a: ``RIGHT`` for the right label and ``WRONG`` for any other, and ``WRONG`` for each
    answer in p, so that EM finds a maximum of the posterior, and nobody is held to be
    faultless after a few labels. A label n may be spread over several answers.

    Args:
        labels: [U, L, C] weights, 0 where nobody said.
    """
    from scipy import sparse  # slow to import

    size = labels.shape[-1]
    prior_counts = WRONG + (RIGHT - WRONG) * np.eye(size)
    # Sparse products add up in one order; dense ones depend on where arrays lie.
    shape = len(labels), labels.shape[1] * size
    flat, said = sparse.csr_matrix(labels.reshape(shape)), labels.sum(1)
    posterior = said / np.maximum(said.sum(-1, keepdims=True), 1e-300)
    posterior[said.sum(-1) == 0] = 1 / size
    for _ in range(MOST_ROUNDS):
        counts = (flat.T @ posterior).reshape(-1, size, size).swapaxes(1, 2)
        confusion = counts + prior_counts
        confusion /= confusion.sum(-1, keepdims=True)
        prior = posterior.sum(0) + WRONG
        prior = prior / prior.sum()
        by_label = np.log(confusion).swapaxes(1, 2).reshape(-1, size)
        logits = np.log(prior) + flat @ by_label
        logits -= logits.max(-1, keepdims=True)
        last, posterior = posterior, np.exp(logits)
        posterior /= posterior.sum(-1, keepdims=True)
        if np.abs(posterior - last).max(initial=0) < SMALL:
            break
    return Confusions(posterior, confusion, prior)


# ----------------------------------------------------------------------- Bradley, Terry


def _completions(items: Sequence[Item], table: Answers) -> tuple[np.ndarray, int]:
    """[U, 2] the number of either completion, equal for equal texts under a prompt and
    a dimension, and how many there are.
    """
    known, numbers = by_name(items), {}
    pairs = []
    for unit in table.units:
        item = known[unit.item]
        prompt = json.dumps(item.prompt, sort_keys=True), unit.dimension
        keys = [(*prompt, item.completions[k]) for k in unit.pair]
        pairs.append([numbers.setdefault(key, len(numbers)) for key in keys])
    return np.asarray(pairs, int).reshape(-1, 2), len(numbers)


def bradley_terry(values: np.ndarray, pairs: np.ndarray, count: int) -> Utilities:
    """Utilities of completions, and temperatures of labellers.

    p(label l of pair i, j says i) = σ((u_i − u_j)/τ_l),   u ~ N(0, 1)

    The median labeller has temperature 1. One who is no better than chance gets a high
    temperature, and then hardly counts; one who is worse gets no negative one, as
    Dawid and Skene's model has.

    The temperatures maximise their posterior given the labels: log(1/τ) is normal with
    mean 0 and standard deviation ``SPREAD``, and bounded by ``LARGEST``. The utilities
    are integrated out of the likelihood, each pair by itself, since with a mode of the
    utilities one labeller would get all the weight. The utilities are the mode of their
    posterior at these temperatures, over all pairs that a completion is in. Last, both
    are divided by the temperature of the median labeller.

    **Source** Bradley & Terry 1952, Biometrika 39; a reliability of each judge: Chen et
    al. 2013, "Pairwise ranking aggregation in a crowdsourced setting", WSDM, who mix
    with the reverse order instead. **Deviations** both priors are ours.

    Args:
        values: [U, L] probability that the first is the better one, NaN for no label.
        pairs: [U, 2] int, the completions of each pair.
        count: completions.
    """
    from scipy import optimize  # slow to import

    if not values.size:
        return Utilities(np.zeros(0), np.zeros(0))
    log_scale = _log_scales(values)
    row, labeller = np.nonzero(np.isfinite(values))
    p, (one, other) = values[row, labeller], pairs[row].T
    scale = np.exp(log_scale)[labeller]

    def objective(u: np.ndarray) -> tuple[float, np.ndarray]:
        logits = scale * (u[one] - u[other])
        loss = p * np.logaddexp(0, -logits) + (1 - p) * np.logaddexp(0, logits)
        slope = scale * (np.exp(-np.logaddexp(0, -logits)) - p)
        gradient = u + np.bincount(one, slope, count) - np.bincount(other, slope, count)
        return float(loss.sum() + (u**2).sum() / 2), gradient

    how = {'jac': True, 'method': 'L-BFGS-B', 'options': {'maxiter': 1000}}
    u = optimize.minimize(objective, np.zeros(count), **how).x
    median = float(np.median(log_scale))
    gaps = np.exp(median) * (u[pairs[:, 0]] - u[pairs[:, 1]])
    return Utilities(1 / (1 + np.exp(-gaps)), np.exp(median - log_scale))


def _log_scales(values: np.ndarray) -> np.ndarray:
    """log 1/τ of every labeller [L] before the median is set to 0, by its posterior."""
    from scipy import optimize, special  # slow to import

    nodes, node_weights = np.polynomial.hermite_e.hermegauss(NODES)
    gaps, log_weights = np.sqrt(2) * nodes, np.log(node_weights)
    known, p = np.isfinite(values), np.nan_to_num(values)
    first, second = p, np.where(known, 1 - p, 0)

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        logits = np.exp(x)[:, None] * gaps  # [L, Q]
        right, wrong = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
        joint = first @ right + second @ wrong + log_weights  # [U, Q]
        total = special.logsumexp(joint, axis=1, keepdims=True)
        posterior = np.exp(joint - total)
        slope = (first.T @ posterior) * -np.exp(wrong)
        slope += (second.T @ posterior) * np.exp(right)
        # d/dx of −log σ(z) is −z·σ(−z); σ(−z) = exp(wrong).
        gradient = (slope * logits).sum(1) + x / SPREAD**2
        return float((x**2).sum() / SPREAD**2 / 2 - total.sum()), gradient

    start = np.zeros(values.shape[1])
    bounds = [(-LARGEST, LARGEST)] * len(start)
    return optimize.minimize(
        objective, start, jac=True, method='L-BFGS-B', bounds=bounds
    ).x
