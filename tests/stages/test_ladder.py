"""The whole ladder, pretrain → sft → rm → ppo: what it leaves behind and hands on."""

import json
import math

import jax
import numpy as np
import pytest

from rlhf_jax.main import launch
from rlhf_jax.sample import load_part
from tests.small_config import get_config

STAGES = ('pretrain', 'sft', 'rm', 'ppo')


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def read(path):
    return json.loads(path.read_text(encoding='utf-8'))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_work_directory_holds_what_the_design_names(finished):
    names = {path.name for path in finished.iterdir()}
    files = {'config.json', 'lock', 'report.html', 'report.json', 'tokenizer'}
    assert names == files | set(STAGES)
    for stage in STAGES:
        held = {path.name for path in (finished / stage).iterdir()}
        wanted = {'checkpoints', 'params', 'metrics.jsonl', 'eval.json', 'done.json'}
        assert wanted | {'model.json'} <= held
        assert [p.name for p in (finished / stage / 'checkpoints').iterdir()] == ['4']
    assert len(rows(finished / 'ppo' / 'samples.jsonl')) == 16


def test_config_json_is_resolved_and_says_what_ran(finished):
    stored = read(finished / 'config.json')
    assert stored['config']['ppo']['clip_eps'] == get_config().ppo.clip_eps
    assert stored['versions']['jax'] == jax.__version__
    assert str(len(jax.devices())) in stored['device']
    assert 'commit' in stored


def test_report_json_has_the_promised_keys(finished):
    report = read(finished / 'report.json')
    assert report == launch(get_config(), finished)
    rm, ppo = report['stages']['rm'], report['stages']['ppo']
    assert 0 <= rm['accuracy'] <= 1 and 0.5 < rm['accuracy_ceiling'] <= 1
    low, high = ppo['win_rate_interval']
    assert low <= ppo['win_rate'] <= high
    for name in ('gold', 'proxy'):
        for when in ('before', 'after'):
            assert np.isfinite(ppo[f'{name}_reward_{when}'])
    assert ppo['prompts'] == 16 and np.isfinite(ppo['kl'])
    assert report['seconds'] > 0
    for stage in STAGES:
        assert report['stages'][stage]['verdict'] in ('pass', 'fail')
        assert report['stages'][stage]['steps'] == 4


def test_training_lowers_the_loss(finished):
    for stage in ('pretrain', 'sft'):
        result = read(finished / stage / 'eval.json')
        assert result['loss'] < result['loss_before']
    before = read(finished / 'sft' / 'eval.json')['loss_before']
    assert before < read(finished / 'sft' / 'eval.json')['uniform_loss']


@pytest.mark.parametrize('stage', STAGES)
def test_metrics_have_one_row_a_step_and_the_usual_names(finished, stage):
    table = rows(finished / stage / 'metrics.jsonl')
    assert [row['step'] for row in table] == [1, 2, 3, 4]
    names = {
        'pretrain': {'train/loss', 'train/lr', 'train/grad_norm'},
        'rm': {'train/loss', 'train/accuracy', 'train/lr', 'train/grad_norm'},
        'ppo': {
            *('objective/kl', 'objective/scores', 'objective/rlhf_reward'),
            *('objective/entropy', 'objective/gold', 'objective/kl_coef', 'reward/rm'),
            *('policy/clipfrac', 'policy/approxkl', 'policy/ratio', 'policy/entropy'),
            *('loss/policy', 'loss/value', 'val/clipfrac', 'val/mean'),
        },
    }
    wanted = names.get(stage, names['pretrain'])
    for row in table:
        assert {'seconds', 'train/tokens_per_second'} | wanted <= row.keys()
        assert all(value is not None and np.isfinite(value) for value in row.values())


def test_the_rate_of_a_step_is_that_of_its_row(finished):
    # 1.5e-3, by a cosine of four steps to 0; five percent of four steps are none.
    rates = [row['train/lr'] for row in rows(finished / 'sft' / 'metrics.jsonl')]
    falling = [1.5e-3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    np.testing.assert_allclose(rates, falling, rtol=1e-6)


def test_the_first_rollout_is_of_the_reference(finished):
    first, second = rows(finished / 'ppo' / 'metrics.jsonl')[:2]
    assert abs(first['objective/kl']) < 1e-4
    assert abs(second['objective/kl']) > 1e-4


def test_the_references_score_zero_on_average_and_padding_does_not_matter(finished):
    result = read(finished / 'rm' / 'eval.json')
    assert abs(result['mean_reference_score']) < 1e-5
    assert result['reference_score_std'] > 0
    assert result['padding_gap'] < 1e-2


def test_parameters_are_handed_on(finished, tmp_path):
    """At learning rate 0 a stage leaves what it was given. Stages are added later."""
    config = get_config('1')
    config.stages = ('sft',)
    config.parallel.backend = 'pmap'
    config.sft.init = str(finished / 'pretrain')
    for name in ('sft', 'rm', 'ppo'):
        config[name].optim.learning_rate = 0.0
    config.ppo.critic_optim.learning_rate = 0.0
    report = launch(config, tmp_path / 'run')
    assert [s for s, r in report['stages'].items() if r['finished']] == ['sft']
    untouched = (tmp_path / 'run' / 'sft' / 'done.json').stat().st_mtime_ns
    config.stages = ('sft', 'rm', 'ppo')
    report = launch(config, tmp_path / 'run')
    assert all(report['stages'][s]['finished'] for s in config.stages)
    assert (tmp_path / 'run' / 'sft' / 'done.json').stat().st_mtime_ns == untouched
    _, pretrained = load_part(finished, 'pretrain', 'policy')
    parts = {
        name: load_part(tmp_path / 'run', *name.split('/'))[1]
        for name in ('sft/policy', 'rm/reward', 'ppo/policy', 'ppo/critic')
    }
    assert_same(parts['sft/policy'], pretrained)
    assert_same(parts['rm/reward']['backbone'], pretrained['backbone'])
    assert_same(parts['ppo/policy'], pretrained)
    assert_same(parts['ppo/critic'], parts['rm/reward'])
    result = read(tmp_path / 'run' / 'ppo' / 'eval.json')
    assert abs(result['kl']) < 1e-4
    assert result['win_rate'] == 0.5 and result['ties'] == 1


def test_training_moves_every_part(finished):
    _, sft = load_part(finished, 'sft', 'policy')
    _, policy = load_part(finished, 'ppo', 'policy')
    _, reward = load_part(finished, 'rm', 'reward')
    _, critic = load_part(finished, 'ppo', 'critic')
    tokens = lambda params: np.asarray(params['backbone']['embed']['tokens'])  # noqa: E731
    assert not np.array_equal(tokens(sft), tokens(policy))
    assert not np.array_equal(tokens(reward), tokens(critic))
    assert not np.array_equal(tokens(sft), tokens(reward))
