"""What every online stage is told, read and checked before anything compiles.

Read ``stages/online.py`` next, which runs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from rlhf_jax import sharding
from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.data import pipeline
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.optim import make_schedule
from rlhf_jax.rewards import ScoreHParams, initial_moments
from rlhf_jax.stages.console import tell_left_out
from rlhf_jax.stages.evaluation import Evaluation, check_evaluation
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import OnlineSettings, RewardSource
from rlhf_jax.types import Array, OnlineState, Params


class Judged(NamedTuple):
    """What was said of the responses of a rollout."""

    total: Array  # [B] the weighted sum of the rewards, scaled and shaped
    each: dict[str, Array]  # [B] by name, as the scorers gave it
    baseline: Array | None = None  # [B] total of the policy's greedy response


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What an online algorithm is to the loop of ``stages/online.py``.

    Both functions are pure, not yet compiled, and take ``axis_name``.
    """

    state: Any  # where it starts; ``params['policy']`` is the policy
    configs: dict[str, TransformerConfig]  # of every part of ``state.params``
    # (state, ref_params, generation, Judged) -> (batch, metrics); once per rollout
    prepare: Callable[..., tuple[Any, Any]]
    # (state, batch, *a batch of every stream) -> (state, metrics)
    step: Callable[..., tuple[Any, Any]]
    streams: tuple[tuple[pipeline.Dataset, tuple[int, ...]], ...] = ()  # and buckets
    group_size: int = 1  # responses to a prompt, adjacent rows of the rollout
    wants_baseline: bool = False  # see ``Judged``
    max_draws: int = 1  # see ``PolicyGradientSettings``
    passes: int = 1  # see ``PPOSettings.rollout_passes``


# (run, job, policy, its parameters) -> the method, its state on the mesh
Begin = Callable[[Run, 'Online', CausalLM, Params], Method]


@dataclasses.dataclass(frozen=True)
class Online:
    """A checked stage, ready to train."""

    stage: str
    settings: OnlineSettings
    hp: Any  # of the method's step
    shaping: ScoreHParams
    anchors: AnchorHParams
    prompts: pipeline.Dataset
    evaluation: Evaluation  # its rewards are those that are optimised
    begin: Begin

    @property
    def num_updates(self) -> int:
        """Optimizer steps of the whole stage."""
        hp = self.hp
        return self.settings.num_rollouts * hp.num_epochs * hp.num_minibatches


def load_online(
    run: Run,
    stage: str,
    settings: OnlineSettings,
    hp: Any,
    shaping: ScoreHParams,
    anchors: AnchorHParams,
    begin: Begin,
    group_size: int = 1,
    kept: int | None = None,
    others: Mapping[str, RewardSource] | None = None,
) -> Online:
    """Reads the prompts of an online stage and checks what all of them have.

    Args:
        run: the run.
        stage: its name.
        settings: what the user wrote.
        hp: of the method's step: temperature, epochs, minibatches.
        shaping: what is done to scores.
        anchors: whether the reference follows the policy, and an average does.
        begin: see ``Begin``.
        group_size: responses to a prompt.
        kept: rows of a group that the step trains on; None for all.
        others: what scores responses beside the rewards, by the setting's name.

    Raises:
        ValueError: nothing to optimise, rows that do not divide over the devices, the
            minibatches and the groups, or whatever is wrong with prompts and models.
    """
    where = f'config.{stage}'
    parts = hp.num_minibatches * hp.num_microbatches
    if group_size > 1:
        _check_groups(run, where, settings.batch_size, group_size)
    rows, name = settings.batch_size, 'batch_size'
    if kept is not None:
        rows, name = rows // group_size * kept, f'batch_size/group_size × {kept}'
    sharding.check_batch_size(rows, run.mesh, where, parts, name)
    if not settings.rewards:
        raise ValueError(
            f'{where}.rewards is empty, so that there is nothing to optimise; set for '
            "instance rewards={'rm': dict(model='rm')}"
        )
    limits = {
        'max_prompt_length': settings.prompt_buckets[-1],
        'overlong': settings.overlong,
        'on_bad': settings.on_bad,
        'control_tokens': settings.control_tokens,
    }
    buffer = shaping.overlong_buffer
    if buffer is not None and not 1 <= buffer <= settings.max_new_tokens:
        raise ValueError(
            f'{where}.overlong_buffer={buffer} tokens of {where}.max_new_tokens='
            f'{settings.max_new_tokens}; use 1 to {settings.max_new_tokens}'
        )
    make_schedule(settings.optim, settings.num_rollouts)
    prompts, held_out = (
        tell_left_out(pipeline.load_prompts(spec, run.tokenizer, **limits))
        for spec in (settings.prompts, settings.eval_prompts)
    )
    evaluation = check_evaluation(
        run, stage, settings, hp.temperature, settings.init, held_out, prompts, others
    )
    evaluation = dataclasses.replace(evaluation, needs_end=shaping.needs_end)
    return Online(stage, settings, hp, shaping, anchors, prompts, evaluation, begin)


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


def initial_state(
    run: Run,
    job: Online,
    params: dict[str, Params],
    tx: optax.GradientTransformation,
    of: Callable[..., OnlineState] = OnlineState,
) -> OnlineState:
    """Where a method starts, in place on the mesh; ``params`` keep the originals.

    Args:
        run: the run.
        job: the stage.
        params: by part, 'policy' among them.
        tx: the optimizer over them.
        of: makes the state from its fields, and adds those of its own.
    """

    def start(params: dict[str, Params]) -> OnlineState:
        fields = {
            'step': jnp.int32(0),
            'rng': run.key(job.stage),
            'params': params,
            'opt_state': tx.init(params),
            'score_moments': initial_moments(job.shaping),
        }
        if job.anchors.ref_sync_rollouts is not None:
            fields['ref_params'] = params['policy']
        if job.anchors.ema_decay is not None:
            fields['ema_params'] = params['policy']
        return of(**fields)

    return sharding.init_sharded(start, run.mesh, params)


def data_of(job: Online, method: Method) -> Mapping[str, pipeline.Dataset]:
    """What a stage read, by what it was for."""
    extra = {data.counts.what: data for data, _ in method.streams}
    return {'prompts': job.prompts, **extra, 'eval prompts': job.evaluation.prompts}
