"""What the kinds of stage that learn from their own samples have in common.

They differ in their settings and in the ``Method`` that they hand to the loop of
``stages/rollouts.py``; ``makes``, ``reads`` and ``train`` they import from here. Read
``stages/ppo.py`` next, or ``policy_gradient.py``, ``online_preference.py``,
``expert_iteration.py``, ``distillation.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax import sharding
from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.updates import RolloutHParams
from rlhf_jax.data import pipeline
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.optim import make_optimizer, make_schedule
from rlhf_jax.responses import GOLD
from rlhf_jax.rewards import ScoreHParams
from rlhf_jax.stages import scoring
from rlhf_jax.stages.console import tell_shared
from rlhf_jax.stages.evaluation import (
    Evaluation,
    check_evaluation,
    evaluate_policy,
    read_prompts,
)
from rlhf_jax.stages.kinds import Makes
from rlhf_jax.stages.rollouts import (
    Method,
    Rollouts,
    initial_state,
    train_on_rollouts,
)
from rlhf_jax.stages.run import Result, Run
from rlhf_jax.stages.sampler import check_sampler, make_sampler
from rlhf_jax.stages.settings import OnlineSettings, RewardSource
from rlhf_jax.stages.sources import (
    check_policy,
    check_positions,
    frozen,
    load_policy,
)
from rlhf_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Online:
    """A checked stage, ready to train."""

    stage: str
    settings: OnlineSettings
    hp: RolloutHParams  # of the method's step
    shaping: ScoreHParams
    anchors: AnchorHParams
    prompts: pipeline.Dataset
    rewards: dict[str, scoring.Reward]  # that are optimised, by name
    evaluation: Evaluation
    # (run, job, policy, its parameters) -> the method, its state on the mesh
    begin: Callable[[Run, Online, CausalLM, Params], Method]

    @property
    def num_updates(self) -> int:
        """Optimizer steps of the whole stage."""
        hp = self.hp
        return self.settings.num_rollouts * hp.num_epochs * hp.num_minibatches


def makes(settings: OnlineSettings, *_: object) -> Makes:
    """A policy."""
    return Makes(parts={'policy': settings.init})


def reads(*_: object) -> dict[str, str]:
    """Prompts."""
    return {'prompts': 'prompts', 'eval_prompts': 'prompts'}


def load_online(
    run: Run,
    stage: str,
    settings: OnlineSettings,
    hp: RolloutHParams,
    shaping: ScoreHParams,
    anchors: AnchorHParams,
    begin: Callable[[Run, Online, CausalLM, Params], Method],
    group_size: int = 1,
    kept: int | None = None,
    others: Mapping[str, RewardSource] | None = None,
) -> Online:
    """Reads the prompts of an online stage and checks what all of them have.

    Args:
        run: the run.
        stage: its name.
        settings: what the user wrote.
        hp: of the method's step.
        shaping: what is done to scores.
        anchors: whether the reference follows the policy, and an average does.
        begin: see ``Online``.
        group_size: responses to a prompt.
        kept: rows of a group that the step trains on; None for all.
        others: what scores responses beside the rewards, by the setting's name.

    Raises:
        ValueError: rows that do not divide over the devices, the minibatches and the
            groups, or whatever is wrong with prompts and models.
    """
    where, others = f'config.{stage}', others or {}
    parts = hp.num_minibatches * hp.num_microbatches
    if group_size > 1:
        _check_groups(run, where, settings.batch_size, group_size)
    rows, name = settings.batch_size, 'batch_size'
    if kept is not None:
        rows, name = rows // group_size * kept, f'batch_size/group_size × {kept}'
    sharding.check_batch_size(rows, run.mesh, where, parts, name)
    buffer = shaping.overlong_buffer
    if buffer is not None and not 1 <= buffer <= settings.max_new_tokens:
        raise ValueError(
            f'{where}.overlong_buffer={buffer} tokens of {where}.max_new_tokens='
            f'{settings.max_new_tokens}; use 1 to {settings.max_new_tokens}'
        )
    make_schedule(settings.optim, settings.num_rollouts)
    check_sampler(run, where, settings)
    policy = check_policy(run, f'{where}.init', settings.init)
    check_positions(run, f'{where}.init', policy, settings)
    data = [
        read_prompts(run, spec, settings)
        for spec in (settings.prompts, settings.eval_prompts)
    ]
    tell_shared(*data)
    longest = settings.prompt_buckets[-1] + settings.max_new_tokens
    rewards = scoring.check_rewards(
        run, where, settings.rewards, longest, data, (GOLD, *others)
    )
    beside = {
        name: scoring.check_reward(run, f'{where}.{name}', source, longest, data)
        for name, source in others.items()
    }
    evaluation = check_evaluation(
        run, stage, settings, hp.temperature, data[1], rewards, data, beside
    )
    evaluation = dataclasses.replace(evaluation, needs_end=shaping.needs_end)
    return Online(
        stage, settings, hp, shaping, anchors, data[0], rewards, evaluation, begin
    )


def policy_method(
    run: Run,
    job: Online,
    policy: CausalLM,
    params: Params,
    prepare: Callable[..., Any],
    step: Callable[..., Any],
    **others: Any,
) -> Method:
    """The method of an algorithm that trains the policy alone.

    Args:
        run: the run.
        job: its stage, whose ``hp`` has a ``group_size``.
        policy: the model.
        params: where it starts.
        prepare: see ``Method``; it takes ``model`` and ``hp`` too.
        step: likewise, and ``tx``.
        **others: fields of ``Method``.
    """
    tx = make_optimizer(job.settings.optim, job.num_updates)
    how = {'model': policy, 'hp': job.hp}
    return Method(
        state=initial_state(
            run, job.stage, job.shaping, job.anchors, {'policy': params}, tx
        ),
        configs={'policy': policy.config},
        prepare=functools.partial(prepare, **how),
        step=functools.partial(step, **how, tx=tx),
        group_size=job.hp.group_size,
        **others,
    )


def check_optimised(where: str, settings: OnlineSettings) -> None:
    """Refuses a stage without rewards.

    Raises:
        ValueError: there is nothing to optimise.
    """
    if not settings.rewards:
        raise ValueError(
            f'{where}.rewards is empty, so that there is nothing to optimise; set for '
            "instance rewards={'rm': dict(model='rm')}"
        )


def _check_groups(run: Run, where: str, batch_size: int, group_size: int) -> None:
    """A group stays on one device, where its advantages are computed."""
    devices = run.mesh.shape['data'] * run.mesh.shape['fsdp']
    unit = devices * group_size
    if batch_size % unit:
        below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
        raise ValueError(
            f'{where}.batch_size={batch_size} responses do not divide into groups of '
            f'{where}.group_size={group_size} on {devices} devices; use '
            f'{f"{below} or {above}" if below else above}'
        )


def train(run: Run, job: Online) -> Result:
    """Runs a stage: trains, and compares the policy with the one it started from."""
    clock = time.monotonic()
    settings, key = job.settings, run.key(job.stage)
    policy, ref_params = load_policy(run, settings.init, key)
    method = job.begin(run, job, policy, ref_params)
    ref_params = frozen(run, policy, ref_params)
    rollouts = Rollouts(
        run=run,
        stage=job.stage,
        settings=settings,
        shaping=job.shaping,
        anchors=job.anchors,
        weights=scoring.weights_of(job.rewards),
        prompts=job.prompts,
        method=method,
        scorers=scoring.make_scorers(run, job.evaluation.scorers),
        sampler=make_sampler(run, settings, job.hp.temperature, policy),
        phases={},
    )
    rollouts.phases['setup'] = time.monotonic() - clock
    state, seconds = train_on_rollouts(rollouts, ref_params)
    clock = time.monotonic()
    params = dict(state.params)
    if state.ema_params is not None:  # what is kept is the average
        params['policy'] = state.ema_params
    report = evaluate_policy(
        run,
        job.evaluation,
        policy,
        ref_params,
        params['policy'],
        sample=rollouts.sampler,
        scorers={**rollouts.scorers, **method.judges},
    )
    seconds['eval'] = time.monotonic() - clock
    extra = {data.counts.what: data for data, _ in method.streams}
    data = {'prompts': job.prompts, **extra, 'eval prompts': job.evaluation.prompts}
    return Result(
        steps=settings.num_rollouts,
        init=settings.init,
        params=params,
        configs=method.configs,
        seconds=seconds,
        data=data,
        evaluation=report,
    )
