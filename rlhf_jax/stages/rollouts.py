"""Learning from one's own samples: the loop that all online stages share.

One iteration: prompts → the sampler → scores (``stages/scoring.py``) → the method's
``prepare``, once per rollout → the method's ``step``, which makes all updates over it.
What a method is stands in :class:`Method`. Read ``stages/ppo.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import sharding
from rlhf_jax.algos.anchors import AnchorHParams, move_anchors
from rlhf_jax.data import pipeline
from rlhf_jax.data.joining import decode_behind
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.ops.rows import repeat_prompts
from rlhf_jax.responses import GOLD, Responses, Scorer
from rlhf_jax.rewards import (
    ScoreHParams,
    initial_moments,
    scale_scores,
    shape_scores,
    weighted_sum,
)
from rlhf_jax.stages.loop import run_loop
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import OnlineSettings
from rlhf_jax.stages.watching import Watch
from rlhf_jax.types import (
    Array,
    Generation,
    Max,
    Mean,
    Metrics,
    Min,
    OnlineState,
    Params,
    PRNGKey,
    PromptBatch,
    RunningMoments,
    Scores,
    reduce_metrics,
)

# Purposes folded into the stage's key; algos.updates.SHUFFLE and
# stages.evaluation.EVALUATE are others.
SAMPLE, REUSE = 11, 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What an online algorithm is to the loop.

    Both functions are pure, not yet compiled, and take ``axis_name``.
    """

    state: OnlineState  # where it starts; ``params['policy']`` is the policy
    configs: dict[str, TransformerConfig]  # of every part of ``state.params``
    # (state, ref_params, generation, Scores, *models) -> (batch, metrics); once per
    # rollout
    prepare: Callable[..., tuple[Any, Metrics]]
    # (state, batch, *a batch of every stream) -> (state, metrics)
    step: Callable[..., tuple[OnlineState, Metrics]]
    streams: tuple[tuple[pipeline.Dataset, tuple[int, ...]], ...] = ()  # and buckets
    group_size: int = 1  # responses to a prompt, adjacent rows of the rollout
    wants_baseline: bool = False  # see ``Scores``
    max_draws: int = 1  # of prompts, to replace groups of equal scores
    passes: int = 1  # times that a rollout is prepared and trained on
    # Parameters of further models that ``prepare`` reads, frozen and on the mesh
    models: tuple[Params, ...] = ()
    # What scores the samples of the evaluation at the end alone, by name
    judges: Mapping[str, Scorer] = dataclasses.field(default_factory=dict)


