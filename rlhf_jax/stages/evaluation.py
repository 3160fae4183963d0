"""What every stage that trains a policy is measured on when it ends, in the same way.

The policy it started from and the one it made answer the held-out prompts with the same
keys; rewards and gold score both. Read ``stages/online.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rlhf_jax import evaluators, files, sharding
from rlhf_jax.data import pipeline
from rlhf_jax.data.joining import decode_behind
from rlhf_jax.evals import policy as policy_eval
from rlhf_jax.evals.policy import Sampled
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.responses import GOLD, Scorer
from rlhf_jax.stages import scoring
from rlhf_jax.stages.console import tell_left_out
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.sampler import check_sampler
from rlhf_jax.stages.settings import EvaluationSettings
from rlhf_jax.stages.sources import (
    check_policy,
    check_positions,
    frozen,
    load_policy,
)
from rlhf_jax.types import Generation, Params

EVALUATE = 12  # a purpose folded into the stage's key; stages.rollouts has others


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A checked evaluation."""

    stage: str
    settings: EvaluationSettings
    temperature: float  # of the samples
    prompts: pipeline.Dataset
    # By name: what scores the responses, gold included.
    scorers: dict[str, scoring.Reward]
    weights: dict[str, float]  # of those that are rewards, in their sum
    needs_end: bool = False  # in training, see ``ScoreHParams.needs_end``


def read_prompts(run: Run, spec: str, settings: Any) -> pipeline.Dataset:
    """The prompts of a spec, with a line for people about what was left out.

    Args:
        run: the run.
        spec: see ``data/sources.py``.
        settings: ``RecordSettings`` and ``SamplerSettings`` in one.

    Raises:
        ValueError: bad data.
    """
    length = settings.prompt_buckets[-1]
    return tell_left_out(
        pipeline.load_prompts(
            spec, run.tokenizer, max_prompt_length=length, **settings.reading
        )
    )


def load_evaluation(run: Run, stage: str, settings: Any) -> Evaluation:
    """Reads the prompts of an evaluation and checks all of it, for a stage that samples
    from its policy at the end alone.

    Args:
        run: the run.
        stage: its name.
        settings: ``RecordSettings``, ``SamplerSettings``, ``EvaluationSettings``, with
            ``rewards`` and a ``temperature``, in one.

    Raises:
        ValueError: see :func:`check_evaluation`, or what is wrong with the prompts or
            the rewards.
    """
    where = f'config.{stage}'
    check_sampler(run, where, settings)
    prompts = read_prompts(run, settings.eval_prompts, settings)
    longest = settings.prompt_buckets[-1] + settings.max_new_tokens
    rewards = scoring.check_rewards(
        run, where, settings.rewards, longest, [prompts], (GOLD,)
    )
    return check_evaluation(
        run, stage, settings, settings.temperature, prompts, rewards, [prompts]
    )


def check_evaluation(
    run: Run,
    stage: str,
    settings: Any,
    temperature: float,
    prompts: pipeline.Dataset,
    rewards: Mapping[str, scoring.Reward],
    scored: Sequence[pipeline.Dataset],
    others: Mapping[str, scoring.Reward] | None = None,
) -> Evaluation:
    """Checks an evaluation before anything compiles.

    Args:
        run: the run.
        stage: that ends with it.
        settings: ``EvaluationSettings`` and ``SamplerSettings`` in one.
        temperature: of the samples.
        prompts: held out.
        rewards: of the stage, checked, by name.
        scored: the data sets whose responses the gold reward will score.
        others: what scores responses beside rewards and gold, by name.

    Raises:
        ValueError: rows that do not divide over the devices, a base that is no policy,
            a gold reward that cannot score, or an evaluator that cannot measure.
    """
    where = f'config.{stage}'
    has_gold = settings.gold is not None
    evaluators.check(settings.evaluators, f'{where}.evaluators', has_gold)
    sharding.check_batch_size(
        settings.eval_batch_size, run.mesh, where, name='eval_batch_size'
    )
    if settings.base is not None:
        base = check_policy(run, f'{where}.base', settings.base)
        check_positions(run, f'{where}.base', base, settings)
    scorers = {**rewards, **(others or {})}
    if has_gold:
        longest = settings.prompt_buckets[-1] + settings.max_new_tokens
        scorers[GOLD] = scoring.check_reward(
            run, f'{where}.gold', settings.gold, longest, scored
        )
    weights = scoring.weights_of(rewards)
    return Evaluation(stage, settings, temperature, prompts, scorers, weights)


