"""Every method on the same model, data, budget and judge; several seeds.

    python -m rlhf_jax.main --config configs/ladder.py:seed=0 --workdir runs/ladder0
    python -m experiments.compare --base 'runs/ladder{seed}' --seeds 0 --workdir DIR

The base of a seed is a finished run with stages sft and rm. Methods that learn from
comparisons see the same number of them; methods that sample write the same number of
responses and ask the same reward model. All are judged by the gold reward of their
answers to the held-out prompts against those of the SFT policy, in
``stages/evaluation.py``. Writes ``compare.json``, ``compare.md`` and ``compare.png``;
what ``compare.json`` in DIR holds, and finished runs there, are not run again, so that
methods and seeds can be added: those of docs/recipes.md are in
experiments/results. The column of time is not of these runs, which may share a machine:
it is what ``experiments/pace.py`` has left in DIR, if it was run there.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from absl import app, flags, logging

from rlhf_jax.main import launch

# The recipe of every method and its argument, by family; the families share a budget.
FAMILIES = {
    'reward model, sampling': {
        'ppo': ('quickstart', ''),
        **{
            name: ('policy_gradient', f'name={name},')
            for name in (
                'rloo',
                'grpo',
                'dr_grpo',
                'dapo',
                'reinforce_pp',
                'remax',
                'gspo',
                'cispo',
            )
        },
        'online_dpo': ('online_dpo', ''),
        'expert_iteration': ('expert_iteration', ''),
    },
    'comparisons': {
        name: ('preference', f'loss={name},')
        for name in (
            'dpo',
            'robust_dpo',
            'r_dpo',
            'ld_dpo',
            'ipo',
            'hinge',
            'kto',
            'bco',
            'simpo',
            'orpo',
            'cpo',
            'nca',
            'exo',
            'sppo',
            'aot',
            'apo_zero',
            'apo_down',
            'discopop',
        )
    },
}
METHODS = {name: how for family in FAMILIES.values() for name, how in family.items()}
COLUMNS = ('win_rate', 'gold_reward_after', 'kl', 'length_after', 'distinct_after')
# What is kept of a run: the rest of its report stands in its own folder.
KEPT = (*COLUMNS, 'gold_reward_before', 'win_rate_interval', 'ended_after', 'steps')


def run_one(method: str, base: Path, workdir: Path, seed: int, smoke: bool) -> Any:
    """Runs one method from a finished base; returns what is kept of its report."""
    recipe, arg = METHODS[method]
    module = importlib.import_module(f'configs.{recipe}')
    arg += f'from={base},seed={seed},smoke={smoke}'
    config = module.get_config(arg)
    (stage,) = config.stages
    report = launch(config, workdir)
    jax.clear_caches()  # the programs of the next run are others
    return {name: report['stages'][stage][name] for name in KEPT}


def read(path: Path, smoke: bool) -> dict[str, dict[str, Any]]:
    """The runs that ``compare.json`` holds, by method and seed; none without a file.

    Raises:
        ValueError: they are smoke runs and these are not, or the reverse.
    """
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding='utf-8'))
    if content['smoke'] != smoke:
        raise ValueError(
            f'{path} holds runs with smoke={content["smoke"]}, this command has '
            f'smoke={smoke}; give another --workdir'
        )
    return content['runs']


def read_pace(path: Path) -> dict[str, float]:
    """Time of learning over PPO's, by method, as ``experiments/pace.py`` has left it;
    none without a file.
    """
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding='utf-8'))['over_ppo']


def summarise(
    results: dict[str, dict[str, Any]], over_ppo: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Means over seeds, and the lowest of the lower ends of the win rate's interval.

    Args:
        results: runs by method and seed.
        over_ppo: time of learning over PPO's, by method; None in the table without.
    """
    table = {}
    for method, by_seed in results.items():
        runs = list(by_seed.values())
        row = {c: float(np.mean([run[c] for run in runs])) for c in COLUMNS}
        row['seeds'] = len(runs)
        row['lowest_end'] = min(run['win_rate_interval'][0] for run in runs)
        ends = [run['win_rate'] for run in runs]
        row['win_rate_range'] = [min(ends), max(ends)]
        row['gold_gain'] = float(
            np.mean([r['gold_reward_after'] - r['gold_reward_before'] for r in runs])
        )
        row['time_to_ppo'] = over_ppo.get(method)
        table[method] = row
    return table


