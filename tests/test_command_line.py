"""What flags change in a recipe: None, new entries, and what is refused."""

import pytest
from ml_collections import ConfigDict, config_dict

from rlhf_jax.command_line import OPEN, check_sections, read_flags
from rlhf_jax.config import build, section
from rlhf_jax.stages import settings
from rlhf_jax.stages.ppo import PPOSettings
from rlhf_jax.stages.settings import RewardSource

RECIPE = """
from ml_collections import ConfigDict
from rlhf_jax.config import section
from rlhf_jax.stages.ppo import PPOSettings

def get_config(arg=None):
    config = ConfigDict({'seed': 0})
    config.ppo = section(
        PPOSettings,
        init='sft',
        critic='rm',
        prompts='a',
        eval_prompts='b',
        top_k=5,
        rewards={'rm': dict(model='rm')},
        gold=dict(fn='a:b', args=dict(x=1)),
    )
    return config
"""


@pytest.fixture
def ppo(tmp_path):
    """(the settings of ppo that flags make, the flags that are left)."""
    path = tmp_path / 'recipe.py'
    path.write_text(RECIPE)

    def parse(*flags):
        config, left = read_flags(flags, str(path))
        return build(config.ppo, PPOSettings, where='config.ppo')[0], left

    return parse


def test_none_switches_values_and_sections_off(ppo):
    got, left = ppo('--config.ppo.top_k=None', '--config.ppo.gold=None', '--seed=1')
    assert got.top_k is None and got.gold is None and left == ['--seed=1']
    assert ppo('--config.ppo.top_k', 'None')[0].top_k is None
    assert ppo('--config.ppo.rewards.rm=None')[0].rewards == {}


def test_the_last_flag_holds(ppo):
    off, on = '--config.ppo.top_k=None', '--config.ppo.top_k=7'
    assert ppo(on, off)[0].top_k is None and ppo(on, off)[1] == []
    assert ppo(off, on)[1] == [on]  # which ml_collections applies
    below = '--config.ppo.gold.weight=2'
    assert ppo(below, '--config.ppo.gold=None')[1] == []


def test_none_where_there_must_be_a_value(ppo):
    with pytest.raises(ValueError, match='config.ppo.batch_size=None is not int'):
        ppo('--config.ppo.batch_size=None')
    with pytest.raises(ValueError, match='config.ppo.optim=None is not OptimConfig'):
        ppo('--config.ppo.optim=None')


def test_a_new_reward_by_flags(ppo):
    got, left = ppo(
        '--config.ppo.rewards.short.fn=my.module:short',
        '--config.ppo.rewards.short.weight=2',
        '--config.ppo.rewards.short.args.limit=(3, 4)',
        '--config.ppo.gold.args.y=text',
    )
    short = RewardSource(
        fn='my.module:short', weight=2.0, args={'limit': (3, 4)}
    )  # 2 becomes 2.0
    assert got.rewards == {'rm': RewardSource(model='rm'), 'short': short}
    assert got.gold.args == {'x': 1, 'y': 'text'} and left == []


def test_a_section_that_is_off_is_put_on(ppo):
    got, _ = ppo(
        '--config.ppo.gold=None',
        '--config.ppo.gold.fn=c:d',
        '--config.ppo.rewards.rm.heads.helpful=1',
    )
    assert got.gold == RewardSource(fn='c:d')
    assert got.rewards['rm'].heads == {'helpful': 1.0}


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--config.ppo.topk=3', "no 'topk'; did you mean 'top_k'?"),
        ('--config.ppoo.top_k=3', "no 'ppoo'; did you mean 'ppo'?"),
        ('--config.ppo.top_k.x=3', "'top_k' is a value, nothing stands below it"),
        ('--config.ppo.rewards.rm.wight=2', "wight is unknown; did you mean 'weight'?"),
        ('--config.ppo.rewards.short.f=a:b', 'config.ppo.rewards.short.f is unknown'),
        ('--config.ppo.rewards.short', "there is no 'short'"),
        (f'--{"x" * 5000}', 'x… is no flag'),
        ('--config=nowhere.py', "No such file or directory: 'nowhere.py'"),
    ],
)
def test_what_there_is_not(ppo, flag, message):
    with pytest.raises(ValueError) as caught:
        ppo(flag)
    assert message in str(caught.value)