def evaluate_policy(
    run: Run,
    job: Evaluation,
    policy: CausalLM,
    before: Params,
    after: Params,
    *,
    sample: Any,
    scorers: Mapping[str, Scorer],
) -> dict[str, Any]:
    """Samples two policies on the held-out prompts with the same keys.

    Args:
        run: the run.
        job: what to measure on.
        policy: the model of both.
        before: parameters that the stage started from, and the reference of the KL.
        after: parameters that it made.
        sample: from ``sampler.make_sampler``.
        scorers: of ``job.scorers``.

    Returns:
        The fields of ``evals.policy.policy_report`` and those of the evaluators;
        ``samples.jsonl`` is written.
    """
    before, after = (frozen(run, policy, params) for params in (before, after))
    statistics = _statistics(run, job, policy, before)
    base = jax.random.fold_in(run.key(job.stage), EVALUATE)

    def sampled(params: Params) -> Sampled:
        counter = iter(range(len(job.prompts.examples)))
        return policy_eval.sample_policy(
            lambda batch: sample(
                params, batch, jax.random.fold_in(base, next(counter))
            ),
            statistics,
            scorers,
            run.tokenizer,
            job.prompts.records,
            pipeline.eval_batches(
                job.prompts, job.settings.eval_batch_size, job.settings.prompt_buckets
            ),
            decode_behind,
        )

    both = sampled(before), sampled(after)
    path = run.stage_dir(job.stage) / 'samples.jsonl'
    files.write_rows(path, _sample_rows(job, *both))
    report = {
        **policy_eval.policy_report(*both, job.weights),
        'expected_win_rate': job.settings.expected_win_rate,
        'needs_end': job.needs_end,
    }
    names, where = job.settings.evaluators, f'config.{job.stage}.evaluators'
    return evaluators.measure(names, report, *both, job.weights, where=where)


def _statistics(run: Run, job: Evaluation, policy: CausalLM, ref_params: Params) -> Any:
    """Generation → statistics by row: under the reference, and under the base."""
    statistics = run.compile(
        functools.partial(
            policy_eval.row_statistics, policy=policy, temperature=job.temperature
        ),
        **policy_eval.KINDS,
    )
    if job.settings.base is None:
        return functools.partial(statistics, ref_params)
    base, params = load_policy(run, job.settings.base, run.key(job.stage))
    params = frozen(run, base, params)
    likelihood = run.compile(
        functools.partial(policy_eval.base_likelihood, model=base), **policy_eval.KINDS
    )

    def of(generation: Generation) -> dict[str, Any]:
        return {
            **statistics(ref_params, generation),
            **likelihood(params, generation),
        }

    return of


def _sample_rows(
    job: Evaluation, before: Sampled, after: Sampled
) -> list[dict[str, Any]]:
    """The lines of ``samples.jsonl``."""
    records = job.prompts.records[: job.settings.num_samples]
    rows = [
        {'prompt': r.prompt, 'templated': r.templated, 'reference': r.reference}
        for r in records
    ]
    for when, sampled in (('before', before), ('after', after)):
        for i, row in enumerate(rows):
            row[when] = sampled.responses[i]
            if job.weights:
                row[f'proxy_{when}'] = float(sampled.proxy(job.weights)[i])
            row[f'rewards_{when}'] = {
                name: float(sampled.scores[name][i]) for name in job.weights
            }
            if GOLD in sampled.scores:
                row[f'gold_{when}'] = float(sampled.scores[GOLD][i])
    return rows
