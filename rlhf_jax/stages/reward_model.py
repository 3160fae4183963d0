"""The kind reward_model: scores are learned from judged data, by ``rm_step``.

After training the score bias is set. With ``members`` above 1 all is done for an
ensemble, whose parameters and scores have an axis more. The rest is shared with
``stages/offline.py``. Read ``stages/preference.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import numpy as np

from rlhf_jax import files, reward_losses
from rlhf_jax.algos.ensemble import ensemble_rm_step, over_members, stack_members
from rlhf_jax.algos.rm import (
    RMHParams,
    pair_scores,
    rm_step,
    step_scores,
    text_scores,
)
from rlhf_jax.checkpoint import ScoreFacts
from rlhf_jax.data import pipeline
from rlhf_jax.data.clock import same_date
from rlhf_jax.data.examples import padded_labels
from rlhf_jax.data.loading import Limits
from rlhf_jax.data.reward_data import Wanted, load_judgements
from rlhf_jax.data.tokenizer import load_scoring_tokenizer
from rlhf_jax.evals import judgements, preference
from rlhf_jax.evals.ensemble import ensemble_report
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.pages import reward_model as pages
from rlhf_jax.ranges import at_least
from rlhf_jax.reward_losses import RewardLoss
from rlhf_jax.rewards import reward_model_scores
from rlhf_jax.sharding import init_sharded
from rlhf_jax.stages.console import tell_left_out
from rlhf_jax.stages.kinds import Choice, Makes
from rlhf_jax.stages.offline import (
    Offline,
    check_offline,
    fit,
    how_sure,
    known_gold,
    known_kinds,
)
from rlhf_jax.stages.run import Result, Run, records_of
from rlhf_jax.stages.scoring import reads_alike
from rlhf_jax.stages.settings import DataSpec, OfflineSettings
from rlhf_jax.stages.sources import Source, load_scalar, resolve
from rlhf_jax.types import Params, PRNGKey

# Of a report, what is logged during training.
IN_BRIEF = ('accuracy', 'sign_accuracy', 'loss', 'rmse', 'kendall_tau', 'spread')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings(OfflineSettings):
    """A reward model. The settings of its loss stand beside these; None is the loss's
    own default, see ``config.unset``.
    """

    # A module of rlhf_jax.reward_losses, or package.module; it says which data it needs
    loss: str = 'bradley_terry'
    tokenizer: str | None = None  # of its model, when it is not the run's
    # of an ensemble; each has a head and a data order of its own
    members: Annotated[int, at_least(1)] = 1
    references: DataSpec | None = None  # demonstrations whose mean score becomes 0
    num_references: Annotated[int, at_least(1)] = 512
    heads: tuple[str, ...] = ()  # dimensions with a score each; () for a single score
    rating_range: tuple[float, ...] | None = None  # lowest, highest; needed for ratings
    rating_unit: Literal['given', 'range'] = 'given'  # 'range': it becomes 0 to 1
    step_separator: str = '\n'  # between the steps of a response


SETTINGS = (RewardSettings, RMHParams)
CHOICE = Choice('loss', reward_losses.load)
PAGE = pages.PAGE
# What the losses learn from, by their ``DATA``, as the readers call it.
FORMS = {
    'pairs': 'comparisons',
    'rankings': 'rankings',
    'ratings': 'ratings',
    'steps': 'steps',
}


@dataclasses.dataclass(frozen=True)
class RewardJob:
    """A checked stage, ready to train."""

    offline: Offline
    loss: RewardLoss
    loss_hp: Any  # loss.HParams
    references: pipeline.Dataset | None  # whose mean score becomes 0


def makes(
    settings: RewardSettings, hp: RMHParams, loss: RewardLoss, loss_hp: Any
) -> Makes:
    """A reward model, or an ensemble of them."""
    separator = settings.step_separator if loss.DATA == 'steps' else None
    return Makes(
        parts={'reward': settings.init},
        members=settings.members,
        facts=ScoreFacts(tuple(settings.heads), separator),
        tokenizer=settings.tokenizer,
    )


def reads(
    settings: RewardSettings, hp: RMHParams, loss: RewardLoss, loss_hp: Any
) -> dict[str, str]:
    """What the loss learns from."""
    form = FORMS[loss.DATA]
    return {'train': form, 'eval': form, 'references': 'demonstrations'}


def load(
    run: Run,
    stage: str,
    settings: RewardSettings,
    hp: RMHParams,
    loss: RewardLoss,
    loss_hp: Any,
) -> RewardJob:
    """Reads and checks.

    Raises:
        ValueError: data of another kind than the loss wants, references beside data
            that say where the zero is, or whatever is wrong with the rest.
    """
    where, name = f'config.{stage}', settings.loss
    source = resolve(run, settings.init)
    if source.members > 1:
        raise ValueError(
            f'{where}.init={settings.init!r} is an ensemble; start from a single '
            'model, e.g. from the policy that its members started from'
        )
    tokenizer = _scoring_tokenizer(run, where, settings, source)
    _check_kind(where, settings, loss, source)
    limits = Limits(settings.buckets[-1], **settings.reading)
    references = None
    if settings.references is not None:
        references = pipeline.load_demonstrations(
            settings.references,
            tokenizer,
            max_length=limits.length,
            **settings.reading,
        )
        references = tell_left_out(references).take(settings.num_references)
    wanted = Wanted(
        kind=loss.DATA,
        by=f'{where}.loss={name!r}',
        heads=settings.heads,
        rating_range=settings.rating_range,
        rating_unit=settings.rating_unit,
        step_separator=settings.step_separator,
    )

    def read(spec: str) -> pipeline.Dataset:
        data = load_judgements(spec, tokenizer, wanted, limits)
        if settings.members > 1 and data.counts.what != 'comparisons':
            raise ValueError(
                f'{where}.members={settings.members}: an ensemble learns from plain '
                f'comparisons, and {spec} gives {data.counts.what}; use members=1'
            )
        if references is not None and _has_zero(data):
            name = 'train' if spec == settings.train else 'eval'
            raise ValueError(
                f'{where}.references={settings.references!r} would move the zero of '
                f'the scores, and {where}.{name}={spec!r} says where it is, by '
                f'completions that are null; set {where}.references=None'
            )
        return data

    offline = check_offline(
        run,
        stage,
        settings,
        hp,
        source,
        read,
        tokenizer=tokenizer,
        members=settings.members,
    )
    return RewardJob(offline, loss, loss_hp, references)


def _has_zero(data: pipeline.Dataset) -> bool:
    """Whether a ranking holds the virtual response, whose score is 0."""
    return not data.examples.columns['answers'].values.lengths.all()


def _check_kind(
    where: str, settings: RewardSettings, loss: RewardLoss, source: Source
) -> None:
    """What the kinds of data do not go together with."""
    if len(set(settings.heads)) < len(settings.heads):
        raise ValueError(f'{where}.heads={settings.heads!r} names a dimension twice')
    if loss.DATA != 'pairs' and settings.references is not None:
        raise ValueError(
            f'{where}.references={settings.references!r}: only comparisons leave the '
            f'zero of the scores open, and {where}.loss={settings.loss!r} does not '
            f'learn from them; set {where}.references=None'
        )
    bounds = settings.rating_range
    if loss.DATA == 'ratings' and (
        bounds is None or len(bounds) != 2 or not bounds[0] < bounds[1]
    ):
        raise ValueError(
            f'{where}.rating_range={bounds!r}: declare the lowest and the highest '
            'rating that there can be, such as (0, 4)'
        )
    if loss.DATA == 'steps':
        encoder = source.config().attention == 'bidirectional'
        if settings.heads or encoder:
            what = f'heads={settings.heads!r}' if settings.heads else 'an encoder'
            raise ValueError(
                f'{where}.loss={settings.loss!r} scores steps, which {what} cannot; '
                'use a decoder with a single score'
            )
        if not settings.step_separator:
            raise ValueError(f"{where}.step_separator is empty; use e.g. '\\n'")


def _scoring_tokenizer(
    run: Run, where: str, settings: RewardSettings, source: Source
) -> Any:
    """Its own tokenizer, where that differs from the run's."""
    if settings.tokenizer is None:
        return run.tokenizer
    tokenizer = load_scoring_tokenizer(settings.tokenizer)
    same_date(tokenizer, run.tokenizer)
    brought = source.tokenizer
    if brought is not None and brought.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f'{where}.init={settings.init!r} was trained with another tokenizer than '
            f'{where}.tokenizer={settings.tokenizer!r}; start from a model of that '
            'tokenizer, or use that of the model'
        )
    return run.tokenizer if reads_alike(tokenizer, run.tokenizer) else tokenizer


