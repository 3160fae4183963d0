"""``prepare_pairs`` and ``online_preference_step``: which responses are compared, and
that the step is ``preference_loss`` on them, as a slow loop and on several devices.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algos.online_preference import (
    OnlinePreferenceHParams,
    online_preference_step,
    prepare_pairs,
)
from rlhf_jax.algos.preference import batch_context, preference_loss
from rlhf_jax.algos.updates import SHUFFLE
from rlhf_jax.preference import aot, dpo, ipo, kto, simpo
from rlhf_jax.types import Scores
from tests.algos import small_rollout as small
from tests.algos.small_rollout import PARAMS, REF, ROWS, G

# Prompt 0: row 2 against row 1. Prompt 1: row 5 (and 7) against row 6 (and 4).
SCORES = jnp.array([0.25, -0.75, 1.5, 0.4, -3.0, 0.5, -3.0, 0.5])
SGD = optax.sgd(0.5)
BETA = 0.5


def _hp(**values):
    return OnlinePreferenceHParams(**{'group_size': G, **values})


def _prepare(model, hp, scores=SCORES, loss=dpo, generation=None):
    generation = small.generation() if generation is None else generation
    batch, metrics = prepare_pairs(
        None, REF, generation, Scores(scores), model=model, hp=hp, loss=loss
    )
    return batch, small.numbers(metrics)


def _step(model, batch, hp, tx=SGD, loss=dpo, **start):
    how = {'loss': loss, 'loss_hp': loss.HParams(beta=BETA)}
    step = functools.partial(
        online_preference_step, model=model, tx=tx, hp=hp, **how
    )  # fmt: skip
    state, metrics = jax.jit(step)(small.state(tx, **start), batch)
    return state, small.numbers(metrics)


def _sums(table):
    """[B] log-probability of each response."""
    generation = small.generation()
    logp = small.logprobs(table, generation.tokens)
    return jnp.where(generation.response_mask, logp, 0).sum(-1)


# ----------------------------------------------------------------------------- prepare


def test_the_best_meets_the_worst(bigram):
    batch, metrics = _prepare(bigram, _hp())
    generation, rows = small.generation(), jnp.array([[2, 1], [5, 4]])
    np.testing.assert_array_equal(batch.tokens, generation.tokens[rows])
    np.testing.assert_array_equal(batch.mask, generation.mask[rows])
    np.testing.assert_array_equal(batch.response_mask, generation.response_mask[rows])
    np.testing.assert_array_equal(batch.weight, [1, 1])
    np.testing.assert_allclose(batch.ref_logps, _sums(REF['table'])[rows], rtol=1e-5)
    assert metrics['objective/scores_margin'] == pytest.approx((2.25 + 3.5) / 2)
    assert metrics['objective/best_scores'] == pytest.approx(1.0)
    assert metrics['objective/scores'] == pytest.approx(float(SCORES.mean()))
    assert metrics['rollout/equal_groups'] == 0


def test_of_two_responses_the_better_one_is_chosen(bigram):
    batch, _ = _prepare(bigram, _hp(group_size=2))
    rows = jnp.array([[0, 1], [2, 3], [5, 4], [7, 6]])
    np.testing.assert_array_equal(batch.tokens, small.generation().tokens[rows])


def test_equal_scores_have_no_weight_and_are_counted(bigram):
    scores = SCORES.at[4:].set(0.25)
    batch, metrics = _prepare(bigram, _hp(), scores)
    np.testing.assert_array_equal(batch.weight, [1, 0])
    assert metrics['rollout/equal_groups'] == 0.5
    alone = jax.tree.map(lambda x: x[:1], batch)
    (one, with_tie), (other, without) = (
        _step(bigram, b, _hp()) for b in (batch, alone)
    )
    np.testing.assert_allclose(small.moved(one), small.moved(other), atol=1e-7)
    assert with_tie == pytest.approx(without, rel=1e-6)
    assert np.abs(small.moved(one)).max() > 1e-3


def test_the_last_layer_for_responses_alone_changes_nothing(
    unrolled, policy_params, generation
):
    """Where the rollout says how long responses are, the pairs do, too."""
    prepared = jax.jit(
        functools.partial(prepare_pairs, model=unrolled, hp=_hp(), loss=dpo)
    )
    whole, short = (
        prepared(None, policy_params, texts, Scores(jnp.arange(16.0)))[0]
        for texts in (generation, generation.replace(response_length=6))
    )
    assert (whole.response_length, short.response_length) == (None, 6)
    assert np.all(np.asarray(whole.ref_logps) < 0)
    np.testing.assert_allclose(short.ref_logps, whole.ref_logps, rtol=1e-5)


def test_a_loss_without_a_reference_gets_none(bigram):
    batch, _ = _prepare(bigram, _hp(), loss=simpo)
    assert batch.ref_logps is None and batch.ref_shared_logps is None
    assert np.abs(small.moved(_step(bigram, batch, _hp(), loss=simpo)[0])).max() > 1e-3


def test_kl_is_reported_at_the_temperature_of_the_rollout(bigram):
    hp, generation = _hp(temperature=0.5), small.generation(temperature=0.5)
    how = {'model': bigram, 'hp': hp, 'loss': dpo}
    batch, metrics = prepare_pairs(
        None, PARAMS['policy'], generation, Scores(SCORES), **how
    )
    assert small.numbers(metrics)['objective/kl'] == pytest.approx(0, abs=1e-6)
    # The loss is at temperature 1, as with fixed data.
    expected = _sums(PARAMS['policy']['table'])[jnp.array([[2, 1], [5, 4]])]
    np.testing.assert_allclose(batch.ref_logps, expected, rtol=1e-5)


# ------------------------------------------------------------------------------ update


def test_one_epoch_is_a_step_of_dpo_on_the_pairs(bigram):
    """−log σ(β·(d_w − d_l)), written without the package."""
    batch, _ = _prepare(bigram, _hp())
    state, metrics = _step(bigram, batch, _hp())

    def loss(table):
        d = _sums(table) - _sums(REF['table'])
        u = BETA * (d[jnp.array([2, 5])] - d[jnp.array([1, 4])])
        return jnp.mean(jnp.log1p(jnp.exp(-u)))

    value, gradient = jax.value_and_grad(loss)(PARAMS['policy']['table'])
    np.testing.assert_allclose(small.moved(state), -0.5 * gradient, atol=1e-6)
    assert metrics['loss/policy'] == pytest.approx(float(value), rel=1e-5)
    assert np.abs(gradient).max() > 1e-2
    d = BETA * (_sums(PARAMS['policy']['table']) - _sums(REF['table']))
    assert metrics['rewards/chosen'] == pytest.approx(float(d[2] + d[5]) / 2, rel=1e-4)
    assert metrics['rewards/rejected'] == pytest.approx(
        float(d[1] + d[4]) / 2, rel=1e-4
    )
    assert 'loss' not in metrics and metrics['policy/updates'] == 1


def _centre(batch, hp):
    gap = batch.logps[:, 0] - batch.logps[:, 1]
    mean = jnp.sum(gap * batch.weight) / jnp.maximum(jnp.sum(batch.weight), 1)
    return {'centre': jnp.broadcast_to(mean, gap.shape)}


# A pair is pushed above the average pair of its minibatch, where the policy is now.
CENTRED = types.SimpleNamespace(
    __name__='centred',
    DATA='pairs',
    REFERENCE=False,
    HParams=dpo.HParams,
    context=_centre,
    loss=lambda batch, hp: (
        jnp.square(batch.logps[:, 0] - batch.logps[:, 1] - batch.context['centre'] - 1),
        batch.logps,
    ),
)


@pytest.mark.parametrize(('loss', 'parts'), [(dpo, 1), (ipo, 2), (CENTRED, 2)])
def test_a_step_is_a_slow_loop_over_its_minibatches(bigram, loss, parts):
    """Also where a pair's loss depends on the others of its minibatch."""
    tx, scores = optax.adam(0.05), SCORES.at[6:].set(0.5)  # the last pair is a tie
    batch, _ = _prepare(bigram, _hp(group_size=2), scores, loss)
    plan = {'num_epochs': 2, 'num_minibatches': 2, 'num_microbatches': parts}
    state, metrics = _step(bigram, batch, _hp(group_size=2, **plan), tx, loss, step=3)
    params, opt_state = jax.tree.map(jnp.array, PARAMS), tx.init(PARAMS)
    how = {'model': bigram, 'loss': loss, 'loss_hp': loss.HParams(beta=BETA)}
    key = jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(5), 3), SHUFFLE)

    def mean(params, rows):
        context = batch_context(params['policy'], rows, **how)
        total, weight, _ = preference_loss(params['policy'], rows, context, **how)
        return total / weight

    for epoch_key in jax.random.split(key, 2):
        order = np.asarray(jax.random.permutation(epoch_key, 4))
        for chosen in (order[:2], order[2:]):
            rows = jax.tree.map(lambda x, chosen=chosen: x[chosen], batch)
            gradient = jax.grad(mean)(params, rows)
            updates, opt_state = tx.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        state.params['policy']['table'], params['policy']['table'], atol=1e-5
    )
    assert int(state.step) == 4 and metrics['policy/updates'] == 4
    assert np.abs(small.moved(state)).max() > 1e-2


