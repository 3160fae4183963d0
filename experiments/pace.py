"""What a method's learning takes in time, with PPO's as the unit.

    python -m rlhf_jax.main --config configs/ladder.py:seed=0 --workdir runs/ladder0
    python -m experiments.pace --base runs/ladder0 --workdir runs/compare

Runs a few steps of every method of ``experiments/compare.py`` on a machine that does
nothing else, PPO between them, and writes ``pace.json``: the time of all the steps that
the method has in the comparison, over that of PPO in the two runs around it, so that a
slow drift of the machine falls out. Steps alone are counted: no compilation, reading,
log-probabilities of a reference, saving or evaluation. Responses are as long as the SFT
policy writes them; a method that makes them longer gets slower than is said here.
``experiments/compare.py`` reads ``pace.json`` in its work directory.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging

from experiments.compare import METHODS
from rlhf_jax.main import launch

UNIT = 'ppo'


def learning_seconds(method: str, base: Path, workdir: Path, steps: int) -> float:
    """Steps of the method's recipe times the median time of one of ``steps``."""
    recipe, arg = METHODS[method]
    module = importlib.import_module(f'configs.{recipe}')
    config = module.get_config(f'{arg}from={base}')
    (stage,) = config.stages
    section = config[stage]
    budget = 'num_rollouts' if 'num_rollouts' in section else 'num_steps'
    total, section[budget] = section[budget], steps
    section.eval_prompts += '[:64]'
    section.loop.log_every_steps = 1
    launch(config, workdir)
    jax.clear_caches()  # the programs of the next run are others
    return total * median_pace(workdir / stage / 'metrics.jsonl')


def median_pace(path: Path) -> float:
    """Median seconds from a step to the next; rows of the same step are one."""
    rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    first = {row['step']: row['seconds'] for row in reversed(rows)}
    steps = np.array(sorted(first))
    return float(np.median(np.diff([first[s] for s in steps]) / np.diff(steps)))


def over_unit(order: list[str], seconds: list[float]) -> dict[str, float]:
    """Every method's seconds over the mean of PPO's before and behind it."""
    units = [i for i, method in enumerate(order) if method == UNIT]
    ratios = {UNIT: 1.0}
    for i, method in enumerate(order):
        if method != UNIT:
            before = max(u for u in units if u < i)
            behind = min(u for u in units if u > i)
            ratios[method] = seconds[i] / np.mean([seconds[before], seconds[behind]])
    return ratios


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    logging.set_verbosity(logging.FATAL)  # Orbax reports every rename
    values = flags.FLAGS
    unknown = sorted(set(values.methods) - METHODS.keys())
    if unknown:
        raise app.UsageError(f'--methods={unknown}: known are {", ".join(METHODS)}')
    base, workdir = Path(values.base).absolute(), Path(values.workdir)
    folder = workdir / 'pace'
    if folder.exists():  # finished runs are not run again: their time would be the old
        raise app.UsageError(f'{folder} is there already; remove it to measure anew')
    methods = [method for method in values.methods if method != UNIT]
    order = [UNIT]
    for start in range(0, len(methods), values.group):
        order += [*methods[start : start + values.group], UNIT]
    seconds = [
        learning_seconds(method, base, folder / f'{i:02}_{method}', values.steps)
        for i, method in enumerate(order)
    ]
    units = [s for method, s in zip(order, seconds) if method == UNIT]
    content = {
        'jax': jax.__version__,
        'device': jax.devices()[0].device_kind,
        'steps': values.steps,
        'unit_over_its_median': list(np.array(units) / np.median(units)),
        'over_ppo': over_unit(order, seconds),
    }
    text = json.dumps(content, indent=1)
    (workdir / 'pace.json').write_text(text + '\n', encoding='utf-8')
    print(text)


def run() -> None:
    """Entry point; defines the flags, so that an import of this file defines none."""
    flags.DEFINE_string('base', 'runs/ladder0', 'Finished run with sft and rm.')
    flags.DEFINE_string('workdir', 'runs/compare', 'Where to write.')
    flags.DEFINE_list('methods', list(METHODS), 'Methods to run.')
    flags.DEFINE_integer('steps', 12, 'Steps of each.', lower_bound=3)
    flags.DEFINE_integer('group', 7, 'Methods between two runs of PPO.', lower_bound=1)
    app.run(main)


if __name__ == '__main__':
    run()
