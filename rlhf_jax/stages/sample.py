"""The kind sample: responses of a policy are written down, for other stages to read.

``num_samples`` responses to every prompt, with their scores by any named rewards,
become the records that ``keep`` says. A killed stage goes on behind its last whole
batch (``stages/batches.py``). Read ``stages/label.py`` next.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jax
import numpy as np

from rlhf_jax import files
from rlhf_jax.data import pipeline
from rlhf_jax.data.joining import decode_behind
from rlhf_jax.evals.policy import distinct_bigrams
from rlhf_jax.ops.rows import repeat_prompts
from rlhf_jax.pages.page import Page, Verdict, number
from rlhf_jax.ranges import above, at_least
from rlhf_jax.responses import Responses
from rlhf_jax.rewards import weighted_sum
from rlhf_jax.sharding import check_batch_size
from rlhf_jax.stages import scoring
from rlhf_jax.stages.batches import Batch, remove_batches, write_batches
from rlhf_jax.stages.console import tell_left_out
from rlhf_jax.stages.kinds import Makes
from rlhf_jax.stages.run import RECORDS, Result, Run
from rlhf_jax.stages.sampler import check_sampler, make_sampler
from rlhf_jax.stages.settings import (
    DataSpec,
    ModelName,
    RecordSettings,
    RewardSource,
    SamplerSettings,
)
from rlhf_jax.stages.sources import (
    check_policy,
    check_positions,
    frozen,
    load_policy,
)

SHOWN = 16  # responses in samples.jsonl


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings(RecordSettings, SamplerSettings):
    """The sample stage."""

    policy: ModelName
    prompts: DataSpec
    num_samples: Annotated[int, at_least(1)] = 4  # responses to a prompt
    temperature: Annotated[float, above(0)] = 1.0
    batch_size: Annotated[int, at_least(1)] = 128  # prompts at a time
    # By name; their weighted sum chooses.
    rewards: dict[str, RewardSource] = dataclasses.field(default_factory=dict)
    # A demonstration per response, the best one to a prompt, or a comparison of the
    # best with the worst
    keep: Literal['all', 'best', 'best_and_worst'] = 'all'


SETTINGS = (SampleSettings,)


def _verdict(e: dict[str, Any]) -> Verdict:
    """Pass: something was written."""
    figure = f'{number(e["records"])} records of {number(e["responses"])} responses'
    return Verdict('pass' if e['records'] else 'fail', figure, 'at least one record')


PAGE = Page(
    title='Samples',
    verdict=_verdict,
    required=lambda e: ('records', 'responses', 'prompts'),
    facts=(
        ('Prompts', 'prompts', ''),
        ('Responses', 'responses', ''),
        ('Records written', 'records', ''),
        ('Responses or pairs left out', 'left_out', 'blank, or of equal reward'),
        ('Weighted reward', 'reward', 'mean, reward units'),
        ('Response length', 'length', 'tokens'),
        ('Responses that ended', 'ended', 'fraction'),
        ('Distinct bigrams', 'distinct', 'fraction'),
    ),
    draw=lambda stage, rows, evaluation: ([], []),
)


@dataclasses.dataclass(frozen=True)
class SampleJob:
    """A checked stage."""

    stage: str
    settings: SampleSettings
    prompts: pipeline.Dataset
    rewards: dict[str, scoring.Reward]


def makes(settings: SampleSettings) -> Makes:
    """Records."""
    is_pair = settings.keep == 'best_and_worst'
    return Makes(records='comparisons' if is_pair else 'demonstrations')


def reads(settings: SampleSettings) -> dict[str, str]:
    """Prompts."""
    return {'prompts': 'prompts'}


def load(run: Run, stage: str, settings: SampleSettings) -> SampleJob:
    """Reads and checks.

    Raises:
        ValueError: no policy, a choice without rewards, several processes, or whatever
            is wrong with the rest.
    """
    where = f'config.{stage}'
    if jax.process_count() > 1:
        raise ValueError(
            f'{where} writes texts, which one process alone can do, and this run has '
            f'{jax.process_count()}'
        )
    if settings.keep != 'all' and not settings.rewards:
        raise ValueError(
            f'{where}.keep={settings.keep!r} chooses by rewards: set {where}.rewards'
        )
    if settings.keep == 'best_and_worst' and settings.num_samples < 2:
        raise ValueError(
            f'{where}.num_samples={settings.num_samples}: a pair needs two responses'
        )
    source = check_policy(run, f'{where}.policy', settings.policy)
    check_positions(run, f'{where}.policy', source, settings)
    check_sampler(run, where, settings)
    check_batch_size(settings.batch_size, run.mesh, where)
    prompts = tell_left_out(
        pipeline.load_prompts(
            settings.prompts,
            run.tokenizer,
            max_prompt_length=settings.prompt_buckets[-1],
            **settings.reading,
        )
    )
    longest = settings.prompt_buckets[-1] + settings.max_new_tokens
    rewards = scoring.check_rewards(run, where, settings.rewards, longest, [prompts])
    return SampleJob(stage, settings, prompts, rewards)


def train(run: Run, job: SampleJob) -> Result:
    """Samples, scores and writes, batch by batch."""
    clock = time.monotonic()
    folder, settings = run.stage_dir(job.stage), job.settings
    about = {str(settings.prompts): [one.prompt for one in job.prompts.records]}
    rows, _ = write_batches(folder, lambda start: _batches(run, job, start), about)
    files.write_rows(folder / RECORDS, rows)
    report = _report(job, rows)
    files.write_rows(folder / 'samples.jsonl', report.pop('samples'))
    remove_batches(folder)
    return Result(
        steps=0,
        init=settings.policy,
        seconds={'sample': time.monotonic() - clock},
        data={'prompts': job.prompts},
        evaluation=report,
    )


def _batches(run: Run, job: SampleJob, start: int) -> Iterator[Batch]:
    """The records of every batch of prompts from ``start`` on."""
    settings, base = job.settings, run.key(job.stage)
    policy, params = load_policy(run, settings.policy, base)
    params = frozen(run, policy, params)
    sampler = make_sampler(run, settings, settings.temperature, policy)
    scorers = scoring.make_scorers(run, job.rewards)
    weights = scoring.weights_of(job.rewards)
    batches = pipeline.eval_batches(
        job.prompts, settings.batch_size, settings.prompt_buckets
    )
    for number_, batch in enumerate(batches):
        if number_ < start:
            continue
        key = jax.random.fold_in(base, number_)
        size = settings.num_samples
        generation = sampler(params, batch, key, samples=size)
        responses = Responses(
            run.tokenizer,
            job.prompts.records,
            repeat_prompts(batch, size),
            generation,
            decode_behind,
        )
        scored = {name: scorer(responses) for name, scorer in scorers.items()}
        scores = {
            name: np.asarray(one.scores)[responses.real] for name, one in scored.items()
        }
        columns = {
            'logprob': np.asarray(generation.logprobs).sum(-1)[responses.real],
            'tokens': np.asarray(generation.response_mask).sum(-1)[responses.real],
            'ended': np.asarray(generation.ended)[responses.real],
        }
        if scores:
            columns['reward'] = np.asarray(weighted_sum(scores, weights))
        columns |= {f'score_{name}': column for name, column in scores.items()}
        columns |= {
            f'members_{name}': np.asarray(one.members)[responses.real]
            for name, one in scored.items()
            if one.members is not None
        }
        written = {'by': settings.policy, 'temperature': settings.temperature}
        written['key'] = [int(x) for x in np.asarray(key).tolist()]
        rows = [
            {
                'prompt': responses.prompts[i],
                'completion': text,
                **({'templated': True} if responses.templated[i] else {}),
                'sample': i % size,
                **{name: column[i].tolist() for name, column in columns.items()},
                **written,
            }
            for i, text in enumerate(responses.texts)
        ]
        yield Batch(_kept(settings, rows))


def _kept(settings: SampleSettings, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of a batch, whose rows to the same prompt are adjacent."""
    if settings.keep == 'all':
        return [row for row in rows if row['completion'].strip()]
    size, kept = settings.num_samples, []
    for first in range(0, len(rows), size):
        group = sorted(rows[first : first + size], key=lambda row: -row['reward'])
        best, worst = group[0], group[-1]
        if settings.keep == 'best':
            kept += [best] if best['completion'].strip() else []
        elif best['reward'] > worst['reward'] and worst['completion'].strip():
            pair = {'chosen': best.pop('completion'), 'rejected': worst['completion']}
            more = {f'{name}_rejected': worst[name] for name in ('reward', 'logprob')}
            kept.append({'prompt': best.pop('prompt'), **pair, **best, **more})
    return kept


def _report(job: SampleJob, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the records, and the first of them as samples."""
    name = 'chosen' if job.settings.keep == 'best_and_worst' else 'completion'
    means = {
        column: float(np.mean([row[column] for row in rows]))
        for column in ('reward', 'ended')
        if rows and column in rows[0]
    }
    if rows:
        means['length'] = float(np.mean([row['tokens'] for row in rows]))
    samples = [{'prompt': row['prompt'], 'response': row[name]} for row in rows[:SHOWN]]
    for sample, row in zip(samples, rows):
        sample |= {'score': row['reward']} if 'reward' in row else {}
    count = len(job.prompts.examples)
    responses = count * job.settings.num_samples
    return {
        'prompts': count,
        'responses': responses,
        'records': len(rows),
        'left_out': (responses if job.settings.keep == 'all' else count) - len(rows),
        'distinct': distinct_bigrams([row[name] for row in rows]),
        **means,
        'samples': samples,
    }
