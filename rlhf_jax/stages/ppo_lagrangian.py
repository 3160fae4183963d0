"""The kind ppo_lagrangian: the most reward at a mean cost below a limit.

See ``algos/lagrangian.py``; all but the cost and its critic is ``stages/ppo.py``.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.lagrangian import (
    COST,
    ActorCritics,
    LagrangianHParams,
    initial_log_lambda,
    lagrangian_step,
    prepare_lagrangian,
)
from rlhf_jax.algos.ppo import PPOHParams
from rlhf_jax.data import pipeline
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.optim import actor_critic_optimizer
from rlhf_jax.pages import policy as pages
from rlhf_jax.rewards import ScoreHParams
from rlhf_jax.stages import ppo
from rlhf_jax.stages.kinds import Makes
from rlhf_jax.stages.online import Online, check_optimised, load_online
from rlhf_jax.stages.online import train as train
from rlhf_jax.stages.rollouts import Method, initial_state
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import ModelName, RewardSource
from rlhf_jax.stages.sources import load_scalar
from rlhf_jax.types import LagrangianState, Params

COST_CRITIC = 15  # a purpose folded into the stage's key; stages.ppo has another


@dataclasses.dataclass(frozen=True, kw_only=True)
class LagrangianSettings(ppo.PPOSettings):
    """PPO under a constraint on a cost."""

    cost: RewardSource  # of a response, above 0 where it does harm; weighs nothing
    cost_critic: ModelName  # what the second critic starts from


SETTINGS = (
    LagrangianSettings,
    PPOHParams,
    LagrangianHParams,
    ScoreHParams,
    AnchorHParams,
)
PAGE = dataclasses.replace(pages.ONLINE, title='PPO under a cost constraint')


def makes(settings: LagrangianSettings, *others: object) -> Makes:
    """A policy, its critic, and the critic of the cost."""
    parts = ppo.makes(settings, *others).parts
    return Makes(parts={**parts, 'cost_critic': settings.cost_critic})


def reads(settings: LagrangianSettings, *others: object) -> dict[str, str]:
    """As ppo."""
    return ppo.reads(settings, *others)


def load(
    run: Run,
    stage: str,
    settings: LagrangianSettings,
    hp: PPOHParams,
    constraint: LagrangianHParams,
    shaping: ScoreHParams,
    anchors: AnchorHParams,
) -> Online:
    """Reads and checks.

    Raises:
        ValueError: a critic that cannot read the policy's tokens, ptx without data, or
            whatever is wrong with the rest.
    """
    where = f'config.{stage}'
    check_optimised(where, settings)
    for name in ('critic', 'cost_critic'):
        ppo.check_critic(run, f'{where}.{name}', getattr(settings, name), settings)
    ptx = ppo.load_ptx(run, where, settings, hp)
    begin = functools.partial(_begin, ptx=ptx, constraint=constraint)
    costs = {COST: settings.cost}
    return load_online(run, stage, settings, hp, shaping, anchors, begin, others=costs)


def _begin(
    run: Run,
    job: Online,
    policy: CausalLM,
    policy_params: Params,
    *,
    ptx: pipeline.Dataset | None,
    constraint: LagrangianHParams,
) -> Method:
    settings, hp, key = job.settings, job.hp, run.key(job.stage)
    models, params = {'policy': policy}, {'policy': policy_params}
    critics = {'critic': ppo.CRITIC, 'cost_critic': COST_CRITIC}
    for name, purpose in critics.items():
        start = getattr(settings, name), jax.random.fold_in(key, purpose)
        models[name], params[name] = load_scalar(run, *start, 'critic')
    updates = job.num_updates * settings.rollout_passes
    optims = settings.optim, settings.critic_optim
    tx = actor_critic_optimizer(*optims, updates, tuple(critics))
    of = functools.partial(
        LagrangianState,
        kl_coef=np.float32(hp.kl_coef),
        log_lambda=initial_log_lambda(constraint),
    )
    how = {'model': ActorCritics(**models), 'hp': hp, 'constraint': constraint}
    return Method(
        state=initial_state(run, job.stage, job.shaping, job.anchors, params, tx, of),
        configs={name: model.config for name, model in models.items()},
        prepare=functools.partial(prepare_lagrangian, **how),
        step=functools.partial(lagrangian_step, **how, tx=tx),
        streams=((ptx, settings.ptx_buckets),) if ptx else (),
        passes=settings.rollout_passes,
    )
