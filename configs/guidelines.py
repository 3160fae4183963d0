"""Two guidelines, two reward models, and what each makes of the same policy.

    python -m rlhf_jax.main --config configs/guidelines.py --workdir runs/guidelines
    python -m rlhf_jax.main --config configs/guidelines.py:from=RUN --workdir DIR

Summaries of sft (drawn) are compared by the simulated people of the embedded world
twice: by what is helpful, facts that are true, and by what is brief. Each guideline
gives a reward model. PPO optimises the one (ppo_helpful), the other (ppo_brief), both
with equal weight (ppo_both), and what is helpful under a bound on the cost that is
learned from the opposite of brief (ppo_bound: Dai et al. 2023, arXiv 2310.12773). The
summary has facts, inventions and words of all four.

Arguments: ``count`` of prompts whose summaries are compared; ``from`` a finished run to
take sft from; ``smoke``, ``seed=N``.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.ladder import DATA, LENGTHS
from configs.rlaif import simulated
from rlhf_jax.config import parse_arg
from rlhf_jax.stages.kinds import stage

COUNTS = {
    name: dict(fn=f'rlhf_jax.datasets.tiny_tldr:{name}', weight=0.0)
    for name in ('covered', 'invented')
}
POLICIES = {'helpful': (1.0, 0.0), 'brief': (0.0, 1.0), 'both': (1.0, 1.0)}


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    own = parse_arg(arg, count=4000, smoke=False, seed=0, **{'from': ''})
    config = quickstart.get_config('smoke' if own.smoke else None)
    config.seed = own.seed
    start = f'{own["from"]}/sft' if own['from'] else 'sft'
    rm, ppo = config.rm.to_dict(), config.ppo.to_dict()
    for name in ('rm', 'ppo', *(['sft'] if own['from'] else [])):
        del config[name]
    config.drawn = stage(
        'sample',
        policy=start,
        prompts=f'{DATA}/prompts:train[:{64 if own.smoke else own.count}]',
        num_samples=2,
        **LENGTHS,
    )
    stages = [*([] if own['from'] else ['sft']), 'drawn']
    for guideline in ('helpful', 'brief', 'wordy'):
        labels = f'{guideline}_labels'
        config[labels] = simulated('stage:drawn', args={'guideline': guideline})
        config[guideline] = ConfigDict(
            {
                **rm,
                'init': start,
                'train': f'stage:{labels}[:90%]',
                'eval': f'stage:{labels}[90%:]',
                'num_steps': 20 if own.smoke else 250,
            }
        )
        stages += [labels, guideline]
    for name, weights in POLICIES.items():
        rewards = {
            guideline: dict(model=guideline, weight=weight)
            for guideline, weight in zip(('helpful', 'brief'), weights)
        }
        own_ppo = {k: v for k, v in ppo.items() if k not in ('kind', 'rewards')}
        own_ppo |= {
            'init': start,
            'rewards': rewards | COUNTS,
            'expected_win_rate': 0.0,
        }
        own_ppo['critic'] = 'brief' if name == 'brief' else 'helpful'
        config[f'ppo_{name}'] = stage('ppo', **own_ppo)
    own_ppo |= {'rewards': {'helpful': dict(model='helpful')} | COUNTS}
    config.ppo_bound = stage(
        'ppo_lagrangian', **own_ppo, cost=dict(model='wordy'), cost_critic='wordy'
    )
    policies = [*(f'ppo_{name}' for name in POLICIES), 'ppo_bound']
    config.policies = stage(
        'summary',
        series={
            'facts covered': tuple(f'{p}:rewards_after.covered' for p in policies),
            'facts invented': tuple(f'{p}:rewards_after.invented' for p in policies),
            'length, tokens': tuple(f'{p}:length_after' for p in policies),
            'gold reward': tuple(f'{p}:gold_reward_after' for p in policies),
            'KL, nats': tuple(f'{p}:kl' for p in policies),
        },
    )
    config.stages = (*stages, *policies, 'policies')
    return config
