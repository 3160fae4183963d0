"""The policy-gradient methods in a world of 40 responses: where they rest, and their
exact gradients. Nothing is sampled.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.table_world import (
    ALL,
    LENGTH,
    generation,
    objective,
    policy_of,
    to_go,
    token_logprobs,
    values_of,
)
from rlhf_jax.algos.estimators import dr_grpo, reinforce_pp, remax, rloo
from rlhf_jax.ops.advantages import token_rewards
from rlhf_jax.ops.kl import kl_estimate
from rlhf_jax.types import Outcomes
from tests.known.exact import (
    BEST,
    BETA,
    OFFSET,
    PI_REF,
    REF_PARAMS,
    REWARD,
    START,
    TOTAL,
    cosine,
    d_of,
    every,
    hparams,
    moved,
    ppo_hparams,
    ppo_moved,
    ppo_prepared,
    prepared,
)

SIZE = len(ALL.prompt) // 2  # responses to a prompt
ONCE = np.arange(len(ALL.prompt))  # every response one time
SCORES = jnp.asarray(REWARD, jnp.float32)
OPTIMUM, OTHER = policy_of(BEST / TOTAL), policy_of(START / TOTAL)
# Longer than any response, and no power of two
FIXED = {'aggregation': 'fixed_length', 'fixed_length': 5}


def exact(params):
    """The gradient of E[r] − β·KL."""
    return jax.grad(objective)(params, PI_REF, REWARD, BETA)['logits']


# ------------------------------------------------------------------------- fixed points


@pytest.mark.parametrize('estimator', [rloo, dr_grpo], ids=['rloo', 'dr_grpo'])
def test_at_the_optimum_no_response_has_an_advantage(estimator):
    settings = FIXED if estimator is dr_grpo else {}
    hp = hparams(group_size=SIZE, **settings)
    rollout = prepared(
        OPTIMUM, generation(OPTIMUM, ONCE), SCORES, hp=hp, estimator=estimator
    )
    assert np.abs(rollout.advantages).max() < 1e-6
    rollout = prepared(
        OTHER, generation(OTHER, ONCE), SCORES, hp=hp, estimator=estimator
    )
    assert np.abs(rollout.advantages).max() > 0.1


@pytest.mark.parametrize('lam', [1.0, 0.95])
def test_at_the_optimum_with_the_true_values_no_token_has_an_advantage(lam):
    hp = ppo_hparams(lam=lam)
    for params, counts in ((OPTIMUM, BEST), (OTHER, START)):
        values = values_of(counts / TOTAL, to_go(REWARD, d_of(params), BETA))
        rollout = ppo_prepared(params, values, generation(params, ONCE), SCORES, hp=hp)
        largest = np.abs(rollout.advantages).max()
        assert largest < 1e-6 if params is OPTIMUM else largest > 0.1
    # At the optimum the value of a prompt is β·log Z.
    values = values_of(BEST / TOTAL, to_go(REWARD, d_of(OPTIMUM), BETA))['values']
    np.testing.assert_allclose(
        values[ALL.tokens[[0, -1], 0] + 1], OFFSET[[0, -1]], atol=1e-6
    )


@pytest.mark.parametrize('kind', ['k1', 'k2', 'k3'])
def test_of_the_estimates_in_the_reward_k1_alone_rests_at_the_optimum(kind):
    """Which is why the others are refused there."""
    kl = kl_estimate(token_logprobs(OPTIMUM), token_logprobs(REF_PARAMS), kind)
    mask = jnp.asarray(ALL.response_mask)
    rewards = token_rewards(SCORES, kl, mask, BETA).reshape(2, SIZE, LENGTH)
    outcomes = Outcomes(rewards=rewards, mask=mask.reshape(rewards.shape))
    largest = np.abs(rloo.advantages(outcomes, rloo.HParams())).max()
    assert largest < 1e-6 if kind == 'k1' else largest > 0.5


# ---------------------------------------------------------------------- exact gradients


def _baseline(counts):
    """[B] any number for each prompt."""
    return jnp.asarray([0.4, -0.1], jnp.float32)[ALL.prompt[every(counts)]]


def _spread(params, counts):
    """The deviation of the rewards to go over the tokens of a batch, which divides the
    advantages of REINFORCE++.
    """
    sums = to_go(REWARD, d_of(params), BETA)[every(counts)]
    return sums[ALL.response_mask[every(counts)]].std()


CASES = {
    'rloo': (rloo, {}),
    'dr_grpo': (dr_grpo, FIXED),
    'remax': (remax, {}),
    'reinforce_pp': (reinforce_pp, {}),
    'reinforce_pp-token_mean': (reinforce_pp, {'aggregation': 'token_mean'}),
    'cispo': (rloo, {'objective': 'cispo', 'aggregation': 'token_mean'}),
    'gspo': (rloo, {'ratio_level': 'sequence', 'aggregation': 'sequence_sum'}),
}


def _gradient(name, params, counts):
    """What a step does to the logits, in the units of the objective."""
    estimator, settings = CASES[name]
    hp, rows = hparams(**settings), every(counts)
    rollout = prepared(
        params,
        generation(params, rows),
        SCORES[rows],
        _baseline(counts),
        hp=hp,
        estimator=estimator,
    )
    got = moved(params, rollout, hp=hp)
    scale = {rloo: (TOTAL - 1) / TOTAL, reinforce_pp: _spread(params, counts)}
    got = got * scale.get(estimator, 1.0) * (hp.fixed_length or 1)
    if hp.aggregation == 'token_mean':
        got = got * ALL.lengths[rows].mean()
    return np.asarray(got)


@pytest.mark.parametrize('name', CASES)
def test_every_response_with_its_multiplicity_gives_the_exact_gradient(name):
    want = exact(OTHER)
    assert np.abs(want).max() > 1e-2
    np.testing.assert_allclose(_gradient(name, OTHER, START), want, atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_at_the_optimum_the_gradient_is_zero(name):
    assert np.abs(_gradient(name, OPTIMUM, BEST)).max() < 2e-6


@pytest.mark.parametrize('name', ['remax', 'reinforce_pp'])
def test_a_mean_over_the_tokens_of_a_response_is_biased_by_length(name, monkeypatch):
    """For estimators whose advantage at a token is not 0 at the optimum."""
    estimator, settings = CASES[name]
    settings = {**settings, 'aggregation': 'sequence_mean'}
    monkeypatch.setitem(CASES, name, (estimator, settings))
    assert np.abs(_gradient(name, OPTIMUM, BEST)).max() > 3e-3


@pytest.mark.parametrize(
    'settings, true_values',
    [({'lam': 1.0}, False), ({'lam': 0.5}, True), ({'lam': 0.0}, True)],
    ids=['any values', 'true values', 'true values, one step'],
)
def test_ppo_has_the_exact_gradient(settings, true_values):
    """With λ = 1 whatever the critic says; with the true values for every λ."""
    hp, rows = ppo_hparams(**settings), every(START)
    values = values_of(START / TOTAL, to_go(REWARD, d_of(OTHER), BETA))
    if not true_values:
        drawn = np.random.default_rng(3).normal(size=values['values'].shape)
        values = {'values': jnp.asarray(drawn, jnp.float32)}
    rollout = ppo_prepared(OTHER, values, generation(OTHER, rows), SCORES[rows], hp=hp)
    policy, critic = ppo_moved(OTHER, values, rollout, hp=hp)
    tokens = ALL.lengths[rows].mean()
    np.testing.assert_allclose(policy * tokens, exact(OTHER), atol=1e-5)
    # The critic's own rest is at the true values.
    assert np.abs(critic).max() < 1e-6 if true_values else np.abs(critic).max() > 1e-3


# --------------------------------------------------------------------------- off-policy


@pytest.mark.parametrize('level', ['token', 'response'])
def test_weights_of_whole_responses_give_the_exact_gradient_off_policy(level):
    """Responses of μ, the reference, and the gradient of another policy."""
    hp, rows = hparams(off_policy_clip=1e6, off_policy_level=level), every(BEST)
    sampled = generation(OPTIMUM, rows)
    rollout = prepared(OTHER, sampled, SCORES[rows], hp=hp, estimator=rloo)
    got = moved(OTHER, rollout, hp=hp) * (TOTAL - 1) / TOTAL
    if level == 'response':
        np.testing.assert_allclose(got, exact(OTHER), atol=1e-5)
    else:
        assert cosine(got, exact(OTHER)) < 0.97
    # Responses of the policy itself have weight 1 at either level.
    own, rows = generation(OTHER, every(START)), every(START)
    rollout = prepared(OTHER, own, SCORES[rows], hp=hp, estimator=rloo)
    got = moved(OTHER, rollout, hp=hp) * (TOTAL - 1) / TOTAL
    np.testing.assert_allclose(got, exact(OTHER), atol=1e-5)
