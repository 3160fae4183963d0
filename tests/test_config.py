"""Config strings, sections and strict building, and what their errors say."""

import dataclasses
import json
from typing import Literal

import pytest
from ml_collections import ConfigDict

from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.ppo import PPOHParams
from rlhf_jax.config import build, load_dotted, nearest, parse_arg, section, unset
from rlhf_jax.optim import OptimConfig
from rlhf_jax.rewards import ScoreHParams
from rlhf_jax.stages.ppo import PPOSettings
from rlhf_jax.stages.settings import RewardSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    target: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    source: str  # required
    size: int = 3
    on: bool = False
    kind: Literal['a', 'b'] = 'a'
    limit: int | None = None
    sizes: tuple[int, ...] = (8, 16)
    inner: Inner = dataclasses.field(default_factory=Inner)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Many:
    named: dict[str, Inner]
    maybe: Inner | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other:
    coef: float = 0.5


# -------------------------------------------------------------------------- parse_arg


def test_parse_arg():
    known = {'size': 'tiny', 'smoke': False, 'seed': 0, 'lr': 0.1, 'init': None}
    assert parse_arg(None, **known).to_dict() == known
    assert parse_arg('', **known).to_dict() == known
    got = parse_arg('size=1b, smoke,seed=7,lr=1e-3,init=a=b', **known)
    assert got.to_dict() == {
        'size': '1b',
        'smoke': True,
        'seed': 7,
        'lr': 1e-3,
        'init': 'a=b',
    }
    assert parse_arg('smoke=false', smoke=True).smoke is False
    assert parse_arg('smoke=1', smoke=False).smoke is True


@pytest.mark.parametrize(
    'arg, message',
    [
        ('smok', "'smok' is unknown; did you mean 'smoke'?"),
        ('zzz=1', "'zzz' is unknown; known are seed, smoke"),
        ('seed', "'seed' needs a value: write seed="),
        ('seed=many', "'seed=many': 'many' is no int"),
        ('seed=1.5', "'1.5' is no int"),
        ('smoke=maybe', 'use smoke=true or smoke=false'),
    ],
)
def test_parse_arg_errors(arg, message):
    with pytest.raises(ValueError) as error:
        parse_arg(arg, smoke=False, seed=0)
    assert message in str(error.value)


# ------------------------------------------------------------------- section and build


def test_a_section_lays_out_every_default():
    config = section(Outer, Other, source='jsonl:x')
    assert config.to_dict() == {
        'source': 'jsonl:x',
        'size': 3,
        'on': False,
        'kind': 'a',
        'limit': None,
        'sizes': (8, 16),
        'inner': {'rate': 0.1, 'target': None},
        'coef': 0.5,
    }


def test_round_trip():
    config = section(Outer, Other, source='x', limit=4, inner={'target': 2}, coef=1)
    outer, other = build(config, Outer, Other)
    assert outer == Outer(source='x', limit=4, inner=Inner(target=2.0))
    assert other == Other(coef=1.0)
    assert isinstance(other.coef, float) and isinstance(outer.inner.target, float)
    # As a config.json gives it back: a plain dict, tuples as lists.
    plain = {**config.to_dict(), 'sizes': [8, 16]}
    assert build(plain, Outer, Other) == (outer, other)


def test_the_real_hyperparameters_make_the_round_trip():
    required = {'init': 'sft', 'critic': 'rm', 'prompts': 'p', 'eval_prompts': 'q'}
    rewards = {'rm': dict(model='rm', weight=2), 'fn': dict(fn='a:b', args={'k': [1]})}
    kinds = (PPOSettings, PPOHParams, ScoreHParams, AnchorHParams)
    config = section(*kinds, **required, rewards=rewards, top_k=5)
    settings, *hps = build(config, *kinds)
    assert hps == [PPOHParams(), ScoreHParams(), AnchorHParams()]
    sources = {
        'rm': RewardSource(model='rm', weight=2.0),
        'fn': RewardSource(fn='a:b', args={'k': [1]}),
    }
    assert settings == PPOSettings(**required, rewards=sources, top_k=5)
    assert settings.optim == OptimConfig() and settings.gold is None
    # As a config.json gives it back.
    plain = json.loads(config.to_json_best_effort())
    assert build(plain, *kinds) == (settings, *hps)


