"""PPO-Lagrangian: the most reward at a mean cost below a limit.

    python -m rlhf_jax.main --config configs/ppo_lagrangian.py --workdir DIR
    python -m rlhf_jax.main --config configs/ppo_lagrangian.py:from=RUN --workdir DIR

Two critics and a multiplier that rises while the constraint is violated. Dai et al.
2023 (Safe RLHF), arXiv 2310.12773, whose cost is learned (a stage ``cost``, and
``cost=dict(model='cost')`` in the place of the function). Here it is plain, so that one
can see whether the constraint holds: the reward model likes long summaries, and a word
beyond ``words`` on average is a cost.

Arguments: ``words``; ``from`` a finished run to take sft and rm from; ``smoke``,
``seed=N``. Equation, defaults and what goes wrong: docs/algorithms/ppo_lagrangian.md.
"""

from ml_collections import ConfigDict

from configs.ladder import arguments, below, online
from rlhf_jax.stages.kinds import stage


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = arguments(arg, words=9.0)
    config = below('ppo_lagrangian', arg)
    settings = online(arg)
    config.ppo_lagrangian = stage(
        'ppo_lagrangian',
        **settings,
        cost=dict(
            fn='rlhf_jax.datasets.tiny_tldr:words_over', args={'limit': arg.words}
        ),
        critic=settings['rewards']['rm']['model'],
        cost_critic=settings['init'],
        critic_optim=settings['optim'],
        num_epochs=2,
        num_minibatches=2,
        kl_coef=0.2,
    )
    return config
