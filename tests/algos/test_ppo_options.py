"""What PPO can be told beside its losses: REINFORCE as a case of it, critic warm-up,
responses of an older policy, and anchors that move.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algos.anchors import AnchorHParams, move_anchors
from rlhf_jax.algos.estimators import rloo
from rlhf_jax.algos.policy_gradient import PolicyHParams, prepare_policy
from rlhf_jax.optim import OptimConfig, actor_critic_optimizer
from rlhf_jax.types import Scores
from tests.algos.tiny_ppo import (
    PARAMS,
    PLAIN,
    SCORES,
    make_hp,
    make_state,
    two_rows,
)


def _policy_moved(state):
    return np.asarray(state.params['policy']['table'] - PARAMS['policy']['table'])


def _logprobs(table, tokens):
    """[B, T], position 0 holds 0."""
    logp = jax.nn.log_softmax(table, -1)[tokens[:, :-1], tokens[:, 1:]]
    return jnp.pad(logp, ((0, 0), (1, 0)))


# --------------------------------------------------------------------------- REINFORCE


@pytest.mark.parametrize('clip_eps', [None, 0.2])
def test_one_epoch_is_reinforce_with_the_critic_as_baseline(
    ready, update, sampled, clip_eps
):
    """θ moves by 0.5·Σ_t (G_t − V_t)·∇log π_t / tokens: λ = 1, no whitening. The clip
    is not felt at ratio 1.
    """
    hp = make_hp(
        kl_coef=0.0, gamma=0.9, lam=1.0, whiten_advantages=False, clip_eps=clip_eps
    )
    state = make_state(kl_coef=0.0)
    rollout, _ = ready(sampled, hp=hp, state=state)
    after, _ = update(rollout, hp)
    mask, tokens = np.asarray(sampled.response_mask), np.asarray(sampled.tokens)
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(-1)
    distance = last[:, None] - np.arange(mask.shape[1])
    to_go = np.asarray(SCORES)[:, None] * 0.9 ** np.maximum(distance, 0)
    before = np.asarray(PARAMS['critic']['table'])[tokens[:, :-1]]
    weight = np.where(mask, to_go - np.pad(before, ((0, 0), (1, 0))), 0)

    def reinforce(table):
        return jnp.sum(weight * _logprobs(table, tokens)) / mask.sum()

    gradient = jax.grad(reinforce)(PARAMS['policy']['table'])
    np.testing.assert_allclose(_policy_moved(after), 0.5 * gradient, atol=1e-6)
    assert np.abs(gradient).max() > 1e-2


# ----------------------------------------------------------------------------- warm-up


WARM = make_hp(critic_warmup_rollouts=2, num_epochs=2, kl_target=5.0, kl_horizon=100.0)


def _bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def _parts(state):
    """(policy, critic): parameters, optimizer and schedule of each."""
    inner = state.opt_state.inner_states
    return tuple((state.params[name], inner[name]) for name in ('policy', 'critic'))


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_while_the_critic_warms_up_the_policy_keeps_every_bit(
    update, rollout, weight_decay
):
    """Weight decay and momentum included; afterwards it starts as if it were new."""
    rate = OptimConfig(learning_rate=0.05, weight_decay=weight_decay)
    tx = actor_critic_optimizer(rate, rate, 20)
    start = make_state(tx)
    for step in (0, 1):
        state, metrics = update(rollout, WARM, tx=tx, step=step)
        (policy, critic), (policy_0, critic_0) = _parts(state), _parts(start)
        assert _bits(policy) == _bits(policy_0)
        assert _bits(critic) != _bits(critic_0)
        assert float(state.kl_coef) == np.float32(0.1)  # nor does β move
        assert metrics['policy/approxkl'] == pytest.approx(0, abs=1e-10)
        assert int(state.step) == step + 1
    late, _ = update(rollout, WARM, tx=tx, step=2)
    cold = make_hp(**{**vars(WARM), 'critic_warmup_rollouts': 0})
    other, _ = update(rollout, cold, tx=tx, step=2)
    for a, b in zip(jax.tree.leaves(late), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, atol=1e-7)
    assert np.abs(_policy_moved(late)).max() > 1e-3
    assert float(late.kl_coef) != np.float32(0.1)


def test_the_critic_warms_up_as_it_would_have_learnt(update, rollout):
    warm, _ = update(rollout, make_hp(critic_warmup_rollouts=1, num_epochs=3))
    cold, _ = update(rollout, make_hp(num_epochs=3))
    np.testing.assert_allclose(
        warm.params['critic']['table'], cold.params['critic']['table'], atol=1e-7
    )


# -------------------------------------------------------------------------- off-policy


def _older(sampled, shift=0.3):
    """The same responses from another policy μ, in its own log-probabilities."""
    table = PARAMS['policy']['table']
    drawn = jnp.asarray(np.random.default_rng(9).normal(size=table.shape), jnp.float32)
    logprobs = _logprobs(table + shift * drawn, sampled.tokens)
    return sampled.replace(logprobs=jnp.where(sampled.response_mask, logprobs, 0))


def test_responses_of_the_policy_itself_need_no_correction(ready, update, sampled):
    plain, before = ready(sampled)
    hp = make_hp(off_policy_clip=1.5)
    same, metrics = ready(sampled, hp=hp)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(same)):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert metrics.pop('rollout/off_policy_ratio') == pytest.approx(1, abs=1e-5)
    assert metrics.pop('rollout/off_policy_clipfrac') == 0
    assert metrics == pytest.approx(before, abs=1e-5)
    np.testing.assert_allclose(
        _policy_moved(update(plain)[0]), _policy_moved(update(same, hp)[0]), atol=1e-6
    )


def test_weights_of_older_responses_by_numpy(ready, update, sampled):
    """min(π/μ, 1.1) on the whitened advantages; everything else is π's."""
    older, hp = _older(sampled), make_hp(off_policy_clip=1.1)
    rollout, metrics = ready(older, hp=hp)
    plain, before = ready(sampled)
    mask = np.asarray(sampled.response_mask)
    now = np.where(mask, _logprobs(PARAMS['policy']['table'], sampled.tokens), 0)
    ratio = np.exp(now - older.logprobs)
    assert ratio[mask].min() < 0.9 and ratio[mask].max() > 1.2
    weights = np.minimum(ratio, 1.1)
    np.testing.assert_allclose(
        rollout.advantages, plain.advantages * weights, atol=1e-5
    )
    for name in ('old_logprobs', 'returns', 'old_values', 'ref_logprobs'):
        np.testing.assert_allclose(
            getattr(rollout, name), getattr(plain, name), atol=1e-5
        )
    assert metrics['rollout/off_policy_ratio'] == pytest.approx(
        ratio[mask].mean(), abs=1e-5
    )
    clipped = (ratio > 1.1)[mask].mean()
    assert metrics['rollout/off_policy_clipfrac'] == pytest.approx(clipped)
    assert metrics['objective/kl'] == pytest.approx(before['objective/kl'], abs=1e-4)
    _, first = update(rollout, hp)
    assert first['policy/ratio_max'] == pytest.approx(1, abs=1e-5)  # distance from π
    uncorrected, _ = ready(older)
    _, first = update(uncorrected)
    assert first['policy/ratio_max'] > 1.2  # distance from μ


