"""``prepare_policy`` and ``policy_step``: by hand, as REINFORCE, and as a slow loop.

The policy is a table of bigram logits, so that every quantity can be worked out without
the package. Two prompts have four responses each.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algos import estimators
from rlhf_jax.algos.policy_gradient import (
    PolicyHParams,
    policy_gradient_loss,
    policy_step,
    prepare_policy,
)
from rlhf_jax.algos.updates import SHUFFLE
from rlhf_jax.types import Scores
from tests.algos import small_rollout as small
from tests.algos.small_rollout import PARAMS, REF, ROWS, G

SCORES = jnp.array([0.25, -0.75, 1.5, 0.4, 0.5, 0.5, 0.5, 0.5])  # group 2: all equal
PLAIN = PolicyHParams(group_size=G)
SGD = optax.sgd(0.5)


@pytest.fixture(scope='module')
def generation():
    """Prompts of 2 tokens and responses of 1 to 5, with the policy's own numbers."""
    return small.generation()


def _hp(**values):
    return PolicyHParams(**{**vars(PLAIN), **values})


@pytest.fixture(scope='module')
def ready(bigram, generation):
    """ready('grpo', hp, …) -> (rollout, metrics as numbers)."""

    def run(
        name='grpo',
        hp=PLAIN,
        scores=SCORES,
        baseline=None,
        ref=REF,
        sampled=generation,
        **named,
    ):
        module = estimators.load(name, 'name')
        rollout, metrics = prepare_policy(
            small.state(SGD),
            ref,
            sampled,
            Scores(scores, **named, baseline=baseline),
            model=bigram,
            hp=hp,
            estimator=module,
            estimator_hp=module.HParams(),
        )
        return rollout, {n: float(metric.value()) for n, metric in metrics.items()}

    return run


@pytest.fixture(scope='module')
def update(bigram):
    compiled = jax.jit(
        functools.partial(policy_step, model=bigram), static_argnames=('tx', 'hp')
    )

    def run(rollout, hp=PLAIN, tx=SGD, **start):
        state, metrics = compiled(small.state(tx, **start), rollout, tx=tx, hp=hp)
        return state, {n: float(metric.value()) for n, metric in metrics.items()}

    return run


def _moved(state):
    return np.asarray(state.params['policy']['table'] - PARAMS['policy']['table'])


# ----------------------------------------------------------------------------- prepare


def test_kl_in_the_reward_is_part_of_the_return(ready, generation):
    """RLOO on score − β·Σ d, and not on the score."""
    rollout, metrics = ready('rloo', _hp(kl_coef=0.1))
    ref = small.logprobs(REF['table'], generation.tokens)
    d = jnp.where(generation.response_mask, generation.logprobs - ref, 0).sum(-1)
    whole = np.asarray(SCORES - 0.1 * d).reshape(2, G)
    expected = ((whole - whole.mean(-1, keepdims=True)) * 4 / 3).reshape(-1)
    got = np.asarray(rollout.advantages)
    mask = np.asarray(generation.response_mask)
    np.testing.assert_allclose(got, expected[:, None] * mask, atol=1e-5)
    assert metrics['objective/kl'] == pytest.approx(float(d.mean()), rel=1e-4)
    assert metrics['objective/rlhf_reward'] == pytest.approx(whole.mean(), rel=1e-4)
    assert metrics['rollout/equal_groups'] == 0  # their KL differs
    assert np.abs(d).max() > 0.1


def test_a_group_of_equal_scores_is_counted(ready):
    rollout, metrics = ready('grpo')
    assert metrics['rollout/equal_groups'] == 0.5
    assert (rollout.advantages[G:] == 0).all() and rollout.kept is None
    assert 'rollout/kept' not in metrics
    rollout, metrics = ready('dapo')
    assert metrics['rollout/kept'] == 0.5
    assert rollout.kept.tolist() == [True] * 4 + [False] * 4
    _, metrics = ready('reinforce_pp', _hp(group_size=1))
    assert 'rollout/equal_groups' not in metrics


