"""What the kinds of stage over a fixed data set have in common.

``check_offline`` finds what is wrong before anything compiles, ``fit`` trains. Read
``stages/sft.py`` next, or ``reward_model.py``, ``preference.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algos.ensemble import member_seed, stack_batches
from rlhf_jax.data import pipeline
from rlhf_jax.data.columns import Table
from rlhf_jax.data.formats import GOLD
from rlhf_jax.optim import make_optimizer, make_schedule
from rlhf_jax.sharding import check_batch_size, init_sharded
from rlhf_jax.stages.console import tell_left_out
from rlhf_jax.stages.loop import run_loop
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import OfflineSettings
from rlhf_jax.stages.sources import Source
from rlhf_jax.types import Params, TrainState

# What the progress bar shows of the metrics.
SHOWN = {
    'train/loss': 'loss',
    'train/accuracy': 'accuracy',
    'train/rewards/accuracies': 'accuracy',
    'train/tokens_per_second': 'tokens_per_second',
}


@dataclasses.dataclass(frozen=True)
class Offline:
    """A checked stage, ready to train."""

    stage: str
    settings: OfflineSettings
    hp: Any  # of the step
    tokenizer: Any  # the run's, or a reward model's own
    train: pipeline.Dataset
    eval: pipeline.Dataset
    num_steps: int
    members: int = 1  # of an ensemble


def check_offline(
    run: Run,
    stage: str,
    settings: OfflineSettings,
    hp: Any,
    source: Source,
    read: Callable[[str], pipeline.Dataset],
    *,
    tokenizer: Any | None = None,
    members: int = 1,
) -> Offline:
    """Reads the data of a stage and checks what every offline stage has: its batch
    size, its model, its buckets, its length, its schedule.

    Args:
        run: the run.
        stage: its name.
        settings: what the user wrote.
        hp: of the step.
        source: what the model starts from.
        read: data spec -> the data.
        tokenizer: that reads the data; None for that of the run.
        members: of an ensemble.

    Raises:
        ValueError: one of them is wrong.
    """
    where = f'config.{stage}'
    tokenizer = run.tokenizer if tokenizer is None else tokenizer
    check_batch_size(settings.batch_size, run.mesh, where, hp.num_microbatches)
    config = source.config()
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
    if (settings.num_steps is None) == (settings.num_epochs is None):
        raise ValueError(f'{where}: set either num_steps or num_epochs')
    num_steps = settings.num_steps
    if num_steps is None:
        num_steps = math.ceil(
            settings.num_epochs * len(train.examples) / settings.batch_size
        )
    make_schedule(settings.optim, num_steps)
    return Offline(stage, settings, hp, tokenizer, train, held_out, num_steps, members)


def known_gold(records: list[Any]) -> np.ndarray | None:
    """True rewards [N, 2] of chosen and rejected, where all records have them."""
    gold = [[record.meta.get(key) for key in GOLD] for record in records]
    known = all(value is not None for pair in gold for value in pair)
    return np.asarray(gold, float) if known else None


def known_kinds(records: list[Any]) -> list[str] | None:
    """The kind of every comparison, where all records have a text in ``kind``."""
    kinds = [record.meta.get('kind') for record in records]
    return kinds if all(isinstance(kind, str) for kind in kinds) else None


def how_sure(examples: Table) -> dict[str, np.ndarray | None]:
    """The labels of comparisons for a report: ``probability`` and ``tied`` [N], None
    where all are certain.
    """
    return {name: examples.columns[name] for name in ('probability', 'tied')}


def fit(
    run: Run,
    job: Offline,
    step: Any,
    model: Any,
    params: Params,
    key: Any,
    evaluate: Any,
    spent: dict[str, float],
    ref_params: Params | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """Trains: every batch of the stage's data, or what is left of them, by ``step``.

    Args:
        run: the run.
        job: the stage.
        step: (state, batch, *, model, tx, hp) -> (state, metrics); with ``ref_params``
            these come behind the batch.
        model: static argument of the step.
        params: where training starts; the state takes over their memory.
        key: base key of the stage.
        evaluate: params -> numbers to log now and then.
        spent: seconds before training, by phase.
        ref_params: of a frozen model that the step runs too.

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
    init = tx.init if job.members == 1 else jax.vmap(tx.init)
    state = init_sharded(
        lambda p: TrainState(step=jnp.int32(0), rng=key, params=p, opt_state=init(p)),
        run.mesh,
        params,
        donate=(0,),
    )
    frozen = () if ref_params is None else (ref_params,)
    compiled = run.compile(
        functools.partial(step, model=model, tx=tx, hp=job.hp),
        inputs=('params', 'batch') + ('params',) * len(frozen),
    )
    batches = None

    def one_step(state: TrainState, done: int) -> Any:
        nonlocal batches
        if batches is None:  # the first step that this process does
            batches = _stream(run, job, done)
        batch = next(batches)
        state, metrics = compiled(state, batch, *frozen)
        metrics = {f'train/{name}': metric for name, metric in metrics.items()}
        real = int(np.sum(batch.mask))
        known = {'train/lr': float(rates[done]), 'tokens': real}
        known['train/padding'] = 1 - real / np.size(batch.mask)
        return state, metrics, known

    return run_loop(
        run.stage_dir(job.stage),
        state,
        job.num_steps,
        one_step,
        settings=settings.loop,
        writers=tuple(run.config.metrics),
        shown=SHOWN,
        spent=lambda: {**spent, 'train': time.monotonic() - clock},
        evaluate=lambda s: {f'eval/{k}': v for k, v in evaluate(s.params).items()},
        eval_every_steps=settings.loop.eval_every_steps,
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

    seed, members = run.config.seed, job.members
    if members == 1:
        return of(seed)
    orders = [of(member_seed(seed, member)) for member in range(members)]
    return map(stack_batches, zip(*orders))