def train(run: Run, job: RewardJob) -> Result:
    """Trains, sets the score bias and evaluates."""
    clock = time.monotonic()
    offline, settings = job.offline, job.offline.settings
    key = run.key(offline.stage)
    model, params = _start(run, offline, key)
    examine = examination(
        run,
        offline.eval,
        model,
        settings.batch_size,
        settings.buckets,
        settings.members,
    )

    def evaluate(params: Params) -> dict[str, float]:
        report = examine(params)
        return {name: report[name] for name in IN_BRIEF if name in report}

    spent = {'setup': time.monotonic() - clock}
    step = functools.partial(
        ensemble_rm_step if settings.members > 1 else rm_step,
        loss=job.loss,
        loss_hp=job.loss_hp,
    )
    state, seconds = fit(run, offline, step, model, params, key, evaluate, spent)
    clock = time.monotonic()
    params, extra = state.params, {}
    if job.references is not None:
        params, extra = _center(run, offline, job.references, model, params)
    report = {**examine(params), **extra, **_labellers_ceiling(run, offline.stage)}
    report['loss_settings'] = {'name': settings.loss, **dataclasses.asdict(job.loss_hp)}
    seconds['eval'] = time.monotonic() - clock
    is_own = offline.tokenizer is not run.tokenizer
    return Result(
        steps=offline.num_steps,
        init=settings.init,
        params={'reward': params},
        configs={'reward': model.config},
        members=settings.members,
        facts=makes(settings, offline.hp, job.loss, job.loss_hp).facts,
        tokenizer=offline.tokenizer if is_own else None,
        seconds=seconds,
        data={'train': offline.train, 'eval': offline.eval},
        evaluation=report,
    )


