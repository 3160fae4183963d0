"""Rounds of collection: sample, label, reward model, PPO, and again.

    python -m rlhf_jax.main --config configs/rounds.py:rounds=3 --workdir runs/three
    python -m rlhf_jax.main --config configs/rounds.py:rounds=1,from=RUN --workdir DIR

A round draws two responses to each of some training prompts from the policy of the
round before (drawn_1 from sft), has them compared by the simulated people of the
embedded world (labelled_1), trains a reward model (rm_1) and runs PPO from sft against
it (ppo_1). One pool of labels is spread over the rounds, so that one round and three
can be compared at equal labels. After each round fresh responses of its policy to
held-out prompts are compared too, and its reward model is measured on them (tested_1,
judged_1, measured_1); these are no labels that anything learns from. Source: Ziegler et
al. 2019, arXiv 1909.08593; Stiennon et al. 2020, arXiv 2009.01325.

Arguments: ``rounds``; ``labels`` in all; ``schedule`` even, or ziegler: the rate of
labels falls linearly to 0, so that 1 − (1 − k/rounds)² of them are there after round k,
as in Ziegler et al. 2019, who begin with a first batch besides; ``model`` new: every
reward model starts from sft, or on: from the one before; ``data`` all that there are so
far, or last: those of the round; ``from`` a finished run to take sft from; ``smoke``,
``seed=N``.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import quickstart
from configs.ladder import DATA, GOLD, LENGTHS
from configs.rlaif import simulated
from rlhf_jax.config import parse_arg
from rlhf_jax.stages.kinds import stage

OVERLAP = 2  # labels of a pair, so that there is agreement to measure
EPOCHS = 4.0  # of a reward model over its comparisons
SERIES = {
    'gold reward': 'ppo_{}:gold_reward_after',
    'proxy reward': 'ppo_{}:proxy_reward_after',
    'win rate': 'ppo_{}:win_rate',
    'KL, nats': 'ppo_{}:kl',
    'RM accuracy on held-out pairs': 'rm_{}:accuracy',
    'RM accuracy on its policy': 'measured_{}:accuracy',
    'agreement of labellers': 'labelled_{}:agreement',
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    own = parse_arg(
        arg,
        rounds=3,
        labels=6000,
        schedule='even',
        model='new',
        data='all',
        smoke=False,
        seed=0,
        **{'from': ''},
    )
    for name, known in (
        ('schedule', ('even', 'ziegler')),
        ('model', ('new', 'on')),
        ('data', ('all', 'last')),
    ):
        if own[name] not in known:
            raise ValueError(f'{name}={own[name]!r}; use {known[0]!r} or {known[1]!r}')
    if own.rounds < 1 or not 0 < own.labels <= 4000 * OVERLAP:
        raise ValueError(
            f'rounds={own.rounds}, labels={own.labels}: use 1 or more rounds, and at '
            f'most {4000 * OVERLAP} labels: there are 4,000 training prompts'
        )
    config = quickstart.get_config('smoke' if own.smoke else None)
    config.seed = own.seed
    start = f'{own["from"]}/sft' if own['from'] else 'sft'
    ends = pool(own.rounds, 64 if own.smoke else own.labels // OVERLAP, own.schedule)
    if not all(first < last for first, last in zip([0, *ends], ends)):
        raise ValueError(
            f'rounds={own.rounds}, labels={own.labels}, schedule={own.schedule!r}: a '
            f'round gets no pair, which takes {OVERLAP} labels; use fewer rounds or '
            'more labels'
        )
    rm, ppo = config.rm.to_dict(), config.ppo.to_dict()
    stages = [] if own['from'] else ['sft']
    for number, pairs in enumerate(zip([0, *ends], ends), 1):
        stages += one_round(config, own, number, start, pairs, (rm, ppo))
    for name in ('rm', 'ppo', *(['sft'] if own['from'] else [])):
        del config[name]
    config.rounds = stage(
        'summary',
        series={
            name: tuple(point.format(k + 1) for k in range(own.rounds))
            for name, point in SERIES.items()
        },
    )
    config.stages = (*stages, 'rounds')
    return config


def pool(rounds: int, pairs: int, schedule: str) -> list[int]:
    """How many pairs have been labelled after each round."""
    shares = [k / rounds for k in range(1, rounds + 1)]
    if schedule == 'ziegler':
        shares = [1 - (1 - share) ** 2 for share in shares]
    return [round(share * pairs) for share in shares]


def one_round(
    config: ConfigDict,
    own: ConfigDict,
    number: int,
    start: str,
    pairs: tuple[int, int],
    like: tuple[dict[str, Any], dict[str, Any]],
) -> list[str]:
    """The stages of a round, in order; each gets its section in ``config``."""
    names = {
        name: f'{name}_{number}'
        for name in ('drawn', 'labelled', 'rm', 'ppo', 'tested', 'judged', 'measured')
    }
    rm, ppo = like
    first, last = pairs

    def sampling(policy: str, prompts: str) -> ConfigDict:
        return stage(
            'sample',
            policy=policy,
            prompts=f'{DATA}/prompts:{prompts}',
            num_samples=2,
            **LENGTHS,
            rewards={'gold': GOLD},  # for the report
        )

    config[names['drawn']] = sampling(
        start if number == 1 else f'ppo_{number - 1}', f'train[{first}:{last}]'
    )
    config[names['labelled']] = simulated(f'stage:drawn_{number}', overlap=OVERLAP)
    seen = range(1 if own.data == 'all' else number, number + 1)
    rm = {
        **rm,
        'init': start if own.model == 'new' or number == 1 else f'rm_{number - 1}',
    }
    rm['train'] = ' + '.join(f'stage:labelled_{k}' for k in seen)
    if not own.smoke:
        rm |= {'num_steps': None, 'num_epochs': EPOCHS}
    config[names['rm']] = ConfigDict(rm)
    ppo = {**ppo, 'init': start, 'critic': names['rm']}
    config[names['ppo']] = ConfigDict(
        {**ppo, 'rewards': {'rm': {**ppo['rewards']['rm'], 'model': names['rm']}}}
    )
    count = 32 if own.smoke else 500
    config[names['tested']] = sampling(names['ppo'], f'test[:{count}]')
    config[names['judged']] = simulated(f'stage:tested_{number}')
    config[names['measured']] = stage(
        'evaluate',
        reward_model=names['rm'],
        comparisons=f'stage:judged_{number}',
        buckets=rm['buckets'],
    )
    return list(names.values())
