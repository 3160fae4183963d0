"""``prepare`` and ``ppo_step``: by hand, against a slow loop, and known bugs.

The policy is a table of bigram logits and the critic a table of numbers, so that every
quantity can be worked out without the package.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algos.ppo import (
    PPOHParams,
    policy_loss,
    ppo_step,
    value_loss,
)
from rlhf_jax.algos.sft import sft_loss
from rlhf_jax.algos.updates import SHUFFLE, minibatches
from rlhf_jax.types import TokenBatch
from tests.algos.tiny_ppo import (
    NO_VALUE,
    PARAMS,
    PLAIN,
    ROWS,
    SCORES,
    SGD,
    UNIFORM,
    V,
    make_hp,
    make_state,
    two_rows,
)

# ----------------------------------------------------------------------------- prepare


def test_prepare_by_hand(ready):
    hp = make_hp(gamma=1.0, lam=1.0, whiten_advantages=False)
    state = make_state(kl_coef=0.1).replace(params=NO_VALUE)
    rollout, metrics = ready(two_rows(), jnp.array([0.5, -0.25]), hp, UNIFORM, state)
    log6 = np.log(6)
    np.testing.assert_allclose(
        rollout.ref_logprobs,
        [[0, -log6, -log6, 0], [0, -log6, -log6, -log6]],
        rtol=1e-6,
    )
    # d = log π + log 6; r = −0.1·d, plus the score at the last response token.
    row1 = [-0.1 * (log6 - 1), -0.1 * (log6 - 2) + 0.5]
    row2 = [-0.1 * (log6 - 0.5), -0.1 * (log6 - 1.5), -0.1 * (log6 - 3) - 0.25]
    # γ = λ = 1 and V = 0: advantages and returns are the sums of what follows.
    expected = [[0, sum(row1), row1[1], 0], [0, sum(row2), sum(row2[1:]), row2[2]]]
    np.testing.assert_allclose(rollout.returns, expected, atol=1e-6)
    np.testing.assert_allclose(rollout.advantages, expected, atol=1e-6)
    kl = (2 * log6 - 3 + 3 * log6 - 5) / 2  # nats per sequence
    assert metrics['objective/kl'] == pytest.approx(kl, rel=1e-5)
    assert metrics['objective/scores'] == pytest.approx(0.125)
    assert metrics['objective/rlhf_reward'] == pytest.approx(0.125 - 0.1 * kl, rel=1e-5)
    assert metrics['objective/entropy'] == pytest.approx((3 + 5) / 2)
    assert metrics['rollout/response_length'] == 2.5
    assert metrics['rollout/ended'] == 0.5


def test_scores_stay_real_numbers(ready):
    """A score of 0.4 must not become the 0 that an integer type would make of it."""
    hp = make_hp(gamma=1.0, lam=1.0, whiten_advantages=False)
    state = make_state(kl_coef=0.0).replace(params=NO_VALUE)
    rollout, _ = ready(two_rows(), jnp.array([0.4, -0.6]), hp, UNIFORM, state)
    np.testing.assert_allclose(rollout.returns[:, 1], [0.4, -0.6], rtol=1e-6)
    for name, leaf in vars(rollout).items():
        kind = (
            jnp.int32 if name == 'tokens' else bool if 'mask' in name else jnp.float32
        )
        assert leaf is None or leaf.dtype == kind, name


@pytest.mark.parametrize(
    'score_at, first', [('last', [0.5, 1.0, 0]), ('after_last', [0.25, 0.5, 1.0])]
)
def test_where_the_score_stands(ready, score_at, first):
    """γ = ½ shows the distance to the score; a full response has no place behind it."""
    hp = make_hp(gamma=0.5, lam=1.0, whiten_advantages=False, score_at=score_at)
    state = make_state(kl_coef=0.0).replace(params=NO_VALUE)
    rollout, _ = ready(two_rows(), jnp.array([1.0, 1.0]), hp, UNIFORM, state)
    np.testing.assert_allclose(rollout.returns[0, 1:], first, atol=1e-6)
    np.testing.assert_allclose(rollout.returns[1, 1:], [0.25, 0.5, 1.0], atol=1e-6)
    # The policy is trained on what it wrote, wherever the score stands.
    np.testing.assert_allclose(rollout.advantages[0, 1:], [*first[:2], 0], atol=1e-6)
    assert rollout.value_mask[0].tolist() == [
        False,
        True,
        True,
        score_at == 'after_last',
    ]


def test_values_are_those_before_each_token(ready, sampled):
    rollout, _ = ready(sampled)
    critic, tokens = (
        np.asarray(PARAMS['critic']['table']),
        np.asarray(sampled.tokens),
    )
    before = np.pad(critic[tokens[:, :-1]], ((0, 0), (1, 0)))
    expected = np.where(sampled.response_mask, before, 0)
    np.testing.assert_allclose(rollout.old_values, expected, atol=1e-6)
    np.testing.assert_array_equal(rollout.old_logprobs, sampled.logprobs)


def test_a_policy_that_is_its_reference_has_kl_zero(ready, sampled):
    _, metrics = ready(sampled, ref=PARAMS['policy'])
    assert metrics['objective/kl'] == pytest.approx(0, abs=1e-5)
    assert metrics['objective/kl_k3'] == pytest.approx(0, abs=1e-5)
    assert metrics['objective/rlhf_reward'] == pytest.approx(
        float(SCORES.mean()), abs=1e-5
    )
    _, metrics = ready(sampled)
    assert metrics['objective/kl_k3'] > 0.01


def test_advantages_are_whitened_over_the_whole_rollout_and_returns_are_not(
    ready, sampled
):
    plain, _ = ready(sampled, hp=make_hp(whiten_advantages=False))
    for unbiased in (False, True):
        white, _ = ready(sampled, hp=make_hp(unbiased_variance=unbiased))
        inside = np.asarray(white.advantages)[sampled.response_mask]
        assert inside.mean() == pytest.approx(0, abs=1e-5)
        assert inside.std(ddof=int(unbiased)) == pytest.approx(1, abs=1e-4)
        np.testing.assert_array_equal(white.returns, plain.returns)
    rows = np.asarray(white.advantages).sum(1) / sampled.response_mask.sum(1)
    assert np.abs(rows).max() > 0.1  # not row by row


def test_whitened_rewards_keep_their_mean(ready, sampled):
    """With V = 0 and γ = λ = 1 the first return is the sum of a row's rewards."""
    state = make_state().replace(params=NO_VALUE)
    hp = {'gamma': 1.0, 'lam': 1.0, 'whiten_advantages': False}
    plain, _ = ready(sampled, hp=make_hp(**hp), state=state)
    white, _ = ready(sampled, hp=make_hp(**hp, whiten_rewards=True), state=state)
    count = int(sampled.response_mask.sum())

    def rewards(rollout):
        returns = np.asarray(rollout.returns)
        following = np.pad(returns[:, 1:], ((0, 0), (0, 1)))
        return (returns - following)[sampled.response_mask]

    before, after = rewards(plain), rewards(white)
    assert len(after) == count
    assert after.mean() == pytest.approx(before.mean(), abs=1e-5)
    assert after.std() == pytest.approx(1, abs=1e-4)
    assert abs(before.std() - 1) > 0.1


