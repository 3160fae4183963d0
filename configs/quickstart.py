"""The whole ladder on the embedded data set, on a laptop, in a few minutes.

    python -m rlhf_jax.main --workdir runs/quickstart
    python -m rlhf_jax.main --config configs/quickstart.py:smoke --workdir runs/smoke

The stages below (``configs/ladder.py``): the base model that the package ships learns
to write summaries as the labellers of the tiny summarisation world do (sft), and a
reward model learns their comparisons (rm). PPO raises that learned reward; the gold
reward, which no stage sees, judges. It is the recipe of Stiennon et al. 2020, arXiv
2009.01325.

Arguments: ``smoke`` (about a minute, proves nothing but that everything runs),
``seed=N``, ``from`` a finished run to take sft and rm from; and to point it at your own
model and data, ``model``, ``data`` and the others of ``configs/ladder.py``:

    python -m rlhf_jax.main --config configs/quickstart.py:model=DIR,data=hh:FILE
    --workdir DIR
"""

from ml_collections import ConfigDict

from configs.ladder import arguments, below, online
from rlhf_jax.stages.kinds import stage


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    return configure(arguments(arg))


def configure(arg: ConfigDict) -> ConfigDict:
    """The same, of arguments that are read."""
    config = below('ppo', arg)
    settings = {'expected_win_rate': 0.75} | online(arg)
    config.ppo = stage(
        'ppo',
        **settings,
        critic=settings['rewards']['rm']['model'],
        critic_optim=settings['optim'],
        num_epochs=2,
        num_minibatches=2,
        kl_coef=0.2,
    )
    return config
