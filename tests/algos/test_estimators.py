"""Advantage estimators by hand, at their identities, and against slow NumPy loops.

The returns are those of the golden numbers: [1, 2, 4] and [0.5, 0.5, −1].
"""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos import estimators
from rlhf_jax.ops.advantages import rewards_to_go
from rlhf_jax.types import Outcomes

GOLDENS = pathlib.Path(__file__).resolve().parents[3] / 'shared/data/goldens'
RETURNS = np.array([[1.0, 2, 4], [0.5, 0.5, -1]], np.float32)
GROUPED = ['rloo', 'grpo', 'dr_grpo', 'dapo', 'gdpo']
EVERY = [*GROUPED, 'reinforce_pp', 'remax', 'maxrl']
LENGTH = 4


def _outcomes(returns=RETURNS, seed=None, baseline=None):
    """Responses of 1 to 4 tokens; with a seed their rewards lie on all tokens."""
    returns = np.asarray(returns, np.float32)
    lengths = np.arange(returns.size).reshape(returns.shape) % LENGTH + 1
    mask = np.arange(LENGTH) < lengths[..., None]
    rewards = np.where(
        np.arange(LENGTH) == lengths[..., None] - 1, returns[..., None], 0
    )
    if seed is not None:
        noise = np.random.default_rng(seed).normal(size=mask.shape)
        rewards = np.where(mask, rewards + noise, 0)
    return Outcomes(
        rewards=jnp.asarray(rewards, jnp.float32),
        mask=jnp.asarray(mask),
        baseline=None if baseline is None else jnp.asarray(baseline, jnp.float32),
        # Two rewards, and what is beside their sum.
        scores={'one': jnp.asarray(returns), 'other': jnp.asarray(returns[:, ::-1])},
        weights={'one': jnp.float32(0.5), 'other': jnp.float32(2.0)},
    )


def _advantages(name, outcomes, **hp):
    module = estimators.load(name, 'name')
    return np.asarray(module.advantages(outcomes, module.HParams(**hp)))


def _of_rows(name, outcomes, **hp):
    """[P, G], after checking that every token has the advantage of its response."""
    advantages = _advantages(name, outcomes, **hp)
    first = advantages[..., 0]
    expected = np.where(outcomes.mask, first[..., None], 0)
    np.testing.assert_array_equal(advantages, expected)
    return first


def test_by_hand():
    # Others' means: (2 + 4)/2, (1 + 4)/2, (1 + 2)/2; (0.5 − 1)/2 twice, 0.5.
    rloo = [[-2, -0.5, 2.5], [0.75, 0.75, -1.5]]
    np.testing.assert_allclose(_of_rows('rloo', _outcomes()), rloo, atol=1e-6)
    # Means 7/3 and 0.
    dr = [[-4 / 3, -1 / 3, 5 / 3], [0.5, 0.5, -1]]
    np.testing.assert_allclose(_of_rows('dr_grpo', _outcomes()), dr, atol=1e-6)
    # Variances (16 + 1 + 25)/9/2 = 7/3 and 1.5/2.
    std = np.sqrt([[7 / 3], [0.75]])
    for name in ('grpo', 'dapo'):
        got = _of_rows(name, _outcomes(), eps=0.5)
        np.testing.assert_allclose(got, dr / (std + 0.5), atol=1e-6)


def _of_scores(weights, scores, penalty=0.0):
    """One-token responses whose rewards are a weighted sum, and a penalty."""
    scores = {name: jnp.asarray(x, jnp.float32) for name, x in scores.items()}
    total = sum(weights[name] * x for name, x in scores.items()) + jnp.asarray(penalty)
    return Outcomes(
        rewards=total[..., None],
        mask=jnp.ones((*total.shape, 1), bool),
        scores=scores,
        weights=weights,
    )


