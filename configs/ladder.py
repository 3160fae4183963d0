"""The stages below every method, on the embedded data set: sft and rm.

    python -m rlhf_jax.main --config configs/ladder.py --workdir runs/ladder
    python -m rlhf_jax.main --config configs/ladder.py:smoke --workdir runs/smoke
    python -m rlhf_jax.main --config configs/ladder.py:scratch --workdir runs/scratch

The base model that the package ships, which knows the text of the tiny summarisation
world, learns to write summaries as its labellers do (sft), and a reward model learns
from comparisons (rm). With ``scratch`` a base model is pretrained first. The recipes of
single methods differ by one section; with ``from=runs/ladder`` they start from a
finished run. Arguments: ``smoke``, ``scratch``, ``seed=N``.
"""

from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.config import parse_arg, section
from rlhf_jax.sharding import ParallelConfig
from rlhf_jax.stages.kinds import stage
from rlhf_jax.stages.settings import ModelSettings

DATA = 'tfds:tiny_tldr'


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = parse_arg(arg, smoke=False, scratch=False, seed=0)
    config = ConfigDict()
    config.seed = arg.seed
    config.stages = ('pretrain', 'sft', 'rm') if arg.scratch else ('sft', 'rm')
    config.tokenizer = 'rlhf_jax.data.tiny_tldr:tokenizer'
    config.metrics = ('jsonl',)
    # Unrolled: the layers are few, and XLA runs them faster so on a CPU.
    preset = 'nano' if arg.smoke else 'micro'
    config.model = section(ModelSettings, preset=preset, scan_unroll=4)
    config.parallel = section(ParallelConfig)
    if arg.scratch:
        config.pretrain = pretraining(arg.smoke)
    config.sft = stage(
        'sft',
        init='pretrain' if arg.scratch else 'tiny',
        train=f'{DATA}/demonstrations:train',
        eval=f'{DATA}/demonstrations:test',
        num_steps=20 if arg.smoke else 150,
        batch_size=8 if arg.smoke else 32,
        buckets=(80,),
        optim=dict(learning_rate=1.5e-3, warmup_percent=5),
        loop=dict(eval_every_steps=50),
    )
    config.rm = stage(
        'reward_model',
        init='sft',
        train=f'{DATA}/comparisons:train',
        eval=f'{DATA}/comparisons:test',
        references=f'{DATA}/demonstrations:test',
        num_steps=20 if arg.smoke else 450,
        batch_size=8 if arg.smoke else 32,
        buckets=(88,),
        optim=dict(learning_rate=1.2e-3, warmup_percent=5),
        loop=dict(eval_every_steps=200),
    )
    return config


def pretraining(smoke: bool) -> ConfigDict:
    """The stage that makes a base model from nothing."""
    return stage(
        'sft',
        init='scratch',
        form='text',
        train=f'{DATA}/articles:train',
        eval=f'{DATA}/articles:test',
        num_steps=20 if smoke else 1400,
        batch_size=8 if smoke else 16,
        buckets=(112,),
        # Muon seemed to learn copying in fewer steps than AdamW.
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


def below(stage: str, arg: ConfigDict) -> ConfigDict:
    """A run that ends in ``stage`` ('ppo'), whose section is still to be set."""
    config = get_config(f'smoke={arg.smoke},seed={arg.seed}')
    config.stages = (stage,) if arg['from'] else (*config.stages, stage)
    return config


def judged(smoke: bool) -> dict[str, Any]:
    """What every method is judged by, and how its policy samples."""
    prompts = f'{DATA}/prompts:test'
    return {
        'eval_prompts': f'{prompts}[:32]' if smoke else prompts,
        'gold': dict(fn='rlhf_jax.data.tiny_tldr:gold'),
        'prompt_buckets': (56,),
        'max_new_tokens': 28,
        'eval_batch_size': 32 if smoke else 128,
    }


def online(arg: ConfigDict) -> dict[str, Any]:
    """What every online method has in common: start, reward, prompts, budget, rate."""
    run = f'{arg["from"]}/' if arg['from'] else ''
    return judged(arg.smoke) | {
        'init': f'{run}sft',
        'rewards': {'rm': dict(model=f'{run}rm')},
        'prompts': f'{DATA}/prompts:train',
        'batch_size': 16 if arg.smoke else 64,
        'num_rollouts': 4 if arg.smoke else 80,
        'missing_eos_penalty': 1.0,
        'optim': dict(learning_rate=5e-4, schedule='linear', eps=1e-5),
        'loop': dict(log_every_steps=1, save_every_steps=20),
    }
