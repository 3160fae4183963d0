"""What every stage that trains a policy is measured on when it ends, in the same way.

The policy it started from and the one it made answer the held-out prompts with the same
keys; rewards and the judge score both. preference and the online stages call it; read
``stages/online_job.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import sharding
from rlhf_jax.data import pipeline
from rlhf_jax.data.joining import decode_behind
from rlhf_jax.data.stops import token_bytes
from rlhf_jax.evals import policy as policy_eval
from rlhf_jax.evals.policy import GOLD, Sampled, Scorer
from rlhf_jax.generate import Sampling, generate, sampling
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.ops.stop_table import stop_table
from rlhf_jax.pool import generate_pooled
from rlhf_jax.stages import scoring
from rlhf_jax.stages.run import (
    Run,
    check_policy,
    frozen,
    load_policy,
    model_config,
)
from rlhf_jax.stages.settings import EvaluationSettings, RewardSource
from rlhf_jax.types import Generation, Params, PRNGKey, PromptBatch

EVALUATE = 12  # a purpose folded into the stage's key; stages.online has others


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A checked evaluation."""

    stage: str
    settings: EvaluationSettings
    temperature: float  # of the samples
    prompts: pipeline.Dataset
    rewards: dict[str, scoring.Reward]  # by name, and GOLD where there is a judge
    needs_end: bool = False  # in training, see ``ScoreHParams.needs_end``

    @property
    def weights(self) -> dict[str, float]:
        """Of the rewards in their sum; the judge has none."""
        return {name: r.weight for name, r in self.settings.rewards.items()}


def check_evaluation(
    run: Run,
    stage: str,
    settings: EvaluationSettings,
    temperature: float,
    init: str,
    prompts: pipeline.Dataset,
    trained_on: pipeline.Dataset | None = None,
    others: Mapping[str, RewardSource] | None = None,
) -> Evaluation:
    """Checks an evaluation before anything compiles.

    Args:
        run: the run.
        stage: that ends with it.
        settings: what the user wrote.
        temperature: of the samples.
        init: what the policy starts from.
        prompts: held out.
        trained_on: prompts whose responses the same rewards score in training.
        others: what scores responses beside rewards and judge, by the setting's name.

    Raises:
        ValueError: no policy, one without positions for prompts and responses, rows
            that do not divide over the devices, or a reward that cannot score.
    """
    where = f'config.{stage}'
    sharding.check_batch_size(
        settings.eval_batch_size, run.mesh, where, name='eval_batch_size'
    )
    check_decode_rows(run, where, settings.decode_rows)
    stops_of(run.tokenizer, where, settings.stop_sequences)
    for name, model in (('init', init), ('base', settings.base)):
        if model is not None:
            check_policy(run, f'{where}.{name}', model)
            check_positions(run, f'{where}.{name}', model, settings)
    for name in {GOLD, *(others or {})} & settings.rewards.keys():
        raise ValueError(
            f'{where}.rewards.{name}: that name is kept for {where}.{name}; take '
            'another'
        )
    sources = {f'{where}.rewards.{k}': (k, v) for k, v in settings.rewards.items()}
    kept = {
        **({} if settings.gold is None else {GOLD: settings.gold}),
        **(others or {}),
    }
    sources |= {f'{where}.{name}': (name, source) for name, source in kept.items()}
    longest = settings.prompt_buckets[-1] + settings.max_new_tokens
    scored = [data for data in (trained_on, prompts) if data is not None]
    rewards = {
        name: scoring.check_reward(run, place, source, longest, scored)
        for place, (name, source) in sources.items()
    }
    return Evaluation(stage, settings, temperature, prompts, rewards)


def check_decode_rows(run: Run, where: str, rows: int | None) -> None:
    """Refuses continuous batching where the rows would not stand on one device.

    Raises:
        ValueError: several devices in one compiled program.
    """
    if rows is None:
        return
    if run.mesh.size > 1 and run.config.parallel.backend != 'pmap':
        raise ValueError(
            f'{where}.decode_rows={rows}: rows are taken by each device for itself, '
            f"which wants config.parallel.backend='pmap' on {run.mesh.size} devices"
        )


def check_positions(
    run: Run, where: str, model: str, settings: EvaluationSettings
) -> None:
    """Refuses a model that is too small for the tokens or the lengths of the samples.

    Raises:
        ValueError: it has fewer embeddings than ids, or too few positions.
    """
    config = model_config(run, model)
    pipeline.check_vocabulary(run.tokenizer, config.vocab_size)
    longest = settings.prompt_buckets[-1] + settings.max_new_tokens
    if longest > config.max_positions:
        raise ValueError(
            f'{where}={model!r}: prompts of {settings.prompt_buckets[-1]} and '
            f'responses of {settings.max_new_tokens} tokens, {longest} together, '
            f'exceed its {config.max_positions} positions; shorten prompt_buckets or '
            'max_new_tokens'
        )


