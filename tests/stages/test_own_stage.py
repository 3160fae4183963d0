"""A stage of a user's own, in a file outside the package: ``tests/own_stage.py``."""

import json

import pytest

from rlhf_jax.main import launch
from rlhf_jax.stages.kinds import stage
from tests.small_config import ROOT, get_config
from tests.test_main import fails, never_compiled  # noqa: F401

pytestmark = pytest.mark.usefixtures('one_device')

DATA = 'tfds:tiny_tldr/comparisons'


def rows(path):
    return [json.loads(line) for line in path.open(encoding='utf-8')]


def config_below(finished):
    """Comparisons of which the reward model of a finished run is sure, and a reward
    model that learns from them.
    """
    config = get_config()
    config.stages = ('sure', 'second')
    config.sure = stage(
        'tests.own_stage',
        comparisons=f'{DATA}:train[:24]',
        reward_model=f'{finished}/rm',
        min_margin=0.0,
        max_length=88,
        batch_size=8,
    )
    config.second = stage(
        'reward_model',
        init=f'{finished}/sft',
        train='stage:sure',
        eval=f'{DATA}:test[:16]',
        num_steps=1,
        batch_size=8,
        buckets=(88,),
    )
    return config


@pytest.fixture(scope='module')
def done(finished, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('own')
    return workdir, launch(config_below(finished), workdir)['stages']


def test_it_keeps_what_the_reward_model_is_sure_of(done):
    workdir, stages = done
    found, report = rows(workdir / 'sure' / 'records.jsonl'), stages['sure']
    assert report['finished'] and report['verdict'] == 'pass'
    assert report['comparisons'] == sum(report['counts']) == 24
    assert 0 < report['kept'] == len(found) < 24
    for row in found:
        assert row['reward_margin'] > 0 and row['chosen'] != row['rejected']
        assert row['prompt']
    assert report['figure'] == f'{len(found)} kept'


def test_another_stage_reads_its_records(done):
    workdir, stages = done
    assert stages['second']['finished']
    read = json.loads((workdir / 'second' / 'done.json').read_text())['data']['train']
    assert read.startswith(f'{stages["sure"]["kept"]} comparisons read from jsonl:')


def test_it_has_its_card_its_facts_and_its_figure(done):
    page = (done[0] / 'report.html').read_text()
    for part in (
        'Sure comparisons',
        'Mean margin',
        'sure-margins',
        'right of the line',
    ):
        assert part in page


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'sure.reward_model': 'RUN/ppo'}, ['config.sure.reward_model', 'no trained']),
        ({'sure.comparisons': 'stage:second'}, ['does not come before sure']),
        ({'sure.kind': 'tests.own_loss'}, ['config.sure.kind', 'no SETTINGS']),
        ({'second.init': 'sure'}, ['makes no model']),
    ],
)
def test_mistakes_are_told_before_anything_compiles(
    finished,
    tmp_path,
    never_compiled,  # noqa: F811
    changes,
    words,
):
    config = config_below(finished)
    for key, value in changes.items():
        section, name = key.split('.')
        config[section][name] = value.replace('RUN', str(finished))
    fails(config, tmp_path, *words)


def test_it_is_short_and_stands_in_the_documentation():
    code = (ROOT / 'tests' / 'own_stage.py').read_text()
    assert len(code.splitlines()) <= 80
    assert code in (ROOT / 'docs' / 'stages.md').read_text()