def test_the_weighted_gradient_is_unbiased_by_the_bound(ready, update, sampled):
    """Without a bound that is felt, one epoch is the importance-weighted gradient
    Σ π/μ·A·∇log π / tokens.
    """
    older, hp = _older(sampled), make_hp(off_policy_clip=100.0)
    rollout, _ = ready(older, hp=hp)
    plain, _ = ready(sampled)
    state, _ = update(rollout, hp)
    mask = sampled.response_mask

    def weighted(table):
        logp = jnp.where(mask, _logprobs(table, sampled.tokens), 0)
        return jnp.sum(jnp.exp(logp - older.logprobs) * plain.advantages) / mask.sum()

    gradient = jax.grad(weighted)(PARAMS['policy']['table'])
    np.testing.assert_allclose(_policy_moved(state), 0.5 * gradient, atol=1e-6)


def test_garbage_log_probabilities_outside_the_response_weigh_nothing(ready, sampled):
    older, hp = _older(sampled), make_hp(off_policy_clip=1.1)
    clean, _ = ready(older, hp=hp)
    garbage = jnp.where(older.response_mask, older.logprobs, jnp.nan)
    dirty, metrics = ready(older.replace(logprobs=garbage), hp=hp)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(list(metrics.values())).all()


def test_methods_without_a_critic_are_corrected_too(bigram):
    """RLOO on two responses with scores 1 and 0: advantages ±1 times min(π/μ, c)."""
    hp = PolicyHParams(group_size=2, off_policy_clip=0.7)
    how = {'model': bigram, 'estimator': rloo, 'estimator_hp': rloo.HParams()}
    own = two_rows()
    scores, table = jnp.array([1.0, 0.0]), PARAMS['policy']['table']
    args = (PARAMS['policy'], own, Scores(scores))
    rollout, metrics = prepare_policy(make_state(), *args, hp=hp, **how)
    now = _logprobs(table, own.tokens)
    weights = np.minimum(np.exp(now - own.logprobs), 0.7)
    expected = np.where(own.response_mask, weights * np.array([[1.0], [-1.0]]), 0)
    np.testing.assert_allclose(rollout.advantages, expected, atol=1e-5)
    assert 0 < float(metrics['rollout/off_policy_clipfrac'].value()) < 1
    np.testing.assert_allclose(
        rollout.old_logprobs, jnp.where(own.response_mask, now, 0), atol=1e-5
    )
    with pytest.raises(ValueError, match='off_policy_clip=-1.0 leaves no weight'):
        PolicyHParams(off_policy_clip=-1.0)


