"""Coefficients of agreement against published tables and slow loops."""

import functools
import itertools

import numpy as np
import pytest

from rlhf_jax.labels.coefficients import (
    bootstrap_interval,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    measured,
    percent_agreement,
    share_interval,
    wilson,
)

# Fleiss 1971, table 1: 30 patients, 6 diagnoses each; depression, personality disorder,
# schizophrenia, neurosis, other.
DIAGNOSES = """
00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050
02031 00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040
10500 00006
""".split()
# Krippendorff 2011: 4 observers, 12 units, 0 where nobody said.
OBSERVERS = """
1 2 3 3 2 1 4 1 2 0 0 0
1 2 3 3 2 2 4 1 2 5 0 3
0 3 3 3 2 3 4 2 2 5 1 0
1 2 3 3 2 4 4 1 2 5 1 0
"""
UNITS = np.asarray(OBSERVERS.split(), int).reshape(4, 12).T - 1


def diagnoses():
    """[30, 6] codes; who gave which label is not in the table."""
    rows = [[c for c, n in enumerate(row) for _ in range(int(n))] for row in DIAGNOSES]
    return np.asarray(rows)


def from_table(table):
    """[N, 2] codes of a table of two labellers."""
    return np.asarray(
        [
            (i, j)
            for i, row in enumerate(table)
            for j, count in enumerate(row)
            for _ in range(count)
        ]
    )


def odd_codes(seed=0, size=(40, 5), categories=4):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, categories, size[0])
    codes = np.where(
        rng.uniform(size=size) < 0.6, truth[:, None], rng.integers(0, categories, size)
    )
    codes[rng.uniform(size=size) < 0.3] = -1
    return codes


# ------------------------------------------------------------------- published tables


def test_diagnoses_of_fleiss():
    codes = diagnoses()
    assert codes.shape == (30, 6)
    assert np.bincount(codes.ravel()).tolist() == [26, 26, 30, 55, 43]
    assert fleiss_kappa(codes) == pytest.approx(0.430, abs=5e-4)
    # His mean over patients of the share of agreeing pairs is 0.5556.
    assert percent_agreement(codes) == pytest.approx(0.5556, abs=5e-5)


def test_the_example_of_krippendorff():
    assert krippendorff_alpha(UNITS, 'nominal') == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(UNITS, 'ordinal') == pytest.approx(0.815, abs=5e-4)


def test_the_example_of_cohen():
    # Cohen 1960, table 1, of 200: p_o = 0.70, p_e = 0.41.
    codes = from_table([[88, 14, 18], [10, 40, 10], [2, 6, 12]])
    assert percent_agreement(codes) == pytest.approx(0.70)
    assert cohen_kappa(codes) == pytest.approx(0.29 / 0.59)


def test_kappa_of_two_labellers_by_hand():
    # p_o = (20 + 15)/50; both say yes in 25·30/50² and no in 25·20/50².
    assert cohen_kappa(from_table([[20, 5], [10, 15]])) == pytest.approx(0.4)


# ---------------------------------------------------------------------- slow references


def slow_alpha(codes, level):
    """Every pair of values of a unit, one by one."""
    units = [[int(c) for c in row if c >= 0] for row in codes]
    units = [row for row in units if len(row) > 1]
    values = [c for row in units for c in row]
    n_of = {c: values.count(c) for c in set(values)}

    def distance(c, k):
        if level == 'nominal':
            return float(c != k)
        c, k = min(c, k), max(c, k)
        between = sum(n_of.get(g, 0) for g in range(c, k + 1))
        return (between - (n_of[c] + n_of[k]) / 2) ** 2 if c != k else 0.0

    seen = sum(
        distance(a, b) / (len(row) - 1)
        for row in units
        for a, b in itertools.permutations(row, 2)
    ) / len(values)
    pairs = itertools.permutations(values, 2)
    chance = sum(distance(a, b) for a, b in pairs)
    return 1 - seen / (chance / (len(values) * (len(values) - 1)))


@pytest.mark.parametrize('level', ['nominal', 'ordinal'])
@pytest.mark.parametrize('seed', range(3))
def test_alpha_against_a_loop(level, seed):
    codes = odd_codes(seed)
    got = krippendorff_alpha(codes, level)
    assert got == pytest.approx(slow_alpha(codes, level))


def test_agreement_against_a_loop():
    codes = odd_codes()
    pairs = [
        a == b
        for row in codes
        for a, b in itertools.combinations([c for c in row if c >= 0], 2)
    ]
    assert percent_agreement(codes) == pytest.approx(np.mean(pairs))


def test_kappas_of_several_against_a_loop():
    codes = odd_codes()
    total, shared = 0, 0
    for one, other in itertools.combinations(codes.T, 2):
        both = (one >= 0) & (other >= 0)
        a, b = one[both], other[both]
        chance = sum((a == c).mean() * (b == c).mean() for c in range(4))
        total += both.sum() * ((a == b).mean() - chance) / (1 - chance)
        shared += both.sum()
    assert cohen_kappa(codes) == pytest.approx(total / shared)
    rows = [[c for c in row if c >= 0] for row in codes]
    rows = [row for row in rows if len(row) > 1]
    each = [
        np.mean([a == b for a, b in itertools.combinations(row, 2)]) for row in rows
    ]
    shares = np.bincount(np.concatenate(rows)) / sum(map(len, rows))
    chance = (shares**2).sum()
    assert fleiss_kappa(codes) == pytest.approx((np.mean(each) - chance) / (1 - chance))


