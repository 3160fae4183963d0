"""SFT → RM → PPO on Anthropic's HH-RLHF transcripts, from a pretrained model.

    python -m rlhf_jax.main --config configs/hh.py:model=DIR,data=FILE --workdir runs/hh

Arguments: ``model`` a directory or hub name (docs/models.md); ``data`` a transcript
file (``.jsonl`` or ``.jsonl.gz``, also of a hub data set), of which the last tenth is
held out; ``length`` the longest dialogue in tokens, cut from the left;
``learning_rate`` of SFT, on which the others depend: the default suits the default
model of 135 million parameters, one of under a million wants 1e-3; ``smoke`` (about a
minute: ``hh.py:model=DIR,data=FILE,smoke``), ``seed=N``. There is no gold reward here:
the report says what the learned reward did and that this alone proves nothing.

Source of the data: Bai et al. 2022, arXiv 2204.05862.
"""

from ml_collections import ConfigDict

from rlhf_jax.config import parse_arg, section
from rlhf_jax.sharding import ParallelConfig
from rlhf_jax.stages.kinds import stage
from rlhf_jax.stages.settings import (
    ModelSettings,
)


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = parse_arg(
        arg,
        model='HuggingFaceTB/SmolLM2-135M',
        data='Anthropic/hh-rlhf/harmless-base/train.jsonl.gz',
        length=512,
        learning_rate=5e-5,
        smoke=False,
        seed=0,
    )
    part = 30 if arg.smoke else 90  # percent of the file that is trained on
    train, held_out = f'hh:{arg.data}[:{part}%]', f'hh:{arg.data}[{part}%:{part + 10}%]'
    length = 256 if arg.smoke else arg.length
    response = 24 if arg.smoke else 64
    buckets = (length // 2, length)
    reading = dict(overlong='truncate', on_bad='skip', buckets=buckets)
    config = ConfigDict()
    config.seed = arg.seed
    config.stages = ('sft', 'rm', 'ppo')
    config.tokenizer = arg.model
    config.metrics = ('jsonl',)
    config.model = section(ModelSettings)
    config.parallel = section(ParallelConfig)
    config.sft = stage(
        'sft',
        init=arg.model,
        train=train,
        eval=held_out,
        batch_size=8 if arg.smoke else 16,
        num_steps=10 if arg.smoke else None,
        num_epochs=None if arg.smoke else 1.0,
        optim=dict(learning_rate=arg.learning_rate, warmup_percent=5, eps=1e-5),
        **reading,
    )
    config.rm = stage(
        'reward_model',
        init='sft',
        train=train,
        eval=held_out,
        references=held_out,
        num_references=64 if arg.smoke else 256,
        batch_size=8 if arg.smoke else 16,
        num_steps=10 if arg.smoke else None,
        num_epochs=None if arg.smoke else 1.0,
        optim=dict(learning_rate=arg.learning_rate / 3, warmup_percent=5, eps=1e-5),
        **reading,
    )
    config.ppo = stage(
        'ppo',
        init='sft',
        rewards={'rm': dict(model='rm')},
        critic='rm',
        prompts=train,
        eval_prompts=held_out,
        overlong='truncate',
        on_bad='skip',
        batch_size=8 if arg.smoke else 32,
        num_rollouts=3 if arg.smoke else 40,
        prompt_buckets=(length - response,),
        max_new_tokens=response,
        eval_batch_size=32,
        num_epochs=2,
        kl_coef=0.05,
        missing_eos_penalty=1.0,
        optim=dict(learning_rate=arg.learning_rate / 10, schedule='linear', eps=1e-5),
        critic_optim=dict(
            learning_rate=arg.learning_rate / 3, schedule='linear', eps=1e-5
        ),
        loop=dict(log_every_steps=1, save_every_steps=20),
    )
    return config
