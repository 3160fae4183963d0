"""Two rounds: comparisons of the first PPO's own samples make a second reward model.

    python -m rlhf_jax.main --config configs/two_rounds.py --workdir runs/two_rounds
    python -m rlhf_jax.main --config configs/two_rounds.py:from=RUN --workdir DIR

The quickstart's stages (sft, rm, ppo) are the first round. Its policy answers training
prompts (drawn), the annotators of the tiny summarisation world compare the answers
(labelled), a reward model learns from the old and the new comparisons (rm_2), and PPO
runs again from sft against it (ppo_2). What changes is where the comparisons come from:
the second reward model has seen what the first one was exploited by. Rounds of
collection: Ziegler et al. 2019, arXiv 1909.08593; Stiennon et al. 2020, arXiv
2009.01325.

Arguments: ``count`` of prompts that are answered and compared; ``from`` a finished
quickstart to take the first round from; ``smoke``, ``seed=N``.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.ladder import DATA, arguments
from rlhf_jax.stages.kinds import stage


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = arguments(arg, count=4000)
    config = quickstart.configure(arg)
    first = f'{arg["from"]}/' if arg['from'] else ''
    second = ('drawn', 'labelled', 'rm_2', 'ppo_2')
    config.stages = second if first else (*config.stages, *second)
    count = 32 if arg.smoke else arg.count
    config.drawn = stage(
        'sample',
        policy=f'{first}ppo',
        prompts=f'{DATA}/prompts:train[:{count}]',
        num_samples=2,
        prompt_buckets=config.ppo.prompt_buckets,
        max_new_tokens=config.ppo.max_new_tokens,
        # Written beside the responses, for the report alone.
        rewards={'gold': dict(fn='rlhf_jax.datasets.tiny_tldr:gold')},
    )
    config.labelled = stage(
        'label', responses='stage:drawn', fn='rlhf_jax.datasets.tiny_tldr:annotate'
    )
    config.rm_2 = ConfigDict(config.rm.to_dict())
    config.rm_2.init = f'{first}rm'  # it goes on from the first
    config.rm_2.train = f'{config.rm.train} + stage:labelled'
    config.ppo_2 = ConfigDict(config.ppo.to_dict())
    config.ppo_2.init = f'{first}sft'
    config.ppo_2.critic = 'rm_2'
    config.ppo_2.rewards.rm.model = 'rm_2'
    return config