def test_a_rollout_of_ties_moves_nothing_and_stays_finite(bigram):
    batch, before = _prepare(bigram, _hp(), jnp.full(ROWS, 0.1))
    state, metrics = _step(bigram, batch, _hp(num_epochs=2))
    assert before['rollout/equal_groups'] == 1
    assert np.isfinite(list(metrics.values())).all()
    assert (small.moved(state) == 0).all()


def test_garbage_in_the_padding_changes_nothing(bigram):
    generation = small.generation()
    tokens = jnp.where(generation.mask, generation.tokens, -7)
    dirty = generation.replace(tokens=tokens)
    one, other = (
        _step(bigram, _prepare(bigram, _hp(), generation=g)[0], _hp())[0]
        for g in (generation, dirty)
    )
    np.testing.assert_allclose(small.moved(one), small.moved(other), atol=1e-7)


@pytest.mark.parametrize('backend', ['jit', 'pmap'])
def test_eight_devices_equal_one(backend, bigram):
    """Sixteen prompts, two on every device; some of them without a difference."""
    how = {'model': bigram, 'hp': _hp(num_microbatches=2), 'loss': aot}
    prepare = functools.partial(prepare_pairs, **how)
    step = functools.partial(online_preference_step, **how, loss_hp=aot.HParams())
    scores = np.random.default_rng(1).normal(size=(16, G))
    scores[[3, 8]] = 0.5
    scores, tx = scores.reshape(-1), optax.adam(0.1)
    numbers = small.on_one_and_on_eight(backend, prepare, step, scores, tx=tx)
    assert numbers['rollout/equal_groups'] == 2 / 16


def test_no_key_is_used_twice(bigram):
    how = {'loss': dpo, 'loss_hp': dpo.HParams(), 'hp': _hp(num_epochs=2)}
    step = functools.partial(online_preference_step, model=bigram, **how)
    small.uses_no_key_twice(step, _prepare(bigram, _hp())[0], SGD)


# ------------------------------------------------------------------------------- errors


def test_a_loss_on_singles_is_an_error(bigram):
    with pytest.raises(ValueError, match=r"kto is a loss on single .* is 'pairs'"):
        _prepare(bigram, _hp(), loss=kto)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'temperature': 0.0}, 'temperature=0'),
        ({'group_size': 1}, 'group_size=1 leaves nothing to compare; use 2 or more'),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        _hp(**settings)


def test_rows_that_do_not_divide(bigram):
    with pytest.raises(ValueError, match='8 rollout rows .* group_size=3; use a mul'):
        _prepare(bigram, _hp(group_size=3))
    with pytest.raises(ValueError, match='2 rollout rows .* num_minibatches=3'):
        _step(bigram, _prepare(bigram, _hp())[0], _hp(num_minibatches=3))
