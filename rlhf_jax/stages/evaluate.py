"""The kind evaluate: policies and reward models are measured, and nothing is trained.

A policy on prompts, as ``stages/evaluation.py`` measures it where it was trained; a
reward model on comparisons, as ``stages/reward_model.py`` does; or what a policy
prefers, its implicit reward log π − log π_ref. Read ``stages/online.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Annotated, Any

import numpy as np

from rlhf_jax.algos.preference import reference_logps
from rlhf_jax.checkpoint import ScoreFacts
from rlhf_jax.data import pipeline
from rlhf_jax.data.tokenizer import check_vocabulary
from rlhf_jax.evals import preference
from rlhf_jax.pages import policy as pages
from rlhf_jax.pages.held_out import draw_held_out
from rlhf_jax.pages.page import Json, Page, Verdict
from rlhf_jax.pages.reward_model import verdict_of as verdict_of_reward_model
from rlhf_jax.ranges import above, at_least
from rlhf_jax.sharding import check_batch_size
from rlhf_jax.stages import scoring
from rlhf_jax.stages.console import tell_left_out
from rlhf_jax.stages.evaluation import Evaluation, evaluate_policy, load_evaluation
from rlhf_jax.stages.kinds import Makes
from rlhf_jax.stages.offline import how_sure, known_gold, known_kinds
from rlhf_jax.stages.reward_model import examination
from rlhf_jax.stages.run import Result, Run
from rlhf_jax.stages.sampler import make_sampler
from rlhf_jax.stages.settings import (
    LENGTHS,
    DataSpec,
    EvaluationSettings,
    ModelName,
    RecordSettings,
    RewardSource,
    SamplerSettings,
)
from rlhf_jax.stages.sources import (
    Source,
    check_policy,
    check_positions,
    check_trained_score,
    frozen,
    load_ensemble,
    load_policy,
    load_scalar,
    resolve,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings(RecordSettings, SamplerSettings, EvaluationSettings):
    """The evaluate stage."""

    policy: ModelName | None = None
    reference: ModelName | None = None  # what the policy is compared with
    eval_prompts: DataSpec | None = None  # answered by both
    temperature: Annotated[float, above(0)] = 1.0
    rewards: dict[str, RewardSource] = dataclasses.field(default_factory=dict)
    reward_model: ModelName | None = None
    comparisons: DataSpec | None = None  # ranked by the reward model, else the policy
    batch_size: Annotated[int, at_least(1)] = 64  # comparisons at a time
    buckets: Annotated[tuple[int, ...], LENGTHS] = (128,)  # of comparisons, in tokens


SETTINGS = (EvaluateSettings,)


def _verdict(e: Json) -> Verdict:
    """As the page of what was measured: a policy's samples, else comparisons."""
    if 'kl' in e:
        return pages.verdict_of_policy(e)
    return verdict_of_reward_model(e)


def _draw(stage: str, rows: Any, e: Json) -> Any:
    what = 'implicit reward' if e.get('is_implicit') else 'reward model'
    return draw_held_out(stage, what, e) if 'accuracy' in e else ([], [])


PAGE = Page(
    title='Evaluation',
    verdict=_verdict,
    warnings=lambda e: pages.warnings(e) if 'kl' in e else [],
    facts=pages.PREFERENCE.facts,
    changes=pages.CHANGES,
    draw=_draw,
    max_samples=pages.ONLINE.max_samples,
)


@dataclasses.dataclass(frozen=True)
class EvaluateJob:
    """A checked stage."""

    stage: str
    settings: EvaluateSettings
    evaluation: Evaluation | None  # of the policy on prompts
    comparisons: pipeline.Dataset | None


def makes(settings: EvaluateSettings) -> Makes:
    """Nothing but numbers."""
    return Makes()


def reads(settings: EvaluateSettings) -> dict[str, str]:
    """Prompts and comparisons."""
    return {'eval_prompts': 'prompts', 'comparisons': 'comparisons'}


