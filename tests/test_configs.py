"""The recipes: they build, say how they are launched, and the one on real data runs."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.main import launch
from rlhf_jax.stages.kinds import kind_of, read_settings
from tests.small_config import ROOT, config_file

NAMES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
DATA = Path(__file__).resolve().parents[2] / 'shared' / 'data'
MODEL = DATA / 'stories260k'
TRANSCRIPTS = DATA / 'hh_rlhf_harmless' / 'test.jsonl.gz'


def test_the_named_recipes_are_there():
    assert {'quickstart', 'ladder', 'preference'} <= set(NAMES)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('arg', [None, 'smoke', 'seed=3', 'smoke,seed=3'])
def test_a_recipe_builds(name, arg):
    config = config_file(name).get_config(arg)
    assert config.seed == (3 if arg and 'seed' in arg else 0)
    for stage in config.stages:
        read_settings(kind_of(config, stage), config[stage], stage)
    json.loads(config.to_json_best_effort())


@pytest.mark.parametrize('name', NAMES)
def test_an_unknown_argument_names_the_right_one(name):
    with pytest.raises(ValueError, match="'smoek' is unknown; did you mean 'smoke'"):
        config_file(name).get_config('smoek')


@pytest.mark.parametrize(
    'name, arg, words',
    [
        ('rlaif', 'labels=nobody', "use 'people', 'model' or 'half'"),
        ('rlaif', 'count=0', 'too few'),
        ('rlaif', 'count=-5,labels=people', 'too few'),
        ('rlaif', 'count=1,labels=half', 'too few'),
        ('rounds', 'rounds=0', 'use 1 or more rounds'),
        ('rounds', 'schedule=odd', "use 'even' or 'ziegler'"),
        ('rounds', 'model=old', "use 'new' or 'on'"),
        ('rounds', 'data=first', "use 'all' or 'last'"),
        ('rounds', 'labels=8001', 'at most 8000 labels'),
        ('rounds', 'labels=1', 'a round gets no pair'),
        ('rounds', 'rounds=50,labels=20', 'a round gets no pair'),
        ('rounds', 'rounds=100,schedule=ziegler,smoke', 'a round gets no pair'),
    ],
)
def test_arguments_that_make_no_run_are_told_at_once(name, arg, words):
    with pytest.raises(ValueError) as error:
        config_file(name).get_config(arg)
    assert words in str(error.value)


@pytest.mark.parametrize(
    'rounds, labels, schedule', [(3, 6000, 'even'), (4, 90, 'ziegler')]
)
@pytest.mark.parametrize('model, data', [('new', 'all'), ('on', 'last')])
def test_rounds_share_one_pool_of_labels(rounds, labels, schedule, model, data):
    arg = f'{rounds=},{labels=},schedule={schedule},model={model},data={data},from=RUN'
    config = config_file('rounds').get_config(arg)
    ends = [0]
    for k in range(1, rounds + 1):
        spec, first, last = re.fullmatch(
            r'(.*)\[(\d+):(\d+)\]', config[f'drawn_{k}'].prompts
        ).groups()
        assert spec.endswith('prompts:train') and int(first) == ends[-1]
        ends.append(int(last))
        assert config[f'drawn_{k}'].policy == ('RUN/sft' if k == 1 else f'ppo_{k - 1}')
        is_first = k == 1 or model == 'new'
        assert config[f'rm_{k}'].init == ('RUN/sft' if is_first else f'rm_{k - 1}')
        seen = range(1 if data == 'all' else k, k + 1)
        assert config[f'rm_{k}'].train == ' + '.join(
            f'stage:labelled_{n}' for n in seen
        )
    assert ends[-1] == labels // 2 and 'sft' not in config
    sizes = np.diff(ends)
    assert sizes.min() > 0
    assert np.ptp(sizes) <= 1 if schedule == 'even' else (np.diff(sizes) < 0).all()


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_is_short_and_says_how_it_is_launched(name):
    source = (ROOT / 'configs' / f'{name}.py').read_text(encoding='utf-8')
    assert 30 <= len(source.splitlines()) <= 180
    text = ast.get_docstring(ast.parse(source))
    assert 'python -m rlhf_jax.main' in text and '--workdir' in text
    assert f'configs/{name}.py' in text and 'smoke' in text


POLICY_GRADIENTS = config_file('policy_gradient').METHODS
METHODS = (
    'preference',
    'quickstart',
    *(f'policy_gradient:name={name}' for name in POLICY_GRADIENTS),
    'online_dpo',
    'expert_iteration',
    'ppo_lagrangian',
)


@pytest.mark.parametrize('name', METHODS)
def test_methods_are_one_section_apart(name):
    name, _, method = name.partition(':')
    for arg in ('', 'smoke'):
        ours = config_file(name).get_config(f'{method},{arg}')
        ladder = config_file('ladder').get_config(arg)
        *below, stage = ours.stages
        for shared in ('seed', 'tokenizer', 'model', *below):
            assert ours[shared] == ladder[shared], shared
        ladder = config_file('ladder')
        judged = ladder.judged(ladder.arguments(arg))
        for setting, value in judged.items():  # equal terms
            told = ours[stage][setting]
            assert told == value or told.fn == value['fn'], setting
    sweep = config_file(name).get_config(f'{method},from=runs/a')
    assert sweep.stages == (stage,)
    assert sweep[stage].init == 'runs/a/sft'
    if stage != 'preference':
        assert sweep[stage].rewards.rm.model == 'runs/a/rm'


@pytest.mark.parametrize('name', METHODS)
def test_a_method_can_be_pointed_at_anything(name):
    name, _, method = name.partition(':')
    arg = f'{method},model=DIR,data=jsonl:a.jsonl,prompts=jsonl:p.jsonl,length=100'
    config = config_file(name).get_config(arg)
    *below, stage = config.stages
    own = config[stage]
    assert config.tokenizer == config.sft.init == 'DIR' and own.gold is None
    assert config.sft.train == 'jsonl:a.jsonl[:90%]' and config.sft.buckets == (50, 100)
    assert own.eval_prompts == 'jsonl:p.jsonl[90%:]' and own.prompt_buckets == (36,)
    told = config.to_json_best_effort()
    assert own.optim.learning_rate == pytest.approx(5e-6)
    assert (
        name in ('ppo_lagrangian',)
        or method.endswith('gdpo')
        or ('tiny_tldr' not in told)
    )
    for section in config.stages:
        read_settings(kind_of(config, section), config[section], section)


def test_a_loss_lays_out_its_own_settings():
    simpo, dpo = (
        config_file('preference').get_config(f'loss={loss}').preference
        for loss in ('simpo', 'dpo')
    )
    assert simpo.name == 'simpo' and 'gamma' in simpo and 'gamma' not in dpo


def test_a_policy_gradient_has_its_settings_and_any_estimator_a_recipe():
    get = config_file('policy_gradient').get_config
    dapo, cispo, gdpo, own = (
        get(f'name={name}').policy_gradient
        for name in ('dapo', 'cispo', 'gdpo', 'rlhf_jax.algos.estimators.rloo')
    )
    assert dapo.max_draws == 4 and dapo.kl_coef == 0 and dapo.name == 'dapo'
    assert cispo.name == 'grpo' and cispo.clip_eps_low is None and 'eps' in cispo
    assert set(gdpo.rewards) == {'rm', 'short'} and gdpo.rewards.short.weight == -0.5
    assert own.name == 'rlhf_jax.algos.estimators.rloo' and own.kl_coef == 0.2
    with pytest.raises(ValueError, match="name='grp' .* did you mean 'grpo'"):
        get('name=grp')
    assert config_file('rlvr').get_config('name=maxrl').policy_gradient.kl_coef == 0


def test_real_transcripts_go_through_all_stages(one_device, tmp_path):
    if not (MODEL.exists() and TRANSCRIPTS.exists()):
        pytest.skip(f'{MODEL} and {TRANSCRIPTS} are not both here')
    arg = f'model={MODEL},data=hh:{TRANSCRIPTS},response=24,smoke'
    config = config_file('quickstart').get_config(arg)
    train, held_out = f'hh:{TRANSCRIPTS}[:80]', f'hh:{TRANSCRIPTS}[2200:2240]'
    for stage in ('sft', 'rm'):
        section = config[stage]
        section.train, section.eval, section.num_steps = train, held_out, 2
        section.buckets = section.buckets[-1:]  # one shape: half the compilation
    config.rm.references = held_out
    config.ppo.prompts = train
    config.ppo.eval_prompts = f'hh:{TRANSCRIPTS}[2200:2216]'
    config.ppo.num_rollouts = 2
    report = launch(config, tmp_path)
    assert [s for s, result in report['stages'].items() if result['finished']] == [
        'sft',
        'rm',
        'ppo',
    ]
    rm, ppo = report['stages']['rm'], report['stages']['ppo']
    assert rm['pairs'] > 30 and 0 <= rm['length_baseline'] <= 1
    assert np.isfinite([ppo['kl'], ppo['proxy_reward_before']]).all()
    assert 'win_rate' not in ppo and 'accuracy_ceiling' not in rm  # there is no gold
    for stage in ('sft', 'rm'):
        counted = json.loads((tmp_path / stage / 'done.json').read_text())['data']
        assert 'read from hh:' in counted['train']