def test_an_estimator_sees_the_single_rewards_and_what_is_beside_them(
    ready, generation
):
    """GDPO of two rewards, one of which costs, with a KL penalty in the reward."""
    one, two = np.asarray(SCORES), np.asarray(SCORES)[::-1] ** 2
    total = jnp.asarray(one - 0.5 * two)
    how = {'each': {'a': jnp.asarray(one), 'b': jnp.asarray(two)}}
    how['weights'] = {'a': 1.0, 'b': -0.5}
    rollout, _ = ready('gdpo', _hp(kl_coef=0.1), total, **how)
    ref = small.logprobs(REF['table'], generation.tokens)
    d = jnp.where(generation.response_mask, generation.logprobs - ref, 0).sum(-1)

    def deviations(x):
        groups = np.asarray(x, float).reshape(2, G)
        return groups - groups.mean(-1, keepdims=True)

    def normal(x):
        return deviations(x) / (deviations(x).std(-1, ddof=1, keepdims=True) + 1e-6)

    whole = normal(one) - 0.5 * normal(two) + deviations(-0.1 * d)
    expected = (whole / np.sqrt((whole**2).mean())).reshape(-1)
    mask = np.asarray(generation.response_mask)
    np.testing.assert_allclose(rollout.advantages, expected[:, None] * mask, atol=1e-5)


def test_a_rate_of_success_has_no_kl_in_it(ready):
    with pytest.raises(ValueError, match='kl_coef=0.1 .* use kl_coef=0'):
        ready('maxrl', _hp(kl_coef=0.1))
    rollout, _ = ready('maxrl', scores=jnp.array([0.0, 1, 0, 0, 1, 1, 1, 1]))
    assert rollout.advantages[:G].max() == 3 and (rollout.advantages[G:] == 0).all()


def test_rows_that_are_no_groups_are_an_error(ready):
    with pytest.raises(ValueError, match='8 rollout rows .* group_size=3; use a mul'):
        ready('grpo', _hp(group_size=3))


# ------------------------------------------------------------------------------ update


@pytest.mark.parametrize('level', ['token', 'sequence'])
def test_the_first_minibatch_sees_ratio_one(ready, update, level):
    rollout, _ = ready()
    _, metrics = update(rollout, _hp(ratio_level=level))
    assert metrics['policy/ratio'] == pytest.approx(1, abs=1e-6)
    assert metrics['policy/approxkl'] == pytest.approx(0, abs=1e-10)
    assert metrics['policy/clipfrac'] == 0
    _, metrics = update(rollout, _hp(ratio_level=level, num_epochs=3))
    assert metrics['policy/approxkl'] > 1e-4 and metrics['policy/updates'] == 3


@pytest.mark.parametrize('level', ['token', 'sequence'])
@pytest.mark.parametrize('objective', ['clipped', 'cispo'])
@pytest.mark.parametrize('baseline', [0.0, 0.4])
def test_one_epoch_without_a_clip_is_reinforce(
    ready, update, generation, objective, level, baseline
):
    """θ moves by 0.5·mean_b Σ_t (R_b − baseline)·∇log π, for every objective: ReMax
    sums over a response unless told otherwise.
    """
    rows = jnp.full(ROWS, baseline)
    rollout, _ = ready('remax', baseline=rows)
    hp = _hp(
        objective=objective, ratio_level=level, clip_eps_low=None, clip_eps_high=None
    )
    state, _ = update(rollout, hp)

    def reinforce(table):
        mask = generation.response_mask
        logp = jnp.where(mask, small.logprobs(table, generation.tokens), 0)
        return jnp.mean((SCORES - baseline) * logp.sum(-1))

    gradient = jax.grad(reinforce)(PARAMS['policy']['table'])
    np.testing.assert_allclose(_moved(state), 0.5 * gradient, rtol=1e-5, atol=2e-6)
    assert np.abs(gradient).max() > 1e-2


