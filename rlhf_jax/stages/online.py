"""The stage that learns from its own samples: ppo.

One iteration: ``generate`` → score (``stages/scoring.py``) → ``prepare`` →
``ppo_step``; the first three run once per rollout, the last makes all updates over it.
Read ``main.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import checkpoint, sharding
from rlhf_jax.algos.ppo import ActorCritic, PPOHParams, ppo_step, prepare
from rlhf_jax.data import pipeline
from rlhf_jax.evals import policy as policy_eval
from rlhf_jax.evals.policy import GOLD
from rlhf_jax.generate import Sampling, generate
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.optim import actor_critic_optimizer
from rlhf_jax.rewards import shape_scores, weighted_sum
from rlhf_jax.stages import scoring
from rlhf_jax.stages.loop import run_loop
from rlhf_jax.stages.online_job import Online, stop_rules
from rlhf_jax.stages.run import Run, load_policy, load_scalar
from rlhf_jax.stages.settings import OnlineSettings
from rlhf_jax.types import (
    Array,
    Generation,
    Mean,
    Metrics,
    Params,
    PPOState,
    PromptBatch,
    Rollout,
    reduce_metrics,
)

# Purposes folded into the stage's key; algos.updates.SHUFFLE is another.
SAMPLE, EVALUATE, CRITIC = 11, 12, 13


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What the stage reads and never trains, and the two models."""

    models: ActorCritic
    ref_params: Params
    scorers: dict[str, policy_eval.Scorer]


def combine_and_prepare(
    state: PPOState,
    ref_params: Params,
    generation: Generation,
    scores: dict[str, Array],
    *,
    models: ActorCritic,
    weights: dict[str, float],
    hp: PPOHParams,
    axis_name: str | None = None,
) -> tuple[Rollout, Metrics]:
    """The weighted sum of the rewards, shaped, and the rollout it makes; a pure
    function to compile. Every score, the judge's included, becomes a metric.
    """
    total = shape_scores(
        weighted_sum(scores, weights),
        generation.ended,
        missing_eos_score=hp.missing_eos_score,
        missing_eos_penalty=hp.missing_eos_penalty,
        clip=hp.score_clip,
    )
    rollout, metrics = prepare(
        state, ref_params, generation, total, model=models, hp=hp, axis_name=axis_name
    )
    named: Metrics = {
        'objective/gold' if name == GOLD else f'reward/{name}': Mean(
            jnp.sum(column), jnp.float32(column.shape[0])
        )
        for name, column in scores.items()
    }
    return rollout, {**metrics, **reduce_metrics(named, axis_name)}


def train_ppo(run: Run, job: Online) -> None:
    """Runs ppo: trains, compares with the policy it started from, writes the result."""
    clock = time.monotonic()
    settings, key = job.settings, run.key(job.stage)
    policy, ref_params = load_policy(run, settings.init, key)
    critic, critic_params = load_scalar(
        run, settings.critic, jax.random.fold_in(key, CRITIC), 'critic'
    )
    scorers = scoring.make_scorers(run, job.rewards)
    frozen = Frozen(ActorCritic(policy, critic), ref_params, scorers)
    state, tx = _initial_state(run, job, ref_params, critic_params, key)
    phases = {'setup': time.monotonic() - clock}
    write = _writer(run, job, policy)
    state, seconds = run_loop(
        run.stage_dir(job.stage),
        state,
        settings.num_rollouts,
        _iteration(run, job, frozen, tx, write, phases),
        settings=settings.loop,
        writers=tuple(run.config.metrics),
        shown={
            'objective/scores': 'reward',
            'objective/kl': 'KL',
            'objective/gold': 'gold',
            'train/tokens_per_second': 'tokens_per_second',
        },
        spent=lambda: phases,
    )
    clock = time.monotonic()
    report = _evaluate(run, job, frozen, state.params['policy'], write)
    folder = run.stage_dir(job.stage)
    checkpoint.write_json(folder / 'eval.json', report)
    checkpoint.save_params(
        folder, dict(state.params), {'policy': policy.config, 'critic': critic.config}
    )
    seconds['eval'] = time.monotonic() - clock
    done = {
        'stage': job.stage,
        'steps': settings.num_rollouts,
        'init': settings.init,
        'seconds': seconds,
        'data': {
            'prompts': job.prompts.counts.describe(),
            'eval prompts': job.eval_prompts.counts.describe(),
        },
    }
    checkpoint.write_json(folder / 'done.json', done)


