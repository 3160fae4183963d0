"""RLVR: word problems, GRPO, and a program that knows the right answers.

    python -m rlhf_jax.main --config configs/rlvr.py --workdir runs/rlvr
    python -m rlhf_jax.main --config configs/rlvr.py:name=maxrl --workdir runs/maxrl
    python -m rlhf_jax.main --config configs/rlvr.py:smoke --workdir runs/smoke

A small decoder learns sums (pretrain) and imitates worked answers, 30% of which are
wrong (sft); GRPO then pays for the right final number and for nothing else. There is no
reward model. The judge is the same verifier on held-out problems. Shao et al. 2024,
arXiv 2402.03300; Lambert et al. 2024, arXiv 2411.15124.

Arguments: ``name`` of another estimator than GRPO's, a module of
rlhf_jax/algos/estimators or your own; ``smoke``, ``seed=N``. Data, verifiers and what
goes wrong: docs/algorithms/verifiable_rewards.md.
"""

from ml_collections import ConfigDict

from rlhf_jax.config import parse_arg, section
from rlhf_jax.sharding import ParallelConfig
from rlhf_jax.stages.kinds import stage
from rlhf_jax.stages.settings import (
    ModelSettings,
)

DATA = 'python:rlhf_jax.datasets.tiny_math'


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = parse_arg(arg, name='grpo', smoke=False, seed=0)
    config = ConfigDict()
    config.seed = arg.seed
    config.stages = ('pretrain', 'sft', 'policy_gradient')
    config.tokenizer = 'rlhf_jax.datasets.tiny_math:tokenizer'
    config.metrics = ('jsonl',)
    # Unrolled: the layers are few, and XLA runs them faster so on a CPU.
    preset = 'nano' if arg.smoke else 'micro'
    config.model = section(ModelSettings, preset=preset, scan_unroll=4)
    config.parallel = section(ParallelConfig)
    muon = dict(
        name='muon',
        learning_rate=2e-2,
        adam_learning_rate=4e-3,
        warmup_percent=5,
        final_percent=10,
        weight_decay=0.01,
        b2=0.98,
    )
    config.pretrain = stage(
        'sft',
        init='scratch',
        form='text',
        train=f'{DATA}:texts?split=train',
        eval=f'{DATA}:texts?split=test',
        num_steps=20 if arg.smoke else 800,
        batch_size=8 if arg.smoke else 16,
        buckets=(72,),
        optim=muon,
        loop=dict(eval_every_steps=200),
    )
    config.sft = stage(
        'sft',
        init='pretrain',
        train=f'{DATA}:demonstrations?split=train',
        eval=f'{DATA}:demonstrations?split=test',
        num_steps=20 if arg.smoke else 500,
        batch_size=8 if arg.smoke else 32,
        buckets=(72,),
        optim=dict(muon, learning_rate=1e-2, adam_learning_rate=2e-3),
        loop=dict(eval_every_steps=100),
    )
    correct = dict(fn='rlhf_jax.verify:numeric_answer', args={'where': ('####',)})
    held_out = f'{DATA}:prompts?split=test'
    config.policy_gradient = stage(
        'policy_gradient',
        name=arg.name,
        init='sft',
        rewards={'correct': correct},
        gold=correct,
        prompts=f'{DATA}:prompts?split=train',
        eval_prompts=f'{held_out}[:32]' if arg.smoke else held_out,
        group_size=2 if arg.smoke else 8,
        batch_size=16 if arg.smoke else 128,
        num_rollouts=4 if arg.smoke else 100,
        prompt_buckets=(40,),
        max_new_tokens=32,
        eval_batch_size=32 if arg.smoke else 128,
        expected_win_rate=0.55,
        kl_loss_coef=0.01,
        optim=dict(learning_rate=2e-4, schedule='linear', eps=1e-5),
        loop=dict(log_every_steps=1, save_every_steps=25),
    )
    return config
