"""Constitutional AI on the embedded world: state only what the article says.

    python -m rlhf_jax.main --config configs/constitution.py --workdir runs/constitution
    python -m rlhf_jax.main --config configs/constitution.py:from=RUN --workdir DIR

A policy that writes summaries (sft, of the quickstart) invents facts. A critic of its
size has learned from critiques and revisions that were made by rule (critic). The
policy answers training prompts, the critic says what is wrong and puts it right
(revised), the policy learns from the last revisions (sft_2), and inventions are counted
before and after (measured).

Then preferences by the principle, in two ways. sft_2 answers other prompts and learns
to prefer the critic's revisions to its own answers (paired, dpo). And it answers them
twice, a judge that goes on from the critic says which answer follows the principle
better (judge, drawn, preferred), a reward model learns from what it says, and PPO
optimises that (rm, ppo). No stage but those that train critic and judge sees what the
rule knows. Bai et al. 2022, arXiv 2212.08073; see docs/algorithms/constitution.md.

Arguments: ``rounds`` of critique and revision; ``from`` a finished quickstart to take
sft from; ``smoke``, ``seed=N``.
"""

import json

from ml_collections import ConfigDict

from configs import quickstart
from configs.ladder import COPYING, DATA, GOLD, LENGTHS
from configs.rlaif import demonstrations
from rlhf_jax.config import parse_arg
from rlhf_jax.datasets import tiny_critiques
from rlhf_jax.labels.constitution import read_constitution
from rlhf_jax.stages.kinds import stage

CRITIQUES = 'python:rlhf_jax.datasets.tiny_critiques:demonstrations'
COUNTED = 'rlhf_jax.datasets.tiny_tldr:'
COUNTS = {
    'invented': dict(fn=f'{COUNTED}invented', weight=-1.0),
    'covered': dict(fn=f'{COUNTED}covered'),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = parse_arg(arg, rounds=1, smoke=False, seed=0, **{'from': ''})
    config = quickstart.get_config('smoke' if arg.smoke else None)
    config.seed = arg.seed
    rm, ppo = config.rm.to_dict(), config.ppo.to_dict()
    del config.rm, config.ppo
    first = f'{arg["from"]}/sft' if arg['from'] else 'sft'
    stages = ('critic', 'revised', 'sft_2', 'measured', 'paired', 'dpo')
    stages += ('judge', 'drawn', 'preferred', 'rm', 'ppo')
    config.stages = stages if arg['from'] else ('sft', *stages)
    count = 32 if arg.smoke else 2000
    config.critic = stage(
        'sft',
        init=first,
        train=f'{CRITIQUES}?split=train',
        eval=f'{CRITIQUES}?split=test',
        buckets=(96, 120, 184),
        sort_batches=16,
        batch_size=8 if arg.smoke else 16,
        num_steps=20 if arg.smoke else 1200,
        optim=COPYING,
        loop=dict(eval_every_steps=600),
    )
    config.revised = revising(arg, first, f'{DATA}/prompts:train[:{count}]')
    config.sft_2 = ConfigDict(config.sft.to_dict())
    config.sft_2.init = first
    config.sft_2.train = 'stage:revised[:90%]'
    config.sft_2.eval = 'stage:revised[90%:]'
    config.sft_2.num_steps = 4 if arg.smoke else 120
    config.sft_2.buckets = (88,)
    config.sft_2.optim.learning_rate = 5e-4
    held_out = dict(
        eval_prompts=f'{DATA}/prompts:test[:{count}]'
        if arg.smoke
        else f'{DATA}/prompts:test',
        gold=GOLD,
        rewards=COUNTS,
        eval_batch_size=32 if arg.smoke else 128,
        **LENGTHS,
    )
    config.measured = stage('evaluate', policy='sft_2', reference=first, **held_out)
    config.paired = revising(
        arg, 'sft_2', f'{DATA}/prompts:train[{count}:{2 * count}]', keep='pairs'
    )
    config.dpo = stage(
        'preference',
        name='dpo',
        init='sft_2',
        train='stage:paired[:90%]',
        eval='stage:paired[90%:]',
        batch_size=4 if arg.smoke else 32,
        num_steps=4 if arg.smoke else 60,
        buckets=(88,),
        optim=dict(learning_rate=2e-4, warmup_percent=10),
        **held_out,
    )
    preferring(config, arg, f'{DATA}/prompts:train[{count}:{2 * count}]')
    config.rm = ConfigDict(rm)
    config.rm.init = 'sft_2'
    config.rm.train = 'stage:preferred[:90%]'
    config.rm.eval = 'stage:preferred[90%:]'
    config.rm.num_steps = 4 if arg.smoke else 150
    config.ppo = ConfigDict(ppo)
    config.ppo.init, config.ppo.critic = 'sft_2', 'rm'
    config.ppo.expected_win_rate = 0.5
    for name, count in COUNTS.items():  # for the report alone
        config.ppo.rewards[name] = ConfigDict(count | {'weight': 0.0})
    return config


def preferring(config: ConfigDict, arg: ConfigDict, prompts: str) -> None:
    """The stages that say which of two answers follows the principle better."""
    labels = tiny_critiques.LABELS
    (principle,) = read_constitution(
        tiny_critiques.CONSTITUTION, ('preference_question',)
    )

    def told(split: str) -> str:
        return demonstrations(
            f'python:rlhf_jax.datasets.tiny_critiques:comparisons?split={split}',
            prompt=str(tiny_critiques.JUDGE_BY_PRINCIPLE),
            labels=json.dumps(labels),
            reason='rlhf_jax.datasets.tiny_critiques:reason',
            principle=principle.preference_question,
        )

    config.judge = ConfigDict(config.critic.to_dict())
    config.judge.init = 'critic'
    config.judge.train, config.judge.eval = told('train'), told('test')
    config.judge.buckets = (104, 120, 136, 160, 192)
    config.judge.num_steps = 20 if arg.smoke else 1200
    config.drawn = stage(
        'sample',
        policy='sft_2',
        prompts=prompts,
        num_samples=2,
        rewards=COUNTS,
        **LENGTHS,
    )
    config.preferred = stage(
        'label',
        responses='stage:drawn',
        by='model',
        judge='judge',
        constitution=str(tiny_critiques.CONSTITUTION),
        prompt_file=str(tiny_critiques.JUDGE_BY_PRINCIPLE),
        labels=labels,
        judge_buckets=(112, 144),
        judge_batch_size=32 if arg.smoke else 64,
        max_reasoning_tokens=48,
        reasoning_temperature=0.0,
    )


def revising(arg: ConfigDict, policy: str, prompts: str, **settings: str) -> ConfigDict:
    """A stage in which the critic revises a policy's answers."""
    return stage(
        'revise',
        policy=policy,
        critic='critic',
        prompts=prompts,
        constitution=str(tiny_critiques.CONSTITUTION),
        critique_prompt=str(tiny_critiques.CRITIQUE),
        revision_prompt=str(tiny_critiques.REVISION),
        rounds=arg.rounds,
        batch_size=32 if arg.smoke else 128,
        **LENGTHS,
        critique_buckets=(96, 160),
        max_critique_tokens=60,
        critic_temperature=0.0,
        rewards=COUNTS | {'gold': GOLD | {'weight': 0.0}},
        **settings,
    )
