"""A world whose optimum is known, and batches that hold every response as often as its
policy writes it; not a test.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.table_world import (
    ALL,
    TablePolicy,
    TableValue,
    counted_policy,
    policy_of,
    token_logprobs,
)
from rlhf_jax.algos.policy_gradient import PolicyHParams, policy_step, prepare_policy
from rlhf_jax.algos.ppo import ActorCritic, PPOHParams, ppo_step, prepare
from rlhf_jax.types import PPOState, Scores, TrainState

BETA, TOTAL = 0.2, 400
SGD = optax.sgd(1.0)
POLICY, CRITIC = TablePolicy(), TableValue()
ACTORS = ActorCritic(POLICY, CRITIC)
# Three distributions over the responses, as counts out of TOTAL for each prompt.
BEST, START, REF = (counted_policy(seed, TOTAL) for seed in (0, 1, 2))
PI_REF = REF / TOTAL
# The reward under which BEST is π*; β·log Z is 0.3 for one prompt, −0.5 for the other.
OFFSET = np.array([0.3, -0.5])[ALL.prompt]
REWARD = BETA * np.log(BEST / REF) + OFFSET
REF_PARAMS = policy_of(PI_REF)


def d_of(params):
    """log π − log π_ref of the tokens of all responses, [N, T]."""
    return np.asarray(token_logprobs(params) - token_logprobs(REF_PARAMS), np.float64)


def every(counts):
    """Rows of all responses, each as often as is said."""
    return np.repeat(np.arange(len(counts)), counts)


def state(policy, critic=None):
    """Before the first step."""
    params = {'policy': policy}
    if critic is not None:
        params['critic'] = critic
    start = {
        'step': jnp.int32(0),
        'rng': jax.random.PRNGKey(0),
        'params': params,
        'opt_state': SGD.init(params),
    }
    if critic is None:
        return TrainState(**start)
    return PPOState(**start, kl_coef=jnp.float32(BETA))


@functools.partial(jax.jit, static_argnames=('hp', 'estimator'))
def prepared(params, rows, scores, baseline=None, *, hp, estimator):
    """The rollout of a method without a critic."""
    return prepare_policy(
        state(params),
        REF_PARAMS,
        rows,
        Scores(scores, baseline=baseline),
        model=POLICY,
        hp=hp,
        estimator=estimator,
        estimator_hp=estimator.HParams(),
    )[0]


@functools.partial(jax.jit, static_argnames='hp')
def moved(params, rollout, *, hp):
    """What a step of SGD at rate 1 adds to the logits: minus the gradient."""
    after, _ = policy_step(state(params), rollout, model=POLICY, tx=SGD, hp=hp)
    return after.params['policy']['logits'] - params['logits']


@functools.partial(jax.jit, static_argnames='hp')
def ppo_prepared(params, values, rows, scores, *, hp):
    """The rollout of PPO."""
    start = state(params, values)
    return prepare(start, REF_PARAMS, rows, Scores(scores), model=ACTORS, hp=hp)[0]


@functools.partial(jax.jit, static_argnames='hp')
def ppo_moved(params, values, rollout, *, hp):
    """What a step of SGD at rate 1 adds to the logits and to the values."""
    after, _ = ppo_step(state(params, values), rollout, model=ACTORS, tx=SGD, hp=hp)
    policy = after.params['policy']['logits'] - params['logits']
    return policy, after.params['critic']['values'] - values['values']


def hparams(**settings):
    """Of a method without a critic: one update, the whole batch a group per prompt."""
    plain = {'group_size': TOTAL, 'kl_coef': BETA}
    return PolicyHParams(**{**plain, **settings})


def ppo_hparams(**settings):
    """Of PPO: one update, nothing whitened."""
    plain = {'kl_coef': BETA, 'num_epochs': 1, 'whiten_advantages': False}
    return PPOHParams(**{**plain, **settings})


def cosine(a, b):
    """Of the angle between two gradients."""
    a, b = np.ravel(a), np.ravel(b)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