# ----------------------------------------------------------------------------- anchors


def _anchored(step, ref=0.0, average=0.0):
    """A state whose policy is (1, 3), and anchors of (ref, ref) and (average, …)."""
    return make_state(optax.sgd(0.1), step=step).replace(
        params={'policy': {'x': jnp.array([1.0, 3.0])}},
        ref_params={'x': jnp.full(2, ref)},
        ema_params={'x': jnp.full(2, average)},
    )


def test_the_reference_moves_when_it_is_due_by_hand():
    """¼·(1, 3) + ¾·(5, 5) = (4, 4.5) after rollouts 3, 6, …"""
    hp = AnchorHParams(ref_sync_rollouts=3, ref_mix=0.25)
    for step, expected in ((1, [5, 5]), (2, [5, 5]), (3, [4, 4.5]), (6, [4, 4.5])):
        state = jax.jit(move_anchors, static_argnames='hp')(_anchored(step, 5.0), hp=hp)
        assert state.ref_params['x'].tolist() == expected
        assert state.ema_params['x'].tolist() == [0, 0]
    state = move_anchors(_anchored(3, 5.0), AnchorHParams(ref_sync_rollouts=3))
    assert state.ref_params['x'].tolist() == [1, 3]  # α = 1: the policy itself


def test_the_average_by_hand():
    """¾·8 + ¼·(1, 3) = (6.25, 6.75), then once more (4.9375, 5.8125)."""
    hp, state = AnchorHParams(ema_decay=0.75), _anchored(1, 5.0, 8.0)
    state = move_anchors(state, hp)
    assert state.ema_params['x'].tolist() == [6.25, 6.75]
    state = move_anchors(state, hp)
    assert state.ema_params['x'].tolist() == [4.9375, 5.8125]
    assert state.ref_params['x'].tolist() == [5, 5]


def test_anchors_that_are_off_leave_the_state_alone():
    state = make_state()
    assert move_anchors(state, AnchorHParams()) is state


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'ref_sync_rollouts': 0}, 'ref_sync_rollouts=0: use 1 or more'),
        ({'ref_mix': 0.0}, r'ref_mix=0.0: use a number in \(0, 1\]'),
        ({'ema_decay': 1.0}, r'ema_decay=1.0: use a number in \[0, 1\)'),
    ],
)
def test_anchors_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        AnchorHParams(**settings)


def test_anchors_that_are_not_there():
    with pytest.raises(ValueError, match='ref_sync_rollouts=2 .* with ref_params'):
        move_anchors(make_state(), AnchorHParams(ref_sync_rollouts=2))
    with pytest.raises(ValueError, match='ema_decay=0.5 .* with ema_params'):
        move_anchors(make_state(), AnchorHParams(ema_decay=0.5))


def test_a_reference_that_is_the_policy_leaves_no_penalty(ready, sampled):
    """``state.ref_params``, moved all the way, given to prepare: KL 0."""
    state = make_state(step=4).replace(ref_params={'table': jnp.zeros((6, 6))})
    state = move_anchors(state, AnchorHParams(ref_sync_rollouts=2))
    _, metrics = ready(sampled, ref=state.ref_params, state=state)
    assert metrics['objective/kl'] == pytest.approx(0, abs=1e-5)
    assert PLAIN.kl_coef > 0
