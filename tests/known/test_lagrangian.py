"""PPO-Lagrangian in a world of 40 responses: it rests at the optimum of the constrained
problem that it names, and the multiplier is the price of the limit.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.table_world import (
    ALL,
    PROMPTS,
    generation,
    optimum,
    policy_of,
    to_go,
    values_of,
)
from rlhf_jax.algos.lagrangian import (
    ActorCritics,
    LagrangianHParams,
    prepare_lagrangian,
)
from rlhf_jax.types import LagrangianState, Scores
from tests.known.exact import (
    BETA,
    CRITIC,
    PI_REF,
    POLICY,
    REF_PARAMS,
    REWARD,
    SGD,
    d_of,
    ppo_hparams,
)

COSTS = ALL.lengths - 1.5  # reward units of their own
LAMBDA = 0.6


def solved(weight):
    """π ∝ π_ref·exp((r − λ·c)/β), its mean cost, and its E[r] − β·KL."""
    best, _ = optimum(PI_REF, REWARD - weight * COSTS, BETA)
    kl = best * np.log(best / PI_REF)
    worth = (best * REWARD - BETA * kl).sum() / len(PROMPTS)
    return best, (best * COSTS).sum() / len(PROMPTS), worth


@pytest.mark.parametrize('lam', [1.0, 0.95])
def test_at_the_constrained_optimum_no_token_has_an_advantage(lam):
    best, limit, _ = solved(LAMBDA)
    params = policy_of(best)
    d = d_of(params)
    critics = {
        'critic': values_of(best, to_go(REWARD, d, BETA)),
        'cost_critic': values_of(best, to_go(COSTS, d, 0.0)),
    }
    everything = {'policy': params, **critics}
    state = LagrangianState(
        step=jnp.int32(0),
        rng=jax.random.PRNGKey(0),
        params=everything,
        opt_state=SGD.init(everything),
        kl_coef=jnp.float32(BETA),
        log_lambda=jnp.log(jnp.float32(LAMBDA)),
    )
    rows = np.arange(len(best))
    costs = jnp.asarray(COSTS, jnp.float32)
    # The rows are not a sample of the policy: their mean cost is made the limit.
    constraint = LagrangianHParams(cost_limit=float(costs.mean()))
    rollout, metrics = prepare_lagrangian(
        state,
        REF_PARAMS,
        generation(params, rows),
        Scores(jnp.asarray(REWARD, jnp.float32), {'cost': costs}),
        model=ActorCritics(POLICY, CRITIC, CRITIC),
        hp=ppo_hparams(lam=lam),
        constraint=constraint,
    )
    assert float(metrics['objective/lambda'].value()) == pytest.approx(LAMBDA)
    assert np.abs(rollout.reward.advantages).max() < 1e-6
    assert limit < solved(0.0)[1] - 0.1  # the constraint binds


def test_the_multiplier_is_the_price_of_the_limit():
    """What E[r] − β·KL gains for each unit that the limit is moved."""
    (_, low, less), (_, high, more) = solved(LAMBDA + 1e-4), solved(LAMBDA - 1e-4)
    assert (more - less) / (high - low) == pytest.approx(LAMBDA, rel=1e-4)
