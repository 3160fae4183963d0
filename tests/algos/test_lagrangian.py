"""PPO-Lagrangian: λ by hand, PPO as the case of λ = 0, and its gradient worked out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algos.lagrangian import (
    ActorCritics,
    LagrangianHParams,
    initial_log_lambda,
    lagrangian_step,
    next_log_lambda,
    prepare_lagrangian,
)
from rlhf_jax.sharding import ParallelConfig, compile_step, make_mesh, place
from rlhf_jax.types import LagrangianState, Scores, TokenBatch
from tests.algos.tiny_ppo import (
    PARAMS,
    REF,
    ROWS,
    SCORES,
    SGD,
    UNIFORM,
    V,
    make_hp,
    make_state,
    two_rows,
)

COSTS = jnp.array([1.5, -0.5, 0.25, 2.0, -1.0, 0.0, 0.75, 1.0])  # mean 0.5
LIMIT_0 = LagrangianHParams()
ALL = {
    **PARAMS,
    'cost_critic': {'table': PARAMS['critic']['table'][::-1] * 0.7 + 0.1},
}


def _state(tx=SGD, lam=1.0, params=ALL, step=0, kl_coef=0.1):
    params = jax.tree.map(jnp.array, params)
    return LagrangianState(
        step=jnp.int32(step),
        rng=jax.random.PRNGKey(5),
        params=params,
        opt_state=tx.init(params),
        kl_coef=jnp.float32(kl_coef),
        log_lambda=jnp.log(jnp.float32(lam)),
    )


@pytest.fixture(scope='module')
def models(bigram, token_scores):
    return ActorCritics(bigram, token_scores, token_scores)


@pytest.fixture(scope='module')
def constrained(models):
    """prepare, compiled once per setting: (rollout, metrics as numbers)."""
    compiled = jax.jit(
        functools.partial(prepare_lagrangian, model=models),
        static_argnames=('hp', 'constraint'),
    )

    def run(state, generation, scores, costs, hp, ref=REF, constraint=LIMIT_0):
        rollout, metrics = compiled(
            state,
            ref,
            generation,
            Scores(scores, {'cost': costs}),
            hp=hp,
            constraint=constraint,
        )
        return rollout, {n: float(x.value()) for n, x in metrics.items()}

    return run


@pytest.fixture(scope='module')
def step(models):
    compiled = jax.jit(
        functools.partial(lagrangian_step, model=models),
        static_argnames=('tx', 'hp', 'constraint'),
    )

    def run(state, rollout, hp, constraint=LIMIT_0, tx=SGD, ptx=None):
        state, metrics = compiled(
            state, rollout, ptx, tx=tx, hp=hp, constraint=constraint
        )
        return state, {n: float(x.value()) for n, x in metrics.items()}

    return run


# ---------------------------------------------------------------------- the multiplier


def test_lambda_by_hand():
    """λ = 2, mean cost 0.5, rate 0.1: log 2 + 0.1·2·(0.5 − limit)."""
    state, hp = _state(lam=2.0), make_hp()
    for limit, change in ((0.0, 0.1), (0.5, 0.0), (1.5, -0.2)):
        constraint = LagrangianHParams(cost_limit=limit)
        moved = next_log_lambda(state, COSTS, hp, constraint)
        assert float(moved) == pytest.approx(np.log(2) + change, abs=1e-6)
    bounded = LagrangianHParams(cost_limit=-100.0, lambda_max=3.0)
    assert float(next_log_lambda(state, COSTS, hp, bounded)) == pytest.approx(np.log(3))
    free = LagrangianHParams(cost_limit=-100.0, lambda_max=None)
    assert float(next_log_lambda(state, COSTS, hp, free)) > np.log(3) + 10


def test_lambda_rises_while_the_constraint_is_violated_and_falls_when_it_holds(
    constrained, step, sampled
):
    state, hp = _state(), make_hp()
    seen = []
    for shift in (0, 0, 0, -5, -5, -5):  # mean costs 0.5 and −4.5
        rollout, metrics = constrained(state, sampled, SCORES, COSTS + shift, hp)
        state, _ = step(state, rollout, hp)
        # The advantages were combined with the λ that this rollout's costs gave.
        lam = float(jnp.exp(state.log_lambda))
        assert metrics['objective/lambda'] == pytest.approx(lam, rel=1e-5)
        assert metrics['objective/cost'] == pytest.approx(0.5 + shift)
        seen.append(lam)
    changes = np.diff([1.0, *seen])
    assert (changes[:3] > 0).all() and (changes[3:] < 0).all()
    assert float(initial_log_lambda(LIMIT_0)) == 0


def test_lambda_waits_while_the_critics_warm_up(constrained, step, sampled):
    hp = make_hp(critic_warmup_rollouts=1)
    rollout, metrics = constrained(_state(), sampled, SCORES, COSTS, hp)
    state, _ = step(_state(), rollout, hp)
    assert float(state.log_lambda) == 0 and metrics['objective/lambda'] == 1
    np.testing.assert_array_equal(
        state.params['policy']['table'], PARAMS['policy']['table']
    )
    for name in ('critic', 'cost_critic'):
        moved = state.params[name]['table'] - ALL[name]['table']
        assert np.abs(moved).max() > 1e-4
    state, _ = step(state, rollout, hp)
    assert float(state.log_lambda) > 0


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'lambda_init': 0.0}, 'lambda_init=0.0: λ moves by factors'),
        ({'lambda_max': 0.5}, 'lambda_max=0.5 is below lambda_init=1.0'),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        LagrangianHParams(**settings)


# ------------------------------------------------------------------------- the rollout


def test_prepare_by_hand(constrained):
    """γ = λ_GAE = 1, V = 0, β = 0.1, multiplier 3: every advantage is the sum of what
    follows, of (r − β·d − 3c)/4.
    """
    hp = make_hp(gamma=1.0, lam=1.0, whiten_advantages=False)
    zero = {'table': jnp.zeros(V)}
    state = _state(lam=3.0, params={**ALL, 'critic': zero, 'cost_critic': zero})
    scores, costs = jnp.array([0.5, -0.25]), jnp.array([1.0, -1.0])  # J_C = 0
    rollout, metrics = constrained(state, two_rows(), scores, costs, hp, UNIFORM)
    log6 = np.log(6)
    d = np.array([[0, log6 - 1, log6 - 2, 0], [0, log6 - 0.5, log6 - 1.5, log6 - 3]])
    last = np.array([[0, 0, 1, 0], [0, 0, 0, 1]])
    mask = np.array([[0, 1, 1, 0], [0, 1, 1, 1]])

    def to_go(x):
        return np.cumsum(x[:, ::-1], axis=1)[:, ::-1] * mask

    reward = to_go(-0.1 * d + last * np.array([[0.5], [-0.25]]))
    cost = to_go(last * np.array([[1.0], [-1.0]]))
    np.testing.assert_allclose(rollout.reward.returns, reward, atol=1e-6)
    np.testing.assert_allclose(rollout.cost.returns, cost, atol=1e-6)
    combined = (reward - 3 * cost) / 4
    np.testing.assert_allclose(rollout.reward.advantages, combined, atol=1e-6)
    # Times 1 + λ it is the Lagrangian, in which a nat costs β whatever λ is.
    np.testing.assert_allclose(
        4 * combined[1, 1], -0.25 - 3 * -1.0 - 0.1 * d[1].sum(), atol=1e-6
    )
    assert metrics['objective/lambda'] == pytest.approx(3)
    assert metrics['objective/cost'] == 0
    assert metrics['objective/scores'] == pytest.approx(0.125)


@pytest.mark.parametrize('whiten', [False, True])
def test_without_a_multiplier_it_is_ppo(
    constrained, step, ready, update, sampled, whiten
):
    """λ = 10⁻³⁰: rollout, update and metrics of policy and critic are PPO's, and β."""
    hp = make_hp(
        whiten_advantages=whiten,
        num_epochs=2,
        num_minibatches=2,
        kl_target=5.0,
        kl_horizon=100.0,
    )
    state = _state(lam=1e-30)
    rollout, metrics = constrained(state, sampled, SCORES, COSTS, hp)
    plain, before = ready(sampled, hp=hp)
    for a, b in zip(jax.tree.leaves(rollout.reward), jax.tree.leaves(plain)):
        np.testing.assert_array_equal(a, b)
    assert before.items() <= metrics.items()
    after, metrics = step(state, rollout, hp)
    ppo, expected = update(plain, hp)
    for name in ('policy', 'critic'):
        np.testing.assert_allclose(
            after.params[name]['table'], ppo.params[name]['table'], atol=1e-7
        )
    assert float(after.kl_coef) == float(ppo.kl_coef) != np.float32(0.1)
    shared = {name: metrics[name] for name in expected}
    assert shared == pytest.approx(expected, rel=1e-5, abs=1e-7)
    moved = after.params['cost_critic']['table'] - ALL['cost_critic']['table']
    assert np.abs(moved).max() > 1e-3  # and the cost's critic learns beside it