def _labellers_ceiling(run: Run, stage: str) -> dict[str, float]:
    """What the labellers of the held-out data, else of the training data, let a reward
    model reach, as their label stages have it (``labels/agreement.py``); the lowest of
    several.
    """
    written = run.config[stage]  # where records of stages have their names
    for spec in (written.eval, written.train):
        reports = [
            files.read_json(path, 'the label stage writes it again')
            for name in records_of(spec)
            if (path := run.source_dir(name) / 'eval.json').exists()
        ]
        if found := [report['ceiling'] for report in reports if 'ceiling' in report]:
            return {'labellers_ceiling': min(found)}
    return {}


def examination(
    run: Run,
    data: pipeline.Dataset,
    model: ScalarModel,
    batch_size: int,
    buckets: tuple[int, ...],
    members: int = 1,
) -> Callable[[Params], dict[str, Any]]:
    """params -> the report on judged data, whatever their kind.

    Args:
        run: the run.
        data: held out.
        model: the reward model.
        batch_size: examples at a time.
        buckets: static lengths in tokens.
        members: of an ensemble, whose parameters are stacked.
    """
    examples, what = data.examples, data.counts.what

    def outputs(fn: Any, collect: Any) -> Callable[[Params], Any]:
        compiled = _compile(run, members, functools.partial(fn, model=model))
        return lambda params: collect(
            compiled, params, pipeline.eval_batches(data, batch_size, buckets)
        )

    if what == 'rankings':
        scores_of, facts = outputs(text_scores, preference.score_pairs), _ranked(data)
        return lambda params: judgements.ranking_report(
            scores_of(params), *facts, model.heads, examples.columns['probability']
        )
    if what == 'ratings':
        scores_of = outputs(text_scores, preference.score_pairs)
        ratings = padded_labels(examples.columns['labels'], 1)[:, 0]
        rated = np.isfinite(ratings)
        return lambda params: judgements.rating_report(
            scores_of(params)[:, 0], np.nan_to_num(ratings), rated, model.heads
        )
    if what == 'responses in steps':
        scores_of = outputs(step_scores, judgements.score_steps)
        right = [labels[:, 0] > 0 for labels in examples.columns['labels']]
        return lambda params: judgements.step_report(scores_of(params), right)
    scores_of = outputs(pair_scores, preference.score_pairs)
    report_of = functools.partial(
        preference.preference_report,
        lengths=np.asarray([list(map(len, e.answers)) for e in examples]),
        gold=known_gold(data.records),
        kinds=known_kinds(data.records),
        **how_sure(examples),
    )
    if members > 1:
        return lambda params: ensemble_report(scores_of(params), report_of)
    return lambda params: report_of(scores_of(params))


