"""Our estimators and losses against what other projects' own functions returned.

The numbers lie outside the repository, so that these tests are skipped where they are
missing; the same cases by hand arithmetic stand in ``tests/ops``. Those of preference
losses and advantages without a critic are in ``preference/test_losses.py`` and
``algos/test_estimators.py``.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algos.ppo import _after_last
from rlhf_jax.ops.advantages import gae, token_rewards
from rlhf_jax.ops.best_of_n import best_of_n_kl_bound, best_of_n_mean
from rlhf_jax.ops.kl import adapt_kl_coef, kl_estimate
from rlhf_jax.ops.masked import last_index, masked_mean, whiten
from rlhf_jax.ops.policy_loss import aggregate, clipped_policy_loss, clipped_value_loss
from rlhf_jax.optim import OptimConfig, make_optimizer
from rlhf_jax.rewards import (
    ScoreHParams,
    combine_members,
    initial_moments,
    scale_scores,
)
from tests.reward_losses.test_bradley_terry import nll

PATH = pathlib.Path(__file__).resolve().parents[2] / 'shared/data/goldens/goldens.json'

R = jnp.array([[-0.1, 0.2, 0, 1], [0.05, -0.3, 0.7, 0]])
V = jnp.array([[0.5, 0.4, 0.3, 0.2], [0.1, 0.2, 0.3, 0]])
M = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
EVERY = jnp.ones_like(M)
LOGPROBS = jnp.array([[-1, -0.5, -2, -0.1], [-0.7, -1.2, -0.3, -0.9]])
OLD = jnp.array([[-1.2, -0.45, -1.7, -0.1], [-0.9, -1, -0.35, -0.9]])
REF = jnp.array([[-1.1, -0.6, -1.5, -0.2], [-0.8, -1.1, -0.5, -0.4]])
A = jnp.array([[1, -0.5, 2, -1.5], [0.3, -1, 0.8, 0]])


@pytest.fixture(scope='module')
def golden():
    if not PATH.exists():
        pytest.skip(f'golden numbers are not at {PATH}')
    return json.loads(PATH.read_text())


def _same(ours, theirs, mask=None):
    ours, theirs = np.ravel(ours), np.ravel(theirs)
    if mask is not None:
        ours, theirs = ours[np.ravel(mask)], theirs[np.ravel(mask)]
    np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=1e-6)


def test_whitening(golden):
    _same(whiten(R, EVERY), golden['openai_whiten(R)'])
    _same(
        whiten(R, EVERY, shift_mean=False), golden['openai_whiten(R,shift_mean=False)']
    )
    _same(whiten(R, EVERY, unbiased=True), golden['trlx_whiten_unbiased(R)'])
    # Theirs leaves whitened garbage outside the mask, ours leaves 0 there.
    _same(whiten(R, M), golden['masked_whiten(R,M)'], M)
    kept = whiten(R, M, shift_mean=False)
    _same(kept, golden['masked_whiten(R,M,shift_mean=False)'], M)


def test_running_moments(golden):
    """trlx's, after a batch of 3 and one of 4 scores. The second is known by its mean
    and spread: -1, 0, 3, 5 have mean 7/4 and Σ (x − 7/4)² = 35 − 4·(7/4)² = 22.75.
    """
    hp = ScoreHParams(score_scaling='running')
    mean, std, variance, count, *batches = golden['trlx_RunningMoments']
    moments = initial_moments(hp)
    for scores, (batch_mean, batch_std) in zip(([1, 2, 4], [-1, 0, 3, 5]), batches):
        _same([np.mean(scores), np.std(scores, ddof=1)], [batch_mean, batch_std])
        _, moments = scale_scores(jnp.float32(scores), moments, hp=hp)
    _same([moments.count, moments.mean], [count, mean])
    _same(moments.m2 / moments.count, variance)
    _same(jnp.sqrt(moments.m2 / (moments.count - 1)), std)


def test_gae(golden):
    advantages, returns = gae(R, V, EVERY, gamma=1.0, lam=0.95)
    _same(advantages, golden['GAE(g=1,l=.95) adv'])
    _same(returns, golden['GAE ret'])


def test_masked_gae_and_whitening_with_n_minus_one(golden):
    advantages, returns = gae(R, V, M, gamma=1.0, lam=0.95)
    whitened, expected_returns = golden['verl GAE masked']
    _same(whiten(advantages, M, unbiased=True), whitened, M)
    _same(returns, expected_returns, M)


@pytest.mark.parametrize('kind', ['k1', 'k2', 'k3'])
def test_kl(golden, kind):
    _same(kl_estimate(LOGPROBS, REF, kind), golden[f'kl_{kind}'])


@pytest.mark.parametrize(
    'name, how',
    [
        ('token-mean', 'token_mean'),
        ('seq-mean-token-sum', 'sequence_sum'),
        ('seq-mean-token-mean', 'sequence_mean'),
    ],
)
def test_aggregation(golden, name, how):
    total, weight = aggregate(LOGPROBS, M, how)
    _same(total / weight, golden[f'agg {name}'])


def test_aggregation_over_a_fixed_length(golden):
    """verl divides the sum by the 4 places of a row, and leaves the 2 rows a sum."""
    total, weight = aggregate(LOGPROBS, M, 'fixed_length', 4)
    _same(2 * total / weight, golden['agg seq-mean-token-sum-norm'])


def test_best_of_n(golden):
    """Five samples of one prompt: gold, and the proxy that chooses."""
    proxy, gold = np.array([[-1.0, 0, 1, 2, 3]]), np.array([[0.1, 0.5, 0.9, 1.2, 0.4]])
    for n, expected in enumerate(golden['unbiased BoN (gold,proxy) n=1..5 N=5'], 1):
        got = [best_of_n_mean(proxy, values, n)[0] for values in (gold, proxy)]
        _same(got, expected)
    bounds = golden['KL_bon bound n=1,2,4,16,64,1024']
    _same([best_of_n_kl_bound(n) for n in (1, 2, 4, 16, 64, 1024)], bounds)


def test_ensembles(golden):
    """Three members. Of the second row only results are known: the first, plus 1."""
    scores = jnp.array([[1.0, 0, 2], [2, 1, 3]])
    mean, worst, unbiased = golden['ensemble mean/WCO/UWO(.1,torch unbiased)']
    _same(combine_members(scores, 'mean', 0.1)[0], mean)
    _same(combine_members(scores, 'worst', 0.1)[0], worst)
    weighted, _ = combine_members(scores, 'uncertainty', 0.1)
    _same(weighted, golden['UWO numpy population'])
    # Their variance divides by M − 1: λ·3/2 is ours.
    _same(combine_members(scores, 'uncertainty', 0.15)[0], unbiased)


def test_policy_loss(golden):
    loss, clip_fraction, k1_to_old = golden['OpenRLHF PolicyLoss']
    ours, _, clipped = clipped_policy_loss(LOGPROBS, OLD, A, clip_eps=0.2)
    _same(masked_mean(ours, M), loss)
    _same(masked_mean(clipped, M), clip_fraction)
    _same(masked_mean(kl_estimate(OLD, LOGPROBS, 'k1'), M), k1_to_old)


def test_policy_loss_with_dual_clip(golden):
    ours, _, _ = clipped_policy_loss(LOGPROBS, OLD, A, clip_eps=0.2, dual_clip=3.0)
    _same(masked_mean(ours, M), golden['verl ppo loss (dualclip 3)'])


def test_value_loss(golden):
    new = jnp.array([[0.9, 0.35, -0.1, 0.2], [0.1, 0.6, 0.25, 9]])
    returns = jnp.array([[1.4, 0.9, 0.8, 1], [0.3, 0.2, 0.7, 0]])
    loss, clipped = clipped_value_loss(new, V, returns, clip_eps=0.2)
    _same(masked_mean(loss, M), golden['ValueLoss clip .2'])
    _same([masked_mean(loss, M), masked_mean(clipped, M)], golden['verl value loss'])


def test_adaptive_kl(golden):
    (name,) = [key for key in golden if key.startswith('AdaptiveKL')]
    coef, path = jnp.float32(0.15), []
    for kl in (0, 3, 6, 6.5, 7.5, 20):
        coef = adapt_kl_coef(coef, kl, target=6.0, horizon=1e4, num_episodes=512)
        path.append(coef)
    _same(path, golden[name])


def test_bradley_terry(golden):
    # Differences 1, −0.6 and 0: the numbers belong to a first pair (1.5, 0.5).
    chosen, rejected = jnp.array([1.5, -0.2, 0.3]), jnp.array([0.5, 0.4, 0.3])
    margins = jnp.array([1, 2 / 3, 1 / 3])
    _same(nll(chosen, rejected).mean(), golden['BT loss'])
    _same(nll(chosen, rejected, margins).mean(), golden['BT margin loss'])


def test_token_rewards(golden):
    """OpenRLHF's ``compute_reward``: β 0.05, scores 2 and −1 at the last real token.

    It leaves the KL penalty of padding in place, where ours is 0.
    """
    kl = kl_estimate(LOGPROBS, REF, 'k1')
    rewards = token_rewards(jnp.array([2.0, -1.0]), kl, M, 0.05)
    _same(rewards, golden['compute_reward'], M)
    assert float(rewards[1, 3]) == 0


@pytest.mark.parametrize(
    'name, gradients',
    [
        ('Adam 1 step g=1e-4 tf/pt', [1e-4]),
        ('Adam 3 steps g=1e-4,-2e-4,5e-5 tf/pt', [1e-4, -2e-4, 5e-5]),
    ],
)
def test_adam_has_the_semantics_of_pytorch(golden, name, gradients):
    config = OptimConfig(
        learning_rate=1e-3, eps=1e-5, schedule='constant', max_grad_norm=None
    )
    tx = make_optimizer(config, len(gradients))
    params = {'w': jnp.zeros(())}
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update({'w': jnp.float32(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    tensorflow, pytorch = golden[name]
    np.testing.assert_allclose(params['w'], pytorch, rtol=1e-5)
    assert abs(float(params['w']) - tensorflow) > 1e-4


def test_where_a_truncated_response_ends_and_where_its_reward_may_stand(golden):
    truncated, last, reward = golden['truncate']
    mask = jnp.array(truncated).reshape(3, 5) != -1
    assert last_index(mask).tolist() == last
    assert last_index(_after_last(mask)).tolist() == reward
