"""Labels by people, by a model, or half and half, on the embedded world.

    python -m rlhf_jax.main --config configs/rlaif.py:labels=model --workdir runs/model
    python -m rlhf_jax.main --config configs/rlaif.py:labels=people,from=RUN --workdir D

The same pairs of summaries are labelled by six simulated people (people), by a language
model that was fine-tuned on other comparisons of theirs (model), or the first half by
the ones and the second half by the other (half). A reward model learns from the labels,
and PPO optimises it. The judge reads both orders and gives a soft label; it is the
base model, trained to say behind a prompt file whether the second summary is right or
wrong. RLAIF:
Lee et al. 2023, arXiv 2309.00267.

Arguments: ``labels`` people, model or half; ``count`` of pairs that are labelled;
``from`` a finished run to take sft, and of this recipe the judge, from; ``smoke``,
``seed=N``.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.ladder import DATA
from rlhf_jax.config import parse_arg
from rlhf_jax.datasets import tiny_tldr
from rlhf_jax.stages.kinds import stage

LABELS = (' wrong', ' right')  # the second one is: of the first, of the second better


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    own = parse_arg(
        arg, labels='model', count=6000, smoke=False, seed=0, **{'from': ''}
    )
    if own.labels not in ('people', 'model', 'half'):
        raise ValueError(f"labels={own.labels!r}; use 'people', 'model' or 'half'")
    config = quickstart.get_config('smoke' if own.smoke else None)
    config.seed = own.seed
    count = 32 if own.smoke else own.count
    by_people = {'people': count, 'model': 0, 'half': count // 2}[own.labels]
    named, first = [], f'{own["from"]}/' if own['from'] else ''
    if by_people:
        config.people = simulated(f'{DATA}/comparisons:train[:{by_people}]')
        named.append('people')
    if by_people < count:
        judge = f'{first}judge'
        if not first:
            config.judge = judging(own.smoke)
            named.insert(0, 'judge')
        pairs = f'{DATA}/comparisons:train[{by_people}:{count}]'
        config.model_labels = stage(
            'label',
            responses=pairs,
            by='model',
            judge=judge,
            prompt_file=str(tiny_tldr.JUDGE),
            labels=LABELS,
            judge_buckets=(112, 144),
            judge_batch_size=32 if own.smoke else 64,
        )
        named.append('model_labels')
    labelled = [name for name in named if name != 'judge']
    config.rm.init = f'{first}sft'
    config.rm.train = ' + '.join(f'stage:{name}' for name in labelled)
    if not own.smoke:
        config.rm.num_steps = 300
    config.ppo.init = f'{first}sft'
    config.stages = (*([] if first else ['sft']), *named, 'rm', 'ppo')
    if first:
        del config.sft
    return config


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


def judging(smoke: bool) -> ConfigDict:
    """A model that learns to compare, from comparisons that nobody labels anew."""
    spec = 'python:rlhf_jax.labels.judge:demonstrations?labels=[" wrong"," right"]'
    spec += f'&prompt={tiny_tldr.JUDGE}&data=tfds:tiny_tldr/comparisons:'
    return stage(
        'sft',
        init='tiny',
        train=f'{spec}train[6000:]',
        eval=f'{spec}test[:500]',
        buckets=(112, 144),
        batch_size=8 if smoke else 32,
        num_steps=20 if smoke else 2000,
        optim=dict(learning_rate=1.5e-3, warmup_percent=5),
        loop=dict(eval_every_steps=250),
    )
