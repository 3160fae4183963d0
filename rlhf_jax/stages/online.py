"""The stages that learn from their own samples: the loop that all of them share.

One iteration: prompts → ``generate`` → scores (``stages/scoring.py``) → the method's
``prepare``, once per rollout → the method's ``step``, which makes all updates over it.
What a method is stands in ``stages/online_job.py``; read ``stages/ppo.py`` next, or
``policy_gradient.py``, ``online_preference.py``, ``expert_iteration.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import files
from rlhf_jax.algos.anchors import AnchorHParams, move_anchors
from rlhf_jax.data import pipeline
from rlhf_jax.data.joining import decode_behind
from rlhf_jax.evals import policy as policy_eval
from rlhf_jax.evals.policy import GOLD
from rlhf_jax.ops.rows import repeat_prompts
from rlhf_jax.rewards import (
    ScoreHParams,
    scale_scores,
    shape_scores,
    weighted_sum,
)
from rlhf_jax.stages import scoring
from rlhf_jax.stages.evaluation import evaluate_policy, make_writer
from rlhf_jax.stages.loop import run_loop
from rlhf_jax.stages.online_job import Judged, Method, Online, data_of
from rlhf_jax.stages.run import Run, finish, frozen, load_policy
from rlhf_jax.stages.watching import Watch
from rlhf_jax.types import (
    Array,
    Generation,
    Max,
    Mean,
    Metrics,
    Min,
    Params,
    PRNGKey,
    PromptBatch,
    RunningMoments,
    reduce_metrics,
)

# Purposes folded into the stage's key; algos.updates.SHUFFLE and
# stages.evaluation.EVALUATE are others.
SAMPLE, REUSE = 11, 14


class Scored(NamedTuple):
    """Responses and what the scorers say of them, unshaped."""

    generation: Generation
    scores: dict[str, Array]  # [B] by name


def train_online(run: Run, job: Online) -> None:
    """Runs a stage: trains, compares with the policy it started from, writes the
    result.
    """
    clock = time.monotonic()
    settings, key = job.settings, run.key(job.stage)
    policy, ref_params = load_policy(run, settings.init, key)
    method = job.begin(run, job, policy, ref_params)
    ref_params = frozen(run, policy, ref_params)
    scorers = scoring.make_scorers(run, job.evaluation.rewards)
    write = make_writer(run, job.evaluation, policy)
    phases = {'setup': time.monotonic() - clock}
    rollouts = _Rollouts(run, job, method, scorers, write, phases)
    state, seconds = run_loop(
        run.stage_dir(job.stage),
        method.state,
        settings.num_rollouts,
        _iteration(rollouts, ref_params),
        settings=settings.loop,
        writers=tuple(run.config.metrics),
        shown={
            'objective/proxy_reward': 'proxy',
            'objective/kl': 'KL',
            'objective/gold': 'gold',
            'train/tokens_per_second': 'tokens_per_second',
        },
        spent=lambda: phases,
        watch=Watch(job.shaping.needs_end),
        profile=run.profile,
    )
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
        write=write,
        scorers=scorers,
    )
    files.write_json(run.stage_dir(job.stage) / 'eval.json', report)
    seconds['eval'] = time.monotonic() - clock
    finish(
        run,
        job.stage,
        settings.num_rollouts,
        settings.init,
        params,
        method.configs,
        seconds,
        dict(data_of(job, method)),
    )


def _iteration(rollouts: _Rollouts, ref_params: Params) -> Any:
    """One rollout and the updates over it, as ``run_loop`` wants it."""
    run, job, method = rollouts.run, rollouts.job, rollouts.method
    ready = run.compile(
        functools.partial(
            shape_and_prepare,
            prepare=method.prepare,
            weights=job.evaluation.weights,
            shaping=job.shaping,
            max_length=job.settings.max_new_tokens,
        ),
        inputs=('params', 'params', 'batch', 'batch'),
        outputs=('batch', 'replicated', 'replicated'),
        donate=(),
    )
    updates = [
        run.compile(
            functools.partial(
                _pass,
                step=method.step,
                anchors=job.anchors,
                number=i,
                last=method.passes,
            ),
            inputs=('params', 'batch') + ('batch',) * len(method.streams),
        )
        for i in range(1, method.passes + 1)
    ]
    streams: list[Iterator[Any]] = []

    def one_step(state: Any, done: int) -> Any:
        if not streams:  # the first step that this process does
            streams.extend(rollouts.streams(done))
        prompts = [next(streams[0]) for _ in range(method.max_draws)]
        extra = tuple(next(stream) for stream in streams[1:])
        key = jax.random.fold_in(jax.random.fold_in(run.key(job.stage), done), SAMPLE)
        samples, greedy, known = rollouts.sample(state.params['policy'], prompts, key)
        known['tokens'] = float(jnp.sum(samples.generation.response_mask))
        known['rollout/padding'] = 1 - float(jnp.mean(samples.generation.mask))
        metrics: Metrics = {}
        for update in updates:
            clock = time.monotonic()
            batch, before, moments = rollouts.timed(
                'prepare', clock, ready(state, ref_params, samples, greedy)
            )
            if update is updates[0]:  # a score counts once
                state = state.replace(score_moments=moments)
            clock = time.monotonic()
            state, after = rollouts.timed('update', clock, update(state, batch, *extra))
            metrics = metrics or {**before, **after}  # of the first pass
        return state, metrics, known

    return one_step


def shape_and_prepare(
    state: Any,
    ref_params: Params,
    samples: Scored,
    greedy: Scored | None,
    *,
    prepare: Callable[..., tuple[Any, Metrics]],
    weights: dict[str, float],
    shaping: ScoreHParams,
    max_length: int,
    axis_name: str | None = None,
) -> tuple[Any, Metrics, RunningMoments | None]:
    """The weighted sum of the rewards, scaled and shaped, the batch that a method makes
    of it, and the moments of the scores for the state; a pure function to compile.
    Every score, the judge's included, becomes a metric, and so do their weighted sum
    and the range of what is optimised.
    """
    scale = functools.partial(
        scale_scores, moments=state.score_moments, hp=shaping, axis_name=axis_name
    )
    shape = functools.partial(_shape, hp=shaping, max_length=max_length)
    proxy = weighted_sum(samples.scores, weights)
    total, moments = scale(proxy)
    scores, baseline = shape(samples.generation, total), None
    if greedy is not None:
        # In the same units, but no part of their moments.
        likewise, _ = scale(weighted_sum(greedy.scores, weights), moments=moments)
        baseline = shape(greedy.generation, likewise)
        baseline = jnp.repeat(baseline, scores.shape[0] // baseline.shape[0])
    reference = ref_params if state.ref_params is None else state.ref_params
    judged = Judged(scores, samples.scores, baseline)
    batch, metrics = prepare(
        state, reference, samples.generation, judged, axis_name=axis_name
    )
    columns = {
        'objective/gold' if name == GOLD else f'reward/{name}': column
        for name, column in samples.scores.items()
    }
    named: Metrics = {
        name: Mean(jnp.sum(column), jnp.float32(column.shape[0]))
        for name, column in {**columns, 'objective/proxy_reward': proxy}.items()
    }
    named['objective/scores_min'] = Min(jnp.min(scores))
    named['objective/scores_max'] = Max(jnp.max(scores))
    return batch, {**metrics, **reduce_metrics(named, axis_name)}, moments


def _shape(
    generation: Generation, scores: Array, *, hp: ScoreHParams, max_length: int
) -> Array:
    lengths = jnp.sum(generation.response_mask, axis=-1)
    how = {'hp': hp, 'max_length': max_length}
    return shape_scores(scores, generation.ended, lengths, **how)


def _pass(
    state: Any,
    batch: Any,
    *extra: Any,
    step: Callable[..., tuple[Any, Metrics]],
    anchors: AnchorHParams,
    number: int,
    last: int,
    axis_name: str | None = None,
) -> tuple[Any, Metrics]:
    """The ``number``-th of ``last`` times that a step learns from the same rollout.

    The state counts rollouts, its anchors move with them, and each time shuffles by a
    key of its own.
    """
    before = state
    if number > 1:
        again = jax.random.fold_in(jax.random.fold_in(state.rng, REUSE), number)
        state = state.replace(rng=again)
    state, metrics = step(state, batch, *extra, axis_name=axis_name)
    state = state.replace(rng=before.rng)
    if number < last:
        return state.replace(step=before.step), metrics
    return move_anchors(state, anchors), metrics


# ----------------------------------------------------------------------------- rollouts


@dataclasses.dataclass(frozen=True)
class _Rollouts:
    """Writes and scores responses, and notes how long that takes."""

    run: Run
    job: Online
    method: Method
    scorers: dict[str, policy_eval.Scorer]
    write: Any
    phases: dict[str, float]

    def timed(self, phase: str, began: float, value: Any) -> Any:
        """Waits for a value and counts the time since ``began`` for the phase."""
        jax.block_until_ready(value)
        spent = time.monotonic() - began
        self.phases[phase] = self.phases.get(phase, 0.0) + spent
        return value

    def streams(self, done: int) -> Iterator[Iterator[Any]]:
        """The prompts, then what else the method reads, from rollout ``done`` on."""
        settings, method = self.job.settings, self.method
        rows = settings.batch_size // method.group_size
        buckets = settings.prompt_buckets
        if method.max_draws > 1:  # the rows of several draws make one rollout
            buckets = buckets[-1:]
        start = done * method.max_draws
        yield self._stream(self.job.prompts, rows, buckets, start)
        for data, buckets in method.streams:
            yield self._stream(data, settings.batch_size, buckets, done)

    def _stream(
        self, data: pipeline.Dataset, rows: int, buckets: tuple[int, ...], start: int
    ) -> Iterator[Any]:
        return pipeline.batches(
            data,
            rows,
            seed=self.run.config.seed,
            buckets=buckets,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def sample(
        self, params: Params, prompts: list[PromptBatch], key: PRNGKey
    ) -> tuple[Scored, Scored | None, dict[str, float]]:
        """The responses of a rollout, the greedy ones where they are wanted, and
        numbers to log.
        """
        method = self.method
        if method.max_draws > 1:
            samples, known = self._draw(params, prompts, key)
        else:
            samples, known = self._respond(params, prompts[0], key, method.group_size)
        greedy = None
        if method.wants_baseline:
            greedy, _ = self._respond(params, prompts[0], key, 1, temperature=0.0)
        return samples, greedy, known

    def _respond(
        self,
        params: Params,
        prompts: PromptBatch,
        key: PRNGKey,
        size: int,
        temperature: float | None = None,
    ) -> tuple[Scored, dict[str, float]]:
        """So many responses to every prompt; the share of texts that a scorer had cut,
        and how far the members of an ensemble differ.
        """
        clock = time.monotonic()
        generation = self.write(params, prompts, key, temperature, size)
        self.timed('generate', clock, generation)
        clock = time.monotonic()
        responses = policy_eval.Responses(
            self.run.tokenizer,
            self.job.prompts.records,
            repeat_prompts(prompts, size),
            generation,
            decode_behind,
        )
        scored = {name: scorer(responses) for name, scorer in self.scorers.items()}
        known = {}
        for name, x in scored.items():
            if x.truncated is not None:
                known[f'reward/{name}/truncated'] = x.truncated / len(responses.real)
            if x.deviation is not None:
                known[f'reward/{name}/std'] = float(jnp.mean(x.deviation))
        scores = {name: x.scores for name, x in scored.items()}
        return Scored(generation, self.timed('score', clock, scores)), known

    def _draw(
        self, params: Params, prompts: list[PromptBatch], key: PRNGKey
    ) -> tuple[Scored, dict[str, float]]:
        """Groups whose responses differ in score, from as many draws as that takes.

        Where the draws do not suffice, groups of equal scores fill the rollout up.

        Source: Yu et al. 2025 (DAPO), arXiv 2503.14476, §3.2, dynamic sampling.
        """
        size, rows = self.method.group_size, self.job.settings.batch_size
        good: list[Scored] = []
        rest: list[Scored] = []
        seen = found = draws = 0
        known: dict[str, float] = {}
        while found * size < rows and draws < self.method.max_draws:
            again = jax.random.fold_in(key, draws)
            drawn, more = self._respond(params, prompts[draws], again, size)
            drawn, draws = jax.device_get(drawn), draws + 1
            differ = self._differ(drawn, size)
            seen, found = seen + len(differ), found + int(differ.sum())
            good.append(_rows(drawn, np.repeat(differ, size)))
            rest.append(_rows(drawn, np.repeat(~differ, size)))
            known = {name: known.get(name, 0.0) + x for name, x in more.items()}
        samples = jax.tree.map(
            lambda *parts: np.concatenate(parts)[:rows], *good, *rest
        )
        return samples, {
            **{name: total / draws for name, total in known.items()},
            'rollout/draws': float(draws),
            'rollout/useful_prompts': found / seen,
        }

    def _differ(self, drawn: Scored, size: int) -> np.ndarray:
        """[P] bool, the groups whose shaped scores are not all equal."""
        scores = _shape(
            drawn.generation,
            weighted_sum(drawn.scores, self.job.evaluation.weights),
            hp=self.job.shaping,
            max_length=self.job.settings.max_new_tokens,
        )
        groups = np.asarray(scores).reshape(-1, size)
        return (groups != groups[:, :1]).any(-1)


def _rows(samples: Scored, chosen: np.ndarray) -> Scored:
    return jax.tree.map(lambda x: x[chosen], samples)