# ------------------------------------------------------------------------------ update


def test_the_first_minibatch_sees_ratio_one(update, rollout):
    _, metrics = update(rollout)
    assert metrics['policy/ratio'] == pytest.approx(1, abs=1e-6)
    assert metrics['policy/ratio_max'] == pytest.approx(1, abs=2e-6)
    assert metrics['policy/approxkl'] == pytest.approx(0, abs=1e-10)
    assert metrics['policy/clipfrac'] == 0


@pytest.mark.parametrize('epochs', [1, 3])
def test_how_far_the_sampler_is_counts_before_the_first_update(update, rollout, epochs):
    """Here it is wrong by 0.25 nats at every token, and by 0.5 at one."""
    response = np.asarray(rollout.response_mask)
    wrong = np.asarray(rollout.old_logprobs) - 0.25 * response
    wrong[*np.argwhere(response)[0]] -= 0.25
    hp = make_hp(num_epochs=epochs, num_minibatches=1)
    _, metrics = update(rollout.replace(old_logprobs=wrong), hp)
    mean = 0.25 + 0.25 / response.sum()
    assert metrics['sampling/logprob_diff_mean'] == pytest.approx(mean, abs=1e-5)
    assert metrics['sampling/logprob_diff_max'] == pytest.approx(0.5, abs=1e-5)