def test_dataclasses_by_name_and_optional_ones():
    config = section(Many, named={'a': {}, 'b': {'rate': 1}})
    assert config.named.to_dict() == {
        'a': {'rate': 0.1, 'target': None},
        'b': {'rate': 1.0, 'target': None},
    }
    config.named.a.target = 2.0
    config.maybe = {'rate': 0.5}
    (many,) = build(config, Many)
    named = {'a': Inner(target=2.0), 'b': Inner(rate=1.0)}
    assert many == Many(named=named, maybe=Inner(rate=0.5))
    config.maybe = None
    assert build(config, Many)[0].maybe is None
    assert section(Many, named={}, maybe={'rate': 2}).maybe.rate == 2.0


@pytest.mark.parametrize(
    'values, message',
    [
        ({'named': {'a': {'rat': 1.0}}}, "'rat' is unknown; did you mean 'rate'?"),
        ({'named': {'a': {'rate': 'x'}}}, "rate='x' is not float"),
        ({'named': {'a': 3}}, 'named.a=3 is not Inner'),
        ({'named': 3}, 'named=3 is not dict[str, '),
        ({'maybe': {'rat': 1.0}}, "'rat' is unknown; did you mean 'rate'?"),
        ({'maybe': 3}, 'maybe=3 is not '),
    ],
)
def test_mistakes_in_nested_dataclasses(values, message):
    values = {'named': {}, **values}
    with pytest.raises(ValueError) as error:
        build(values, Many)
    assert message.replace("'rat' is unknown", 'rat is unknown') in str(error.value)
    with pytest.raises(ValueError) as error:
        section(Many, **values)
    assert message.replace('is unknown', 'is no setting here') in str(error.value)
    with pytest.raises(ValueError, match='config.named is needed and not set'):
        build(section(Many), Many)


def test_values_of_a_section_can_be_set_as_on_the_command_line():
    config = section(Outer, source='x', limit=4, inner={'rate': 1})
    config.inner.rate = 0.25  # given as an int, still a float
    config.limit = None
    config.inner.target = 3.0  # None by default, typed all the same
    config.on = True
    (outer,) = build(config, Outer)
    assert outer == Outer(source='x', on=True, inner=Inner(rate=0.25, target=3.0))
    with pytest.raises(TypeError):
        config.limit = 'four'
    with pytest.raises(TypeError):
        config.inner.target = 'six'


def test_none_switches_off_what_can_be_off_and_stays_settable():
    config = section(Outer, source='x', limit=None)
    config.limit = 9
    assert build(config, Outer)[0].limit == 9
    with pytest.raises(ValueError, match='size=None is not int'):
        section(Outer, source='x', size=None)


@pytest.mark.parametrize(
    'values, message',
    [
        ({'sise': 4}, "config.sise is unknown; did you mean 'size'?"),
        ({'zzz': 4}, 'config.zzz is unknown; known are inner, kind, limit'),
        ({'inner': {'rat': 1.0}}, "config.inner.rat is unknown; did you mean 'rate'?"),
        ({'source': None}, 'config.source is needed and not set'),
        ({'size': '4'}, "config.size='4' is not int"),
        ({'size': 4.5}, 'config.size=4.5 is not int'),
        ({'size': True}, 'config.size=True is not int'),
        ({'size': None}, 'config.size=None is not int'),
        ({'on': 1}, 'config.on=1 is not bool'),
        ({'kind': 'c'}, "config.kind='c' is not Literal['a', 'b']"),
        ({'limit': 0.5}, 'config.limit=0.5 is not int | None'),
        ({'sizes': 8}, 'config.sizes=8 is not tuple[int, ...]'),
        ({'sizes': [8, 'x']}, "config.sizes='x' is not int"),
        ({'inner': 3}, 'config.inner=3 is not Inner'),
        ({'inner': {'rate': 'x'}}, "config.inner.rate='x' is not float"),
        ({'inner': {'rate': False}}, 'config.inner.rate=False is not float'),
    ],
)
def test_build_errors_name_the_place_and_the_right_key(values, message):
    config = {**section(Outer, source='x').to_dict(), **values}
    with pytest.raises(ValueError) as error:
        build(config, Outer)
    assert message in str(error.value)