def _loss(table, rows, hp):
    """The loss of a minibatch, written without the package."""
    mask = np.asarray(rows.response_mask)
    count = mask.sum(-1)
    hidden = jax.nn.log_softmax(table, -1)
    logp = jnp.where(mask, small.logprobs(table, rows.tokens), 0)
    log_ratio = logp - rows.old_logprobs
    if hp.ratio_level == 'sequence':
        log_ratio = jnp.broadcast_to(
            log_ratio.sum(-1, keepdims=True) / count[:, None], mask.shape
        )
    ratio, a = jnp.exp(log_ratio), rows.advantages
    near = jnp.clip(ratio, 1 - hp.clip_eps_low, 1 + hp.clip_eps_high)
    if hp.objective == 'cispo':
        loss = -jax.lax.stop_gradient(near) * a * logp
    else:
        loss = -jnp.minimum(a * ratio, a * near)
    before = jnp.pad(rows.tokens[:, :-1], ((0, 0), (1, 0)))
    entropy = -(jnp.exp(hidden) * hidden).sum(-1)[before]
    d = logp - rows.ref_logprobs
    loss = loss + hp.kl_loss_coef * (jnp.exp(-d) - 1 + d) - hp.entropy_coef * entropy
    rows_loss = jnp.where(mask, loss, 0).sum(-1)
    return {
        'token_mean': rows_loss.sum() / count.sum(),
        'sequence_mean': (rows_loss / count).mean(),
        'sequence_sum': rows_loss.mean(),
        'fixed_length': rows_loss.mean() / 5,
    }[hp.aggregation or 'sequence_mean']  # GRPO's


@pytest.mark.parametrize(
    'settings',
    [
        {'aggregation': 'sequence_mean', 'kl_loss_coef': 0.3},  # GRPO
        {'aggregation': 'fixed_length', 'fixed_length': 5},  # Dr. GRPO
        {'aggregation': 'token_mean', 'clip_eps_high': 0.05},  # DAPO
        {'aggregation': 'sequence_sum', 'entropy_coef': 0.2},  # RLOO
        {'ratio_level': 'sequence'},  # GSPO
        {'objective': 'cispo', 'aggregation': 'token_mean'},
    ],
    ids=lambda settings: '-'.join(map(str, settings.values())),
)
@pytest.mark.parametrize('parts', [1, 2])
def test_a_step_is_a_slow_loop_over_its_minibatches(ready, update, settings, parts):
    """Two epochs of two minibatches with Adam; also accumulated in two parts."""
    tx, step = optax.adam(0.05), 3
    rollout, _ = ready('grpo', scores=SCORES.at[6].set(-1.0))
    tight = {'clip_eps_low': 0.02, 'clip_eps_high': 0.02, 'num_epochs': 2}
    hp = _hp(**{**tight, **settings}, num_minibatches=2, num_microbatches=parts)
    state, metrics = update(rollout, hp, tx=tx, step=step)
    params, opt_state = jax.tree.map(jnp.array, PARAMS), tx.init(PARAMS)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(5), step), SHUFFLE)
    gradient = jax.grad(lambda p, rows: _loss(p['policy']['table'], rows, hp))
    for epoch_key in jax.random.split(key, 2):
        order = np.asarray(jax.random.permutation(epoch_key, ROWS))
        for chosen in (order[:4], order[4:]):
            rows = jax.tree.map(lambda x, chosen=chosen: x[chosen], rollout)
            updates, opt_state = tx.update(gradient(params, rows), opt_state, params)
            params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        state.params['policy']['table'], params['policy']['table'], atol=1e-5
    )
    assert metrics['policy/clipfrac'] > 0.1  # the bounds were felt
    assert int(state.step) == step + 1


@pytest.mark.parametrize('how', ['token_mean', 'sequence_mean'])
def test_prompts_that_are_left_out_are_as_if_not_there(ready, update, how):
    """The advantages of DAPO's second group are 0, but its tokens would have diluted
    the first group's loss, and have had their share of the entropy bonus.
    """
    hp = _hp(aggregation=how, entropy_coef=0.1)
    whole, _ = ready('dapo')
    first = jax.tree.map(lambda x: x[:G], whole)
    left_out, metrics = update(whole, hp)
    alone, _ = update(first, hp)
    np.testing.assert_allclose(_moved(left_out), _moved(alone), atol=1e-6)
    diluted, _ = update(whole.replace(kept=None), hp)
    assert np.abs(_moved(diluted) - _moved(alone)).max() > 1e-3
    assert np.abs(_moved(alone)).max() > 1e-3


