"""Best-of-n against a learned reward: how far it goes, and whether gold goes along.

    python -m rlhf_jax.main --workdir runs/quickstart
    python -m experiments.best_of_n --base runs/quickstart --workdir runs/best_of_n \
        --ppo runs/quickstart

Draws N responses to every held-out prompt of a finished run from the policy that its
ppo starts from, scores them by its rewards (proxy) and its judge (gold), and writes the
table of ``evals/best_of_n.py`` as ``best_of_n.json`` and ``.md`` and, as
``best_of_n.png``, both rewards against √KL, after Gao et al. 2022, arXiv 2210.10760,
figure 1; ``--ppo`` adds every rollout of the ppo stages of other runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from rlhf_jax import files
from rlhf_jax.config import build
from rlhf_jax.data import pipeline
from rlhf_jax.data.joining import decode_behind
from rlhf_jax.evals.best_of_n import best_of_n_report, text_ids
from rlhf_jax.evals.policy import Sampled, sample_policy
from rlhf_jax.responses import GOLD
from rlhf_jax.sharding import ParallelConfig, make_mesh
from rlhf_jax.stages import scoring
from rlhf_jax.stages.evaluation import Evaluation
from rlhf_jax.stages.online import Online
from rlhf_jax.stages.run import Run, load_run_tokenizer
from rlhf_jax.stages.sampler import make_sampler
from rlhf_jax.stages.sources import load_policy
from rlhf_jax.types import Array, Generation

_BASE = flags.DEFINE_string('base', 'runs/quickstart', 'Finished run with a reward.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/best_of_n', 'Where to write.')
_SAMPLES = flags.DEFINE_integer(
    'num_samples', 64, 'N, responses per prompt.', lower_bound=1
)
_PROMPTS = flags.DEFINE_string(
    'prompts', None, "Data spec; the run's held-out prompts by default."
)
_PPO = flags.DEFINE_list('ppo', [], 'Runs whose ppo is drawn into the figure.')

TABLE = ('n', 'proxy', 'gold', 'win_rate', 'kl_bound', 'kl')


def load(base: Path, prompts: str | None) -> tuple[Run, Online]:
    """The finished run, and its ppo as it was before training.

    Raises:
        ValueError: no run, no settings of ppo in it, or models that are not finished.
    """
    path = base / 'config.json'
    if not path.exists():
        raise ValueError(f'--base {base} has no config.json; name a finished run')
    config = ConfigDict(json.loads(path.read_text(encoding='utf-8'))['config'])
    if 'ppo' not in config:
        raise ValueError(f'{path} has no ppo section, which names rewards and prompts')
    if prompts is not None:
        config.ppo.eval_prompts = prompts
    (parallel,) = build(config.parallel, ParallelConfig, where='config.parallel')
    run = Run(base, config, make_mesh(parallel), load_run_tokenizer(config))
    return run, run.kind('ppo').load(run, 'ppo', *run.settings('ppo'))


def draw(run: Run, stage: Online, num_samples: int) -> list[Sampled]:
    """N responses to every prompt, scored; in every ``Sampled`` one per prompt."""
    settings, job = stage.settings, stage.evaluation
    policy, params = load_policy(run, settings.init, run.key('best_of_n'))
    sampler = make_sampler(run, settings, job.temperature, policy)
    scorers = scoring.make_scorers(run, job.scorers)

    def statistics(generation: Generation) -> dict[str, Array]:
        # Sampled from the reference itself: its log-probabilities are the sampler's.
        logps = generation.logprobs.sum(-1)
        lengths = generation.response_mask.sum(-1)
        known = {'ref_logprobs': logps, 'kl': 0 * logps, 'lengths': lengths}
        return {**known, 'ended': generation.ended}

    def one(sample: int) -> Sampled:
        key = jax.random.fold_in(run.key('best_of_n'), sample)
        counter = iter(range(len(job.prompts.examples)))
        batches = pipeline.eval_batches(
            job.prompts, job.settings.eval_batch_size, job.settings.prompt_buckets
        )
        return sample_policy(
            lambda batch: sampler(
                params, batch, jax.random.fold_in(key, next(counter))
            ),
            statistics,
            scorers,
            run.tokenizer,
            job.prompts.records,
            batches,
            decode_behind,
        )

    return [one(sample) for sample in range(num_samples)]


def report(job: Evaluation, samples: Sequence[Sampled]) -> list[dict[str, Any]]:
    """The table over n."""
    gold = None
    if GOLD in job.scorers:
        gold = np.stack([sampled.scores[GOLD] for sampled in samples], axis=1)
    return best_of_n_report(
        np.stack([sampled.proxy(job.weights) for sampled in samples], axis=1),
        gold,
        logps=np.stack([sampled.ref_logprobs for sampled in samples], axis=1),
        texts=text_ids(list(zip(*(sampled.responses for sampled in samples)))),
    )


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a page; intervals are 95%, bootstrapped over prompts."""

    def cell(row: Mapping[str, Any], name: str) -> str:
        if name == 'n' or row[name] is None:
            return str(row[name] or '–')
        if row.get(f'{name}_interval') is None:
            return f'{row[name]:.3f}'
        low, high = row[f'{name}_interval']
        return f'{row[name]:.3f} [{low:.3f}, {high:.3f}]'

    names = [name for name in TABLE if name in rows[0]]
    lines = [names, ['---'] * len(names)]
    lines += [[cell(row, name) for name in names] for row in rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def rollouts(folder: Path, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
    """√KL, proxy and gold of every logged rollout of a finished or running ppo."""
    lines = (folder / 'ppo' / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    rows = [json.loads(line) for line in lines]
    kl = np.asarray([row['objective/kl'] for row in rows])
    named = weights.items()
    proxy = [sum(w * row[f'reward/{name}'] for name, w in named) for row in rows]
    points = {'distance': np.sqrt(np.maximum(kl, 0)), 'proxy': np.asarray(proxy)}
    if 'objective/gold' in rows[0]:
        points['gold'] = np.asarray([row['objective/gold'] for row in rows])
    return points


def plot(
    rows: Sequence[Mapping[str, Any]],
    runs: Mapping[str, Mapping[str, np.ndarray]],
    path: Path,
) -> None:
    """Proxy and gold against √KL: best-of-n as a line, rollouts of ppo as dots."""
    matplotlib.use('Agg')
    from matplotlib import pyplot

    titles = {'proxy': 'proxy reward (learned)', 'gold': 'gold reward (true)'}
    names = [name for name in titles if name in rows[0]]
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(4.5 * len(names), 3.6), squeeze=False, sharex=True,
        layout='constrained',
    )  # fmt: skip
    for panel, name in zip(panels[0], names):
        for run, points in runs.items():
            if name in points:
                panel.plot(
                    points['distance'], points[name], '.', alpha=0.4, label=f'ppo {run}'
                )
        values = [row[name] for row in rows]
        ends = np.asarray([row[f'{name}_interval'] for row in rows]).T
        distance = np.sqrt([row['kl'] for row in rows])
        panel.plot(distance, values, 'ko-', markersize=3, label='best of n')
        panel.fill_between(distance, *ends, color='k', alpha=0.15)
        for row, x in zip(rows, distance):
            place = {'xytext': (3, -9), 'textcoords': 'offset points'}
            panel.annotate(str(row['n']), (x, row[name]), fontsize=7, **place)
        panel.set_title(titles[name])
        panel.set_xlabel('√KL to the SFT policy (√nats per sequence)')
        panel.set_ylabel('reward units')
        panel.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    logging.set_verbosity(logging.WARNING)
    workdir = Path(_WORKDIR.value)
    try:
        run, stage = load(Path(_BASE.value), _PROMPTS.value)
        job = stage.evaluation
        points = {Path(x).name: rollouts(Path(x), job.weights) for x in _PPO.value}
        rows = report(job, draw(run, stage, _SAMPLES.value))
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(1)
    workdir.mkdir(parents=True, exist_ok=True)
    result = {
        'base': str(run.workdir),
        'prompts': job.settings.eval_prompts,
        'num_prompts': len(job.prompts.examples),
        'num_samples': _SAMPLES.value,
        'temperature': job.temperature,
        'best_of_n': rows,
    }
    files.write_json(workdir / 'best_of_n.json', result)
    (workdir / 'best_of_n.md').write_text(markdown(rows), encoding='utf-8')
    plot(rows, points, workdir / 'best_of_n.png')
    print(markdown(rows))


if __name__ == '__main__':
    app.run(main)