def _initial_state(
    run: Run, job: Online, policy_params: Params, critic_params: Params, key: Array
) -> tuple[PPOState, Any]:
    updates = job.settings.num_rollouts * job.hp.num_epochs * job.hp.num_minibatches
    tx = actor_critic_optimizer(job.settings.optim, job.settings.critic_optim, updates)

    def start(params: Params) -> PPOState:
        return PPOState(
            step=jnp.int32(0),
            rng=key,
            params=params,
            opt_state=tx.init(params),
            kl_coef=jnp.float32(job.hp.kl_coef),
        )

    # Compiled without donation: the state owns copies, the reference keeps the
    # originals.
    params = {'policy': policy_params, 'critic': critic_params}
    return sharding.init_sharded(start, run.mesh, params), tx


def _writer(run: Run, job: Online, policy: CausalLM) -> Any:
    """(params, prompt batch, key, how) -> Generation, compiled once per prompt
    bucket.
    """
    compiled = run.compile(
        lambda params, batch, row_ids, key, how: generate(
            params,
            batch.tokens,
            batch.mask,
            row_ids,
            key,
            how,
            model=policy,
            max_new_tokens=job.settings.max_new_tokens,
        ),
        inputs=('params', 'batch', 'batch', 'replicated', 'replicated'),
        outputs=('batch',),
        donate=(),
    )

    def write(
        params: Params, batch: PromptBatch, key: Array, how: Sampling
    ) -> Generation:
        rows = np.arange(len(batch.index), dtype=np.int32)
        return compiled(params, batch, rows, key, how)

    return write


def _iteration(
    run: Run, job: Online, frozen: Frozen, tx: Any, write: Any, phases: dict[str, float]
) -> Any:
    """One rollout and the updates over it, as ``run_loop`` wants it."""
    settings, hp = job.settings, job.hp
    how = stop_rules(run, job, hp.temperature)
    ready = run.compile(
        functools.partial(
            combine_and_prepare, models=frozen.models, weights=job.weights, hp=hp
        ),
        inputs=('params', 'params', 'batch', 'batch'),
        outputs=('batch', 'replicated'),
        donate=(),
    )
    update = run.compile(
        functools.partial(ppo_step, model=frozen.models, tx=tx, hp=hp),
        inputs=('params', 'batch') + (('batch',) if job.ptx else ()),
    )
    streams: list[Iterator[Any]] = []

    def timed(phase: str, began: float, value: Any) -> Any:
        jax.block_until_ready(value)
        phases[phase] = phases.get(phase, 0.0) + time.monotonic() - began
        return value

    def one_step(state: PPOState, done: int) -> Any:
        if not streams:  # the first step that this process does
            streams.append(
                _stream(run, job.prompts, settings, settings.prompt_buckets, done)
            )
            if job.ptx:
                streams.append(
                    _stream(run, job.ptx, settings, settings.ptx_buckets, done)
                )
        prompts = next(streams[0])
        extra = (next(streams[1]),) if job.ptx else ()
        key = jax.random.fold_in(jax.random.fold_in(run.key(job.stage), done), SAMPLE)
        clock = time.monotonic()
        generation = timed(
            'generate', clock, write(state.params['policy'], prompts, key, how)
        )
        clock = time.monotonic()
        scores, known = _score(run, job, frozen, prompts, generation)
        rollout, before = timed(
            'score and prepare',
            clock,
            ready(state, frozen.ref_params, generation, scores),
        )
        known['tokens'] = float(jnp.sum(generation.response_mask))
        clock = time.monotonic()
        state, metrics = timed('update', clock, update(state, rollout, *extra))
        return state, {**before, **metrics}, known

    return one_step


