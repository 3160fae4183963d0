"""One reward model against an ensemble of five, under noisy labels.

    python -m rlhf_jax.main --workdir runs/quickstart
    python -m experiments.ensembles --base runs/quickstart --workdir runs/ensembles

A quarter of the labels is turned round. From the SFT model of a finished quickstart, a
single reward model and an ensemble are trained on them, and PPO starts from the same
policy and the same critic against each: the single model, and the mean, the worst and
the uncertainty-weighted score of the ensemble, at the same small KL coefficient and for
as many rollouts. After Coste et al. 2023, arXiv 2310.02743. Writes ``ensembles.json``,
``ensembles.md`` and ``ensembles.png`` into the work directory; each run resumes like
any other. ``--smoke`` makes everything tiny and proves nothing but that it runs.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from configs.quickstart import get_config
from experiments.overoptimisation import plot, run_ppo, smooth
from rlhf_jax.evals.policy import mean_interval
from rlhf_jax.main import launch

NOISY = 'python:rlhf_jax.datasets.tiny_tldr:comparisons?flipped_percent='
# What decides the numbers, beside the base; written beside them.
SETTINGS = (
    'seeds',
    'rollouts',
    'members',
    'kl_coef',
    'uncertainty_coef',
    'flipped_percent',
)
# By name: which reward model, and how the scores of its members become one.
METHODS = {
    'single': ('single', None),
    'mean': ('ensemble', 'mean'),
    'worst': ('ensemble', 'worst'),
    'uncertainty': ('ensemble', 'uncertainty'),
}


def train_rewards(base: Path, workdir: Path, argument: str) -> dict[str, Any]:
    """Trains the single model and the ensemble; their evaluations by name."""
    reports = {}
    for name, members in (('single', 1), ('ensemble', flags.FLAGS.members)):
        config = get_config(argument)
        config.stages = ('rm',)
        config.rm.init = str(base / 'sft')
        config.rm.train = f'{NOISY}{flags.FLAGS.flipped_percent}'
        config.rm.members = members
        launch(config, workdir / name)
        path = workdir / name / 'rm' / 'eval.json'
        reports[name] = json.loads(path.read_text(encoding='utf-8'))
    return reports


def optimise(base: Path, workdir: Path, argument: str, method: str) -> dict[str, Any]:
    """Runs PPO against one score: the rows of its metrics, and of its samples."""
    values = flags.FLAGS
    which, combine = METHODS[method]
    source = {'model': str((workdir / which / 'rm').absolute())}
    if combine is not None:
        source |= {'combine': combine, 'uncertainty_coef': values.uncertainty_coef}
    settings = {
        'init': str(base / 'sft'),
        'rewards': {'rm': source},
        'critic': str((workdir / 'single' / 'rm').absolute()),
        'kl_coef': values.kl_coef,
        'num_samples': 100_000,  # all prompts: the intervals are over them
    }
    if not values.smoke:
        settings['num_rollouts'] = values.rollouts
    folder = workdir / f'ppo_{method}'
    rows = run_ppo(folder, argument, settings)
    text = (folder / 'ppo' / 'samples.jsonl').read_text(encoding='utf-8')
    # Not by splitlines: a text may hold line separators of its own.
    samples = [json.loads(line) for line in text.split('\n') if line]
    return {'rows': rows, 'samples': samples}


def describe(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of one method over its seeds.

    ``gold`` is the mean over seeds and held-out prompts; its interval is over the
    prompts, whose rewards are first averaged over the seeds.
    """
    gold = gold_rewards(runs)
    last = [row for run in runs for row in run['rows'][-10:]]
    peaks = [smooth(column(run['rows'], 'objective/gold')).max() for run in runs]
    result = {
        'gold': float(gold.mean()),
        'gold_interval': mean_interval(gold.mean(axis=0)),
        'gold_by_seed': gold.mean(axis=1).tolist(),
        'gold_peak_of_rollouts': float(np.mean(peaks)),
        'kl_of_last_rollouts': float(column(last, 'objective/kl').mean()),
        'proxy_of_last_rollouts': float(column(last, 'objective/proxy_reward').mean()),
    }
    if 'reward/rm/std' in last[0]:
        result['std_of_last_rollouts'] = float(column(last, 'reward/rm/std').mean())
    return result


