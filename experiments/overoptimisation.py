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

_BASE = flags.DEFINE_string('base', 'runs/quickstart', 'Finished quickstart run.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/overoptimisation', 'Where to write.')
_COEFS = flags.DEFINE_list('kl_coefs', ['0.0', '0.05'], 'KL coefficients to compare.')
_ROLLOUTS = flags.DEFINE_integer('rollouts', 120, 'Rollouts of every run.')


def run_one(
    base: Path, workdir: Path, kl_coef: float, rollouts: int
) -> list[dict[str, Any]]:
    """Runs PPO with one KL coefficient; returns the rows of its metrics."""
    config = get_config()
    config.stages = ('ppo',)
    config.ppo.update(
        init=str(base / 'sft'),
        rewards={'rm': {'model': str(base / 'rm')}},
        critic=str(base / 'rm'),
        kl_coef=kl_coef,
        num_rollouts=rollouts,
    )
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


def plot(runs: dict[float, list[dict[str, Any]]], path: Path) -> None:
    """Proxy and gold reward against √KL, a colour per coefficient."""
    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, 2, figsize=(9, 3.6), sharex=True, layout='constrained'
    )
    names = (
        ('objective/scores', 'proxy reward (learned)'),
        ('objective/gold', 'gold reward (true)'),
    )
    for panel, (name, title) in zip(panels, names):
        for kl_coef, rows in runs.items():
            distance = np.sqrt(np.maximum([row['objective/kl'] for row in rows], 0))
            values = np.asarray([row[name] for row in rows])
            label = f'β = {kl_coef:g}' if kl_coef else 'no anchor (β = 0)'
            dots = panel.plot(distance, values, '.', alpha=0.25, markersize=4)
            panel.plot(
                smooth(distance), smooth(values), color=dots[0].get_color(), label=label
            )
        panel.set_title(title)
        panel.set_xlabel('√KL to the SFT policy (√nats per sequence)')
        panel.set_ylabel('reward units')
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=130)


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    logging.set_verbosity(logging.WARNING)
    base, workdir = Path(_BASE.value).absolute(), Path(_WORKDIR.value)
    runs = {
        float(text): run_one(base, workdir / f'kl_{text}', float(text), _ROLLOUTS.value)
        for text in _COEFS.value
    }
    plot(runs, workdir / 'overoptimisation.png')
    last = {
        f'{kl_coef:g}': {
            name: float(np.mean([row[name] for row in rows[-10:]]))
            for name in (
                'objective/kl',
                'objective/scores',
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


if __name__ == '__main__':
    app.run(main)