def to_markdown(table: dict[str, dict[str, Any]]) -> str:
    """The table for people, best win rate of a family first."""
    lines = [
        '| method | seeds | win rate (range) | lowest 95% end | gold gain | KL, nats '
        '| length, tokens | distinct bigrams | time, PPO = 1 |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for family, members in FAMILIES.items():
        there = [name for name in members if name in table]
        if there:
            lines.append(f'| *{family}* |' + ' |' * 8)
        for name in sorted(there, key=lambda name: -table[name]['win_rate']):
            row = table[name]
            low, high = row['win_rate_range']
            spread = f' ({low:.3f}–{high:.3f})' if row['seeds'] > 1 else ''
            time = row['time_to_ppo']
            cells = [
                f'`{name}`',
                str(row['seeds']),
                f'{row["win_rate"]:.3f}{spread}',
                f'{row["lowest_end"]:.3f}',
                f'{row["gold_gain"]:+.2f}',
                f'{row["kl"]:.1f}',
                f'{row["length_after"]:.1f}',
                f'{row["distinct_after"]:.3f}',
                '–' if time is None else f'{time:.2f}',
            ]
            lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Gain in gold reward against √KL: a point per run, a label per method."""
    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, 2, figsize=(11, 4.6), sharey=True, layout='constrained'
    )
    for panel, (family, members) in zip(panels, FAMILIES.items()):
        for i, name in enumerate(n for n in members if n in results):
            runs = results[name].values()
            x = np.sqrt([max(run['kl'], 0) for run in runs])
            y = [run['gold_reward_after'] - run['gold_reward_before'] for run in runs]
            color = pyplot.get_cmap('tab20')(i % 20)
            panel.scatter(x, y, color=color, s=22, label=name)
        panel.axhline(0, color='#667381', lw=0.8)
        panel.set(title=family, xlabel='√KL to the SFT policy (√nats per sequence)')
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, ncols=2)
    panels[0].set_ylabel('gain in gold reward over SFT')
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    logging.set_verbosity(logging.FATAL)  # Orbax reports every rename
    values = flags.FLAGS
    workdir = Path(values.workdir)
    unknown = sorted(set(values.methods) - METHODS.keys())
    if unknown:
        raise app.UsageError(f'--methods={unknown}: known are {", ".join(METHODS)}')
    path = workdir / 'compare.json'
    try:
        results = read(path, values.smoke)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    for seed in values.seeds:
        base = Path(values.base.format(seed=seed)).absolute()
        for method in values.methods:
            if seed in results.get(method, {}):
                continue
            run_dir = workdir / f'{method}_{seed}'
            run = run_one(method, base, run_dir, int(seed), values.smoke)
            results.setdefault(method, {})[seed] = run
            text = json.dumps({'smoke': values.smoke, 'runs': results}, indent=1)
            path.write_text(text, encoding='utf-8')
    text = to_markdown(summarise(results, read_pace(workdir / 'pace.json')))
    (workdir / 'compare.md').write_text(text, encoding='utf-8')
    plot(results, workdir / 'compare.png')
    print(text)


def run() -> None:
    """Entry point; defines the flags, so that an import of this file defines none."""
    flags.DEFINE_string('base', 'runs/ladder{seed}', 'Finished run of a seed.')
    flags.DEFINE_string('workdir', 'runs/compare', 'Where to write.')
    flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds to run.')
    flags.DEFINE_list('methods', list(METHODS), 'Methods to run.')
    flags.DEFINE_bool('smoke', False, 'Tiny runs, to see that it works.')
    app.run(main)


if __name__ == '__main__':
    run()
