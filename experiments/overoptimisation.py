"""PPO with and without its KL anchor: proxy up, gold down.

    python -m rlhf_jax.main --workdir runs/quickstart
    python -m experiments.overoptimisation --base runs/quickstart --workdir
    runs/overoptimisation

Starts PPO from the SFT and reward models of a finished quickstart, once per KL
coefficient, and plots the learned (proxy) and the true (gold) reward of every rollout
against √KL, after Gao et al. 2022, arXiv 2210.10760, figure 1. Writes
``overoptimisation.png`` and ``.json`` into the work directory. Each run resumes like
any other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import app, flags, logging

from configs.quickstart import get_config
from rlhf_jax.main import launch


def run_ppo(
    workdir: Path, argument: str, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Runs PPO at a constant learning rate; returns the rows of its metrics.

    Args:
        workdir: of the run.
        argument: of the quickstart config, e.g. 'seed=1'.
        settings: what differs in its ``ppo``.
    """
    config = get_config(argument)
    config.stages = ('ppo',)
    config.ppo.update(settings)
    # A constant rate: the question is where optimisation leads, not where it is slowed.
    config.ppo.optim.schedule = config.ppo.critic_optim.schedule = 'constant'
    config.ppo.optim.learning_rate = 3e-4
    launch(config, workdir)
    lines = (workdir / 'ppo' / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [json.loads(line) for line in lines]


def smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Centred running mean that shortens at the ends."""
    half = width // 2
    return np.asarray(
        [values[max(i - half, 0) : i + half + 1].mean() for i in range(len(values))]
    )


def plot(runs: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Proxy and gold reward against √KL, a colour per label, a curve per run."""
    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, 2, figsize=(9, 3.6), sharex=True, layout='constrained'
    )
    names = (
        ('objective/proxy_reward', 'proxy reward (learned)'),
        ('objective/gold', 'gold reward (true)'),
    )
    for panel, (name, title) in zip(panels, names):
        for number, (label, curves) in enumerate(runs.items()):
            color = f'C{number}'
            for rows in curves:
                distance = np.sqrt(np.maximum([row['objective/kl'] for row in rows], 0))
                values = np.asarray([row[name] for row in rows])
                panel.plot(distance, values, '.', alpha=0.25, markersize=4, color=color)
                panel.plot(smooth(distance), smooth(values), color=color, label=label)
                label = None  # one entry of the legend is enough
        panel.set_title(title)
        panel.set_xlabel('√KL to the SFT policy (√nats per sequence)')
        panel.set_ylabel('reward units')
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=130)


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    base, workdir = Path(values.base).absolute(), Path(values.workdir)
    runs = {}
    for text in values.kl_coefs:
        settings = {
            'init': str(base / 'sft'),
            'rewards': {'rm': {'model': str(base / 'rm')}},
            'critic': str(base / 'rm'),
            'kl_coef': float(text),
            'num_rollouts': values.rollouts,
        }
        runs[float(text)] = run_ppo(workdir / f'kl_{text}', 'seed=0', settings)
    labels = {coef: f'β = {coef:g}' if coef else 'no anchor (β = 0)' for coef in runs}
    plot({labels[c]: [x] for c, x in runs.items()}, workdir / 'overoptimisation.png')
    last = {
        f'{kl_coef:g}': {
            name: float(np.mean([row[name] for row in rows[-10:]]))
            for name in (
                'objective/kl',
                'objective/proxy_reward',
                'objective/gold',
                'rollout/response_length',
            )  # fmt: skip
        }
        | {
            'gold_peak': float(
                smooth(np.asarray([r['objective/gold'] for r in rows])).max()
            )
        }
        for kl_coef, rows in runs.items()
    }
    (workdir / 'overoptimisation.json').write_text(
        json.dumps(last, indent=1), encoding='utf-8'
    )
    print(json.dumps(last, indent=1))


def run() -> None:
    """Entry point; defines the flags, so that an import of this file defines none."""
    flags.DEFINE_string('base', 'runs/quickstart', 'Finished quickstart run.')
    flags.DEFINE_string('workdir', 'runs/overoptimisation', 'Where to write.')
    flags.DEFINE_list('kl_coefs', ['0.0', '0.05'], 'KL coefficients to compare.')
    flags.DEFINE_integer('rollouts', 120, 'Rollouts of every run.')
    app.run(main)


if __name__ == '__main__':
    run()
