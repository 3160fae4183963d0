"""``prepare`` and ``ppo_step`` of ``tiny_ppo.py``, compiled once for the tests here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos.ppo import ActorCritic, ppo_step, prepare
from rlhf_jax.generate import generate, sampling
from rlhf_jax.types import Scores
from tests.algos.tiny_ppo import EOS, PARAMS, PLAIN, REF, ROWS, SCORES, SGD, make_state


@pytest.fixture(scope='session')
def model(bigram, token_scores):
    return ActorCritic(bigram, token_scores)


@pytest.fixture(scope='session')
def sampled(bigram):
    """Responses of 1 to 5 tokens to prompts of 1 or 2, sampled by the policy."""
    rng = np.random.default_rng(4)
    prompts = rng.integers(0, EOS, (ROWS, 2)).astype(np.int32)
    mask = np.ones((ROWS, 2), bool)
    mask[::3, 0] = False
    run = jax.jit(functools.partial(generate, model=bigram, max_new_tokens=5))
    how = sampling(eos_ids=[EOS])
    out = run(
        PARAMS['policy'], prompts, mask, jnp.arange(ROWS), jax.random.PRNGKey(1), how
    )
    lengths = out.response_mask.sum(-1)
    assert lengths.min() < 4 and lengths.max() == 5 and len(set(lengths.tolist())) > 2
    # The table has no layers, of which the last could be run for the responses alone.
    return out.replace(response_length=None)


@pytest.fixture(scope='session')
def ready(model):
    """prepare, compiled once per ``hp``: ready(sampled, scores, hp, ref)."""
    compiled = jax.jit(functools.partial(prepare, model=model), static_argnames='hp')

    def run(sampled, scores=SCORES, hp=PLAIN, ref=REF, state=None):
        rollout, metrics = compiled(
            state or make_state(), ref, sampled, Scores(scores), hp=hp
        )
        return rollout, {
            name: float(metric.value()) for name, metric in metrics.items()
        }

    return run


@pytest.fixture(scope='session')
def rollout(ready, sampled):
    return ready(sampled)[0]


@pytest.fixture(scope='session')
def update(model):
    """ppo_step, compiled once per optimizer and hyperparameters."""
    compiled = jax.jit(
        functools.partial(ppo_step, model=model), static_argnames=('tx', 'hp')
    )

    def run(rollout, hp=PLAIN, ptx=None, tx=SGD, **start):
        state, metrics = compiled(make_state(tx, **start), rollout, ptx, tx=tx, hp=hp)
        return state, {name: float(metric.value()) for name, metric in metrics.items()}

    return run
