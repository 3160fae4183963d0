"""``prepare_best`` and ``expert_iteration_step``: which responses are imitated, and
that the step is SFT on them, as a slow loop and on several devices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algos.expert_iteration import (
    ExpertIterationHParams,
    expert_iteration_step,
    prepare_best,
)
from rlhf_jax.algos.sft import sft_loss
from rlhf_jax.algos.updates import SHUFFLE
from rlhf_jax.types import Scores
from tests.algos import small_rollout as small
from tests.algos.small_rollout import PARAMS, REF, ROWS, G

# Best of prompt 0 is row 2, then row 3; prompt 1 has two best ones, rows 5 and 7.
SCORES = jnp.array([0.25, -0.75, 1.5, 0.4, -2.0, 0.5, -3.0, 0.5])
SGD = optax.sgd(0.5)


def _hp(**values):
    return ExpertIterationHParams(**{'group_size': G, **values})


def _prepare(model, hp, scores=SCORES, generation=None):
    generation = small.generation() if generation is None else generation
    batch, metrics = prepare_best(
        None, REF, generation, Scores(scores), model=model, hp=hp
    )
    return batch, small.numbers(metrics)


def _step(model, batch, hp, tx=SGD, **start):
    step = functools.partial(expert_iteration_step, model=model, tx=tx, hp=hp)
    state, metrics = jax.jit(step)(small.state(tx, **start), batch)
    return state, small.numbers(metrics)


# ----------------------------------------------------------------------------- prepare


@pytest.mark.parametrize(
    ('settings', 'rows', 'counted'),
    [
        ({}, [2, 5], [True, True]),
        ({'keep': 2}, [2, 3, 5, 7], [True] * 4),
        ({'keep': 3}, [2, 3, 0, 5, 7, 4], [True] * 6),
        ({'min_score': 1.0}, [2, 5], [True, False]),
        ({'min_score': 0.5}, [2, 5], [True, False]),  # above, not at
        (
            {'keep': 4, 'min_score': 0.3},
            [2, 3, 0, 1, 5, 7, 4, 6],
            [True, True, False, False, True, True, False, False],
        ),
    ],
)
def test_which_responses_are_kept(bigram, settings, rows, counted):
    batch, _ = _prepare(bigram, _hp(**settings))
    generation = small.generation()
    np.testing.assert_array_equal(batch.tokens, generation.tokens[jnp.array(rows)])
    np.testing.assert_array_equal(batch.mask, generation.mask[jnp.array(rows)])
    expected = generation.response_mask[jnp.array(rows)] & jnp.array(counted)[:, None]
    np.testing.assert_array_equal(batch.loss_mask, expected)


def test_metrics_of_the_rollout_are_those_of_all_responses(bigram):
    scores = SCORES.at[4:].set(0.25)  # the second prompt: all equal
    _, metrics = _prepare(bigram, _hp(min_score=0.3), scores)
    assert metrics['rollout/equal_groups'] == 0.5 and metrics['rollout/kept'] == 0.5
    assert metrics['objective/best_scores'] == pytest.approx((1.5 + 0.25) / 2)
    assert metrics['objective/scores'] == pytest.approx(float(scores.mean()))
    assert metrics['objective/rlhf_reward'] == pytest.approx(float(scores.mean()))
    generation = small.generation()
    ref = small.logprobs(REF['table'], generation.tokens)
    kl = jnp.where(generation.response_mask, generation.logprobs - ref, 0).sum(-1)
    assert metrics['objective/kl'] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert abs(metrics['objective/kl']) > 0.01
    assert 'rollout/kept' not in _prepare(bigram, _hp())[1]


def test_kl_is_reported_at_the_temperature_of_the_rollout(bigram):
    generation = small.generation(temperature=0.5)
    hp = _hp(temperature=0.5)
    same = functools.partial(
        prepare_best, None, PARAMS['policy'], generation, Scores(SCORES)
    )
    _, metrics = same(model=bigram, hp=hp)
    assert small.numbers(metrics)['objective/kl'] == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------ update


def test_one_epoch_is_a_step_of_sft_on_the_best(bigram):
    """Token mean over rows 2 and 5, written without the package."""
    batch, _ = _prepare(bigram, _hp())
    state, metrics = _step(bigram, batch, _hp())
    generation = small.generation()

    def loss(table):
        logp = small.logprobs(table, generation.tokens)
        rows = jnp.array([2, 5])  # responses of 3 and 5 tokens
        return -jnp.where(generation.response_mask, logp, 0)[rows].sum() / 8

    value, gradient = jax.value_and_grad(loss)(PARAMS['policy']['table'])
    np.testing.assert_allclose(small.moved(state), -0.5 * gradient, atol=1e-6)
    assert metrics['loss/policy'] == pytest.approx(float(value), rel=1e-5)
    assert metrics['policy/updates'] == 1
    assert metrics['policy/grad_norm'] == pytest.approx(
        float(jnp.linalg.norm(gradient)), rel=1e-5
    )


@pytest.mark.parametrize('parts', [1, 2])
def test_a_step_is_a_slow_loop_over_its_minibatches(bigram, parts):
    tx = optax.adam(0.05)
    batch, _ = _prepare(bigram, _hp(keep=2, min_score=0.45))  # row 3 is masked
    hp = _hp(keep=2, num_epochs=2, num_minibatches=2, num_microbatches=parts)
    state, metrics = _step(bigram, batch, hp, tx, step=3)
    params, opt_state = jax.tree.map(jnp.array, PARAMS), tx.init(PARAMS)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(5), 3), SHUFFLE)

    def loss(params, rows):
        total, weight, _ = sft_loss(params['policy'], rows, model=bigram)
        return total / weight

    for epoch_key in jax.random.split(key, 2):
        order = np.asarray(jax.random.permutation(epoch_key, 4))
        for chosen in (order[:2], order[2:]):
            rows = jax.tree.map(lambda x, chosen=chosen: x[chosen], batch)
            gradient = jax.grad(loss)(params, rows)
            updates, opt_state = tx.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        state.params['policy']['table'], params['policy']['table'], atol=1e-5
    )
    assert int(state.step) == 4 and metrics['policy/updates'] == 4


def test_a_rollout_without_a_kept_response_moves_nothing_and_stays_finite(bigram):
    hp = _hp(min_score=9.0, num_epochs=2)
    batch, before = _prepare(bigram, hp)
    state, metrics = _step(bigram, batch, hp)
    assert before['rollout/kept'] == 0 and not batch.loss_mask.any()
    assert np.isfinite(list(metrics.values())).all()
    assert metrics['loss/policy'] == 0
    assert (small.moved(state) == 0).all()


def test_responses_that_are_not_kept_are_as_if_not_there(bigram):
    masked, _ = _prepare(bigram, _hp(min_score=1.0))
    alone = jax.tree.map(lambda x: x[:1], masked)
    one, other = (_step(bigram, b, _hp())[0] for b in (masked, alone))
    np.testing.assert_allclose(small.moved(one), small.moved(other), atol=1e-6)
    assert np.abs(small.moved(one)).max() > 1e-3


def test_the_last_layer_for_responses_alone_changes_nothing(
    unrolled, policy_params, generation
):
    """Where the rollout says how long responses are, the demonstrations do, too."""
    hp, scores = _hp(group_size=4), jnp.arange(16.0)
    texts = generation.replace(response_length=6)
    prepare = jax.jit(functools.partial(prepare_best, model=unrolled, hp=hp))
    batch, _ = prepare(None, policy_params, texts, Scores(scores))
    assert batch.response_length == 6
    loss = jax.jit(functools.partial(sft_loss, model=unrolled))
    short, whole = (
        loss(policy_params, demonstrations)[0]
        for demonstrations in (batch, batch.replace(response_length=None))
    )
    assert float(whole) > 0
    np.testing.assert_allclose(short, whole, rtol=1e-5)


def test_garbage_in_the_padding_changes_nothing(bigram):
    generation = small.generation()
    tokens = jnp.where(generation.mask, generation.tokens, -7)
    dirty = generation.replace(tokens=tokens)
    one, other = (
        _step(bigram, _prepare(bigram, _hp(), generation=g)[0], _hp())[0]
        for g in (generation, dirty)
    )
    np.testing.assert_allclose(small.moved(one), small.moved(other), atol=1e-7)


def test_the_score_of_the_samples_rises(bigram):
    """Twenty rounds on fixed texts: the likelihood of the best of each prompt grows."""
    hp, tx = _hp(), optax.adam(0.05)
    batch, _ = _prepare(bigram, hp)
    step = functools.partial(expert_iteration_step, model=bigram, tx=tx, hp=hp)
    step, state, losses = jax.jit(step), small.state(tx), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics['loss/policy'].value()))
    assert losses[-1] < losses[0] - 0.5
    assert step._cache_size() == 1 and int(state.step) == 20


@pytest.mark.parametrize('backend', ['jit', 'pmap'])
def test_eight_devices_equal_one(backend, bigram):
    """Sixteen prompts, two on every device."""
    how = {'model': bigram, 'hp': _hp(keep=2, min_score=0.3, num_microbatches=2)}
    prepare = functools.partial(prepare_best, **how)
    step = functools.partial(expert_iteration_step, **how)
    scores = np.random.default_rng(1).normal(size=8 * ROWS)
    tx = optax.adam(0.1)
    numbers = small.on_one_and_on_eight(backend, prepare, step, scores, tx=tx)
    assert 0 < numbers['rollout/kept'] < 1


def test_no_key_is_used_twice(bigram):
    step = functools.partial(expert_iteration_step, model=bigram, hp=_hp(num_epochs=2))
    small.uses_no_key_twice(step, _prepare(bigram, _hp())[0], SGD)


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'temperature': 0.0}, 'temperature=0'),
        ({'keep': 0}, 'keep=0: use 1 or more'),
        ({'keep': 5}, 'keep=5 of group_size=4'),
        ({'keep': 4}, 'selects nothing; lower keep, or set min_score'),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        _hp(**settings)


def test_rows_that_do_not_divide(bigram):
    with pytest.raises(ValueError, match='8 rollout rows .* group_size=3; use a mul'):
        _prepare(bigram, ExpertIterationHParams(group_size=3))
    with pytest.raises(ValueError, match='2 rollout rows .* num_minibatches=3'):
        _step(bigram, _prepare(bigram, _hp())[0], _hp(num_minibatches=3))
