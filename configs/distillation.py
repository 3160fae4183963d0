"""On-policy distillation on the embedded data set: SFT's policy learns from PPO's.

    python -m rlhf_jax.main --config configs/distillation.py:from=RUN --workdir DIR
    python -m rlhf_jax.main --config configs/distillation.py:smoke --workdir runs/smoke

RUN is a finished run of ``configs/quickstart.py``: its PPO policy is the teacher, its
SFT policy the student, and there is no reward; without ``from`` the stages of the
quickstart run first. The teacher says of every token that the student samples how
likely it is. Lu et al. 2025, 'On-Policy Distillation'; Agarwal et al. 2024, arXiv
2306.13649.

Arguments: ``from`` a finished run to take sft and ppo from; ``teacher`` another
teacher; ``smoke``, ``seed=N``. A reward is added by
``--config.distillation.rewards.rm.model=RUN/rm --config.distillation.group_size=4``.
Equation, defaults and what goes wrong: docs/algorithms/distillation.md.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.ladder import arguments, online
from rlhf_jax.stages.kinds import stage


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = arguments(arg, teacher='')
    config = quickstart.configure(arg)
    config.stages = (*config.stages, 'distillation')
    run = ''
    if arg['from']:
        config.stages, run = ('distillation',), f'{arg["from"]}/'
    settings = online(arg)
    # Of rewards, of which there are none.
    settings |= {'rewards': {}, 'missing_eos_penalty': None}
    if not arg.data:
        settings['expected_win_rate'] = 0.75  # that of the quickstart
    config.distillation = stage(
        'distillation',
        **settings,
        teacher=arg.teacher or f'{run}ppo',
        num_epochs=2,
        num_minibatches=2,
    )
    return config
