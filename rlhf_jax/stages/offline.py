"""Stages over a fixed data set: pretrain and sft, and what rm and preference share.

``load_…`` reads and checks everything that can be wrong before anything compiles;
``train_…`` trains, evaluates and writes the result. Read ``stages/reward_model.py``
next.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import files
from rlhf_jax.algos.ensemble import member_seed, stack_batches
from rlhf_jax.algos.sft import SFTHParams, sft_step
from rlhf_jax.config import build
from rlhf_jax.data import pipeline
from rlhf_jax.data.examples import TokenExample
from rlhf_jax.data.formats import GOLD
from rlhf_jax.data.packing import pack
from rlhf_jax.evals import language_model
from rlhf_jax.optim import make_optimizer, make_schedule
from rlhf_jax.sharding import check_batch_size, init_sharded
from rlhf_jax.stages.console import tell_left_out
from rlhf_jax.stages.loop import run_loop
from rlhf_jax.stages.run import (
    Run,
    check_policy,
    finish,
    load_policy,
    model_config,
)
from rlhf_jax.stages.settings import OfflineSettings
from rlhf_jax.types import Params, TrainState
from rlhf_jax.verdicts import REWARD_MODELS


@dataclasses.dataclass(frozen=True)
class Offline:
    """A checked stage, ready to train."""

    stage: str
    settings: OfflineSettings
    hp: Any  # SFTHParams or RMHParams
    tokenizer: Any  # the run's, or rm's own
    train: pipeline.Dataset
    eval: pipeline.Dataset
    references: pipeline.Dataset | None
    num_steps: int


def load_language_model(run: Run, stage: str) -> Offline:
    """Data and settings of pretrain and sft; see ``OfflineSettings``."""
    where = f'config.{stage}'
    settings, hp = build(run.config[stage], OfflineSettings, SFTHParams, where=where)
    check_policy(run, f'{where}.init', settings.init)
    if settings.tokenizer is not None:
        raise ValueError(
            f'{where}.tokenizer={settings.tokenizer!r}: rm alone can have its own; a '
            'policy has that of config.tokenizer'
        )

    def read(spec: str) -> pipeline.Dataset:
        if stage == 'pretrain':
            return pipeline.load_texts(
                spec, run.tokenizer, max_length=settings.buckets[-1]
            )
        return pipeline.load_demonstrations(
            spec,
            run.tokenizer,
            max_length=settings.buckets[-1],
            loss_on=settings.loss_on,
            overlong=settings.overlong,
            on_bad=settings.on_bad,
            control_tokens=settings.control_tokens,
        )

    return check_offline(run, stage, settings, hp, run.tokenizer, read, None)


def check_offline(
    run: Run,
    stage: str,
    settings: OfflineSettings,
    hp: Any,
    tokenizer: Any,
    read: Any,
    references: pipeline.Dataset | None,
) -> Offline:
    """Reads the data of a stage by ``read(spec)`` and checks what every offline stage
    has: its batch size, its model, its buckets, its length, its schedule.

    Raises:
        ValueError: one of them is wrong.
    """
    where = f'config.{stage}'
    if settings.members > 1 and stage not in REWARD_MODELS:
        raise ValueError(
            f'{where}.members={settings.members}: rm alone trains an ensemble; set it '
            'to 1'
        )
    check_batch_size(settings.batch_size, run.mesh, where, hp.num_microbatches)
    config = model_config(run, settings.init)
    pipeline.check_vocabulary(tokenizer, config.vocab_size)
    if settings.buckets[-1] > config.max_positions:
        raise ValueError(
            f'{where}.buckets end at {settings.buckets[-1]} tokens, the model has '
            f'{config.max_positions} positions; use shorter buckets'
        )
    train, held_out = (
        tell_left_out(read(settings.train)),
        tell_left_out(read(settings.eval)),
    )
    if settings.packing is not None:
        train = _packed(train, settings, where)
    if (settings.num_steps is None) == (settings.num_epochs is None):
        raise ValueError(f'{where}: set either num_steps or num_epochs')
    num_steps = settings.num_steps
    if num_steps is None:
        num_steps = math.ceil(
            settings.num_epochs * len(train.examples) / settings.batch_size
        )
    make_schedule(settings.optim, num_steps)
    return Offline(
        stage, settings, hp, tokenizer, train, held_out, references, num_steps
    )


def _packed(
    train: pipeline.Dataset, settings: OfflineSettings, where: str
) -> pipeline.Dataset:
    if not isinstance(train.examples[0], TokenExample):
        raise ValueError(
            f'{where}.packing={settings.packing!r}: only pretrain and sft have rows of '
            'several documents; set it to None'
        )
    if settings.packing != 'best_fit':
        raise ValueError(
            f"{where}.packing={settings.packing!r}; use 'best_fit' or None"
        )
    return pack(train, settings.buckets[-1])


def train_language_model(run: Run, job: Offline) -> None:
    """Runs pretrain or sft and leaves its result in the stage's folder."""
    clock = time.monotonic()
    key = run.key(job.stage)
    model, params = load_policy(run, job.settings.init, key)
    loss_of = run.compile(
        functools.partial(language_model.batch_loss, model=model),
        **language_model.KINDS,
    )

    def evaluate(params: Params) -> dict[str, float]:
        batches = pipeline.eval_batches(
            job.eval, job.settings.batch_size, job.settings.buckets
        )
        return language_model.evaluate_loss(loss_of, params, batches)

    before = evaluate(params)['loss']
    spent = {'setup': time.monotonic() - clock}
    state, seconds = fit(run, job, sft_step, model, params, key, evaluate, spent)
    clock = time.monotonic()
    result = evaluate(state.params)
    files.write_json(
        run.stage_dir(job.stage) / 'eval.json',
        {
            **result,
            'loss_before': before,
            'uniform_loss': math.log(model.config.vocab_size),
        },
    )
    seconds['eval'] = time.monotonic() - clock
    finish(
        run,
        job.stage,
        job.num_steps,
        job.settings.init,
        {'policy': state.params},
        {'policy': model.config},
        seconds,
        {'train': job.train, 'eval': job.eval},
    )


