"""Verifiable rewards in a run: columns reach the rows they belong to, or nothing
compiles.
"""

import json

import pytest

from rlhf_jax.main import launch
from rlhf_jax.verify import numeric_answer
from tests.small_config import config_file

pytestmark = pytest.mark.usefixtures('one_device')


def told(prompts, responses, references, steps):
    """A reward that is its record's alone: unlike for every number of a problem."""
    return [int(r) + 1000 * s for r, s in zip(references, steps)]


@pytest.fixture
def config():
    """The recipe's last stage alone, from a model that knows nothing."""
    config = config_file('rlvr').get_config('smoke')
    config.stages = ('policy_gradient',)
    stage = config.policy_gradient
    stage.init, stage.num_rollouts = 'scratch', 1
    stage.prompts += '[:16]'
    stage.eval_prompts = stage.eval_prompts.split('[')[0] + '[:24]'
    return config


def test_columns_reach_the_rows_of_their_prompts(config, tmp_path):
    stage = config.policy_gradient
    stage.rewards = {**stage.rewards, 'told': dict(fn=f'{__name__}:told')}
    stage.gold = dict(fn='rlhf_jax.verify:regex', args={'pattern': '^.*$'})
    launch(config, tmp_path)
    folder = tmp_path / 'policy_gradient'
    [row] = map(json.loads, (folder / 'metrics.jsonl').open())
    assert 0 <= row['reward/correct'] <= 1 and 1000 < row['reward/told'] < 3000
    samples = list(map(json.loads, (folder / 'samples.jsonl').open()))
    assert len(samples) == 16
    for sample in samples:
        changes = sample['prompt'].count('.') - 1  # sentences behind the first
        for when in ('before', 'after'):
            said = sample[f'rewards_{when}']
            assert said['told'] == int(sample['reference']) + 1000 * changes
            text = [sample['prompt']], [sample[when]], [sample['reference']]
            assert said['correct'] == numeric_answer(*text, where=['####'])[0]
            assert sample[f'gold_{when}'] == ('\n' not in sample[when])


@pytest.mark.parametrize(
    ('key', 'spec'),
    [('prompts', 'train'), ('eval_prompts', 'test')],
)
def test_data_without_references_stop_the_run_before_it_compiles(
    config, tmp_path, key, spec
):
    path = tmp_path / f'{spec}.jsonl'
    path.write_text('{"prompt": "1 + 1 =", "reference": "2"}\n{"prompt": "2 + 2 ="}\n')
    config.policy_gradient[key] = f'jsonl:{path}'
    with pytest.raises(ValueError, match=rf"'references'.*{spec}.jsonl:2; add it"):
        launch(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'policy_gradient').exists()