def test_gdpo_by_hand():
    # Deviations of (0, 0, 3) are (−1, −1, 2), their variance (1 + 1 + 4)/2 = 3; those
    # of (10, −10, 0) are themselves, their variance 200/2.
    outcomes = _of_scores(
        {'right': 1.0, 'short': 0.5},
        {'right': [[0.0, 0, 3]], 'short': [[10.0, -10, 0]]},
        penalty=[[0.0, 0, -0.3]],
    )
    right = np.array([-1, -1, 2]) / np.sqrt(3)
    short = np.array([1.0, -1, 0])
    total = right + 0.5 * short + np.array([0.1, 0.1, -0.2])
    expected = total / np.sqrt(np.mean(total**2))
    got = _of_rows('gdpo', outcomes, eps=0.0)
    np.testing.assert_allclose(got[0], expected, rtol=1e-5)
    # Of one reward alone, GRPO over its root mean square, sqrt((1 + 1 + 4)/3/3).
    alone = _of_scores({'right': 1.0}, {'right': [[0.0, 0, 3]]})
    got = _of_rows('gdpo', alone, eps=0.0)
    np.testing.assert_allclose(got[0], right / np.sqrt(2 / 3), rtol=1e-5)


def test_gdpo_tells_apart_what_a_sum_does_not():
    """With a second reward of ten times the size the first is hardly seen in a sum,
    and a scale of one reward changes nothing.
    """
    weights = {'right': 1.0, 'long': 1.0}
    right, long = np.array([[1.0, 0, 1, 0]]), np.array([[0.0, 0, 10, 10]])
    outcomes = _of_scores(weights, {'right': right, 'long': long})
    [gdpo], [grpo] = _of_rows('gdpo', outcomes), _of_rows('grpo', outcomes)
    assert gdpo[2] - gdpo[3] == pytest.approx(gdpo[2] - gdpo[0], rel=1e-4)
    assert grpo[2] - grpo[3] < 0.2 * (grpo[2] - grpo[0])
    scaled = _of_scores(weights, {'right': right, 'long': 7 * long - 3})
    # The penalty beside the rewards is none in both.
    np.testing.assert_allclose(_of_rows('gdpo', scaled)[0], gdpo, atol=1e-4)


def test_gdpo_needs_the_single_rewards():
    with pytest.raises(ValueError, match='gdpo needs the single rewards'):
        _advantages('gdpo', _outcomes().replace(scores=None, weights=None))


def test_maxrl_by_hand():
    # Means 1/4, 3/4, 0: 1/(1/4) − 1 = 3, 1/(3/4) − 1 = 1/3, and nothing to divide by.
    outcomes = _outcomes([[0.0, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]])
    expected = [[-1, 3, -1, -1], [1 / 3, 1 / 3, -1, 1 / 3], [0, 0, 0, 0]]
    np.testing.assert_allclose(_of_rows('maxrl', outcomes), expected, rtol=1e-6)
    assert _of_rows('maxrl', _outcomes([[-1.0, 0, -1]])).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize('size', [2, 3, 5])
@pytest.mark.parametrize('p', [0.1, 0.6])
def test_maxrl_follows_the_first_terms_of_the_likelihood(size, p):
    """The gradient of a policy that is right with probability p, by its logit, over
    all outcomes of a group: ∇ log of right is 1 − p, of wrong −p, and ∇p = p·(1 − p).
    """
    total = 0.0
    for right in itertools.product([0.0, 1.0], repeat=size):
        chance = np.prod([p if r else 1 - p for r in right])
        [advantage] = _of_rows('maxrl', _outcomes([right]))
        score = np.array(right) - p
        total += chance * np.mean(advantage * score)
    terms = sum((1 - p) ** (k - 1) for k in range(1, size))
    assert total == pytest.approx(terms * p * (1 - p), rel=1e-5)


def test_other_projects_numbers():
    path = GOLDENS / 'goldens.json'
    if not path.exists():
        pytest.skip(f'golden numbers are not at {path}')
    golden = json.loads(path.read_text())
    for name, key in (
        ('rloo', 'RLOO adv'),
        ('grpo', 'GRPO adv (std unbiased, eps1e-6)'),
    ):
        got = _of_rows(name, _outcomes())
        np.testing.assert_allclose(np.ravel(got), golden[key], atol=1e-6)