def known_gold(records: list[Any]) -> np.ndarray | None:
    """True rewards [N, 2] of chosen and rejected, where all records have them."""
    gold = [[record.meta.get(key) for key in GOLD] for record in records]
    known = all(value is not None for pair in gold for value in pair)
    return np.asarray(gold, float) if known else None


def known_kinds(records: list[Any]) -> list[str] | None:
    """The kind of every comparison, where all records have a text in ``kind``."""
    kinds = [record.meta.get('kind') for record in records]
    return kinds if all(isinstance(kind, str) for kind in kinds) else None


def fit(
    run: Run,
    job: Offline,
    step: Any,
    model: Any,
    params: Params,
    key: Any,
    evaluate: Any,
    spent: dict[str, float],
) -> tuple[TrainState, dict[str, float]]:
    """Trains: every batch of the stage's data, or what is left of them, by ``step``.

    Args:
        run: the run.
        job: the stage.
        step: (state, batch, *, model, tx, hp) -> (state, metrics).
        model: static argument of the step.
        params: where training starts; the state takes over their memory.
        key: base key of the stage.
        evaluate: params -> numbers to log now and then.
        spent: seconds before training, by phase.

    Returns:
        The last state and the seconds by phase.
    """
    settings = job.settings
    clock = time.monotonic()
    tx = make_optimizer(settings.optim, job.num_steps)
    # All rates at once: asked step by step, each would wait for the step before it.
    steps = jnp.arange(job.num_steps)
    rates = jax.device_get(
        jax.jit(jax.vmap(make_schedule(settings.optim, job.num_steps)))(steps)
    )
    init = tx.init if settings.members == 1 else jax.vmap(tx.init)
    state = init_sharded(
        lambda p: TrainState(step=jnp.int32(0), rng=key, params=p, opt_state=init(p)),
        run.mesh,
        params,
        donate=(0,),
    )
    compiled = run.compile(functools.partial(step, model=model, tx=tx, hp=job.hp))
    batches = None

    def one_step(state: TrainState, done: int) -> Any:
        nonlocal batches
        if batches is None:  # the first step that this process does
            batches = _stream(run, job, done)
        batch = next(batches)
        state, metrics = compiled(state, batch)
        metrics = {f'train/{name}': metric for name, metric in metrics.items()}
        real = int(np.sum(batch.mask))
        known = {'train/lr': float(rates[done]), 'tokens': real}
        known['train/padding'] = 1 - real / np.size(batch.mask)
        return state, metrics, known

    shown = {
        'train/loss': 'loss',
        'train/accuracy': 'accuracy',
        'train/rewards/accuracies': 'accuracy',
        'train/tokens_per_second': 'tokens_per_second',
    }
    return run_loop(
        run.stage_dir(job.stage),
        state,
        job.num_steps,
        one_step,
        settings=settings.loop,
        writers=tuple(run.config.metrics),
        shown=shown,
        spent=lambda: {**spent, 'train': time.monotonic() - clock},
        evaluate=lambda s: {f'eval/{k}': v for k, v in evaluate(s.params).items()},
        profile=run.profile,
    )


def _stream(run: Run, job: Offline, done: int) -> Iterator[Any]:
    """The batches from step ``done`` on; of an ensemble those of all members, whose
    orders are functions of the seed and the member.
    """

    def of(seed: int) -> Iterator[Any]:
        return pipeline.batches(
            job.train,
            job.settings.batch_size,
            seed=seed,
            buckets=job.settings.buckets,
            start_step=done,
            sort_batches=job.settings.sort_batches,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    seed, members = run.config.seed, job.settings.members
    if members == 1:
        return of(seed)
    orders = [of(member_seed(seed, member)) for member in range(members)]
    return map(stack_batches, zip(*orders))