def test_a_large_multiplier_minimises_the_cost(
    constrained, step, ready, update, sampled
):
    """λ → ∞ is PPO on the negative cost without a KL, with the cost's critic turned
    over.
    """
    hp = make_hp()
    state = _state(lam=1e8)
    free = LagrangianHParams(cost_limit=0.5, lambda_max=None)  # J_C = 0: λ stays
    rollout, _ = constrained(state, sampled, SCORES, COSTS, hp, constraint=free)
    after, _ = step(state, rollout, hp, constraint=free)
    turned = {**PARAMS, 'critic': jax.tree.map(jnp.negative, ALL['cost_critic'])}
    state = make_state(kl_coef=0.0).replace(params=turned)
    plain, _ = ready(sampled, -COSTS, hp, state=state)
    ppo, _ = update(plain, hp)
    np.testing.assert_allclose(
        after.params['policy']['table'], ppo.params['policy']['table'], atol=1e-5
    )


# -------------------------------------------------------------------------- the update


def test_each_critic_learns_its_own_returns(constrained, step, sampled):
    """SGD of rate 0.5: θ moves by −0.05·∇ of half the mean squared error."""
    hp = make_hp(value_clip_eps=None)
    state = _state()
    rollout, _ = constrained(state, sampled, SCORES, COSTS, hp)
    after, metrics = step(state, rollout, hp)
    mask = np.asarray(sampled.response_mask)
    before = np.pad(np.asarray(sampled.tokens)[:, :-1], ((0, 0), (1, 0)))
    for name, part, loss in (
        ('critic', rollout.reward, 'loss/value'),
        ('cost_critic', rollout.cost, 'loss/cost_value'),
    ):
        table = np.asarray(ALL[name]['table'], np.float64)
        error = np.where(mask, table[before] - part.returns, 0)
        gradient = np.zeros(V)
        np.add.at(gradient, before[mask], error[mask] / mask.sum())
        np.testing.assert_allclose(
            after.params[name]['table'], table - 0.05 * gradient, atol=1e-6
        )
        expected = (error**2).sum() / 2 / mask.sum()
        assert metrics[loss] == pytest.approx(expected, rel=1e-5)
    assert np.abs(rollout.reward.returns - rollout.cost.returns).max() > 0.1
    assert {'cost_val/clipfrac', 'cost_val/grad_norm'} <= metrics.keys()


