"""The kind sft: a language model learns from texts, by ``sft_step``.

Pretraining is the same with ``form='text'``. Read ``stages/reward_model.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Literal

from rlhf_jax.algos.sft import SFTHParams, sft_step
from rlhf_jax.data import pipeline
from rlhf_jax.data.packing import pack
from rlhf_jax.evals import language_model
from rlhf_jax.pages import language_model as pages
from rlhf_jax.stages.kinds import Makes
from rlhf_jax.stages.offline import Offline, check_offline, fit
from rlhf_jax.stages.run import Result, Run
from rlhf_jax.stages.settings import OfflineSettings
from rlhf_jax.stages.sources import check_policy, load_policy
from rlhf_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTSettings(OfflineSettings):
    """A stage that trains a language model on texts: SFT, pretraining."""

    # 'text' is cut into pieces of the longest bucket, and all of it counts
    form: Literal['demonstrations', 'text'] = 'demonstrations'
    loss_on: Literal['response', 'all', 'assistant'] = 'response'  # of demonstrations
    # several documents in a row of the longest bucket, kept apart
    packing: Literal['best_fit'] | None = None


SETTINGS = (SFTSettings, SFTHParams)
PAGE = pages.PAGE
# What says how demonstrations are read, and nothing of text.
OF_DEMONSTRATIONS = ('loss_on', 'overlong', 'on_bad', 'control_tokens')


def makes(settings: SFTSettings, *_: object) -> Makes:
    """A policy."""
    return Makes(parts={'policy': settings.init})


def reads(settings: SFTSettings, *_: object) -> dict[str, str]:
    """What ``form`` says."""
    form = {'demonstrations': 'demonstrations', 'text': 'texts'}[settings.form]
    return {'train': form, 'eval': form}


def load(run: Run, stage: str, settings: SFTSettings, hp: SFTHParams) -> Offline:
    """Reads and checks.

    Raises:
        ValueError: no language model to start from, a setting that the form of the data
            does not have, or whatever is wrong with the data.
    """
    where = f'config.{stage}'
    source = check_policy(run, f'{where}.init', settings.init)
    limit = settings.buckets[-1]
    if settings.form == 'text':
        defaults = {field.name: field.default for field in dataclasses.fields(settings)}
        for name in OF_DEMONSTRATIONS:
            value = getattr(settings, name)
            if value != defaults[name]:
                raise ValueError(
                    f'{where}.{name}={value!r} is for demonstrations, and '
                    f"{where}.form='text' is cut into pieces that count whole; leave "
                    'it out'
                )

    def read(spec: str) -> pipeline.Dataset:
        if settings.form == 'text':
            return pipeline.load_texts(spec, run.tokenizer, max_length=limit)
        return pipeline.load_demonstrations(
            spec,
            run.tokenizer,
            max_length=limit,
            loss_on=settings.loss_on,
            **settings.reading,
        )

    job = check_offline(run, stage, settings, hp, source, read)
    if settings.packing is None:
        return job
    packed = dataclasses.replace(job, train=pack(job.train, limit))
    if settings.num_epochs is None:
        return packed
    rows = settings.num_epochs * len(packed.train.examples)
    return dataclasses.replace(packed, num_steps=math.ceil(rows / settings.batch_size))


def train(run: Run, job: Offline) -> Result:
    """Trains and evaluates."""
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
    report = {
        **evaluate(state.params),
        'loss_before': before,
        'uniform_loss': math.log(model.config.vocab_size),
    }
    seconds['eval'] = time.monotonic() - clock
    return Result(
        steps=job.num_steps,
        init=job.settings.init,
        params={'policy': state.params},
        configs={'policy': model.config},
        seconds=seconds,
        data={'train': job.train, 'eval': job.eval},
        evaluation=report,
    )
