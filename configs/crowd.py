"""Two of six labellers answer at random: majority against Dawid and Skene.

    python -m rlhf_jax.main --config configs/crowd.py:aggregate=majority --workdir DIR
    python -m rlhf_jax.main --config configs/crowd.py:aggregate=dawid_skene --workdir D

Three of the six simulated people of the embedded world label every pair, and two of the
six toss a coin. A reward model learns from what is made of the labels. The report of
the labels names who agrees with the others no more than chance would.

Arguments: ``aggregate`` majority, share, dawid_skene, bradley_terry or none; ``random``
labellers, the last of the six; ``count`` of pairs; ``from`` a finished run to take sft
from; ``smoke``, ``seed=N``. Equations: docs/agreement.md.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.ladder import DATA
from configs.rlaif import simulated
from rlhf_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    own = parse_arg(
        arg,
        aggregate='dawid_skene',
        random=2,
        count=6000,
        smoke=False,
        seed=0,
        **{'from': ''},
    )
    config = quickstart.get_config('smoke' if own.smoke else None)
    config.seed = own.seed
    del config.ppo
    config.labelled = simulated(
        f'{DATA}/comparisons:train[:{48 if own.smoke else own.count}]',
        overlap=3,
        repeats=0.05,
        gold=f'{DATA}/comparisons:test[:20]',
        args={'random': tuple(range(6 - own.random, 6))},
        aggregate=own.aggregate,
    )
    config.rm.train = 'stage:labelled'
    if not own.smoke:
        config.rm.num_steps = 300
    config.stages = ('sft', 'labelled', 'rm')
    if own['from']:
        config.rm.init = f'{own["from"]}/sft'
        config.stages = ('labelled', 'rm')
        del config.sft
    return config