def stops_of(tokenizer: Any, where: str, stops: Sequence[str]) -> np.ndarray | None:
    """Stop strings over the tokens of a tokenizer, see ``ops/stop_table.py``; None
    where there are none.

    Raises:
        ValueError: one is empty or no text, they are too long, or the tokenizer does
            not write its texts token by token.
    """
    if not stops:
        return None
    try:
        return stop_table(token_bytes(tokenizer), [text.encode() for text in stops])
    except ValueError as error:
        shown = f'{stops!r}' if len(str(stops)) < 200 else f'{str(stops)[:200]}…'
        raise ValueError(f'{where}.stop_sequences={shown}: {error}') from error


def stop_rules(run: Run, job: Evaluation) -> Sampling:
    """The sampling parameters of a stage: its stop strings over the tokens, all EOS
    ids.
    """
    settings = job.settings
    where = f'config.{job.stage}'
    table = stops_of(run.tokenizer, where, settings.stop_sequences)
    return sampling(
        eos_ids=pipeline.eos_ids(run.tokenizer),
        temperature=job.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_table=table,
        stop_after=settings.stop_after,
    )


def make_writer(run: Run, job: Evaluation, policy: CausalLM) -> Any:
    """(params, prompt batch, key, temperature=None, samples=1) -> Generation, compiled
    once per prompt bucket; a temperature takes the place of the stage's, 0 is greedy;
    the samples of a prompt are adjacent rows.
    """
    settings = job.settings
    parts = {'model': policy, 'max_new_tokens': settings.max_new_tokens}
    sample = functools.partial(generate, **parts)
    if settings.decode_rows is not None:
        sample = functools.partial(
            generate_pooled, **parts, num_rows=settings.decode_rows
        )
    compiled = run.compile(
        lambda params, batch, *rest: sample(params, batch.tokens, batch.mask, *rest),
        inputs=('params', 'batch', 'batch', 'replicated', 'replicated'),
        outputs=('batch',),
        donate=(),
    )
    how = stop_rules(run, job)

    def write(
        params: Params,
        batch: PromptBatch,
        key: PRNGKey,
        temperature: float | None = None,
        samples: int = 1,
    ) -> Generation:
        rows = np.arange(len(batch.index) * samples, dtype=np.int32)
        # A sample does not depend on how many processes share the work.
        rows += jax.process_index() * len(rows)
        copies = _copies(len(batch.index) * jax.process_count(), samples, run.mesh)
        batch = repeat_rows(batch, copies)
        drawn = how
        if temperature is not None:
            drawn = how.replace(temperature=jnp.float32(temperature))
        return compiled(params, batch, rows, key, drawn)

    return write


def _copies(prompts: int, samples: int, mesh: Mesh) -> int:
    """How often every prompt is run, so that prompts divide over the devices: once
    where that can be.
    """
    devices = mesh.shape['data'] * mesh.shape['fsdp']
    return next(
        copies
        for copies in range(1, samples + 1)
        if copies == samples or not (samples % copies or prompts * copies % devices)
    )


def repeat_rows(prompts: PromptBatch, count: int) -> PromptBatch:
    """Every prompt ``count`` times, in adjacent rows."""
    return jax.tree.map(lambda x: np.repeat(x, count, axis=0), prompts)


def evaluate_policy(
    run: Run,
    job: Evaluation,
    policy: CausalLM,
    before: Params,
    after: Params,
    *,
    write: Any,
    scorers: dict[str, Scorer],
) -> dict[str, Any]:
    """Samples two policies on the held-out prompts with the same keys.

    Args:
        run: the run.
        job: what to measure on.
        policy: the model of both.
        before: parameters that the stage started from, and the reference of the KL.
        after: parameters that it made.
        write: from :func:`make_writer`.
        scorers: of ``job.rewards``.

    Returns:
        The fields of ``evals.policy.policy_report``; ``samples.jsonl`` is written.
    """
    before, after = (frozen(run, policy, params) for params in (before, after))
    judge = _judge(run, job, policy, before)
    base = jax.random.fold_in(run.key(job.stage), EVALUATE)

    def sampled(params: Params) -> Sampled:
        counter = iter(range(len(job.prompts.examples)))
        return policy_eval.sample_policy(
            lambda batch: write(params, batch, jax.random.fold_in(base, next(counter))),
            judge,
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
    rows = _sample_rows(job, *both)
    lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
    path.write_text(''.join(lines), encoding='utf-8')
    report = policy_eval.policy_report(*both, job.weights)
    return {
        **report,
        'expected_win_rate': job.settings.expected_win_rate,
        'needs_end': job.needs_end,
    }


def _judge(run: Run, job: Evaluation, policy: CausalLM, ref_params: Params) -> Any:
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
    return lambda generation: {
        **statistics(ref_params, generation),
        **likelihood(params, generation),
    }


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
