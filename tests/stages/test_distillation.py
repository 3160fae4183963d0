"""The kind distillation: what it leaves, without rewards and with, and what it
refuses.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rlhf_jax.main import launch
from tests.small_config import config_file
from tests.stages.kills import killed_behind
from tests.stages.test_scoring import WORDS, words
from tests.test_main import fails, never_compiled  # noqa: F401

pytestmark = pytest.mark.usefixtures('one_device')

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / 'hf' / 'fixtures'
LETTERS = {'letters': {'fn': 'tests.stages.test_online:letters'}}


def get_config(**values):
    """Two rollouts of a small fresh policy; its teacher is the base model that the
    package ships, which is larger. Nothing else judges.
    """
    config = config_file('distillation').get_config('from=NOWHERE,smoke')
    settings = config.distillation
    settings.init, settings.teacher = 'scratch', 'tiny'
    settings.prompts = settings.prompts.split('[')[0] + '[:64]'
    settings.eval_prompts = settings.eval_prompts.split('[')[0] + '[:16]'
    settings.eval_batch_size, settings.max_new_tokens = 16, 8
    settings.num_rollouts, settings.loop.save_every_steps = 2, 2
    for key, value in {'gold': None, **values}.items():
        with settings.ignore_type():
            settings[key] = value
    return config


def rows(workdir):
    path = workdir / 'distillation' / 'metrics.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()]


def params(workdir):
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(workdir / 'distillation' / 'params')


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    """A finished run without rewards and what its report says of it."""
    workdir = tmp_path_factory.mktemp('runs') / 'distilled'
    return workdir, launch(get_config(num_rollouts=4), workdir)['stages']


def test_a_larger_teacher_and_no_reward(done):
    workdir, report = done
    table = rows(workdir)
    assert [row['step'] for row in table] == [1, 2, 3, 4]
    assert table[0]['policy/grad_norm'] > 0
    assert table[0]['objective/teacher_kl'] > 1  # nats
    assert table[0]['objective/kl'] == pytest.approx(0, abs=1e-3)
    assert table[-1]['objective/kl'] != 0
    for name in ('proxy_reward', 'scores_min', 'scores_max'):
        assert f'objective/{name}' not in table[0]
    sizes = [
        json.loads((workdir / 'distillation' / 'model.json').read_text())['policy'],
        json.loads(next(_tiny().glob('config.json')).read_text()),
    ]
    assert sizes[0]['width'] < sizes[1]['hidden_size']
    report = report['distillation']
    assert report['finished'] and set(params(workdir)) == {'policy'}
    assert 'win_rate' not in report and report['rewards_after'] == {}


def _tiny():
    from rlhf_jax.datasets import tiny_base

    return pathlib.Path(tiny_base.__path__[0])


def test_the_kl_to_the_teacher_decides_where_nothing_else_judges(done):
    workdir, stages = done
    report = stages['distillation']
    before, after = (report[f'teacher_kl_{when}'] for when in ('before', 'after'))
    assert report['verdict'] == ('pass' if after < before else 'fail')
    assert 'KL to the teacher' in report['figure']
    # Of the same policy as the first rollout, on other prompts.
    assert before == pytest.approx(rows(workdir)[0]['objective/teacher_kl'], rel=0.3)
    page = (workdir / 'report.html').read_text()
    for part in ('distillation-teacher', 'distillation-updates', 'On-policy distill'):
        assert part in page
    assert 'There are no rewards' in page and 'only the learned one' not in page


def test_a_resumed_run_is_bit_identical(done, tmp_path):
    with killed_behind(2):
        launch(get_config(num_rollouts=4), tmp_path)
    launch(get_config(num_rollouts=4), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params(done[0]), params(tmp_path))
    name = 'objective/teacher_kl'
    assert [row[name] for row in rows(tmp_path)] == [row[name] for row in rows(done[0])]


def test_rewards_are_added_where_responses_are_compared(done, tmp_path):
    launch(get_config(rewards=LETTERS, group_size=2, num_rollouts=1), tmp_path)
    (row,) = rows(tmp_path)
    assert row['reward/letters'] == row['objective/proxy_reward'] > 0
    assert row['objective/scores_min'] < row['objective/scores_max']
    assert row['objective/rlhf_reward'] == pytest.approx(
        row['objective/scores'] - row['objective/teacher_kl'], rel=1e-4
    )


def test_its_own_start_has_nothing_to_teach(finished, tmp_path):
    both = dict.fromkeys(('init', 'teacher'), f'{finished}/sft')
    launch(get_config(**both, num_rollouts=1, num_epochs=1), tmp_path)
    (row,) = rows(tmp_path)
    assert row['objective/teacher_kl'] == pytest.approx(0, abs=1e-3)
    assert row['policy/grad_norm'] < 1e-3


def test_the_recipe_runs_below_a_quickstart(finished, tmp_path):
    """With the judge of the data set."""
    config = config_file('distillation').get_config(f'smoke,from={finished}')
    settings = config.distillation
    assert config.stages == ('distillation',) and not settings.rewards
    assert settings.init == f'{finished}/sft' and settings.teacher == f'{finished}/ppo'
    settings.num_rollouts = 1
    report = launch(config, tmp_path)['stages']['distillation']
    assert 0 <= report['win_rate'] <= 1 and report['teacher_kl_before'] != 0
    whole = config_file('distillation').get_config('smoke')
    assert whole.stages == ('sft', 'rm', 'ppo', 'distillation')
    assert (whole.distillation.init, whole.distillation.teacher) == ('sft', 'ppo')


@pytest.mark.parametrize(
    ('changes', 'parts'),
    [
        ({'teacher': 'FOREIGN'}, ['.teacher=', 'another tokenizer', 'same tokenizer']),
        ({'teacher': 'RUN/rm'}, ['.teacher=', 'no language model']),
        ({'teacher': 'distillation'}, ['does not come before distillation']),
        ({'rewards': LETTERS}, ['group_size=1', 'compared', '2 or more']),
        ({'missing_eos_penalty': 1.0}, ['missing_eos_penalty=1.0', 'rewards is empty']),
        (
            {'rewards': {'teacher_kl': LETTERS['letters']}, 'group_size': 2},
            ['rewards.teacher_kl', 'take another'],
        ),
        ({'group_size': 3}, ['batch_size=16', 'group_size=3']),
        ({'aggregation': 'fixed_length'}, ['aggregation', "'token_mean'"]),
    ],
)
def test_mistakes_are_named_before_compilation(
    finished,
    tmp_path,
    never_compiled,  # noqa: F811
    changes,
    parts,
):
    if changes.get('teacher') == 'FOREIGN':
        pieces = ['[UNK]', '<bos>', '</s>', *WORDS]
        tokenizer = words(pieces, '$A', eos_token='</s>', pad_token='[UNK]')
        shutil.copytree(FIXTURES / 'gpt2', tmp_path / 'gpt2')
        tokenizer.save_pretrained(tmp_path / 'gpt2')
        changes = {'teacher': str(tmp_path / 'gpt2')}
    config = get_config()
    with config.unlocked(), config.ignore_type():
        for key, value in changes.items():
            if isinstance(value, str):
                value = value.replace('RUN', str(finished))
            config.distillation[key] = value
    fails(config, tmp_path / 'run', *parts)