def _slow_gdpo(outcomes):
    """[P, G] from single rewards, their weights, and the rest of the returns."""
    rest = np.asarray(outcomes.returns, float)
    total = np.zeros_like(rest)
    for name, weight in outcomes.weights.items():
        scores = np.asarray(outcomes.scores[name], float)
        rest -= float(weight) * scores
        for p, row in enumerate(scores):
            std = np.std(row, ddof=1)
            for g, score in enumerate(row):
                total[p, g] += float(weight) * (score - np.mean(row)) / std
    for p, row in enumerate(rest):
        total[p] += row - np.mean(row)
    return total / np.sqrt(np.mean(total**2))


@pytest.mark.parametrize('name', EVERY)
def test_slow_loops(name):
    """Rewards on every token, a discount and a baseline, written with for loops."""
    baseline = [[0.3] * 3, [-0.2] * 3]
    outcomes = _outcomes(seed=1, baseline=baseline)
    rewards, mask = np.asarray(outcomes.rewards, float), np.asarray(outcomes.mask)
    gamma = {'reinforce_pp': 0.9}.get(name, 1.0)
    expected = np.zeros_like(rewards)
    gdpo = _slow_gdpo(outcomes)
    for p in range(2):
        whole = [rewards[p, g][mask[p, g]].sum() for g in range(3)]
        for g in range(3):
            others = [whole[j] for j in range(3) if j != g]
            for t in range(mask[p, g].sum()):
                to_go = sum(
                    gamma ** (s - t) * rewards[p, g, s] for s in range(t, LENGTH)
                )
                expected[p, g, t] = {
                    'rloo': whole[g] - np.mean(others),
                    'dr_grpo': whole[g] - np.mean(whole),
                    'grpo': (whole[g] - np.mean(whole)) / np.std(whole, ddof=1),
                    'dapo': (whole[g] - np.mean(whole)) / np.std(whole, ddof=1),
                    'reinforce_pp': to_go,
                    'remax': to_go - baseline[p][g],
                    'maxrl': whole[g] / np.mean(whole) - 1 if p == 0 else 0,
                    'gdpo': gdpo[p, g],
                }[name]
    if name == 'reinforce_pp':
        expected = (expected - expected[mask].mean()) / expected[mask].std() * mask
    hp = {'gamma': gamma} if name == 'reinforce_pp' else {}
    got = _advantages(name, outcomes, **hp)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert got.dtype == np.float32


@pytest.mark.parametrize('name', GROUPED)
def test_groups_sum_to_zero(name):
    random = np.random.default_rng(0).normal(size=(5, 4))
    rows = _of_rows(name, _outcomes(random))
    np.testing.assert_allclose(rows.sum(-1), 0, atol=1e-5)
    assert np.abs(rows).min() > 1e-3


@pytest.mark.parametrize('name', GROUPED)
def test_a_shift_of_a_prompts_rewards_changes_nothing(name):
    shifted = RETURNS + np.array([[100.0], [-3]])
    got = _of_rows(name, _outcomes(shifted))
    np.testing.assert_allclose(got, _of_rows(name, _outcomes()), atol=1e-5)


@pytest.mark.parametrize(
    'name, power', [('rloo', 1), ('dr_grpo', 1), ('grpo', 0), ('dapo', 0)]
)
def test_what_a_scale_of_the_rewards_does(name, power):
    got = _of_rows(name, _outcomes(RETURNS * 8))
    np.testing.assert_allclose(got, _of_rows(name, _outcomes()) * 8**power, atol=1e-5)


def test_rloo_is_dr_grpo_in_another_unit():
    outcomes = _outcomes(seed=3)
    rloo, dr = _of_rows('rloo', outcomes), _of_rows('dr_grpo', outcomes)
    np.testing.assert_allclose(rloo, dr * 3 / 2, rtol=1e-5)


