"""Microbatches sorted by length and cut behind it: the same gradient from less."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algos.gradients import Cuts, mean_gradient, microbatches, sort_by_length
from rlhf_jax.algos.policy_gradient import PolicyHParams, policy_step
from rlhf_jax.algos.ppo import ActorCritic, PPOHParams, ppo_step, prepare
from rlhf_jax.algos.rollout import response_cuts
from rlhf_jax.sharding import ParallelConfig, compile_step, make_mesh, place
from rlhf_jax.types import Mean, PPOState, Scores, TrainState

LENGTHS = np.array([1, 5, 2, 8, 3, 8, 1, 2] * 2)
SIZES = (2, 4, 8)


def by_places(count, axis_name=None):
    """Gradient of Σ w·x over the places of each row, and how many places were run."""

    def gradient(params, batch, axis_name=axis_name):
        def loss(params, rows):
            x = rows['x']
            places = Mean(jnp.float32(x.size), jnp.float32(x.shape[0]))
            counted = jnp.arange(x.shape[1]) < rows['length'][:, None]
            total = jnp.sum(jnp.where(counted, x * params['w'][: x.shape[1]], 0))
            return total, jnp.sum(counted).astype(jnp.float32), {'places': places}

        def cut(rows, size):
            return {**rows, 'x': rows['x'][:, :size]}

        cuts = Cuts(batch['length'], SIZES, cut)
        return mean_gradient(
            loss, params, batch, num_microbatches=count, axis_name=axis_name, cuts=cuts
        )

    return gradient


@pytest.mark.parametrize(
    ('layout', 'count', 'places'),
    [
        # In order 1 1 1 1 | 2 2 2 2 | 3 3 5 5 | 8 8 8 8.
        (dict(data=1), 4, (2 + 2 + 8 + 8) / 4),
        (dict(data=1), 2, (2 + 8) / 2),
        (dict(data=1), 1, 8),
        # Two devices hold the same eight lengths: 1 1 | 2 2 | 3 5 | 8 8 on each.
        (dict(data=2), 4, (2 + 2 + 8 + 8) / 4),
        # Four hold 1 5 2 8 or 3 8 1 2: 1 2 and 1 2 | 5 8 and 3 8.
        (dict(data=2, fsdp=2), 2, (2 + 8) / 2),
        (dict(backend='pmap'), 4, (2 + 2 + 8 + 8) / 4),
    ],
)
def test_every_microbatch_is_run_at_the_size_of_its_longest_row(layout, count, places):
    parallel = ParallelConfig(**layout)
    devices = 2 if parallel.backend == 'pmap' else parallel.data * parallel.fsdp
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    run = compile_step(
        by_places(count),
        mesh=make_mesh(parallel, jax.devices()[:devices]),
        backend=parallel.backend,
        donate=(),
    )
    batch = {'x': x, 'length': LENGTHS.astype(np.int32)}
    gradient, metrics = run({'w': jnp.ones(8)}, batch)
    counted = np.arange(8) < LENGTHS[:, None]
    expected = np.where(counted, x, 0).sum(0) / counted.sum()
    np.testing.assert_allclose(gradient['w'], expected, atol=1e-6)
    assert float(metrics['places'].value()) == places


def test_rows_are_sorted_where_they_are():
    mesh = make_mesh(ParallelConfig(data=2), jax.devices()[:2])
    lengths = jnp.asarray([9, 1, 5, 3, 2, 8, 4, 6])

    def sort(lengths):
        return microbatches(sort_by_length(lengths, lengths, 2), 2)

    with jax.set_mesh(mesh):
        rows = jax.jit(sort)(place(lengths, mesh, 'batch'))
    # The first device holds 9 1 5 3, the second 2 8 4 6.
    assert rows.tolist() == [[1, 3, 2, 4], [5, 9, 6, 8]]
    split = jax.NamedSharding(mesh, jax.P(None, ('data', 'fsdp')))
    assert rows.sharding.is_equivalent_to(split, rows.ndim)
    assert jax.jit(sort)(lengths).tolist() == [[1, 2, 3, 4], [5, 6, 8, 9]]


@pytest.fixture
def rollout(policy, policy_params, reward_model, reward_params, generation):
    """Of responses of 1 to 6 tokens, with everything that a critic needs, too."""
    state = TrainState(
        step=jnp.int32(0),
        rng=jax.random.PRNGKey(0),
        params={'policy': policy_params, 'critic': reward_params},
        opt_state=None,
    )
    model = ActorCritic(policy, reward_model)
    hp = PPOHParams(score_at='after_last')
    scores = jnp.arange(16.0) / 8 - 1
    ready = functools.partial(prepare, model=model, hp=hp)
    state = PPOState(**vars(state), kl_coef=jnp.float32(0.1))
    generation = generation.replace(response_length=6)
    return jax.jit(ready)(state, policy_params, generation, Scores(scores))[0]


def test_cuts_hold_what_policy_and_critic_are_trained_at(rollout):
    cuts = response_cuts(rollout, 4)
    assert cuts.sizes == (2, 3, 5, 6)
    responses = rollout.response_mask.sum(1)
    # With a score behind the response the critic has one place more.
    np.testing.assert_array_equal(cuts.lengths, np.minimum(responses + 1, 6))
    for size in cuts.sizes:
        rows = cuts.cut(rollout, size)
        assert rows.tokens.shape == rows.returns.shape == (16, 5 + size)
        assert rows.response_length == size
        fits = np.asarray(cuts.lengths) <= size
        for name in ('response_mask', 'value_mask'):
            before, after = getattr(rollout, name), getattr(rows, name)
            assert (before.sum(1) == after.sum(1))[fits].all()
            assert size == 6 or not (before.sum(1) == after.sum(1)).all()
    assert response_cuts(rollout, 1) is None
    few = rollout.replace(value_mask=None, old_values=None, returns=None)
    np.testing.assert_array_equal(response_cuts(few, 2).lengths, responses)


@pytest.mark.parametrize('count', [0, 2])
def test_cuts_need_a_length(rollout, count):
    with pytest.raises(ValueError, match=f'num_length_buckets={count} with response_'):
        response_cuts(rollout.replace(response_length=None), count)


def test_a_ppo_step_is_that_of_whole_rows(
    policy, policy_params, reward_model, reward_params, rollout
):
    tx = optax.sgd(0.1)
    params = {'policy': policy_params, 'critic': reward_params}

    def run(buckets):
        hp = PPOHParams(
            num_epochs=2,
            num_minibatches=2,
            num_microbatches=2,
            num_length_buckets=buckets,
            entropy_coef=0.01,
            aggregation='sequence_mean',
        )
        step = functools.partial(
            ppo_step, model=ActorCritic(policy, reward_model), tx=tx, hp=hp
        )
        state = PPOState(
            step=jnp.int32(0),
            rng=jax.random.PRNGKey(0),
            params=params,
            opt_state=tx.init(params),
            kl_coef=jnp.float32(0.1),
        )
        return jax.jit(step)(state, rollout)

    compare(run(2), run(1), params)


@pytest.mark.parametrize('level', ['token', 'sequence'])
def test_a_policy_step_is_that_of_whole_rows(policy, policy_params, rollout, level):
    tx, params = optax.sgd(0.1), {'policy': policy_params}
    rows = rollout.replace(
        value_mask=None, old_values=None, returns=None, aggregation='sequence_mean'
    )
    hp = PolicyHParams(num_microbatches=4, ratio_level=level, kl_loss_coef=0.1)

    def run(buckets):
        step = functools.partial(
            policy_step,
            model=policy,
            tx=tx,
            hp=dataclasses.replace(hp, num_length_buckets=buckets),
        )
        state = TrainState(
            step=jnp.int32(0),
            rng=jax.random.PRNGKey(0),
            params=params,
            opt_state=tx.init(params),
        )
        return jax.jit(step)(state, rows)

    compare(run(2), run(1), params)


def compare(got, expected, start):
    """Equal parameters, which have moved, and equal metrics."""
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected[0].params, start)
    assert max(jax.tree.leaves(moved)) > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
        got[0].params,
        expected[0].params,
    )
    for name, metric in expected[1].items():
        np.testing.assert_allclose(
            got[1][name].value(), metric.value(), atol=1e-5, rtol=1e-4, err_msg=name
        )