class Sampled(NamedTuple):
    """Responses and what the scorers say of them, unshaped."""

    generation: Generation
    scores: dict[str, Array]  # [B] by name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """A stage's rollouts: what they are made of, and how long that took."""

    run: Run
    stage: str
    settings: OnlineSettings
    shaping: ScoreHParams
    anchors: AnchorHParams
    weights: Mapping[str, float]  # of the rewards in their sum
    prompts: pipeline.Dataset
    method: Method
    scorers: Mapping[str, Scorer]
    sampler: Any  # from ``sampler.make_sampler``
    phases: dict[str, float]  # seconds by phase, added to

    def timed(self, phase: str, began: float, value: Any) -> Any:
        """Waits for a value and counts the time since ``began`` for the phase."""
        jax.block_until_ready(value)
        spent = time.monotonic() - began
        self.phases[phase] = self.phases.get(phase, 0.0) + spent
        return value

    def streams(self, done: int) -> Iterator[Iterator[Any]]:
        """The prompts, then what else the method reads, from rollout ``done`` on."""
        settings, method = self.settings, self.method
        rows = settings.batch_size // method.group_size
        buckets = settings.prompt_buckets
        if method.max_draws > 1:  # the rows of several draws make one rollout
            buckets = buckets[-1:]
        start = done * method.max_draws
        yield self._stream(self.prompts, rows, buckets, start)
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
    ) -> tuple[Sampled, Sampled | None, dict[str, float]]:
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
    ) -> tuple[Sampled, dict[str, float]]:
        """So many responses to every prompt; the share of texts that a scorer had cut,
        and how far the members of an ensemble differ.
        """
        clock = time.monotonic()
        generation = self.sampler(params, prompts, key, temperature, size)
        self.timed('generate', clock, generation)
        clock = time.monotonic()
        responses = Responses(
            self.run.tokenizer,
            self.prompts.records,
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
        return Sampled(generation, self.timed('score', clock, scores)), known

    def _draw(
        self, params: Params, prompts: list[PromptBatch], key: PRNGKey
    ) -> tuple[Sampled, dict[str, float]]:
        """Groups whose responses differ in score, from as many draws as that takes.

        Where the draws do not suffice, groups of equal scores fill the rollout up.

        Source: Yu et al. 2025 (DAPO), arXiv 2503.14476, §3.2, dynamic sampling.
        """
        size, rows = self.method.group_size, self.settings.batch_size
        good: list[Sampled] = []
        rest: list[Sampled] = []
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

    def _differ(self, drawn: Sampled, size: int) -> np.ndarray:
        """[P] bool, the groups whose shaped scores are not all equal."""
        scores = _shape(
            drawn.generation,
            weighted_sum(drawn.scores, self.weights),
            hp=self.shaping,
            max_length=self.settings.max_new_tokens,
        )
        groups = np.asarray(scores).reshape(-1, size)
        return (groups != groups[:, :1]).any(-1)


def _rows(samples: Sampled, chosen: np.ndarray) -> Sampled:
    return jax.tree.map(lambda x: x[chosen], samples)


# ---------------------------------------------------------------------------- training


def initial_state(
    run: Run,
    stage: str,
    shaping: ScoreHParams,
    anchors: AnchorHParams,
    params: dict[str, Params],
    tx: optax.GradientTransformation,
    of: Callable[..., OnlineState] = OnlineState,
) -> OnlineState:
    """Where a method starts, in place on the mesh; ``params`` keep the originals.

    Args:
        run: the run.
        stage: its name.
        shaping: what is done to scores.
        anchors: whether the reference follows the policy, and an average does.
        params: by part, 'policy' among them.
        tx: the optimizer over them.
        of: makes the state from its fields, and adds those of its own.
    """

    def start(params: dict[str, Params]) -> OnlineState:
        fields = {
            'step': jnp.int32(0),
            'rng': run.key(stage),
            'params': params,
            'opt_state': tx.init(params),
            'score_moments': initial_moments(shaping),
        }
        if anchors.ref_sync_rollouts is not None:
            fields['ref_params'] = params['policy']
        if anchors.ema_decay is not None:
            fields['ema_params'] = params['policy']
        return of(**fields)

    return sharding.init_sharded(start, run.mesh, params)


def train_on_rollouts(
    rollouts: Rollouts, ref_params: Params
) -> tuple[OnlineState, dict[str, float]]:
    """Makes all rollouts of a stage and learns from them, or what is left of that.

    Args:
        rollouts: of the stage.
        ref_params: of the reference policy.

    Returns:
        The last state and the seconds by phase.
    """
    run, settings = rollouts.run, rollouts.settings
    return run_loop(
        run.stage_dir(rollouts.stage),
        rollouts.method.state,
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
        spent=lambda: rollouts.phases,
        watch=Watch(rollouts.shaping.needs_end),
        profile=run.profile,
    )


def _iteration(rollouts: Rollouts, ref_params: Params) -> Any:
    """One rollout and the updates over it, as ``run_loop`` wants it."""
    run, method = rollouts.run, rollouts.method
    ready = run.compile(
        functools.partial(
            shape_and_prepare,
            prepare=method.prepare,
            weights=dict(rollouts.weights),
            shaping=rollouts.shaping,
            max_length=rollouts.settings.max_new_tokens,
        ),
        inputs=('params', 'params', 'batch', 'batch', 'params'),
        outputs=('batch', 'replicated', 'replicated'),
        donate=(),
    )
    updates = [
        run.compile(
            functools.partial(
                _pass,
                step=method.step,
                anchors=rollouts.anchors,
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
        base = run.key(rollouts.stage)
        key = jax.random.fold_in(jax.random.fold_in(base, done), SAMPLE)
        samples, greedy, known = rollouts.sample(state.params['policy'], prompts, key)
        known['tokens'] = float(jnp.sum(samples.generation.response_mask))
        known['rollout/padding'] = 1 - float(jnp.mean(samples.generation.mask))
        metrics: Metrics = {}
        for update in updates:
            clock = time.monotonic()
            batch, before, moments = rollouts.timed(
                'prepare',
                clock,
                ready(state, ref_params, samples, greedy, method.models),
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
    samples: Sampled,
    greedy: Sampled | None,
    models: tuple[Params, ...] = (),
    *,
    prepare: Callable[..., tuple[Any, Metrics]],
    weights: dict[str, float],
    shaping: ScoreHParams,
    max_length: int,
    axis_name: str | None = None,
) -> tuple[Any, Metrics, RunningMoments | None]:
    """The weighted sum of the rewards, scaled and shaped, the batch that a method makes
    of it, and the moments of the scores for the state; a pure function to compile.
    Every score, the gold one included, becomes a metric, and so do their weighted sum
    and the range of what is optimised; without rewards scores are 0, and there is
    neither.
    """
    scale = functools.partial(
        scale_scores, moments=state.score_moments, hp=shaping, axis_name=axis_name
    )
    shape = functools.partial(_shape, hp=shaping, max_length=max_length)
    proxy = jnp.zeros(samples.generation.ended.shape)
    if weights:
        proxy = weighted_sum(samples.scores, weights)
    total, moments = scale(proxy)
    total, baseline = shape(samples.generation, total), None
    if greedy is not None:
        # In the same units, but no part of their moments.
        likewise, _ = scale(weighted_sum(greedy.scores, weights), moments=moments)
        baseline = shape(greedy.generation, likewise)
        baseline = jnp.repeat(baseline, total.shape[0] // baseline.shape[0])
    reference = ref_params if state.ref_params is None else state.ref_params
    scores = Scores(total, samples.scores, weights, baseline)
    batch, metrics = prepare(
        state, reference, samples.generation, scores, *models, axis_name=axis_name
    )
    columns = {
        'objective/gold' if name == GOLD else f'reward/{name}': column
        for name, column in samples.scores.items()
    }
    if weights:
        columns['objective/proxy_reward'] = proxy
    named: Metrics = {
        name: Mean(jnp.sum(column), jnp.float32(column.shape[0]))
        for name, column in columns.items()
    }
    if weights:
        named['objective/scores_min'] = Min(jnp.min(total))
        named['objective/scores_max'] = Max(jnp.max(total))
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
