"""Labels by people, by a model, or half and half, on the embedded world.

    python -m rlhf_jax.main --config configs/rlaif.py:labels=model --workdir runs/model
    python -m rlhf_jax.main --config configs/rlaif.py:labels=people,from=RUN --workdir D

The same pairs of summaries are labelled by six simulated people (people), by a language
model that was fine-tuned on other comparisons of theirs (model), or the first half by
the ones and the second half by the other (half). A reward model learns from the labels,
and PPO optimises it. The judge reads both orders and gives a soft label; it is the base
model, trained to go through the facts of both summaries, and then to say whether the
second one is right or wrong, the better one or not. RLAIF: Lee et al. 2023, arXiv
2309.00267.

    python -m rlhf_jax.main --config configs/rlaif.py:model=DIR,data=hh:FILE
    --workdir DIR

With ``data`` its own labels are those by people, and the judge is asked by the prompt
file of the package.

Arguments: ``labels`` people, model or half; ``count`` of pairs that are labelled;
``from`` a finished run to take sft, and of this recipe the judge, from; ``smoke``,
``seed=N``, and the others of ``configs/ladder.py``.
"""

import json
from typing import Any
from urllib.parse import urlencode

from ml_collections import ConfigDict

from configs import quickstart
from configs.ladder import COPYING, DATA, arguments, rates
from rlhf_jax.datasets import tiny_critiques
from rlhf_jax.stages.kinds import stage


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = arguments(arg, labels='model', count=6000)
    if arg.labels not in ('people', 'model', 'half'):
        raise ValueError(f"labels={arg.labels!r}; use 'people', 'model' or 'half'")
    if arg.count < 1 + (arg.labels == 'half'):
        raise ValueError(f'count={arg.count} pairs are too few for {arg.labels!r}')
    config = quickstart.configure(arg)
    first = f'{arg["from"]}/' if arg['from'] else ''
    if first:  # which has no reward model of these labels
        own = quickstart.configure(ConfigDict({**arg.to_dict(), 'from': ''}))
        config.rm = own.rm
        config.rm.init = f'{first}sft'
    count = 32 if arg.smoke else arg.count
    by_people = {'people': count, 'model': 0, 'half': count // 2}[arg.labels]
    pairs = arg.data or f'{DATA}/comparisons:train'
    stages, learned = [] if first else ['sft'], []
    if by_people:
        learned.append(f'{pairs}[:{by_people}]')
        if not arg.data:
            config.people = simulated(learned.pop())
            learned.append('stage:people')
            stages.append('people')
    if by_people < count:
        if not first:
            config.judge = judging(arg, count)
            stages.append('judge')
        config.model_labels = stage(
            'label',
            responses=f'{pairs}[{by_people}:{count}]',
            by='model',
            judge=f'{first}judge',
            **asking(arg),
            judge_batch_size=32 if arg.smoke else 64,
            on_bad='skip' if arg.data else 'error',
        )
        stages.append('model_labels')
        learned.append('stage:model_labels')
    config.rm.train = ' + '.join(learned)
    if not (arg.smoke or arg.data):
        config.rm.num_steps = 300
    config.ppo.rewards.rm.model = config.ppo.critic = 'rm'
    config.stages = (*stages, 'rm', 'ppo')
    return config


def asking(arg: ConfigDict) -> dict[str, Any]:
    """What the judge is asked, and what it may say."""
    if arg.data:
        return {'judge_buckets': (2 * arg.length + 128,)}
    return {
        'prompt_file': str(tiny_critiques.JUDGE),
        'labels': tiny_critiques.LABELS,
        'judge_buckets': (112, 144),
        'max_reasoning_tokens': 48,
        'reasoning_temperature': 0.0,
    }


def simulated(responses: str, **settings: object) -> ConfigDict:
    """Labels by the six annotators of the embedded world."""
    return stage(
        'label',
        responses=responses,
        by='simulated',
        fn='rlhf_jax.datasets.tiny_tldr:answer_as',
        labellers=('ann', 'ben', 'eva', 'leo', 'mia', 'tom'),
        **settings,
    )


def judging(arg: ConfigDict, count: int) -> ConfigDict:
    """A model that learns to compare, from comparisons that nobody labels anew."""
    if arg.data:
        said = demonstrations(arg.data)
        rate, *_ = rates(arg, 1e-3, 0.0, 0.0)
        how = dict(
            train=f'{said}[{count}:90%]',
            eval=f'{said}[90%:]',
            buckets=asking(arg)['judge_buckets'],
            overlong='truncate',
            optim=dict(learning_rate=rate, warmup_percent=5),
        )
    else:
        told = dict(
            prompt=str(tiny_critiques.JUDGE),
            labels=json.dumps(tiny_critiques.LABELS),
            reason='rlhf_jax.datasets.tiny_critiques:reason',
        )
        how = dict(
            train=demonstrations(f'{DATA}/comparisons:train[{count}:]', **told),
            eval=demonstrations(f'{DATA}/comparisons:test[:250]', **told),
            buckets=(104, 120, 136, 160, 192),
            sort_batches=16,
            optim=COPYING,
        )
    return stage(
        'sft',
        init=arg.model or 'tiny',
        batch_size=8 if arg.smoke else 32,
        num_steps=20 if arg.smoke else 2000,
        loop=dict(eval_every_steps=500),
        **how,
    )


def demonstrations(data: str, **told: str) -> str:
    """A data spec of what a judge should have said of comparisons."""
    reader = 'python:rlhf_jax.labels.judge:demonstrations?'
    return reader + urlencode({'data': data, **told})
