"""Reward models in a world of 40 responses: from every comparison with its exact
probability each loss gets the rewards back that the comparisons were made of.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.table_world import ALL, NUMBERS, PREFIXES, SAME, per_prompt
from rlhf_jax import reward_losses
from rlhf_jax.algos.rm import RMHParams, rm_step
from rlhf_jax.types import JudgedBatch, TrainState
from tests.known.exact import CRITIC

N, STEPS = len(ALL.prompt), 400
FIRST, OTHER = np.nonzero(np.triu(SAME, 1))
REWARD = np.random.default_rng(5).normal(size=N)
GAP = REWARD[FIRST] - REWARD[OTHER]
END = NUMBERS[np.arange(N), ALL.lengths]  # where a response's score is read
TX = optax.sgd(60.0, momentum=0.8)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bradley_terry():
    return sigmoid(GAP), sigmoid(-GAP)


def turned_round(share):
    right = sigmoid(GAP)
    return tuple((1 - share) * p + share * (1 - p) for p in (right, 1 - right))


def davidson(nu):
    """Ties in proportion to 2ν·√(e^r·e^r′)."""
    half = np.exp(GAP / 2)
    total = half + 1 / half + 2 * nu
    return half / total, 1 / half / total


def rao_kupper(theta):
    """A win needs the odds to be θ times as good."""
    return tuple(sigmoid(x - np.log(theta)) for x in (GAP, -GAP))


def rankings(wins, losses):
    """Every pair three times: won, lost and tied, as often as each happens."""
    two = np.tile(np.stack([FIRST, OTHER], axis=1), (3, 1))
    ranks = np.repeat(np.array([[1, 2], [2, 1], [1, 1]]), len(FIRST), axis=0)
    weight = np.concatenate([wins, losses, 1 - wins - losses])
    return JudgedBatch(
        tokens=jnp.asarray(ALL.tokens[two]),
        mask=jnp.asarray(ALL.mask[two]),
        labels=jnp.asarray(ranks[..., None], jnp.float32),
        judged=jnp.ones((*ranks.shape, 1), bool),
        margin=jnp.zeros(len(two)),
        weight=jnp.asarray(np.maximum(weight, 0), jnp.float32),
    )


def ratings():
    """Every text twice, rated by 0.5 above and below its reward."""
    twice = np.concatenate([np.arange(N)] * 2)
    rated = REWARD[twice] + np.repeat([0.5, -0.5], N)
    return JudgedBatch(
        tokens=jnp.asarray(ALL.tokens[twice][:, None]),
        mask=jnp.asarray(ALL.mask[twice][:, None]),
        labels=jnp.asarray(rated[:, None, None], jnp.float32),
        judged=jnp.ones((2 * N, 1, 1), bool),
        weight=jnp.ones(2 * N),
    )


def learnt(batch, loss, loss_hp):
    """The scores after training from zero, by the public step."""
    step = functools.partial(
        rm_step, model=CRITIC, tx=TX, hp=RMHParams(), loss=loss, loss_hp=loss_hp
    )
    params = {'values': jnp.zeros(PREFIXES)}
    state = TrainState(
        step=jnp.int32(0),
        rng=jax.random.PRNGKey(0),
        params=params,
        opt_state=TX.init(params),
    )
    state, _ = jax.jit(
        lambda state: jax.lax.scan(
            lambda s, _: (step(s, batch)[0], None), state, None, STEPS
        )
    )(state)
    return np.asarray(state.params['values'], np.float64)[END]


@pytest.mark.parametrize(
    'name, settings, batch',
    [
        ('bradley_terry', {}, lambda: rankings(*bradley_terry())),
        ('robust', {'flip_rate': 0.2}, lambda: rankings(*turned_round(0.2))),
        ('davidson', {'nu': 0.8}, lambda: rankings(*davidson(0.8))),
        ('rao_kupper', {'theta': 1.8}, lambda: rankings(*rao_kupper(1.8))),
        ('squared', {}, ratings),
    ],
    ids=lambda x: x if isinstance(x, str) else '',
)
def test_a_reward_model_gets_the_rewards_back(name, settings, batch):
    loss = reward_losses.load(name, 'name')
    scores = learnt(batch(), loss, loss.HParams(**settings))
    error = scores - REWARD
    if name != 'squared':  # comparisons leave a constant free
        error -= per_prompt(error) / per_prompt(np.ones(N))
    assert np.abs(error).max() < 1e-4
