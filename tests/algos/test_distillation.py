"""``prepare_distillation`` and ``distillation_step``: by hand on a table of bigrams,
against the exact KL in a world of 40 responses, and on several devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.table_world import (
    ALL,
    NUMBERS,
    counted_policy,
    generation,
    objective,
    policy_of,
)
from rlhf_jax.algos.distillation import (
    DistillationHParams,
    distillation_step,
    prepare_distillation,
)
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.types import Scores
from tests.algos import small_rollout as small
from tests.algos.small_rollout import LENGTHS, PARAMS, REF, ROWS, G
from tests.known import exact

SCORES = jnp.array([0.25, -0.75, 1.5, 0.4, -3.0, 0.5, -3.0, 0.5])
NOTHING = jnp.zeros(ROWS)
SGD = optax.sgd(0.5)
TEACHER = {'table': small.table(3)}


def _hp(**values):
    return DistillationHParams(**values)


def _prepare(model, hp, scores=NOTHING, teacher=TEACHER, generation=None):
    generation = small.generation() if generation is None else generation
    batch, metrics = prepare_distillation(
        None,
        REF,
        generation,
        Scores(scores),
        teacher,
        model=model,
        teacher=model,
        hp=hp,
    )
    return batch, small.numbers(metrics)


def _step(model, batch, hp, tx=SGD, **start):
    step = functools.partial(distillation_step, model=model, tx=tx, hp=hp)
    state, metrics = jax.jit(step)(small.state(tx, **start), batch)
    return state, small.numbers(metrics)


def _on_responses(table, temperature=1.0):
    """[B, T] log-probabilities of the responses under a table, 0 elsewhere."""
    rows = small.generation()
    logp = small.logprobs(table / temperature, rows.tokens)
    return np.where(rows.response_mask, logp, 0)


# ----------------------------------------------------------------------------- prepare


def test_a_token_is_worth_what_the_teacher_says_more_than_the_policy(bigram):
    batch, metrics = _prepare(bigram, _hp())
    own, teacher, ref = (
        _on_responses(x['table']) for x in (PARAMS['policy'], TEACHER, REF)
    )
    np.testing.assert_allclose(batch.advantages, teacher - own, atol=1e-5)
    assert np.abs(batch.advantages).max() > 1
    np.testing.assert_allclose(batch.old_logprobs, own, atol=1e-6)
    kl = (own - teacher).sum(-1).mean()
    assert metrics['objective/teacher_kl'] == pytest.approx(kl, rel=1e-5)
    assert metrics['objective/kl'] == pytest.approx(
        (own - ref).sum(-1).mean(), rel=1e-4
    )
    assert metrics['objective/rlhf_reward'] == pytest.approx(-kl, rel=1e-5)
    assert metrics['rollout/response_length'] == np.mean(LENGTHS)


def test_with_its_own_start_as_the_teacher_nothing_is_learned(bigram):
    batch, metrics = _prepare(bigram, _hp(), teacher=PARAMS['policy'])
    assert np.abs(batch.advantages).max() < 1e-6
    assert metrics['objective/teacher_kl'] == pytest.approx(0, abs=1e-6)
    assert np.abs(small.moved(_step(bigram, batch, _hp())[0])).max() < 1e-6


def test_the_temperature_is_that_of_policy_and_teacher(bigram):
    hp, rows = _hp(temperature=0.5), small.generation(temperature=0.5)
    batch, _ = _prepare(bigram, hp, generation=rows)
    own, teacher = (_on_responses(x['table'], 0.5) for x in (PARAMS['policy'], TEACHER))
    np.testing.assert_allclose(batch.advantages, teacher - own, atol=1e-5)


def test_scores_add_what_a_response_has_more_than_the_others(bigram):
    """RLOO by hand: the score less the mean of the other three, at every token."""
    alone, _ = _prepare(bigram, _hp(group_size=G))
    batch, metrics = _prepare(bigram, _hp(group_size=G), SCORES)
    groups = np.asarray(SCORES).reshape(-1, G)
    others = (groups.sum(-1, keepdims=True) - groups) / (G - 1)
    more = (groups - others).reshape(-1, 1) * np.asarray(batch.response_mask)
    np.testing.assert_allclose(batch.advantages - alone.advantages, more, atol=1e-5)
    assert metrics['objective/rlhf_reward'] == pytest.approx(
        metrics['objective/scores'] - metrics['objective/teacher_kl'], rel=1e-5
    )
    # Without scores the groups make no difference.
    np.testing.assert_array_equal(
        alone.advantages, _prepare(bigram, _hp())[0].advantages
    )


def test_a_teacher_of_another_shape(bigram, config, generation):
    """Two Transformers of one vocabulary; the larger is the teacher."""
    large = dataclasses.replace(config, num_layers=3, width=48, mlp_width=96)
    (model, params), (teacher, theirs) = (
        (CausalLM(c), CausalLM(c).init(jax.random.PRNGKey(i), *_two())['params'])
        for i, c in enumerate((config, large))
    )
    batch, _ = prepare_distillation(
        None,
        params,
        generation,
        Scores(jnp.zeros(16)),
        theirs,
        model=model,
        teacher=teacher,
        hp=_hp(),
    )
    hidden = teacher.apply({'params': theirs}, generation.tokens, generation.mask)
    logits = jax.nn.log_softmax(hidden @ teacher.unembedding(theirs))
    logp = np.take_along_axis(logits[:, :-1], generation.tokens[:, 1:, None], -1)
    want = np.pad(logp[..., 0], ((0, 0), (1, 0))) - generation.logprobs
    want = np.where(generation.response_mask, want, 0)
    np.testing.assert_allclose(batch.advantages, want, atol=1e-4)


def _two():
    return jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)


# -------------------------------------------------------------------------- exact world


WORLD_TEACHER = policy_of(counted_policy(3, exact.TOTAL) / exact.TOTAL)
STUDENT = policy_of(exact.START / exact.TOTAL)


def _exact_kl(params):
    """The KL to the teacher at every prefix, as often as the student comes there, with
    those frequencies held; by prompt.
    """
    log_p, log_t = (
        jax.nn.log_softmax(x['logits'])[NUMBERS[:, :-1]]
        for x in (params, WORLD_TEACHER)
    )
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_t), axis=-1)  # [N, LENGTH - 1]
    often = exact.START[:, None] * ALL.response_mask[:, 1:]
    return jnp.sum(often * kl) / exact.TOTAL / 2


@functools.partial(jax.jit, static_argnames='hp')
def _world_gradient(rows, scores, hp):
    batch, _ = prepare_distillation(
        None,
        exact.REF_PARAMS,
        rows,
        Scores(scores),
        WORLD_TEACHER,
        model=exact.POLICY,
        teacher=exact.POLICY,
        hp=hp,
    )
    state, _ = distillation_step(
        exact.state(STUDENT), batch, model=exact.POLICY, tx=exact.SGD, hp=hp
    )
    return STUDENT['logits'] - state.params['policy']['logits']


@pytest.mark.parametrize('how', ['token_mean', 'sequence_sum'])
def test_its_gradient_is_that_of_the_exact_reverse_kl(how):
    """With every response as often as the student writes it."""
    rows = exact.every(exact.START)
    hp = _hp(aggregation=how)
    got = _world_gradient(generation(STUDENT, rows), jnp.zeros(len(rows)), hp)
    got = got * (ALL.lengths[rows].mean() if how == 'token_mean' else 1)
    want = jax.grad(_exact_kl)(STUDENT)['logits']
    assert np.abs(want).max() > 1e-2
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_with_rewards_it_is_that_of_both():
    rows, size = exact.every(exact.START), exact.TOTAL
    hp = _hp(aggregation='sequence_sum', group_size=size)
    # So that RLOO, which multiplies by G/(G − 1), is exact.
    scores = jnp.asarray(exact.REWARD[rows], jnp.float32) * (size - 1) / size
    got = _world_gradient(generation(STUDENT, rows), scores, hp)
    reward = jax.grad(objective)(STUDENT, exact.PI_REF, exact.REWARD, 0.0)['logits']
    want = jax.grad(_exact_kl)(STUDENT)['logits'] - reward
    np.testing.assert_allclose(got, want, atol=1e-5)


# ------------------------------------------------------------------------------ update


def test_the_first_update_is_by_the_advantages(bigram):
    """Σ_t A_t·∇log π / tokens, written without the package."""
    batch, _ = _prepare(bigram, _hp())
    state, metrics = _step(bigram, batch, _hp())
    advantages = _on_responses(TEACHER['table']) - _on_responses(
        PARAMS['policy']['table']
    )

    def value(table):
        rows = small.generation()
        return jnp.sum(advantages * small.logprobs(table, rows.tokens)) / sum(LENGTHS)

    gradient = jax.grad(value)(PARAMS['policy']['table'])
    np.testing.assert_allclose(small.moved(state), 0.5 * gradient, atol=1e-6)
    assert np.abs(gradient).max() > 1e-2
    assert metrics['policy/approxkl'] == pytest.approx(0, abs=1e-10)
    assert metrics['policy/updates'] == 1


def test_a_ratio_beyond_the_bound_no_longer_counts(bigram):
    """The second epoch has nothing left to do where the first went too far."""
    batch, _ = _prepare(bigram, _hp())
    clip = {'clip_eps_low': 1e-3, 'clip_eps_high': 1e-3, 'num_epochs': 2}
    far, free = (
        _step(bigram, batch, _hp(**settings))
        for settings in (clip, dict.fromkeys(clip) | {'num_epochs': 2})
    )
    assert far[1]['policy/clipfrac'] > 0.2 and free[1]['policy/clipfrac'] == 0
    assert np.abs(small.moved(far[0]) - small.moved(free[0])).max() > 1e-2


def test_garbage_in_the_padding_changes_nothing(bigram):
    rows = small.generation()
    dirty = rows.replace(tokens=jnp.where(rows.mask, rows.tokens, -7))
    one, other = (
        _step(bigram, _prepare(bigram, _hp(), generation=g)[0], _hp())[0]
        for g in (rows, dirty)
    )
    np.testing.assert_allclose(small.moved(one), small.moved(other), atol=1e-7)


def test_more_padding_and_microbatches_change_nothing(bigram):
    rows, hp = small.generation(), _hp(group_size=G)

    def wider(x):
        if x.ndim == 1:
            return x
        return jnp.pad(x, ((0, 0), (2, 1)))

    wide = jax.tree.map(wider, rows)
    whole = _step(bigram, _prepare(bigram, hp, SCORES)[0], hp)[0]
    for generation_, parts in ((wide, 1), (rows, 4)):
        batch, _ = _prepare(bigram, hp, SCORES, generation=generation_)
        state, _ = _step(bigram, batch, _hp(group_size=G, num_microbatches=parts))
        np.testing.assert_allclose(small.moved(state), small.moved(whole), atol=1e-6)


@pytest.mark.parametrize('backend', ['jit', 'pmap'])
def test_eight_devices_equal_one(backend, bigram):
    """Sixteen prompts, two on every device, with scores."""
    how = {'model': bigram, 'hp': _hp(group_size=G, num_microbatches=2)}
    prepare = functools.partial(prepare_distillation, teacher=bigram, **how)
    step = functools.partial(distillation_step, **how)
    scores, tx = np.random.default_rng(1).normal(size=16 * G), optax.adam(0.1)
    small.on_one_and_on_eight(backend, prepare, step, scores, TEACHER, tx=tx)


def test_no_key_is_used_twice(bigram):
    step = functools.partial(distillation_step, model=bigram, hp=_hp(num_epochs=2))
    small.uses_no_key_twice(step, _prepare(bigram, _hp())[0], SGD)


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'temperature': 0.0}, 'temperature=0'),
        ({'group_size': 0}, 'group_size=0'),
        ({'clip_eps_low': 0.0}, 'clip_eps_low=0'),
        ({'num_epochs': 0}, 'num_epochs=0'),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        _hp(**settings)


def test_rows_that_do_not_divide(bigram):
    with pytest.raises(ValueError, match='8 rollout rows .* group_size=3; use a mul'):
        _prepare(bigram, _hp(group_size=3))
    with pytest.raises(ValueError, match='8 rollout rows .* num_minibatches=3'):
        _step(bigram, _prepare(bigram, _hp())[0], _hp(num_minibatches=3))