def test_a_recipe_that_is_none(tmp_path):
    path = tmp_path / 'recipe.py'
    path.write_text('x = 1\n')
    with pytest.raises(ValueError, match='has no function get_config'):
        read_flags([], str(path))
    path.write_text('def get_config():\n    return {}\n')
    with pytest.raises(ValueError, match='too many positional arguments'):
        read_flags([f'--config={path}:smoke'], 'other.py')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('def get_config(arg):\n    return {}\n', 'returned a dict; it should'),
        ('def get_config(arg):\n    pass\n', 'returned a NoneType; it should'),
        ('def get_config(arg):\n    return 1 / 0\n', 'ZeroDivisionError'),
        ('get_config = 3\n', 'is not a callable'),
        ('x = 1\ny = {}[3]\n', 'KeyError: 3 ('),
        ('x = 1\ndef get_config(:\n', 'SyntaxError: invalid syntax ('),
        ('def get_config(arg):\n    raise ValueError("no " + arg)\n', ': no smoke'),
        ('import no_such_module\n', 'ModuleNotFoundError'),
    ],
)
def test_a_recipe_that_fails(tmp_path, text, message):
    path = tmp_path / 'recipe.py'
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_flags([f'--config={path}:smoke'], 'other.py')
    assert f'--config={path}:smoke: ' in str(caught.value)
    assert message in str(caught.value), str(caught.value)


def test_the_path_of_a_recipe(tmp_path):
    for path, message in {
        '~nouser/x.py': 'cannot be looked up',
        'x' * 999: 'File name too long',
        str(tmp_path): 'No such file',
    }.items():
        with pytest.raises(ValueError, match=message):
            read_flags([f'--config={path}'], 'other.py')
    path = tmp_path / 'recipe.txt'
    path.write_text('x = 1')
    with pytest.raises(ValueError, match='which ends in .py'):
        read_flags([f'--config={path}'], 'other.py')


WHOLE = {
    'seed': 0,
    'stages': ('sft',),
    'tokenizer': 'x',
    'model': {},
    'parallel': {},
    'metrics': (),
    'sft': {},
}


@pytest.mark.parametrize('name', list(WHOLE)[:-1])
def test_a_config_that_lacks_a_section(name):
    check_sections(ConfigDict(WHOLE))
    config = ConfigDict(WHOLE)
    del config[name]
    with pytest.raises(ValueError, match=f'config.{name} is missing; it should be'):
        check_sections(config)
    for odd in (None, 1.5, True):
        config = ConfigDict({**WHOLE, name: odd})
        with pytest.raises(ValueError, match=f'config.{name}={odd}: it should be'):
            check_sections(config)


def test_a_name_that_is_none_and_a_value_that_is_awaited():
    with pytest.raises(ValueError, match='config.stages: 3 is no name'):
        check_sections(ConfigDict({**WHOLE, 'stages': (3,)}))
    waits = {'optim': {'rate': config_dict.required_placeholder(float)}}
    with pytest.raises(ValueError, match='config.sft.optim.rate is needed'):
        check_sections(ConfigDict({**WHOLE, 'sft': waits}))


def test_every_setting_that_is_a_dict_takes_new_names():
    classes = (settings.OnlineSettings, settings.RewardSource)
    dicts = {
        name
        for cls in classes
        for name, hint in cls.__annotations__.items()
        if hint.startswith('dict[')
    }
    assert dicts == set(OPEN)
    assert section(settings.RewardSource).args.to_dict() == {}
