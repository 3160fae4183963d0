"""The stage ppo: a policy and its critic, ``algos/ppo.py``.

Read ``stages/online.py`` first, whose loop runs it; ``policy_gradient.py`` next.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.ppo import ActorCritic, PPOHParams, ppo_step, prepare
from rlhf_jax.config import build
from rlhf_jax.data import pipeline
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.optim import actor_critic_optimizer
from rlhf_jax.rewards import ScoreHParams
from rlhf_jax.stages import scoring
from rlhf_jax.stages.console import tell_left_out
from rlhf_jax.stages.evaluation import check_positions
from rlhf_jax.stages.online_job import (
    Judged,
    Method,
    Online,
    initial_state,
    load_online,
)
from rlhf_jax.stages.run import Run, check_single_score, load_scalar, model_config
from rlhf_jax.stages.settings import PPOSettings
from rlhf_jax.types import Generation, Metrics, Params, PPOState, Rollout

CRITIC = 13  # a purpose folded into the stage's key; stages.online has others


def load_ppo(run: Run, stage: str) -> Online:
    """Data and settings of ppo; see ``PPOSettings`` and ``PPOHParams``.

    Raises:
        ValueError: a critic that cannot read the policy's tokens, ptx without data, or
            whatever is wrong with the rest.
    """
    where = f'config.{stage}'
    settings, hp, *others = build(
        run.config[stage],
        PPOSettings,
        PPOHParams,
        ScoreHParams,
        AnchorHParams,
        where=where,
    )
    check_critic(run, f'{where}.critic', settings.critic, settings)
    begin = functools.partial(_begin, ptx=load_ptx(run, where, settings, hp))
    return load_online(run, stage, settings, hp, *others, begin)


def check_critic(run: Run, where: str, critic: str, settings: PPOSettings) -> None:
    """Refuses what cannot read the policy's tokens, from left to right.

    Raises:
        ValueError: another tokenizer, an encoder, or too few positions.
    """
    tokenizer = scoring.model_tokenizer(run, critic)
    is_foreign = (
        tokenizer is not None and tokenizer.get_vocab() != run.tokenizer.get_vocab()
    )
    is_encoder = model_config(run, critic).attention == 'bidirectional'
    if is_foreign or is_encoder:
        reason = 'is an encoder' if is_encoder else 'has another tokenizer'
        raise ValueError(
            f'{where}={critic!r} {reason}, but the critic reads the '
            "policy's tokens one after the other; start it from the policy: "
            f'{where}={settings.init!r}'
        )
    check_single_score(run, where, critic)
    check_positions(run, where, critic, settings)


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
    if settings.ptx_kind == 'text':
        return pipeline.load_texts(settings.ptx, run.tokenizer, max_length=length)
    data = pipeline.load_demonstrations(
        settings.ptx,
        run.tokenizer,
        max_length=length,
        loss_on='response',
        overlong=settings.overlong,
        on_bad=settings.on_bad,
        control_tokens=settings.control_tokens,
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
    settings, hp, key = job.settings, job.hp, run.key(job.stage)
    critic, critic_params = load_scalar(
        run, settings.critic, jax.random.fold_in(key, CRITIC), 'critic'
    )
    models = ActorCritic(policy, critic)
    tx = actor_critic_optimizer(
        settings.optim, settings.critic_optim, job.num_updates * settings.rollout_passes
    )

    def prepared(
        state: PPOState,
        ref_params: Params,
        generation: Generation,
        judged: Judged,
        *,
        axis_name: str | None = None,
    ) -> tuple[Rollout, Metrics]:
        how: dict[str, Any] = {'model': models, 'hp': hp, 'axis_name': axis_name}
        return prepare(state, ref_params, generation, judged.total, **how)

    params = {'policy': policy_params, 'critic': critic_params}
    of = functools.partial(PPOState, kl_coef=np.float32(hp.kl_coef))
    return Method(
        state=initial_state(run, job, params, tx, of),
        configs={'policy': policy.config, 'critic': critic.config},
        prepare=prepared,
        step=functools.partial(ppo_step, model=models, tx=tx, hp=hp),
        streams=((ptx, settings.ptx_buckets),) if ptx else (),
        passes=settings.rollout_passes,
    )