def test_old_logprobs_are_not_recomputed_within_a_rollout(update, rollout):
    _, metrics = update(rollout, make_hp(num_epochs=3))
    assert metrics['policy/approxkl'] > 1e-4
    assert metrics['policy/ratio_max'] > 1.01
    assert metrics['policy/updates'] == 3


def _aggregated(loss, mask, how):
    """Mean over the places, or over the rows that have any."""
    loss = jnp.where(mask, loss, 0)
    if how == 'token_mean':
        return loss.sum() / mask.sum()
    rows = loss.sum(-1)
    if how == 'sequence_mean':
        rows = rows / mask.sum(-1)
    return rows.mean()


def _losses(params, rows, hp):
    """The two losses of a minibatch, written without the package."""
    r = rows
    logp = jax.nn.log_softmax(params['policy']['table'], -1)[
        r.tokens[:, :-1], r.tokens[:, 1:]
    ]
    mask = r.response_mask[:, 1:]
    ratio = jnp.exp(jnp.where(mask, logp - r.old_logprobs[:, 1:], 0))
    a = r.advantages[:, 1:]
    surrogate = a * ratio
    if hp.clip_eps is not None:
        near = jnp.clip(ratio, 1 - hp.clip_eps, 1 + hp.clip_eps)
        surrogate = jnp.minimum(surrogate, a * near)
    if hp.dual_clip is not None:
        bounded = jnp.maximum(surrogate, hp.dual_clip * a)
        surrogate = jnp.where(a < 0, bounded, surrogate)
    value = params['critic']['table'][r.tokens[:, :-1]]
    old, target = r.old_values[:, 1:], r.returns[:, 1:]
    error = (value - target) ** 2
    if hp.value_clip_eps is not None:
        near = jnp.clip(value, old - hp.value_clip_eps, old + hp.value_clip_eps)
        error = jnp.maximum(error, (near - target) ** 2)
    policy = _aggregated(-surrogate, mask, hp.aggregation)
    return policy, _aggregated(error / 2, mask, hp.aggregation)


TIGHT = {'clip_eps': 0.02, 'value_clip_eps': 0.01}  # so that the clips are felt