@pytest.mark.parametrize('name', GROUPED)
def test_equal_rewards_give_exactly_zero_and_are_told(name):
    """0.1 three times has a mean that is not 0.1 in float32."""
    outcomes = _outcomes([[0.1, 0.1, 0.1], [0.1, 0.2, 0.1]])
    rows = _of_rows(name, outcomes)
    assert (rows[0] == 0).all() and (rows[1] != 0).all()
    assert outcomes.equal.tolist() == [True, False]
    module = estimators.load(name, 'name')
    assert hasattr(module, 'kept') is (name == 'dapo')
    if name == 'dapo':
        assert module.kept(outcomes).tolist() == [False, True]


def test_reinforce_pp_normalises_over_the_rollout_and_not_by_group():
    outcomes = _outcomes(RETURNS + np.array([[0.0], [50]]))
    advantages, mask = _advantages('reinforce_pp', outcomes), np.asarray(outcomes.mask)
    assert advantages[mask].mean() == pytest.approx(0, abs=1e-5)
    assert advantages[mask].std() == pytest.approx(1, abs=1e-4)
    assert (advantages[0][mask[0]] < 0).all() and (advantages[1][mask[1]] > 0).all()


@pytest.mark.parametrize('name', EVERY)
def test_devices_agree_with_the_whole_rollout(name):
    """One prompt on each of two mapped devices, with responses of different length."""
    outcomes, module = (
        _outcomes(seed=4, baseline=RETURNS),
        estimators.load(name, 'name'),
    )
    weights = outcomes.weights
    split = jax.tree.map(lambda x: x[:, None], outcomes.replace(weights=None))

    def of_device(part):
        part = part.replace(weights=weights)
        return module.advantages(part, module.HParams(), 'devices')

    got = jax.vmap(of_device, axis_name='devices')(split)
    np.testing.assert_allclose(got[:, 0], _advantages(name, outcomes), atol=1e-6)


def test_remax_needs_a_baseline_and_takes_groups_of_one():
    one = _outcomes([[1.0], [2.0]], baseline=[[0.25], [3.0]])
    assert _of_rows('remax', one).tolist() == [[0.75], [-1.0]]
    with pytest.raises(ValueError, match='remax needs baseline'):
        _advantages('remax', _outcomes())


@pytest.mark.parametrize('name', GROUPED)
def test_groups_of_one_are_an_error(name):
    with pytest.raises(ValueError, match='group_size=1: .* use a group_size of 2'):
        _advantages(name, _outcomes([[1.0], [2.0]]))


@pytest.mark.parametrize('name', EVERY)
def test_garbage_outside_the_responses_changes_nothing(name):
    clean = _outcomes(seed=2, baseline=RETURNS)
    dirty = clean.replace(rewards=jnp.where(clean.mask, clean.rewards, jnp.nan))
    np.testing.assert_array_equal(_advantages(name, clean), _advantages(name, dirty))


def test_rewards_to_go_by_hand():
    rewards = jnp.array([[1.0, 2, 4], [1, 2, 4]])
    mask = jnp.array([[0, 1, 1], [1, 1, 0]], bool)
    # 2 + 4/2; 1 + 2/2: nothing flows in from under the mask.
    got = rewards_to_go(rewards, mask, gamma=0.5)
    assert got.tolist() == [[0, 4, 4], [2, 2, 0]]


@pytest.mark.parametrize(
    'name, message',
    [
        ('grp', "did you mean 'grpo'"),
        ('actor_critic', r"use \['dapo', 'dr_grpo', "),
        ('rlhf_jax.preference.dpo', 'has no AGGREGATION, advantages; a critic'),
        ('no_such.estimator', 'cannot be imported'),
    ],
)
def test_a_name_that_is_no_estimator(name, message):
    with pytest.raises(ValueError, match=message):
        estimators.load(name, 'config.estimator.name')