def test_a_rollout_without_a_difference_moves_nothing_and_stays_finite(ready, update):
    rollout, metrics = ready('dapo', scores=jnp.full(ROWS, 0.1))
    assert metrics['rollout/equal_groups'] == 1 and metrics['rollout/kept'] == 0
    state, metrics = update(rollout, _hp(num_epochs=2, entropy_coef=0.1))
    assert np.isfinite(list(metrics.values())).all()
    assert (_moved(state) == 0).all()


def test_kl_in_the_loss_is_reported_and_measured_from_the_reference(ready, update):
    rollout, _ = ready(ref=PARAMS['policy'])
    _, metrics = update(rollout, _hp(kl_loss_coef=0.1))
    assert metrics['policy/kl'] == pytest.approx(0, abs=1e-6)
    rollout, _ = ready()
    _, metrics = update(rollout, _hp(kl_loss_coef=0.1))
    assert metrics['policy/kl'] > 0.01
    assert 'policy/kl' not in update(rollout)[1]


@pytest.mark.parametrize('level', ['token', 'sequence'])
def test_garbage_outside_the_response_changes_nothing(ready, update, generation, level):
    rollout, _ = ready('dapo')
    names = ('old_logprobs', 'ref_logprobs', 'advantages')
    dirty = {
        name: jnp.where(rollout.response_mask, getattr(rollout, name), jnp.nan)
        for name in names
    }
    tokens = jnp.where(generation.mask, rollout.tokens, -7)
    hp = _hp(kl_loss_coef=0.1, entropy_coef=0.1, ratio_level=level)
    clean_state, clean = update(rollout, hp)
    dirty_state, metrics = update(rollout.replace(**dirty, tokens=tokens), hp)
    assert metrics == pytest.approx(clean, rel=1e-6)
    np.testing.assert_allclose(_moved(clean_state), _moved(dirty_state), atol=1e-7)


def test_losses_over_parts_add_up(ready, bigram):
    rollout, _ = ready('dapo', scores=SCORES.at[6].set(-1.0))
    halves = [
        jax.tree.map(lambda x, s=s: x[s], rollout) for s in (slice(3), slice(3, None))
    ]
    for how in ('token_mean', 'sequence_mean', 'fixed_length'):
        length = 5 if how == 'fixed_length' else None
        hp = _hp(aggregation=how, fixed_length=length, kl_loss_coef=0.1)
        loss = functools.partial(policy_gradient_loss, model=bigram, hp=hp)
        whole = loss(PARAMS['policy'], rollout)
        parts = [loss(PARAMS['policy'], half) for half in halves]
        for i in (0, 1):
            both = parts[0][i] + parts[1][i]
            np.testing.assert_allclose(both, whole[i], rtol=1e-5, atol=1e-5)


def test_no_key_is_used_twice(ready, bigram):
    with jax.debug_key_reuse(True):
        step = functools.partial(policy_step, model=bigram, tx=SGD, hp=PLAIN)
        jax.jit(step)(small.state(SGD, rng=jax.random.key(5)), ready()[0])


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'temperature': 0.0}, 'temperature=0'),
        ({'objective': 'clip'}, "objective='clip' is unknown; use 'clipped'"),
        ({'aggregation': 'fixed_length'}, 'fixed_length=None disagree'),
        (
            {'aggregation': 'token_mean', 'fixed_length': 5},
            'fixed_length=5 disagree',
        ),
        ({'kl_estimator': 'k3'}, "kl_estimator='k3'.*use 'k1'.*k3 in the loss"),
        ({'off_policy_level': 'sequence'}, "use 'token' or 'response'"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        PolicyHParams(**settings)