@pytest.mark.parametrize('parts', [1, 2])
@pytest.mark.parametrize(
    'settings',
    [
        {'value_coef': 0.3},
        {**TIGHT, 'aggregation': 'sequence_mean'},
        {**TIGHT, 'aggregation': 'sequence_sum'},
        {'clip_eps': 0.02, 'value_clip_eps': None, 'dual_clip': 1.01},
        {'clip_eps': None, 'value_clip_eps': 0.01},
    ],
    ids=['plain', 'per-sequence', 'sums', 'dual-clip', 'no-clip'],
)
def test_a_step_is_a_slow_loop_over_its_minibatches(update, rollout, settings, parts):
    """Two epochs of two minibatches with Adam; also accumulated in two parts."""
    tx, step = optax.adam(0.05), 3
    # As if the policy had moved already, so that the clips are felt from the start.
    noise = np.random.default_rng(8).normal(0, 0.2, rollout.tokens.shape)
    old = jnp.where(rollout.response_mask, rollout.old_logprobs + noise, 0)
    rollout = rollout.replace(old_logprobs=old)
    hp = make_hp(num_epochs=2, num_minibatches=2, num_microbatches=parts, **settings)
    state, metrics = update(rollout, hp, tx=tx, step=step)
    params, opt_state = jax.tree.map(jnp.array, PARAMS), tx.init(PARAMS)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(5), step), SHUFFLE)

    @jax.jit
    def gradient(params, rows):
        def total(params):
            policy, value = _losses(params, rows, hp)
            return policy + hp.value_coef * value, (policy, value)

        return jax.grad(total, has_aux=True)(params)

    losses, counts = [], []
    for epoch_key in jax.random.split(key, 2):
        order = np.asarray(jax.random.permutation(epoch_key, ROWS))
        for chosen in (order[:4], order[4:]):
            rows = jax.tree.map(lambda x, chosen=chosen: x[chosen], rollout)
            grads, loss = gradient(params, rows)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            losses.append(loss)
            tokens = rows.response_mask.sum()
            counts.append(float(tokens if hp.aggregation == 'token_mean' else 4))
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params)):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # Minibatches have unequal weights where tokens are counted.
    assert (len(set(counts)) > 1) == (hp.aggregation == 'token_mean')
    for name, i in (('loss/policy', 0), ('loss/value', 1)):
        mean = np.average([float(loss[i]) for loss in losses], weights=counts)
        assert metrics[name] == pytest.approx(mean, abs=1e-5)
    assert (metrics['policy/clipfrac'] > 0.02) == (hp.clip_eps is not None)
    assert (metrics['val/clipfrac'] > 0) == (hp.value_clip_eps == 0.01)
    assert int(state.step) == step + 1


def test_the_value_coefficient_scales_the_critic_alone(update, rollout):
    def moved(value_coef):
        state, _ = update(rollout, make_hp(value_coef=value_coef))
        return jax.tree.map(lambda a, b: np.asarray(a - b), state.params, PARAMS)

    one, two = moved(0.1), moved(0.2)
    np.testing.assert_allclose(
        one['policy']['table'], two['policy']['table'], atol=1e-7
    )
    np.testing.assert_allclose(
        2 * one['critic']['table'], two['critic']['table'], atol=1e-6
    )
    assert np.abs(one['critic']['table']).max() > 1e-3


def test_ptx_adds_its_gradient(update, rollout, bigram):
    every = np.ones((ROWS, 4), bool)
    tokens = np.random.default_rng(6).integers(0, V, (ROWS, 4)).astype(np.int32)
    ptx = TokenBatch(tokens=tokens, mask=every, loss_mask=every)
    without, _ = update(rollout)
    state, metrics = update(rollout, make_hp(ptx_coef=3.0), ptx)
    total, gradient = jax.value_and_grad(lambda p: sft_loss(p, ptx, model=bigram)[0])(
        PARAMS['policy']
    )
    weight = ROWS * 3  # position 0 counts nothing
    # SGD of rate 0.5: the difference of the two runs is −0.5·3·∇ptx.
    difference = state.params['policy']['table'] - without.params['policy']['table']
    np.testing.assert_allclose(difference, -1.5 * gradient['table'] / weight, atol=1e-5)
    assert float(jnp.abs(difference).max()) > 0.01
    assert metrics['loss/ptx'] == pytest.approx(float(total) / weight, rel=1e-5)
    np.testing.assert_array_equal(
        state.params['critic']['table'], without.params['critic']['table']
    )
    for hp, batch in ((make_hp(ptx_coef=1.0), None), (PLAIN, ptx)):
        with pytest.raises(ValueError, match='ptx_coef=.* disagree'):
            update(rollout, hp, batch)