def test_ptx_needs_its_coefficient(constrained, step, sampled):
    rollout, _ = constrained(_state(), sampled, SCORES, COSTS, make_hp())
    every = np.ones((ROWS, 4), bool)
    ptx = TokenBatch(tokens=np.zeros((ROWS, 4), np.int32), mask=every, loss_mask=every)
    with pytest.raises(ValueError, match='ptx_coef=.* disagree'):
        step(_state(), rollout, make_hp(), ptx=ptx)
    state, metrics = step(_state(), rollout, make_hp(ptx_coef=1.0), ptx=ptx)
    assert metrics['loss/ptx'] > 0


def test_garbage_in_the_padding_changes_nothing(constrained, step, sampled):
    hp = make_hp(off_policy_clip=2.0)
    logprobs = jnp.where(sampled.response_mask, sampled.logprobs, jnp.nan)
    tokens = jnp.where(sampled.mask, sampled.tokens, -7)
    dirty = sampled.replace(logprobs=logprobs, tokens=tokens)

    def run(generation):
        rollout, before = constrained(_state(), generation, SCORES, COSTS, hp)
        state, after = step(_state(), rollout, hp)
        return state, {**before, **after}

    (one, clean), (other, metrics) = run(sampled), run(dirty)
    assert metrics == pytest.approx(clean, rel=1e-6)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.parametrize('backend', ['jit', 'pmap'])
def test_eight_devices_give_the_numbers_of_one(
    constrained, step, sampled, backend, models
):
    """Rows over the devices; a minibatch of all of them."""
    tx = optax.adam(0.05)
    hp = make_hp(num_epochs=2, kl_target=5.0, kl_horizon=100.0)
    rollout, before = constrained(_state(tx), sampled, SCORES, COSTS, hp)
    one, metrics = step(_state(tx), rollout, hp, tx=tx)
    mesh = make_mesh(ParallelConfig(backend=backend))
    how = {'mesh': mesh, 'backend': backend}
    static = {'model': models, 'hp': hp, 'constraint': LIMIT_0}
    prepared = compile_step(
        functools.partial(prepare_lagrangian, **static),
        **how,
        inputs=('params', 'params', 'batch', 'batch'),
        outputs=('batch', 'replicated'),
        donate=(),
    )
    compiled = compile_step(functools.partial(lagrangian_step, tx=tx, **static), **how)
    # Tables of one token have no layout of their own: whole on every device.
    state, ref = place(_state(tx), mesh, 'replicated'), place(REF, mesh, 'replicated')
    rollout, parts = prepared(state, ref, sampled, Scores(SCORES, {'cost': COSTS}))
    other, more = compiled(state, rollout)
    got = {name: float(x.value()) for name, x in {**parts, **more}.items()}
    assert got == pytest.approx({**before, **metrics}, rel=1e-4, abs=1e-5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert float(one.log_lambda) != 0


def test_no_key_is_used_twice(constrained, models, sampled):
    rollout, _ = constrained(_state(), sampled, SCORES, COSTS, make_hp())
    with jax.debug_key_reuse(True):
        run = functools.partial(
            lagrangian_step,
            model=models,
            tx=SGD,
            hp=make_hp(num_epochs=2),
            constraint=LIMIT_0,
        )
        jax.jit(run)(_state().replace(rng=jax.random.key(5)), rollout)