def load(run: Run, stage: str, settings: EvaluateSettings) -> EvaluateJob:
    """Reads and checks.

    Raises:
        ValueError: nothing to measure, or to measure on; a policy without a reference,
            or of another architecture; or whatever is wrong with the rest.
    """
    where = f'config.{stage}'
    if settings.eval_prompts is None and settings.comparisons is None:
        raise ValueError(f'{where}: set eval_prompts, comparisons, or both')
    is_ranked = settings.comparisons is not None
    needs_policy = settings.eval_prompts is not None or settings.reward_model is None
    if needs_policy:
        _check_policies(run, where, settings)
    evaluation = comparisons = None
    if settings.eval_prompts is not None:
        source = resolve(run, settings.policy)
        check_positions(run, f'{where}.policy', source, settings)
        evaluation = load_evaluation(run, stage, settings)
    if is_ranked:
        check_batch_size(settings.batch_size, run.mesh, where)
        tokenizer = run.tokenizer
        if settings.reward_model is not None:
            source = _check_reward_model(run, where, settings)
            tokenizer = source.tokenizer or tokenizer
            read = pipeline.load_comparisons
        else:
            source = resolve(run, settings.policy)
            read = functools.partial(
                pipeline.load_preferences, kind='pairs', wanted_by=where
            )
        length, config = settings.buckets[-1], source.config('reward')
        check_vocabulary(tokenizer, config.vocab_size)
        if length > config.max_positions:
            raise ValueError(
                f'{where}.buckets end at {length} tokens, the model has '
                f'{config.max_positions} positions; use shorter buckets'
            )
        comparisons = tell_left_out(
            read(settings.comparisons, tokenizer, max_length=length, **settings.reading)
        )
    return EvaluateJob(stage, settings, evaluation, comparisons)


def _check_reward_model(run: Run, where: str, settings: EvaluateSettings) -> Source:
    source = resolve(run, settings.reward_model)
    check_trained_score(source, f'{where}.reward_model')
    if source.facts != ScoreFacts():
        raise ValueError(
            f'{where}.reward_model={settings.reward_model!r} has several scores, or '
            'scores of steps, and comparisons are ranked by one of a whole response'
        )
    if settings.policy is None and settings.reference is not None:
        raise ValueError(f'{where}.reference is for a policy; set {where}.policy too')
    return source


def _check_policies(run: Run, where: str, settings: EvaluateSettings) -> None:
    for name in ('policy', 'reference'):
        if getattr(settings, name) is None:
            raise ValueError(
                f'{where}.{name} is not set: a policy is measured against a reference, '
                'such as what it was trained from'
            )
    one, other = (
        check_policy(run, f'{where}.{name}', getattr(settings, name))
        for name in ('policy', 'reference')
    )
    if one.config() != other.config():
        raise ValueError(
            f'{where}: policy={settings.policy!r} and reference='
            f'{settings.reference!r} are models of different shapes'
        )


def train(run: Run, job: EvaluateJob) -> Result:
    """Measures."""
    clock, settings, key = time.monotonic(), job.settings, run.key(job.stage)
    report: dict[str, Any] = {}
    data = {}
    if settings.policy is not None:
        policy, after = load_policy(run, settings.policy, key)
        _, before = load_policy(run, settings.reference, key)
    if job.evaluation is not None:
        report |= evaluate_policy(
            run,
            job.evaluation,
            policy,
            before,
            after,
            sample=make_sampler(run, settings, settings.temperature, policy),
            scorers=scoring.make_scorers(run, job.evaluation.scorers),
        )
        data['eval prompts'] = job.evaluation.prompts
    if job.comparisons is not None:
        data['comparisons'] = job.comparisons
        if settings.reward_model is not None:
            report |= _of_reward_model(run, job)
        else:
            report |= _of_implicit_reward(run, job, policy, before, after)
    return Result(
        steps=0,
        init=settings.policy or settings.reward_model,
        seconds={'eval': time.monotonic() - clock},
        data=data,
        evaluation=report,
    )


def _of_reward_model(run: Run, job: EvaluateJob) -> dict[str, Any]:
    settings = job.settings
    source = resolve(run, settings.reward_model)
    if source.members > 1:
        model, params = load_ensemble(run, source)
    else:
        key = run.key(job.stage)
        model, params = load_scalar(run, settings.reward_model, key, 'reward')
    examine = examination(
        run,
        job.comparisons,
        model,
        settings.batch_size,
        settings.buckets,
        source.members,
    )
    return examine(frozen(run, model, params))


def _of_implicit_reward(
    run: Run, job: EvaluateJob, policy: Any, before: Any, after: Any
) -> dict[str, Any]:
    """log π − log π_ref of both responses; a β would change no order."""
    settings, data = job.settings, job.comparisons

    def sums(params: Any, batch: Any) -> Any:
        return reference_logps(params, batch, model=policy)['ref_logps']

    compiled = run.compile(sums, **preference.KINDS)

    def scored(params: Any) -> np.ndarray:
        batches = pipeline.eval_batches(data, settings.batch_size, settings.buckets)
        return preference.score_pairs(compiled, frozen(run, policy, params), batches)

    lengths = np.asarray([list(map(len, e.answers)) for e in data.examples])
    report = preference.preference_report(
        scored(after) - scored(before),
        lengths,
        known_gold(data.records),
        known_kinds(data.records),
        **how_sure(data.examples),
    )
    return {**report, 'is_implicit': True}
