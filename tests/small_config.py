"""The quickstart config on a model that is pretrained first, made as small as it goes:
what the tests of the pipeline run.

It is a config file like those in ``configs/``, so that a test can import it or name
it on the command line: ``--config tests/small_config.py``.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[1]


def config_file(name: str):
    """A file of ``configs/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'configs' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_config(steps: str | None = None) -> ConfigDict:
    """``quickstart.py:smoke`` behind ``ladder.py:smoke,scratch``, with ``steps`` (4)
    steps a stage, on a few records.
    """
    config = config_file('quickstart').get_config('smoke')
    scratch = config_file('ladder').get_config('smoke,scratch')
    config.stages = (*scratch.stages, 'ppo')
    config.pretrain, config.sft = scratch.pretrain, scratch.sft
    for stage in ('pretrain', 'sft', 'rm'):
        section = config[stage]
        section.num_steps = int(steps or 4)
        section.batch_size = 8
        section.train += '[:64]'
        section.eval += '[:16]'
        section.loop.log_every_steps = 1
    config.rm.references = config.rm.references.split('[')[0] + '[:16]'
    ppo = config.ppo
    ppo.num_rollouts = int(steps or 4)
    ppo.prompts += '[:64]'
    ppo.eval_prompts = ppo.eval_prompts.split('[')[0] + '[:16]'
    ppo.eval_batch_size = 16
    ppo.batch_size = 16
    ppo.num_epochs = 2
    ppo.num_minibatches = 2
    return config