def _stream(
    run: Run, data: pipeline.Dataset, settings: OnlineSettings, buckets: Any, done: int
) -> Iterator[Any]:
    return pipeline.batches(
        data,
        settings.batch_size,
        seed=run.config.seed,
        buckets=buckets,
        start_step=done,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _score(
    run: Run, job: Online, frozen: Frozen, prompts: PromptBatch, generation: Generation
) -> tuple[dict[str, Array], dict[str, float]]:
    """Scores [B] by name, and the share of texts that had to be cut for them."""
    responses = policy_eval.Responses(
        run.tokenizer, job.prompts.records, prompts, generation
    )
    scored = {name: scorer(responses) for name, scorer in frozen.scorers.items()}
    truncated = {
        f'reward/{name}/truncated': x.truncated / len(responses.real)
        for name, x in scored.items()
        if x.truncated is not None
    }
    return {name: x.scores for name, x in scored.items()}, truncated


def _evaluate(
    run: Run, job: Online, frozen: Frozen, params: Params, write: Any
) -> dict[str, Any]:
    """Samples both policies on the held-out prompts with the same keys; writes
    samples.
    """
    settings = job.settings
    judge = _judge(run, job, frozen)
    how = stop_rules(run, job, job.hp.temperature)
    base = jax.random.fold_in(run.key(job.stage), EVALUATE)

    def sampled(policy_params: Params) -> policy_eval.Sampled:
        counter = iter(range(len(job.eval_prompts.examples)))
        return policy_eval.sample_policy(
            lambda batch: write(
                policy_params, batch, jax.random.fold_in(base, next(counter)), how
            ),
            judge,
            frozen.scorers,
            run.tokenizer,
            job.eval_prompts.records,
            pipeline.eval_batches(
                job.eval_prompts, settings.eval_batch_size, settings.prompt_buckets
            ),
        )

    before, after = sampled(frozen.ref_params), sampled(params)
    rows = _sample_rows(job, before, after)
    path = run.stage_dir(job.stage) / 'samples.jsonl'
    with path.open('w', encoding='utf-8') as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + '\n')
    report = policy_eval.policy_report(before, after, job.weights)
    return {**report, 'expected_win_rate': settings.expected_win_rate}


def _judge(run: Run, job: Online, frozen: Frozen) -> Any:
    """Generation → statistics by row: under the reference, and under the base."""
    statistics = run.compile(
        functools.partial(
            policy_eval.row_statistics,
            policy=frozen.models.policy,
            temperature=job.hp.temperature,
        ),
        **policy_eval.KINDS,
    )
    if job.settings.base is None:
        return functools.partial(statistics, frozen.ref_params)
    base, params = load_policy(run, job.settings.base, run.key(job.stage))
    likelihood = run.compile(
        functools.partial(policy_eval.base_likelihood, model=base), **policy_eval.KINDS
    )
    return lambda generation: {
        **statistics(frozen.ref_params, generation),
        **likelihood(params, generation),
    }


def _sample_rows(
    job: Online, before: policy_eval.Sampled, after: policy_eval.Sampled
) -> list[dict[str, Any]]:
    """The lines of ``samples.jsonl``."""
    records = job.eval_prompts.records[: job.settings.num_samples]
    rows = [{'prompt': r.prompt, 'reference': r.reference} for r in records]
    for when, sampled in (('before', before), ('after', after)):
        proxy = sampled.proxy(job.weights)
        for i, row in enumerate(rows):
            row[when] = sampled.responses[i]
            row[f'proxy_{when}'] = float(proxy[i])
            row[f'rewards_{when}'] = {
                name: float(sampled.scores[name][i]) for name in job.weights
            }
            if GOLD in sampled.scores:
                row[f'gold_{when}'] = float(sampled.scores[GOLD][i])
    return rows
