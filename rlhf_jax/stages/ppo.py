"""The kind ppo: a policy and its critic, ``algos/ppo.py``.

Read ``stages/rollouts.py`` first, whose loop runs it; ``policy_gradient.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import numpy as np

from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.ppo import ActorCritic, PPOHParams, ppo_step, prepare
from rlhf_jax.data import pipeline
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.optim import OptimConfig, actor_critic_optimizer
from rlhf_jax.pages import policy as pages
from rlhf_jax.ranges import at_least
from rlhf_jax.rewards import ScoreHParams
from rlhf_jax.stages import online
from rlhf_jax.stages.console import tell_left_out
from rlhf_jax.stages.kinds import Makes
from rlhf_jax.stages.online import Online, check_optimised, load_online
from rlhf_jax.stages.online import train as train
from rlhf_jax.stages.rollouts import Method, initial_state
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import LENGTHS, DataSpec, ModelName, OnlineSettings
from rlhf_jax.stages.sources import (
    check_positions,
    check_single_score,
    load_scalar,
    resolve,
)
from rlhf_jax.types import Params, PPOState

CRITIC = 13  # a purpose folded into the stage's key; stages.rollouts has others


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOSettings(OnlineSettings):
    """PPO."""

    # What the critic starts from: a reward model (of an ensemble its first member), or
    # a policy
    critic: ModelName
    critic_optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    ptx: DataSpec | None = None  # demonstrations or text for ppo.ptx_coef
    ptx_form: Literal['demonstrations', 'text'] = 'demonstrations'
    ptx_buckets: Annotated[tuple[int, ...], LENGTHS] = (128,)
    # times that every rollout is prepared and trained on
    rollout_passes: Annotated[int, at_least(1)] = 1


SETTINGS = (PPOSettings, PPOHParams, ScoreHParams, AnchorHParams)
PAGE = dataclasses.replace(pages.ONLINE, title='PPO')


def makes(settings: PPOSettings, *_: object) -> Makes:
    """A policy and its critic."""
    return Makes(parts={'policy': settings.init, 'critic': settings.critic})


def reads(settings: PPOSettings, *_: object) -> dict[str, str]:
    """Prompts, and what ``ptx_coef`` asks for."""
    form = {'demonstrations': 'demonstrations', 'text': 'texts'}[settings.ptx_form]
    return {**online.reads(), 'ptx': form}


def load(
    run: Run,
    stage: str,
    settings: PPOSettings,
    hp: PPOHParams,
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
    check_critic(run, f'{where}.critic', settings.critic, settings)
    begin = functools.partial(_begin, ptx=load_ptx(run, where, settings, hp))
    return load_online(run, stage, settings, hp, shaping, anchors, begin)


def check_critic(run: Run, where: str, critic: str, settings: PPOSettings) -> None:
    """Refuses what cannot read the policy's tokens, from left to right.

    Raises:
        ValueError: another tokenizer, an encoder, or too few positions.
    """
    source = resolve(run, critic)
    tokenizer = source.tokenizer
    is_foreign = (
        tokenizer is not None and tokenizer.get_vocab() != run.tokenizer.get_vocab()
    )
    is_encoder = source.config().attention == 'bidirectional'
    if is_foreign or is_encoder:
        reason = 'is an encoder' if is_encoder else 'has another tokenizer'
        raise ValueError(
            f'{where}={critic!r} {reason}, but the critic reads the '
            "policy's tokens one after the other; start it from the policy: "
            f'{where}={settings.init!r}'
        )
    check_single_score(source, where)
    check_positions(run, where, source, settings)


def load_ptx(
    run: Run, where: str, settings: PPOSettings, hp: PPOHParams
) -> pipeline.Dataset | None:
    """What the language-model loss of ``ptx_coef`` reads; None where it is off.

    Raises:
        ValueError: no data, or bad data.
    """
    if not hp.ptx_coef:
        return None
    if settings.ptx is None:
        raise ValueError(f'{where}.ptx_coef={hp.ptx_coef} needs data: set {where}.ptx')
    length = settings.ptx_buckets[-1]
    if settings.ptx_form == 'text':
        return pipeline.load_texts(settings.ptx, run.tokenizer, max_length=length)
    data = pipeline.load_demonstrations(
        settings.ptx,
        run.tokenizer,
        max_length=length,
        loss_on='response',
        **settings.reading,
    )
    return tell_left_out(data)


def _begin(
    run: Run,
    job: Online,
    policy: CausalLM,
    policy_params: Params,
    *,
    ptx: pipeline.Dataset | None,
) -> Method:
    settings, hp = job.settings, job.hp
    key = jax.random.fold_in(run.key(job.stage), CRITIC)
    critic, critic_params = load_scalar(run, settings.critic, key, 'critic')
    models = ActorCritic(policy, critic)
    tx = actor_critic_optimizer(
        settings.optim, settings.critic_optim, job.num_updates * settings.rollout_passes
    )
    params = {'policy': policy_params, 'critic': critic_params}
    of = functools.partial(PPOState, kl_coef=np.float32(hp.kl_coef))
    how = {'model': models, 'hp': hp}
    return Method(
        state=initial_state(run, job.stage, job.shaping, job.anchors, params, tx, of),
        configs={'policy': policy.config, 'critic': critic.config},
        prepare=functools.partial(prepare, **how),
        step=functools.partial(ppo_step, **how, tx=tx),
        streams=((ptx, settings.ptx_buckets),) if ptx else (),
        passes=settings.rollout_passes,
    )