def test_the_entropy_bonus_raises_entropy(update, rollout):
    flat = rollout.replace(advantages=jnp.zeros_like(rollout.advantages))
    state, metrics = update(flat, make_hp(entropy_coef=1.0))
    table = jax.nn.log_softmax(state.params['policy']['table'], -1)
    start = jax.nn.log_softmax(PARAMS['policy']['table'], -1)
    entropy = lambda x: float(-(jnp.exp(x) * x).sum(-1).mean())  # noqa: E731
    assert entropy(table) > entropy(start) + 0.002
    assert metrics['loss/policy'] == pytest.approx(0, abs=1e-6)  # without the bonus
    unmoved, _ = update(flat)
    np.testing.assert_allclose(
        unmoved.params['policy']['table'], PARAMS['policy']['table'], atol=1e-7
    )


def test_kl_in_the_loss_pulls_to_the_reference(update, rollout):
    """With advantages of 0 the step is −0.5·c·∇ of the mean k3, and nothing else."""
    flat = rollout.replace(advantages=jnp.zeros_like(rollout.advantages))
    state, metrics = update(flat, make_hp(kl_loss_coef=0.7))
    now, before = rollout.tokens[:, 1:], rollout.tokens[:, :-1]
    mask = rollout.response_mask[:, 1:]

    def k3(table):
        d = jax.nn.log_softmax(table, -1)[before, now] - rollout.ref_logprobs[:, 1:]
        return jnp.sum(jnp.where(mask, jnp.exp(-d) - 1 + d, 0)) / mask.sum()

    value, gradient = jax.value_and_grad(k3)(PARAMS['policy']['table'])
    moved = state.params['policy']['table'] - PARAMS['policy']['table']
    np.testing.assert_allclose(moved, -0.35 * gradient, atol=1e-6)
    assert float(jnp.abs(moved).max()) > 1e-3
    assert metrics['policy/kl'] == pytest.approx(float(value), rel=1e-4)


def test_target_approxkl_stops_the_epochs(update, rollout, bigram):
    """A stopped run is the run of as many epochs as were done."""
    seen = []
    for epochs in (1, 2):
        state, _ = update(rollout, make_hp(num_epochs=epochs))
        metrics = policy_loss(state.params['policy'], rollout, model=bigram, hp=PLAIN)[
            2
        ]
        seen.append(float(metrics['policy/approxkl'].value()))
    assert 0 < seen[0] < seen[1]
    target = sum(seen) / 2  # passed by the second update, exceeded by the third
    two, unstopped = update(rollout, make_hp(num_epochs=2))
    stopped, metrics = update(rollout, make_hp(num_epochs=4, target_approxkl=target))
    assert metrics['policy/updates'] == 2
    assert metrics['policy/approxkl'] == pytest.approx(
        unstopped['policy/approxkl'], rel=1e-4
    )
    for a, b in zip(jax.tree.leaves(stopped.params), jax.tree.leaves(two.params)):
        np.testing.assert_allclose(a, b, atol=1e-6)
    four, metrics = update(rollout, make_hp(num_epochs=4, target_approxkl=1e3))
    assert metrics['policy/updates'] == 4
    apart = four.params['policy']['table'] - two.params['policy']['table']
    assert float(jnp.abs(apart).max()) > 1e-3


@pytest.mark.parametrize(
    'kl, error', [(0.0, -0.2), (5.0, 0.0), (5.5, 0.1), (50.0, 0.2)]
)
def test_the_adaptive_coefficient_by_hand(update, rollout, kl, error):
    """``kl`` nats per sequence against a target of 5; n/horizon = 8/100."""
    per_token = kl * ROWS / rollout.response_mask.sum()
    ref = jnp.where(rollout.response_mask, rollout.old_logprobs - per_token, 0)
    hp = make_hp(kl_target=5.0, kl_horizon=100.0, entropy_coef=0.1)
    state, _ = update(rollout.replace(ref_logprobs=ref), hp, kl_coef=0.1)
    assert float(state.kl_coef) == pytest.approx(0.1 * (1 + error * 0.08), rel=1e-5)
    assert float(update(rollout)[0].kl_coef) == np.float32(
        0.1
    )  # fixed without a target