def column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """One number of every row."""
    return np.asarray([row[name] for row in rows])


def gold_rewards(runs: list[dict[str, Any]]) -> np.ndarray:
    """[seeds, prompts] of the trained policies."""
    return np.stack([column(run['samples'], 'gold_after') for run in runs])


def compare(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Differences of gold between all pairs of methods, on the same prompts."""
    result = []
    for one, other in itertools.combinations(runs, 2):
        gap = (gold_rewards(runs[other]) - gold_rewards(runs[one])).mean(axis=0)
        result.append(
            {
                'difference': f'{other} − {one}',
                'gold': float(gap.mean()),
                'interval': mean_interval(gap),
            }
        )
    return result


def markdown(results: dict[str, Any]) -> str:
    """The tables for people."""

    def interval(ends: list[float]) -> str:
        return f'[{ends[0]:.3f}, {ends[1]:.3f}]'

    lines = ['| reward | gold | 95% over prompts | by seed | peak | √KL | proxy |']
    lines.append('|---|---|---|---|---|---|---|')
    for name, row in results['methods'].items():
        seeds = ', '.join(f'{x:.3f}' for x in row['gold_by_seed'])
        root = max(row['kl_of_last_rollouts'], 0) ** 0.5
        ends = interval(row['gold_interval'])
        lines.append(
            f'| {name} | {row["gold"]:.3f} | {ends} | {seeds} '
            f'| {row["gold_peak_of_rollouts"]:.3f} | {root:.2f} '
            f'| {row["proxy_of_last_rollouts"]:.3f} |'
        )
    lines += ['', '| difference of gold | mean | 95% over prompts |', '|---|---|---|']
    for row in results['differences']:
        ends = interval(row['interval'])
        lines.append(f'| {row["difference"]} | {row["gold"]:.3f} | {ends} |')
    lines += ['', '| reward model | seed | accuracy | 95% |', '|---|---|---|---|']
    for seed, reports in results['reward_models'].items():
        members = enumerate(reports['ensemble']['members'])
        table = {'single': reports['single'], 'ensemble, mean': reports['ensemble']}
        table |= {f'member {i}': report for i, report in members}
        for name, report in table.items():
            ends = interval(report['interval'])
            lines.append(f'| {name} | {seed} | {report["accuracy"]:.3f} | {ends} |')
    return '\n'.join([*lines, ''])


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    base, workdir = Path(values.base).absolute(), Path(values.workdir)
    reports: dict[str, Any] = {}
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for seed in values.seeds:
        argument = f'seed={seed}' + (',smoke' if values.smoke else '')
        place = workdir / f'seed_{seed}'
        reports[seed] = train_rewards(base, place, argument)
        for method in METHODS:
            runs[method].append(optimise(base, place, argument, method))
    before = column(runs['single'][0]['samples'], 'gold_before')
    results = {
        'settings': {name: values[name].value for name in SETTINGS},
        'gold_before': float(before.mean()),
        'methods': {method: describe(of) for method, of in runs.items()},
        'differences': compare(runs),
        'reward_models': reports,
    }
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (workdir / 'ensembles.json').write_text(text, encoding='utf-8')
    (workdir / 'ensembles.md').write_text(markdown(results), encoding='utf-8')
    curves = {name: [run['rows'] for run in of] for name, of in runs.items()}
    plot(curves, workdir / 'ensembles.png')
    print(markdown(results))


def run() -> None:
    """Entry point; defines the flags, so that an import of this file defines none."""
    flags.DEFINE_string('base', 'runs/quickstart', 'Finished quickstart run.')
    flags.DEFINE_string('workdir', 'runs/ensembles', 'Where to write.')
    flags.DEFINE_list('seeds', ['0'], 'Of the reward models and of PPO.')
    flags.DEFINE_integer('rollouts', 120, 'Rollouts of every PPO run.')
    flags.DEFINE_integer('members', 5, 'Of the ensemble.')
    flags.DEFINE_float('kl_coef', 0.01, 'β of every PPO run.')
    flags.DEFINE_float('uncertainty_coef', 0.1, 'λ of the uncertainty-weighted score.')
    flags.DEFINE_integer('flipped_percent', 25, 'Labels turned round.')
    flags.DEFINE_bool('smoke', False, 'Everything tiny.')
    app.run(main)


if __name__ == '__main__':
    run()
