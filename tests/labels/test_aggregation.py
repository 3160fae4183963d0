"""Labels as one judgement: planted labellers, slow references, odd labels."""

import itertools

import numpy as np
import pytest

from rlhf_jax.labels.aggregation import (
    METHODS,
    RIGHT,
    SPREAD,
    WRONG,
    _log_scales,
    aggregate,
    bradley_terry,
    dawid_skene,
    soft_labels,
)
from rlhf_jax.labels.records import Item, Label


def items(count, form='comparison', completions=('a', 'b')):
    return [
        Item(item=str(i), prompt=f'p{i}', completions=completions, form=form)
        for i in range(count)
    ]


def labels_of(table):
    """Labels of a [U][L] table of probabilities, None for no label."""
    return [
        Label(item=str(u), labeller=f'l{k}', probability=value)
        for u, row in enumerate(table)
        for k, value in enumerate(row)
        if value is not None
    ]


def said(table, method):
    found = aggregate(items(len(table)), labels_of(table), method)
    assert [judgement.item for judgement in found] == [
        str(i) for i in range(len(table))
    ]
    return found


def planted(seed=0, count=300, right=(0.9, 0.9, 0.85, 0.8, 0.5, 0.5)):
    """Truths [U], and labels [U, L] that are right with the given probabilities."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(size=count) < 0.5
    is_right = rng.uniform(size=(count, len(right))) < right
    return truth, np.where(is_right, truth[:, None], ~truth[:, None]).astype(float)


# ------------------------------------------------------------------------- by hand


def test_the_majority_by_hand():
    table = [[1, 1, 0], [1, 0, 0], [1, 0, None], [0.5, 0.5, 1], [0.7, 0.9, 0.1]]
    found = said(table, 'majority')
    assert [j.probability for j in found] == [1, 0, 0.5, 0.5, 1]
    assert [j.tie for j in found] == [False, False, True, True, False]
    assert [j.labels for j in found] == [3, 3, 2, 3, 3]


def test_the_share_by_hand():
    found = said([[1, 1, 0, 0.5], [0.5, 0.5, None, None], [1, 0, None, None]], 'share')
    assert [j.probability for j in found] == [0.625, 0.5, 0.5]
    # Half of the labellers are not a tie: nobody called them equal.
    assert [j.tie for j in found] == [False, True, False]


def test_none_keeps_every_label():
    found = aggregate(items(2), labels_of([[1, 0.25], [None, 0.5]]), 'none')
    assert [(j.item, j.labeller, j.probability, j.tie) for j in found] == [
        ('0', 'l0', 1, False),
        ('0', 'l1', 0.25, False),
        ('1', 'l1', 0.5, True),
    ]


def test_rankings_become_pairs():
    item = Item(item='r', prompt='p', completions=('a', 'b', 'c'), form='ranking')
    said = [
        Label(item='r', labeller='x', ranks=(1, 2, 2)),
        Label(item='r', labeller='y', ranks=(1, 3, 2)),
    ]
    found = aggregate([item], said, 'share')
    assert [(j.pair, j.probability) for j in found] == [
        ((0, 1), 1.0),
        ((0, 2), 1.0),
        ((1, 2), 0.25),
    ]
    with pytest.raises(ValueError, match='2 ranks for 3 completions'):
        aggregate([item], [Label(item='r', labeller='x', ranks=(1, 2))], 'share')


def test_ratings_are_averaged():
    item = Item(item='r', prompt='p', completions=('a',), form='rating')
    said = [
        Label(item='r', labeller=name, rating=x) for name, x in (('x', 3), ('y', 4))
    ]
    (found,) = aggregate([item], said, 'share')
    assert (found.rating, found.pair, found.labels) == (3.5, None, 2)
    assert [j.rating for j in aggregate([item], said, 'none')] == [3, 4]
    with pytest.raises(ValueError, match="'dawid_skene' is for comparisons"):
        aggregate([item], said, 'dawid_skene')


@pytest.mark.parametrize('method', METHODS)
def test_what_says_nothing_is_left_out_and_dimensions_are_apart(method):
    said = [
        Label(item='0', labeller='x', probability=1),
        Label(item='0', labeller='x', probability=0, repeat=1),
        Label(item='0', labeller='x', probability=0, dimension='brief'),
        Label(item='1', labeller='x', verdict='skipped'),
        Label(item='2', labeller='x', verdict='bad'),
    ]
    found = aggregate(items(3), said, method)
    assert [(j.item, j.dimension) for j in found] == [('0', None), ('0', 'brief')]
    assert found[0].probability > 0.5 > found[1].probability


# ---------------------------------------------------------------- Dawid and Skene


def slow_dawid_skene(table, size, rounds):
    """EM in loops over labels [U][L], the class or None."""
    units, labellers = range(len(table)), range(len(table[0]))
    t = [
        [
            sum(x == c for x in row) / sum(x is not None for x in row)
            for c in range(size)
        ]
        for row in table
    ]
    for _ in range(rounds):
        p = [WRONG + sum(t[u][c] for u in units) for c in range(size)]
        p = [x / sum(p) for x in p]
        pi = []
        for k in labellers:
            matrix = []
            for c in range(size):
                row = [RIGHT if c == said else WRONG for said in range(size)]
                for u in units:
                    if table[u][k] is not None:
                        row[table[u][k]] += t[u][c]
                matrix.append([x / sum(row) for x in row])
            pi.append(matrix)
        for u in units:
            weights = []
            for c in range(size):
                weight = p[c]
                for k in labellers:
                    if table[u][k] is not None:
                        weight *= pi[k][c][table[u][k]]
                weights.append(weight)
            t[u] = [x / sum(weights) for x in weights]
    return np.asarray(t), np.asarray(pi), np.asarray(p)


@pytest.mark.parametrize('size', [2, 3])
def test_em_against_loops(size):
    rng = np.random.default_rng(size)
    truth = rng.integers(0, size, 40)
    table = np.where(
        rng.uniform(size=(40, 4)) < [0.9, 0.7, 0.5, 0.3],
        truth[:, None],
        rng.integers(0, size, (40, 4)),
    ).astype(object)
    table[rng.uniform(size=table.shape) < 0.2] = None
    table[np.equal(table, None).all(1), 0] = 0
    labels = np.asarray(
        [[[float(x == c) for c in range(size)] for x in row] for row in table]
    )
    found = dawid_skene(labels)
    posterior, confusion, prior = slow_dawid_skene(table.tolist(), size, 200)
    np.testing.assert_allclose(found.posterior, posterior, atol=1e-6)
    np.testing.assert_allclose(found.confusion, confusion, atol=1e-6)
    np.testing.assert_allclose(found.prior, prior, atol=1e-6)


@pytest.mark.parametrize('seed', range(3))
def test_two_of_six_labellers_at_random_are_found(seed):
    truth, values = planted(seed)
    found = dawid_skene(soft_labels(values))
    right = found.confusion[:, [0, 1], [0, 1]].mean(-1)
    assert (right[:4] > 0.72).all() and (np.abs(right[4:] - 0.5) < 0.1).all()
    by_model = (found.posterior[:, 1] > 0.5) == truth
    majority = np.asarray([j.probability for j in said(values.tolist(), 'majority')])
    by_majority = np.where(majority == 0.5, 0.5, (majority > 0.5) == truth)
    assert by_model.mean() > by_majority.mean() + 0.01
    # The posterior says how sure it is.
    sure = np.maximum(found.posterior[:, 1], found.posterior[:, 0])
    assert by_model.mean() == pytest.approx(sure.mean(), abs=0.04)


def test_a_labeller_who_says_the_opposite_is_turned_round():
    truth, values = planted(right=(0.9, 0.9, 0.9, 0.1))
    found = dawid_skene(soft_labels(values))
    assert found.confusion[3, 0, 1] > 0.8 and found.confusion[3, 1, 0] > 0.8
    assert ((found.posterior[:, 1] > 0.5) == truth).mean() > 0.95


# ----------------------------------------------------------------- Bradley and Terry


def test_temperatures_have_the_largest_posterior():
    """Against sums over a fine grid of differences u_i − u_j ~ N(0, 2)."""
    rng = np.random.default_rng(0)
    gaps = rng.normal(size=50) * np.sqrt(2)
    chance = 1 / (1 + np.exp(-gaps[:, None] * [2.0, 1.0, 0.3]))
    values = (rng.uniform(size=chance.shape) < chance).astype(float)
    values[rng.uniform(size=values.shape) < 0.2] = np.nan
    values[0, 0] = 0.7
    grid = np.linspace(-9, 9, 1801)
    density = np.exp(-(grid**2) / 4)

    def objective(x):
        total = (x**2).sum() / SPREAD**2 / 2
        for row in values:
            likelihood = density.copy()
            for k, p in enumerate(row):
                if np.isfinite(p):
                    right = 1 / (1 + np.exp(-np.exp(x[k]) * grid))
                    likelihood *= right**p * (1 - right) ** (1 - p)
            total -= np.log(likelihood.sum())
        return total

    x = _log_scales(values)
    for step in np.concatenate([np.eye(3), -np.eye(3)]) * 0.02:
        assert objective(x + step) > objective(x)
    temperature = bradley_terry(values, np.arange(100).reshape(50, 2), 100).temperature
    np.testing.assert_allclose(temperature, np.exp(np.median(x) - x))


def test_the_utilities_are_their_mode():
    rng = np.random.default_rng(0)
    values = rng.uniform(size=(12, 3))
    values[rng.uniform(size=values.shape) < 0.3] = np.nan
    pairs = np.asarray(list(itertools.islice(itertools.permutations(range(5), 2), 12)))
    found = bradley_terry(values, pairs, 5)
    scale = np.exp(_log_scales(values))
    median = np.median(scale)
    logits = np.log(found.probability / (1 - found.probability)) / median
    design = np.zeros((12, 5))
    design[np.arange(12), pairs[:, 0]], design[np.arange(12), pairs[:, 1]] = 1, -1
    u = np.linalg.lstsq(design, logits, rcond=None)[0]  # its mean is 0, as at the mode
    slope = u.copy()
    for (i, j), row in zip(pairs, values):
        for k, p in enumerate(row):
            if np.isfinite(p):
                off = scale[k] * (1 / (1 + np.exp(-scale[k] * (u[i] - u[j]))) - p)
                slope[i] += off
                slope[j] -= off
    np.testing.assert_allclose(slope, 0, atol=1e-3)


@pytest.mark.parametrize('seed', range(3))
def test_temperatures_tell_random_labellers(seed):
    truth, values = planted(seed)
    pairs = np.arange(600).reshape(300, 2)
    found = bradley_terry(values, pairs, 600)
    assert found.temperature[:4].max() < found.temperature[4:].min() / 3
    assert ((found.probability > 0.5) == truth).mean() > 0.94


def test_a_completion_in_several_items_has_one_utility():
    """b is better than a, and c better than b: so c is better than a, without a label
    of a labeller who says otherwise having equal weight.
    """
    texts = [('b', 'a'), ('c', 'b'), ('c', 'a')]
    asked = [
        Item(item=str(i), prompt='p', completions=pair) for i, pair in enumerate(texts)
    ]
    said = [
        Label(item=str(i), labeller=f'l{k}', probability=1)
        for i in (0, 1)
        for k in (0, 1)
    ]
    said.append(Label(item='2', labeller='l2', probability=0.5))
    found = aggregate(asked, said, 'bradley_terry')
    assert found[2].probability > 0.75 and not found[2].tie


# -------------------------------------------------------------------- odd labels


@pytest.mark.parametrize('method', METHODS)
def test_all_ties(method):
    found = said([[0.5], [0.5]], method)
    assert [j.probability for j in found] == pytest.approx([0.5, 0.5])
    assert {j.tie for j in found} == {method in ('none', 'majority', 'share')}


@pytest.mark.parametrize('method', METHODS)
def test_a_single_labeller(method):
    found = said([[1], [1], [0], [1]], method)
    assert [j.probability > 0.5 for j in found] == [True, True, False, True]
    if method in ('none', 'majority', 'share'):
        assert [j.probability for j in found] == [1, 1, 0, 1]


@pytest.mark.parametrize('method', METHODS)
def test_twice_the_same_and_nothing_at_all(method):
    _, values = planted(count=40)
    asked, labels = items(40), labels_of(values.tolist())
    assert aggregate(asked, labels, method) == aggregate(asked, labels, method)
    other = aggregate(asked, labels[::-1], method)
    assert other == aggregate(asked, labels, method)
    assert aggregate(items(2), [], method) == []


def test_what_is_refused():
    label = Label(item='0', labeller='x', probability=1)
    with pytest.raises(ValueError, match="method='mean'; use 'none', 'majority'"):
        aggregate(items(1), [label], 'mean')
    with pytest.raises(ValueError, match="1 of 1 labels are of items .*'0'"):
        aggregate(items(2)[1:], [label], 'share')
    with pytest.raises(ValueError, match="'0' by 'x' stands there twice"):
        aggregate(items(1), [label, label], 'share')
    with pytest.raises(ValueError, match="'0' by 'x' has no rating, .* is a rating"):
        aggregate(items(1, 'rating', ('a',)), [label], 'share')