def test_every_epoch_of_every_step_is_shuffled_anew(rollout):
    hp = make_hp(num_epochs=3, num_minibatches=2)

    def orders(step, seed=5):
        state = make_state(step=step, rng=jax.random.PRNGKey(seed))
        return minibatches(state, jnp.arange(ROWS), hp, None).reshape(3, ROWS).tolist()

    seen = [tuple(order) for step in range(5) for order in orders(step)]
    assert all(sorted(order) == list(range(ROWS)) for order in seen)
    assert len(set(seen)) == len(seen) == 15
    assert orders(2) == orders(2)
    assert orders(2) != orders(2, seed=6)


def test_no_key_is_used_twice(model, rollout):
    with jax.debug_key_reuse(True):
        step = functools.partial(
            ppo_step, model=model, tx=SGD, hp=make_hp(num_epochs=2)
        )
        jax.jit(step)(make_state(rng=jax.random.key(5)), rollout)


def test_garbage_outside_the_response_changes_nothing(update, rollout, sampled):
    """NaN in every per-token array and wild ids in the padding."""
    dirty = {
        name: jnp.where(rollout.response_mask, getattr(rollout, name), jnp.nan)
        for name in (
            'old_logprobs',
            'ref_logprobs',
            'old_values',
            'advantages',
            'returns',
        )
    }
    tokens = jnp.where(sampled.mask, rollout.tokens, -7)
    hp = make_hp(kl_target=5.0, kl_horizon=100.0, entropy_coef=0.1)
    clean_state, clean = update(rollout, hp)
    dirty_state, metrics = update(rollout.replace(**dirty, tokens=tokens), hp)
    assert metrics == pytest.approx(clean, rel=1e-6)
    for a, b in zip(jax.tree.leaves(clean_state), jax.tree.leaves(dirty_state)):
        np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.parametrize('how', ['token_mean', 'sequence_mean', 'sequence_sum'])
def test_losses_over_parts_add_up(rollout, bigram, token_scores, how):
    """Sums and weights of two halves add up to those of the whole."""
    hp = make_hp(aggregation=how)
    halves = [
        jax.tree.map(lambda x, s=s: x[s], rollout) for s in (slice(4), slice(4, None))
    ]
    for loss, params, net in (
        (policy_loss, PARAMS['policy'], bigram),
        (value_loss, PARAMS['critic'], token_scores),
    ):
        whole = loss(params, rollout, model=net, hp=hp)
        parts = [loss(params, half, model=net, hp=hp) for half in halves]
        for i in (0, 1):
            both = parts[0][i] + parts[1][i]
            np.testing.assert_allclose(both, whole[i], rtol=1e-5, atol=1e-5)


def test_many_steps_are_one_compilation(model, rollout):
    compiled = jax.jit(functools.partial(ppo_step, model=model, tx=SGD, hp=PLAIN))
    state, scores = make_state(), []
    for _ in range(3):
        state, metrics = compiled(state, rollout)
        scores.append(float(metrics['loss/policy'].value()))
    assert compiled._cache_size() == 1
    assert int(state.step) == 3 and len(set(scores)) == 3


def test_rows_that_do_not_divide_are_an_error(model, rollout):
    hp = make_hp(num_minibatches=3)
    with pytest.raises(
        ValueError, match='8 rollout rows .* num_minibatches=3 .* multiple of 3'
    ):
        ppo_step(make_state(), rollout, model=model, tx=SGD, hp=hp)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match='temperature=0'):
        PPOHParams(temperature=0)
    with pytest.raises(ValueError, match='dual_clip=1.0 bounds ratios of 1'):
        PPOHParams(dual_clip=1.0)
    with pytest.raises(ValueError, match='off_policy_clip=0.0 leaves no weight'):
        PPOHParams(off_policy_clip=0.0)
