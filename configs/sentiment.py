"""Positive continuations from human labels: SFT → RM → PPO on real texts.

    python -m rlhf_jax.main --config configs/sentiment.py --workdir runs/sentiment

The sentiment task of Ziegler et al. 2019 (arXiv 1909.08593, §3.1): continue an opening,
and be positive. The reward model learns from pairs of a positive and a negative text;
``datasets/sentiment.py`` judges, by other means, on the other half of the labels.
Ziegler et al. cut at 24 tokens; here a response that does not end within 32 scores -1.

Arguments, by default GPT-2 and the IMDb reviews of TFDS: ``model`` a directory or hub
name; ``stories`` a text file, for the openings; ``labels`` a directory with
``uci_sentiment`` and ``goemotions``; ``learning_rate`` of SFT, on which the others
depend: a model of under a million parameters wants 1e-3; ``smoke`` (about a minute:
``sentiment.py:model=DIR,stories=FILE,labels=DIR,smoke``), ``seed=N``.
"""

from urllib.parse import urlencode

from ml_collections import ConfigDict

from rlhf_jax.config import parse_arg, section
from rlhf_jax.sharding import ParallelConfig
from rlhf_jax.stages.kinds import stage
from rlhf_jax.stages.settings import (
    ModelSettings,
)

REVIEWS = 'tfds:imdb_reviews/plain_text:train'
RECORDS = 'python:rlhf_jax.datasets.sentiment'


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = parse_arg(
        arg,
        model='gpt2',
        stories='',
        labels='',
        learning_rate=3e-5,
        smoke=False,
        seed=0,
    )
    stories = f'text:{arg.stories}' if arg.stories else REVIEWS
    labels = arg.labels or REVIEWS

    def openings(kind: str, part: str) -> str:
        query = urlencode(dict(stories=stories, part=part), safe='/:')
        return f'{RECORDS}:{kind}?{query}'

    def pairs(part: str) -> str:
        return f'{openings("pairs", part)}&{urlencode(dict(labels=labels), safe="/:")}'

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
        train=openings('demonstrations', 'train'),
        eval=openings('demonstrations', 'test'),
        batch_size=8 if arg.smoke else 32,
        num_steps=10 if arg.smoke else None,
        num_epochs=None if arg.smoke else 3.0,
        buckets=(104,),
        optim=dict(learning_rate=arg.learning_rate, warmup_percent=10, eps=1e-5),
    )
    config.rm = stage(
        'reward_model',
        init='sft',
        train=pairs('train'),
        eval=pairs('test'),
        references=openings('demonstrations', 'test'),
        batch_size=8 if arg.smoke else 32,
        num_steps=10 if arg.smoke else None,
        num_epochs=None if arg.smoke else 1.0,
        buckets=(128,),
        optim=dict(learning_rate=arg.learning_rate, warmup_percent=5, eps=1e-5),
    )
    rate = dict(schedule='linear', warmup_percent=10, eps=1e-5)
    config.ppo = stage(
        'ppo',
        init='sft',
        rewards={'rm': dict(model='rm')},
        critic='rm',
        gold=dict(fn='rlhf_jax.datasets.sentiment:judge', args=dict(labels=labels)),
        base=arg.model,
        prompts=openings('prompts', 'train'),
        eval_prompts=openings('prompts', 'test'),
        batch_size=8 if arg.smoke else 64,
        num_rollouts=3 if arg.smoke else 30,
        prompt_buckets=(64,),
        max_new_tokens=32,
        eval_batch_size=64,
        expected_win_rate=0.6,
        kl_coef=0.4,
        missing_eos_score=-1.0,
        optim=dict(learning_rate=arg.learning_rate / 3, **rate),
        critic_optim=dict(learning_rate=arg.learning_rate, **rate),
        loop=dict(log_every_steps=1, save_every_steps=30),
    )
    return config