def _ranked(data: pipeline.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Ranks [N, K, H], response tokens [N, K] and true rewards [N, K] of rankings."""
    columns = data.examples.columns
    ranks = padded_labels(columns['labels'], columns['answers'].longest)
    ranks = np.nan_to_num(ranks, nan=-1).astype(int)
    lengths = np.zeros(ranks.shape[:2], int)
    gold = np.zeros(ranks.shape[:2])
    is_known = all(record.meta.get('gold') is not None for record in data.records)
    for i, (example, record) in enumerate(zip(data.examples, data.records)):
        lengths[i, : len(example.answers)] = [len(a) for a in example.answers]
        if is_known:
            gold[i, : len(example.answers)] = record.meta['gold']
    return ranks, lengths, gold if is_known else None


def _start(run: Run, job: Offline, key: PRNGKey) -> tuple[ScalarModel, Params]:
    """The model and where it starts; the members of an ensemble, stacked, each with a
    key of its own for what is not read from ``init``.
    """
    init, members = job.settings.init, job.settings.members
    if members == 1:
        return load_scalar(run, init, key, 'reward', job.settings.heads)
    loaded = [
        load_scalar(run, init, jax.random.fold_in(key, member), 'reward', ())
        for member in range(members)
    ]
    trees = [params for _, params in loaded]
    return loaded[0][0], init_sharded(stack_members, run.mesh, trees)


def _compile(run: Run, members: int, fn: Any) -> Callable[..., Any]:
    """``fn(params, batch)`` compiled; for an ensemble it gives [B, M, …]."""
    fn = fn if members == 1 else over_members(fn)
    return run.compile(fn, **preference.KINDS)


def _center(
    run: Run, job: Offline, references: pipeline.Dataset, model: Any, params: Params
) -> tuple[Params, dict[str, Any]]:
    """Shifts the bias so that the references score 0 on average, by every member of an
    ensemble; checks the padding side.

    Source: Stiennon et al. 2020, arXiv 2009.01325, §3.4; the check: Huang et al. 2024,
        arXiv
    2403.17031, who flag a gap above 1e-2.
    """
    scores_of = _compile(
        run,
        job.members,
        lambda params, batch: reward_model_scores(
            params, batch.tokens, batch.mask, model=model
        ),
    )

    def score(params: Params, left: bool) -> np.ndarray:
        rows = []
        for batch in pipeline.eval_batches(
            references, job.settings.batch_size, job.settings.buckets
        ):
            real = np.asarray(batch.loss_mask).any(-1)
            if left:
                order = np.argsort(batch.mask, axis=-1, kind='stable')
                batch = jax.tree.map(
                    lambda x, o=order: np.take_along_axis(x, o, -1), batch
                )
            rows.append(np.asarray(scores_of(params, batch))[real])
        return np.concatenate(rows)

    raw = score(params, left=False)
    gap = np.abs(raw - score(params, left=True)).max()
    head = {**params['head'], 'bias': params['head']['bias'] - raw.mean(0)}
    params = {**params, 'head': head}
    centred = score(params, left=False)
    return params, {
        'mean_reference_score': float(centred.mean()),
        'reference_score_std': float(centred.std()),
        'padding_gap': float(gap),
    }