# ------------------------------------------------------------------------ identities

ALL = [
    percent_agreement,
    cohen_kappa,
    fleiss_kappa,
    functools.partial(krippendorff_alpha, level='nominal'),
    functools.partial(krippendorff_alpha, level='ordinal'),
]


@pytest.mark.parametrize('coefficient', ALL)
def test_weights_are_repeated_units(coefficient):
    codes = odd_codes()
    weights = np.random.default_rng(1).integers(0, 3, (4, len(codes)))
    got = coefficient(codes, weights=weights)
    for row, value in zip(weights, got):
        assert value == pytest.approx(float(coefficient(np.repeat(codes, row, axis=0))))


@pytest.mark.parametrize('coefficient', ALL)
def test_perfect_agreement_is_one_and_a_single_category_has_no_kappa(coefficient):
    codes = np.tile(np.arange(6)[:, None] % 3, (1, 4))
    assert coefficient(codes) == pytest.approx(1)
    same = coefficient(np.zeros((5, 3), int))
    assert same == 1 if coefficient is percent_agreement else np.isnan(same)
    alone = np.full((5, 3), -1)
    alone[:, 0] = [0, 1, 2, 1, 0]
    assert np.isnan(coefficient(alone))
    assert measured(coefficient, alone, np.arange(5)) == (None, None)


@pytest.mark.parametrize('coefficient', ALL)
def test_labels_at_random_agree_by_chance(coefficient):
    codes = np.random.default_rng(1).integers(0, 2, (4000, 4))
    expected = 0.5 if coefficient is percent_agreement else 0
    value, (low, high) = measured(coefficient, codes, np.arange(4000))
    assert low <= expected <= high and high - low < 0.05
    assert low < value < high


def test_the_interval_covers_as_often_as_it_says():
    """Agreement of two labellers on 60 items, whose true value is 0.7."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(100):
        codes = np.zeros((60, 2), int)
        codes[:, 1] = rng.uniform(size=60) >= 0.7
        _, (low, high) = measured(percent_agreement, codes, np.arange(60))
        hits += low <= 0.7 <= high
    assert 88 <= hits <= 100


def test_the_units_of_an_item_are_drawn_together():
    codes = np.zeros((60, 2), int)
    codes[:, 1] = np.random.default_rng(0).uniform(size=60) >= 0.7
    alone = bootstrap_interval(
        lambda w: percent_agreement(codes, weights=w), np.arange(60)
    )
    many = np.repeat(codes, 5, axis=0)
    items = np.repeat(np.arange(60), 5)
    together = bootstrap_interval(lambda w: percent_agreement(many, weights=w), items)
    assert together == pytest.approx(alone)
    assert bootstrap_interval(lambda w: w.sum(-1), np.zeros(3, int)) is None


def test_ratings_that_are_all_different():
    """Numbers with many digits, of which no two are equal, have an order."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3000, 1)) + 0.3 * rng.normal(size=(3000, 3))
    codes = np.argsort(np.argsort(values, axis=None)).reshape(values.shape)
    assert percent_agreement(codes) == 0
    ordinal = functools.partial(krippendorff_alpha, level='ordinal')
    value, (low, high) = measured(ordinal, codes, np.arange(3000))
    # Ranks of normal numbers with correlation 1/1.09.
    assert low < 6 / np.pi * np.arcsin(1 / 1.09 / 2) < high
    assert high - low < 0.03 and low < value < high


def test_wilson_by_hand():
    # See tests/evals/test_preference.py.
    assert wilson(0.8, 10) == pytest.approx([0.49016, 0.94334], abs=2e-4)
    assert wilson(0.0, 5)[0] == 0 and wilson(1.0, 5)[1] == 1


def test_cases_of_one_item_count_as_often_as_they_are_independent():
    values, names = [1.0, 1, 0, 1, 0, 1, 1, 0, 1, 1], list('abcdefghij')
    assert share_interval(values, names) == wilson(0.7, 10)
    # Three equal cases of every item say no more than one; V has I − 1 for I.
    assert share_interval(values * 3, names * 3) == pytest.approx(wilson(0.7, 9))
    # Two cases of an item that are always different: V is 0.
    pairs = [x for value in values for x in (value, 1 - value)]
    assert share_interval(pairs, np.repeat(names, 2)) == wilson(0.5, 10)
    assert share_interval([1.0] * 6, list('aabbcc')) == wilson(1.0, 3)
    assert share_interval([1.0, 0], ['a', 'a']) == wilson(0.5, 1)
    uneven = share_interval([1.0, 1, 0, 0, 1], list('aabbb'))
    # Sums of x − 0.6: 0.8 and −0.8; V = 2·1.28/25.
    assert uneven == pytest.approx(wilson(0.6, 0.24 / (2 * 1.28 / 25)))


@pytest.mark.parametrize('size', [2, 4, 8])
def test_the_interval_of_random_rankings_holds_a_half(size):
    """Its lower end is above ½ in 2.5% of cases, however many pairs a ranking has."""
    rng = np.random.default_rng(0)
    first, second = np.array([*itertools.combinations(range(size), 2)]).T
    items, above = np.repeat(np.arange(40), len(first)), 0
    for _ in range(1000):
        ranks = rng.permuted(np.tile(np.arange(size), (40, 1)), axis=1)
        right = (ranks[:, first] < ranks[:, second]).astype(float)
        above += share_interval(right.reshape(-1), items)[0] > 0.5
    assert 0.01 < above / 1000 < 0.04