def test_a_section_refuses_what_build_would_refuse():
    with pytest.raises(
        ValueError, match="'sise' is no setting here; did you mean 'size'"
    ):
        section(Outer, sise=4)
    with pytest.raises(
        ValueError, match="'rat' is no setting here; did you mean 'rate'"
    ):
        section(Outer, inner={'rat': 4})
    with pytest.raises(ValueError, match="size='4' is not int"):
        section(Outer, size='4')


def test_the_error_knows_where_the_user_is():
    config = section(PPOHParams)
    config.unlock()
    config.clip_epsilon = 0.1
    with pytest.raises(ValueError) as error:
        build(config, PPOHParams, where='config.ppo')
    text = "config.ppo.clip_epsilon is unknown; did you mean 'clip_eps'?"
    assert text in str(error.value)


def test_a_setting_left_out_takes_its_default_unless_it_is_required():
    assert build(ConfigDict({'source': 'x'}), Outer)[0] == Outer(source='x')
    with pytest.raises(ValueError, match='config.source is needed and not set'):
        build(section(Outer), Outer)


def test_two_classes_with_one_field_name_are_refused():
    with pytest.raises(ValueError, match="'coef' is a field of Other and of Other"):
        section(Other, Other)


# ------------------------------------------------------------------------ small helpers


def test_nearest():
    assert nearest('clip_esp', ['clip_eps', 'lam']) == "; did you mean 'clip_eps'?"
    assert nearest('zzz', ['lam', 'gamma']) == '; known are gamma, lam'


def test_load_dotted():
    assert load_dotted('rlhf_jax.config:nearest', 'config.gold') is nearest
    for name, message in (
        ('rlhf_jax.config', 'write package.module:function'),
        ('rlhf_jax.no_such:fn', 'cannot be imported'),
        ('rlhf_jax.config:no_such', 'cannot be imported'),
        ('rlhf_jax:__all__', 'is a list, not a function'),
    ):
        with pytest.raises(ValueError, match=f"config.gold='{name}'.*{message}"):
            load_dotted(name, 'config.gold')


@dataclasses.dataclass(frozen=True)
class Loss:
    beta: float = 0.1
    kind: Literal['a', 'b'] = 'a'


def test_what_is_not_set_is_none_and_can_be_set_on_the_command_line():
    config = section(unset(Loss), kind='b')
    assert config.beta is None and config.kind == 'b'
    config.beta = 2
    assert build(config, Loss) == (Loss(beta=2.0, kind='b'),)
    with pytest.raises(ValueError, match="config.kind='c' is not"):
        config.kind = 'c'
        build(config, Loss)
    with pytest.raises(TypeError):
        section(unset(Loss)).kind = 3  # typed: of the literals
    with pytest.raises(ValueError, match="'bet' is no setting here; did you mean"):
        section(unset(Loss), bet=1)


@pytest.mark.parametrize('name', ['kl_coef', 'num_minibatches'])
def test_an_integer_that_nothing_can_hold(name):
    with pytest.raises(ValueError, match=f'config.ppo.{name} is beyond'):
        build({name: 10**400}, PPOHParams, where='config.ppo')
