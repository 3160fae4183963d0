"""Reward models of every form, on the embedded data set.

    python -m rlhf_jax.main --config configs/reward_model.py:kind=steps --workdir runs/s
    python -m rlhf_jax.main --config configs/reward_model.py:smoke --workdir runs/smoke

The policy of the ladder (sft) lends its backbone to a reward model, which
learns from ``kind``: comparisons, rankings (three to five summaries in order, with
ties), ratings (coverage, faithfulness and brevity, a score each) or steps (sums, right
or wrong line by line; from scratch, because no summary teaches sums).

Arguments: ``kind``; ``loss`` a module of rlhf_jax/reward_losses that goes with it, or
package.module for one of your own; ``from`` a finished run to take sft from, e.g.
runs/ladder; ``smoke`` (about a minute), ``seed=N``. What a loss can be
told stands in its HParams: --config.rm.label_smoothing=0.1; what is not told has the
loss's own default.
"""

from ml_collections import ConfigDict

from configs import ladder
from rlhf_jax.config import nearest
from rlhf_jax.stages.kinds import stage

COMPARISONS = f'{ladder.DATA}/comparisons:'
REFERENCES = f'{ladder.DATA}/demonstrations:test'
JUDGED = 'python:rlhf_jax.datasets.tiny_judgements:'
HEADS = ('coverage', 'faithfulness', 'brevity')
# The data, the usual loss, and what else goes with them.
KINDS = {
    'comparisons': (COMPARISONS, 'bradley_terry', dict(references=REFERENCES)),
    'rankings': (f'{JUDGED}rankings?split=', 'davidson', dict(references=REFERENCES)),
    'ratings': (
        f'{JUDGED}ratings?split=',
        'squared',
        dict(heads=HEADS, rating_range=(0, 4), rating_unit='range'),
    ),
    'steps': (f'{JUDGED}steps?split=', 'stepwise', dict(init='scratch')),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    defaults = dict(kind='comparisons', loss='')
    arg = ladder.arguments(arg, **defaults)
    if arg.kind not in KINDS:
        raise ValueError(f'kind={arg.kind!r} is unknown{nearest(arg.kind, KINDS)}')
    data, usual, more = KINDS[arg.kind]
    reading = dict(train=f'{data}train', eval=f'{data}test', buckets=(88,))
    if arg.data:
        reading = ladder.texts(arg, '', 0)
        if 'references' in more:
            more = dict(references=f'{arg.data}[90%:]')
    _, rate, _ = ladder.rates(arg, 0.0, 2e-3, 0.0)
    config = ladder.below(None, arg)
    if arg['from'] or arg.kind == 'steps':
        config.stages = ('rm',)
    settings = dict(init=f'{arg["from"]}/sft' if arg['from'] else 'sft') | more
    config.rm = stage(
        'reward_model',
        loss=arg.loss or usual,
        num_steps=20 if arg.smoke else 450,
        batch_size=8 if arg.smoke else 32,
        optim=dict(learning_rate=rate, warmup_percent=5),
        loop=dict(eval_every_steps=100),
        **reading,
        **settings,
    )
    return config
