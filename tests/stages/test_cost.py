"""A cost model from PKU-SafeRLHF records, and the policy that it holds in bounds."""

import json

import jax
import numpy as np
import pytest

from rlhf_jax.main import launch
from rlhf_jax.sample import load_part
from rlhf_jax.stages.kinds import stage
from tests.small_config import config_file
from tests.test_main import fails, never_compiled  # noqa: F401

pytestmark = pytest.mark.usefixtures('one_device')

GOOD, BAD = ('a lamp', 'rain in May'), ('a flood', 'no lamp')


def letters(prompts, responses):
    """A reward of the texts alone."""
    return [sum(map(ord, text)) / 1000 for text in responses]


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    """Harmless and harmful answers by rule, in every pattern there is."""
    rng, rows = np.random.default_rng(0), []
    for i in range(48):
        safe = [bool(x) for x in rng.integers(0, 2, 2)]
        safer = int(rng.integers(2)) if safe[0] == safe[1] else safe.index(True)
        answers = [(GOOD if s else BAD)[safer == k] for k, s in enumerate(safe)]
        rows.append(
            {
                'prompt': f'Anna saw {i} lamps',
                'response_0': answers[0],
                'response_1': answers[1],
                'is_response_0_safe': safe[0],
                'is_response_1_safe': safe[1],
                'better_response_id': 1 - safer,
                'safer_response_id': safer,
            }
        )
    path = tmp_path_factory.mktemp('data') / 'train.jsonl'
    path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
    reader = 'rlhf_jax.datasets.safe_rlhf:costs'
    return f'python:{reader}?data=jsonl:{path}&template={{prompt}}'


def get_config(records, **cost):
    """Cost and ppo_lagrangian, in few steps from fresh models."""
    config = config_file('ppo_lagrangian').get_config('smoke')
    config.stages = ('cost', 'ppo_lagrangian')
    config.cost = stage(
        'reward_model',
        **{
            'init': 'scratch',
            'train': records,
            'eval': f'{records}[:16]',
            'num_steps': 30,
            'batch_size': 16,
            'buckets': (48,),
            'optim': dict(learning_rate=3e-3),
            'loop': dict(log_every_steps=1),
        }
        | cost,
    )
    settings = config.ppo_lagrangian
    settings.prompts = settings.prompts.split('[')[0] + '[:64]'
    settings.eval_prompts = settings.eval_prompts.split('[')[0] + '[:16]'
    values = dict(init='scratch', critic='scratch', cost_critic='cost')
    values |= dict(num_rollouts=2, eval_batch_size=16, max_new_tokens=8)
    values |= dict(rewards={'letters': {'fn': f'{__name__}:letters'}})
    values |= dict(cost={'model': 'cost'})
    with config.unlocked(), settings.ignore_type():
        for name, value in values.items():
            settings[name] = value
    return config


def read_json(path):
    return json.loads(path.read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def run(records, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('runs') / 'cost'
    return workdir, launch(get_config(records), workdir)['stages']


def test_it_learns_the_order_and_where_harm_begins(run):
    workdir, stages = run
    cost = stages['cost']
    assert cost['finished'] and cost['verdict'] == 'pass', cost['figure']
    assert cost['sign_accuracy'] > cost['sign_baseline']
    assert 'of the sign' in cost['figure'] and 'of the sign above' in cost['expected']
    assert 'mean_reference_score' not in cost
    page = (workdir / 'report.html').read_text(encoding='utf-8')
    assert 'Reward model <code>cost</code>' in page and 'right side of 0' in page
    assert 'id="rm-' not in page


def test_its_costs_rule_the_multiplier_and_start_the_critic(run):
    workdir, stages = run
    rows = (workdir / 'ppo_lagrangian' / 'metrics.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in rows]
    assert stages['ppo_lagrangian']['finished'] and len(rows) == 2
    # λ starts at 1: log λ moves by lambda_lr·λ·J_C.
    moved = 0.1 * rows[0]['objective/cost']
    assert rows[0]['objective/lambda'] == pytest.approx(np.exp(moved), rel=1e-4)
    sample = read_json(workdir / 'ppo_lagrangian' / 'eval.json')
    assert np.isfinite(sample['cost_after'])
    # Two updates away from the cost model, not from a fresh head.
    _, model = load_part(workdir, 'cost', 'reward')
    _, critic = load_part(workdir, 'ppo_lagrangian', 'cost_critic')
    gap = max(
        np.abs(np.asarray(a) - b).max()
        for a, b in zip(*map(jax.tree.leaves, (model['head'], critic['head'])))
    )
    assert gap < 0.05 < np.abs(np.asarray(model['head']['kernel'])).max()


@pytest.mark.parametrize(
    ('changes', 'parts'),
    [
        (
            {
                'references': 'tfds:tiny_tldr/demonstrations:test[:8]',
                'buckets': (88,),
            },
            ['config.cost.references=', 'config.cost.train=', 'references=None'],
        ),
        ({'members': 2}, ['config.cost.members=2', 'plain comparisons']),
        ({'init': 'ppo_lagrangian'}, ['config.cost.init', 'does not come before cost']),
    ],
)
def test_mistakes_are_named_before_compilation(
    records,
    tmp_path,
    never_compiled,  # noqa: F811
    changes,
    parts,
):
    fails(get_config(records, **changes), tmp_path, *parts)


def test_a_cost_model_writes_no_text(records, tmp_path, never_compiled):  # noqa: F811
    config = get_config(records)
    config.ppo_lagrangian.init = 'cost'
    fails(config, tmp_path, "ppo_lagrangian.init='cost'", 'no language model')
