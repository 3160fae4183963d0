"""Preference optimisation without a reward model, on the embedded data set.

    python -m rlhf_jax.main --config configs/preference.py:loss=dpo --workdir runs/dpo
    python -m rlhf_jax.main --config configs/preference.py:smoke --workdir runs/smoke

The policy of the quickstart (pretrain, sft) learns from the comparisons directly, and
is measured as the quickstart's PPO is, by the gold reward on the same prompts.

Arguments: ``loss`` a module of rlhf_jax/preference, or package.module for one of your
own; ``from`` a finished sft stage's folder to start from, e.g. runs/quickstart/sft, so
that a sweep does not pretrain again; ``smoke`` (about a minute), ``seed=N``. What a
loss can be told stands in its HParams: --config.preference.beta=0.3; what is not told
has the loss's own default.
"""

from ml_collections import ConfigDict

from rlhf_jax.algos.preference import PreferenceHParams
from rlhf_jax.algos.sft import SFTHParams
from rlhf_jax.config import parse_arg, section, unset
from rlhf_jax.preference import load
from rlhf_jax.sharding import ParallelConfig
from rlhf_jax.stages.settings import ModelSettings, OfflineSettings, PreferenceSettings

DATA = 'tfds:tiny_tldr'


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = parse_arg(arg, loss='dpo', smoke=False, seed=0, **{'from': ''})
    config = ConfigDict()
    config.seed = arg.seed
    config.stages = (
        ('preference',) if arg['from'] else ('pretrain', 'sft', 'preference')
    )
    config.tokenizer = 'rlhf_jax.data.tiny_tldr:tokenizer'
    config.metrics = ('jsonl',)
    preset = 'nano' if arg.smoke else 'micro'
    config.model = section(ModelSettings, preset=preset, scan_unroll=4)
    config.parallel = section(ParallelConfig)
    config.pretrain = section(
        OfflineSettings,
        SFTHParams,
        init='scratch',
        train=f'{DATA}/articles:train',
        eval=f'{DATA}/articles:test',
        num_steps=20 if arg.smoke else 1400,
        batch_size=8 if arg.smoke else 16,
        buckets=(104,),
        optim=dict(
            name='muon',
            learning_rate=2e-2,
            adam_learning_rate=4e-3,
            warmup_percent=5,
            final_percent=10,
            weight_decay=0.01,
            b2=0.98,
        ),
        loop=dict(eval_every_steps=200),
    )
    config.sft = section(
        OfflineSettings,
        SFTHParams,
        init='pretrain',
        train=f'{DATA}/demonstrations:train',
        eval=f'{DATA}/demonstrations:test',
        num_steps=20 if arg.smoke else 250,
        batch_size=8 if arg.smoke else 32,
        buckets=(80,),
        optim=dict(learning_rate=1.5e-3, warmup_percent=5),
        loop=dict(eval_every_steps=50),
    )
    prompts = f'{DATA}/prompts:test'
    config.preference = section(
        PreferenceSettings,
        PreferenceHParams,
        unset(load(arg.loss, 'loss').HParams),
        name=arg.loss,
        init=arg['from'] or 'sft',
        # The reference looks at all of it once, before training.
        train=f'{DATA}/comparisons:train{"[:400]" if arg.smoke else ""}',
        eval=f'{DATA}/comparisons:test',
        num_steps=20 if arg.smoke else 450,
        batch_size=8 if arg.smoke else 32,
        buckets=(88,),
        eval_prompts=f'{prompts}[:32]' if arg.smoke else prompts,
        gold=dict(fn='rlhf_jax.data.tiny_tldr:gold'),
        prompt_buckets=(56,),
        max_new_tokens=28,
        eval_batch_size=32 if arg.smoke else 128,
        optim=dict(learning_rate=5e-4, warmup_percent=5),
        loop=dict(eval_every_steps=100),
    )
    return config
