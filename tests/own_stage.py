"""A stage of a user's own: keeps the comparisons of which a reward model is sure."""

import dataclasses

import numpy as np

from rlhf_jax import files, sharding
from rlhf_jax.algos.rm import pair_scores
from rlhf_jax.data import pipeline, sources
from rlhf_jax.evals.preference import KINDS, score_pairs
from rlhf_jax.pages.drawing import BLUE, HALF, Plot, blank, to_svg
from rlhf_jax.pages.page import Page, Verdict
from rlhf_jax.stages.kinds import Makes
from rlhf_jax.stages.run import RECORDS, Result
from rlhf_jax.stages.settings import DataSpec, ModelName
from rlhf_jax.stages.sources import check_trained_score, frozen, load_scalar, resolve


@dataclasses.dataclass(frozen=True, kw_only=True)
class SureSettings:
    comparisons: DataSpec
    reward_model: ModelName
    min_margin: float = 0.0  # reward units, of the chosen response over the rejected
    max_length: int = 128  # tokens; longer ones are left out and counted
    batch_size: int = 64  # comparisons at a time


def verdict(e):
    return Verdict('pass' if e['kept'] else 'fail', f'{e["kept"]} kept', 'at least one')


def draw(stage, rows, e):
    figure, ((axes,),) = blank(HALF, 2.9)
    axes.stairs(e['counts'], e['edges'], fill=True, color=BLUE)
    axes.axvline(e['min_margin'])
    axes.set(xlabel='margin (reward units)', ylabel='comparisons')
    svg = to_svg(figure, f'{stage}-margins', 'histogram of the margins')
    return [Plot('Margins', svg, 'What lies right of the line is kept.')], []


SETTINGS = (SureSettings,)
FACTS = (('Comparisons', 'comparisons', ''), ('Mean margin', 'margin', 'reward units'))
PAGE = Page(title='Sure comparisons', verdict=verdict, facts=FACTS, draw=draw)


def makes(settings):
    return Makes(records='comparisons')


def reads(settings):
    return {'comparisons': 'comparisons'}


def load(run, stage, settings):
    sharding.check_batch_size(settings.batch_size, run.mesh, f'config.{stage}')
    source = resolve(run, settings.reward_model)
    check_trained_score(source, f'config.{stage}.reward_model')
    spec, tokenizer = settings.comparisons, source.tokenizer or run.tokenizer
    data = pipeline.load_comparisons(spec, tokenizer, max_length=settings.max_length)
    return stage, settings, data


def train(run, job):
    stage, settings, data = job
    model, params = load_scalar(run, settings.reward_model, run.key(stage), 'reward')
    score = run.compile(lambda p, batch: pair_scores(p, batch, model=model), **KINDS)
    batches = pipeline.eval_batches(data, settings.batch_size, (settings.max_length,))
    scores = score_pairs(score, frozen(run, model, params), batches).astype(float)
    margins = scores[:, 0] - scores[:, 1]
    found = {r.where: r.fields for r in sources.read(settings.comparisons)}
    kept = [
        {**found[record.where], 'reward_margin': margin}
        for record, margin in zip(data.records, margins.tolist())
        if margin > settings.min_margin
    ]
    files.write_rows(run.stage_dir(stage) / RECORDS, kept)
    report = {'comparisons': len(margins), 'kept': len(kept), 'margin': margins.mean()}
    counts, edges = (x.tolist() for x in np.histogram(margins, 30))
    report |= {'min_margin': settings.min_margin, 'counts': counts, 'edges': edges}
    return Result(steps=0, seconds={}, data={'read': data}, evaluation=report)
