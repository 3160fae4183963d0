"""The kind preference: learning from preferences without sampling, by any loss of
``preference/``.

What a reference policy says of the data is computed once, before training, and kept in
the stage's folder; at the end the policy is measured as ppo's is. The rest is shared
with ``stages/offline.py``. Read ``stages/online.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import files
from rlhf_jax.algos.preference import (
    PreferenceHParams,
    implicit_rewards,
    preference_step,
    reference_logps,
)
from rlhf_jax.data import pipeline
from rlhf_jax.data.loading import refuse_soft
from rlhf_jax.evals import preference
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.pages import policy as pages
from rlhf_jax.preference import PreferenceLoss, wants_tokens
from rlhf_jax.preference import load as load_loss
from rlhf_jax.ranges import above
from rlhf_jax.stages import scoring
from rlhf_jax.stages.evaluation import Evaluation, evaluate_policy, load_evaluation
from rlhf_jax.stages.kinds import Choice, Makes
from rlhf_jax.stages.offline import (
    Offline,
    check_offline,
    fit,
    how_sure,
    known_gold,
    known_kinds,
)
from rlhf_jax.stages.run import Result, Run
from rlhf_jax.stages.sampler import make_sampler
from rlhf_jax.stages.settings import (
    EvaluationSettings,
    OfflineSettings,
    RewardSource,
    SamplerSettings,
)
from rlhf_jax.stages.sources import check_policy, check_positions, frozen, load_policy
from rlhf_jax.types import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings(OfflineSettings, SamplerSettings, EvaluationSettings):
    """Preference optimisation on fixed data. The settings of its loss stand beside
    these; None is the loss's own default, see ``config.unset``.
    """

    name: str  # of the loss: a module of rlhf_jax.preference, or package.module
    temperature: Annotated[float, above(0)] = 1.0  # of the samples at the end
    # By name; they score the samples at the end, for the report
    rewards: dict[str, RewardSource] = dataclasses.field(default_factory=dict)


SETTINGS = (PreferenceSettings, PreferenceHParams)
CHOICE = Choice('name', load_loss)
PAGE = pages.PREFERENCE


@dataclasses.dataclass(frozen=True)
class PreferenceJob:
    """A checked stage, ready to train."""

    offline: Offline
    loss: PreferenceLoss
    loss_hp: Any  # loss.HParams
    evaluation: Evaluation


def makes(settings: PreferenceSettings, *_: object) -> Makes:
    """A policy."""
    return Makes(parts={'policy': settings.init})


def reads(
    settings: PreferenceSettings,
    hp: PreferenceHParams,
    loss: PreferenceLoss,
    loss_hp: Any,
) -> dict[str, str]:
    """What the loss learns from, and prompts for the evaluation."""
    form = 'comparisons' if loss.DATA == 'pairs' else loss.DATA
    return {'train': form, 'eval': form, 'eval_prompts': 'prompts'}


def load(
    run: Run,
    stage: str,
    settings: PreferenceSettings,
    hp: PreferenceHParams,
    loss: PreferenceLoss,
    loss_hp: Any,
) -> PreferenceJob:
    """Reads and checks.

    Raises:
        ValueError: data of another kind than the loss wants, or whatever is wrong with
            the rest.
    """
    where = f'config.{stage}'
    source = check_policy(run, f'{where}.init', settings.init)
    check_positions(run, f'{where}.init', source, settings)

    def read(spec: str) -> pipeline.Dataset:
        wanted_by = f'{where}.name={settings.name!r}'
        data = pipeline.load_preferences(
            spec,
            run.tokenizer,
            kind=loss.DATA,
            wanted_by=wanted_by,
            max_length=settings.buckets[-1],
            **settings.reading,
        )
        if hasattr(loss, 'context'):
            refuse_soft(data, wanted_by, 'compares the pairs of a batch')
        _refuse_dimensions(data, f'{where}: {spec}')
        return data

    evaluation = load_evaluation(run, stage, settings)
    offline = check_offline(run, stage, settings, hp, source, read)
    return PreferenceJob(offline, loss, loss_hp, evaluation)


def _refuse_dimensions(data: pipeline.Dataset, where: str) -> None:
    """Comparisons by several guidelines may contradict each other."""
    found = {record.meta.get('dimension') for record in data.records}
    if len(found) > 1:
        names = ', '.join(sorted(map(str, found)))
        raise ValueError(
            f'{where} has comparisons by several dimensions ({names}), and a policy '
            'is trained on one; give a label stage for each, or a reward model with '
            'heads'
        )


def train(run: Run, job: PreferenceJob) -> Result:
    """The reference, training, and the comparison with where it began."""
    clock = time.monotonic()
    offline, settings = job.offline, job.offline.settings
    key = run.key(offline.stage)
    model, params = load_policy(run, settings.init, key)
    spent = {'setup': time.monotonic() - clock}
    ref_params = None
    if job.loss.REFERENCE and wants_tokens(job.loss):
        # Training takes over the memory of ``params``.
        _, ref_params = load_policy(run, settings.init, key)
        ref_params = frozen(run, model, ref_params)
    elif job.loss.REFERENCE:
        clock = time.monotonic()
        offline = _with_reference(run, offline, model, params)
        spent['reference'] = time.monotonic() - clock
    more = () if ref_params is None else (ref_params,)
    how = {'loss': job.loss, 'loss_hp': job.loss_hp}
    rewards_of = run.compile(
        functools.partial(implicit_rewards, model=model, **how),
        **preference.KINDS | {'inputs': ('params', 'batch') + ('params',) * len(more)},
    )

    def scored(params: Params) -> np.ndarray:
        batches = pipeline.eval_batches(
            offline.eval, settings.batch_size, settings.buckets
        )
        scores = preference.score_pairs(rewards_of, params, batches, *more)
        return _opposed(offline, scores)

    def evaluate(params: Params) -> dict[str, float]:
        gap = np.subtract(*scored(params).T)
        agrees = preference.agreement(gap, **how_sure(offline.eval.examples))
        return {'accuracy': float(agrees.mean()), 'margin': float(gap.mean())}

    step = functools.partial(preference_step, **how)
    state, seconds = fit(
        run, offline, step, model, params, key, evaluate, spent, ref_params
    )
    clock = time.monotonic()
    if ref_params is None:  # training needed none on the device
        _, ref_params = load_policy(run, settings.init, key)
    report = evaluate_policy(
        run,
        job.evaluation,
        model,
        ref_params,
        state.params,
        sample=make_sampler(run, settings, settings.temperature, model),
        scorers=scoring.make_scorers(run, job.evaluation.scorers),
    )
    report |= _held_out(offline, scored(state.params))
    report['loss_settings'] = {'name': settings.name, **dataclasses.asdict(job.loss_hp)}
    seconds['eval'] = time.monotonic() - clock
    return Result(
        steps=offline.num_steps,
        init=settings.init,
        params={'policy': state.params},
        configs={'policy': model.config},
        seconds=seconds,
        data={
            'train': offline.train,
            'eval': offline.eval,
            'eval prompts': job.evaluation.prompts,
        },
        evaluation=report,
    )


# --------------------------------------------------------------------------- held out


def _opposed(offline: Offline, values: np.ndarray) -> np.ndarray:
    """Numbers of responses as [N, 2], desirable and undesirable.

    Of single responses the k-th desirable one meets the k-th undesirable one, which are
    the two of a comparison where one was taken apart.
    """
    if values.ndim == 2:
        return values
    good = offline.eval.examples.columns['labels'].values[:, 0] > 0
    count = min(good.sum(), (~good).sum())
    return np.stack([values[good][:count], values[~good][:count]], axis=-1)


def _held_out(offline: Offline, scores: np.ndarray) -> dict[str, Any]:
    """Accuracy and margins of the implicit reward on the held-out data."""
    examples, records = offline.eval.examples, offline.eval.records
    kinds = None
    lengths = np.asarray([list(map(len, example.answers)) for example in examples])
    if examples[0].labels is None:
        kinds = known_kinds(records)
    else:
        lengths = _opposed(offline, lengths[:, 0])
        records = [r for r, e in zip(records, examples) if e.labels[0, 0] > 0]
    report = preference.preference_report(
        scores, lengths, known_gold(records), kinds, **how_sure(examples)
    )
    return {**report, 'margin': float(np.subtract(*scores.T).mean())}


# -------------------------------------------------------------------------- reference


def _with_reference(
    run: Run, offline: Offline, model: CausalLM, params: Params
) -> Offline:
    """The data with the log-probabilities of the reference, from the stage's folder or
    computed now and left there.

    Raises:
        ValueError: those in the folder are of another model or of other data, or
            damaged.
    """
    path = run.stage_dir(offline.stage) / 'reference.npz'
    parts = {'train': offline.train, 'eval': offline.eval}
    mark = _fingerprint(model, params, parts)
    if path.exists():
        columns = _read_reference(path, mark)
    else:
        compiled = run.compile(
            functools.partial(reference_logps, model=model), **preference.KINDS
        )
        columns = {
            f'{part}.{name}': values
            for part, data in parts.items()
            for name, values in _reference(offline, compiled, params, data).items()
        }
        files.write_arrays(path, {'fingerprint': np.asarray(mark), **columns})
    return dataclasses.replace(
        offline,
        **{
            part: dataclasses.replace(
                data,
                columns={
                    name.removeprefix(f'{part}.'): values
                    for name, values in columns.items()
                    if name.startswith(f'{part}.')
                },
            )
            for part, data in parts.items()
        },
    )


def _reference(
    offline: Offline, compiled: Any, params: Params, data: pipeline.Dataset
) -> dict[str, np.ndarray]:
    """``reference_logps`` of every example, [N, …] by field."""
    settings, rows = offline.settings, []
    for batch in pipeline.eval_batches(data, settings.batch_size, settings.buckets):
        real = np.asarray(batch.weight) > 0
        fetched = jax.device_get(compiled(params, batch))
        rows.append({name: values[real] for name, values in fetched.items()})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _read_reference(path: Path, mark: str) -> dict[str, np.ndarray]:
    mend = f'`rm {shlex.quote(str(path))}`, and it is computed anew'
    columns = files.read_arrays(path, mend)
    if 'fingerprint' not in columns:
        raise ValueError(f'{path} has no fingerprint; {mend}')
    if str(columns.pop('fingerprint')) != mark:
        raise ValueError(
            f'{path} was computed with another model, other data or another tokenizer '
            f'than those of now; delete {path.parent} to begin the stage anew, or put '
            'back what was there'
        )
    return columns


def _fingerprint(
    model: CausalLM, params: Params, parts: dict[str, pipeline.Dataset]
) -> str:
    """Of the reference's architecture and parameters, and of all tokens in order."""
    digest = hashlib.sha256(repr(model.config).encode())
    for path, sums in jax.tree_util.tree_leaves_with_path(_checksums(params)):
        digest.update(f'{jax.tree_util.keystr(path)} {sums.tolist()}'.encode())
    for data in parts.values():
        for example in data.examples:
            parts = (example.prompt, *example.answers)
            parts += (example.labels, example.mismatched)
            if example.probability is not None:
                digest.update(f'p={example.probability!r}'.encode())
            for part in (part for part in parts if part is not None):
                digest.update(f'{np.size(part)}:'.encode())
                digest.update(np.asarray(part, np.int32).tobytes())
    return digest.hexdigest()


def _checksums(params: Params) -> Any:
    """Two sums over the bits of every array: exact, so the same on any mesh."""

    def sums(x: Array) -> Array:
        kind = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
        return jnp.stack([jnp.sum(bits), jnp.sum(bits * bits)])

    return jax.device_get(jax.jit(functools.partial(jax.tree.map, sums))(params))
