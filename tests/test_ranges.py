"""Ranges beside the fields: what is in them, what is refused, and that all have one."""

import dataclasses
import importlib
import pkgutil
import typing
from typing import Annotated

import pytest

from rlhf_jax import preference, reward_losses, stages
from rlhf_jax.algos import estimators
from rlhf_jax.algos.policy_gradient import PolicyHParams
from rlhf_jax.algos.ppo import PPOHParams
from rlhf_jax.config import build, build_named, section, unset
from rlhf_jax.optim import OptimConfig
from rlhf_jax.ranges import Range, above, at_least, between, check_fields, range_of


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: Annotated[float, above(0)] = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    count: Annotated[int | None, at_least(1)] = None
    share: Annotated[float, between(0, 1)] = 1.0
    half: Annotated[float, Range(0, 0.5, open_high=True)] = 0.0
    ids: Annotated[tuple[int, ...], at_least(0)] = ()
    lengths: Annotated[tuple[int, ...], Range(1, ascending=True)] = (8,)
    free: float = -3.0
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_what_is_in_its_range():
    for values in (
        {},
        {'count': 1, 'share': 0, 'half': 0.49, 'ids': (0, 3), 'lengths': (1, 2)},
        {'count': None, 'weights': {'a': -1.0}, 'inner': {'rate': 1e-9}},
    ):
        build(section(Outer, **values), Outer)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'count': 0}, 'config.x.count=0: use 1 or more'),
        ({'share': 1.5}, 'config.x.share=1.5: use a number in [0, 1]'),
        ({'half': 0.5}, 'config.x.half=0.5: use a number in [0, 0.5)'),
        ({'ids': (3, -1)}, 'config.x.ids=(3, -1): use 0 or more'),
        ({'lengths': ()}, 'config.x.lengths=(): use numbers that ascend, 1 or more'),
        ({'lengths': (8, 8)}, 'config.x.lengths=(8, 8): use numbers that ascend'),
        ({'free': float('nan')}, 'config.x.free=nan is not finite'),
        ({'weights': {'a': float('inf')}}, "config.x.weights={'a': inf} is not finite"),
        ({'inner': {'rate': 0}}, 'config.x.inner.rate=0.0: use above 0'),
    ],
)
def test_what_is_not_is_named_by_its_key(values, message):
    with pytest.raises(ValueError) as caught:
        build(section(Outer, **values), Outer, where='config.x')
    assert message in str(caught.value)


def test_a_part_that_a_name_chooses():
    named = section(unset(Inner), rate=-1.0)
    named.name = 'inner'
    where = {'named': Inner, 'where': 'config.x'}

    @dataclasses.dataclass(frozen=True)
    class Stage:
        name: str

    with pytest.raises(ValueError, match='config.x.rate=-1.0: use above 0'):
        build_named(named, Stage, **where)


def test_hyperparameters_check_themselves():
    with pytest.raises(ValueError, match='^gamma=2: use a number in'):
        PPOHParams(gamma=2)
    with pytest.raises(ValueError, match='^learning_rate=-1: use 0 or more'):
        OptimConfig(learning_rate=-1)
    check_fields(PolicyHParams())


# Any number: of a reward; SimPO's margin; of a cost
FREE = {'weight', 'gamma', 'cost_limit'}
# Refused with a reason of their own
FREE |= {'label_smoothing', 'alpha', 'tau', 'nu', 'theta', 'flip_rate'}
FREE |= {'group_size', 'lambda_init'}


def _all_settings():
    """Of every kind of stage, loss and estimator, and the dataclasses in these."""
    waiting = []
    for package in (stages, preference, reward_losses, estimators):
        for file in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f'{package.__name__}.{file.name}')
            waiting += getattr(module, 'SETTINGS', ())
            waiting += [module.HParams] if hasattr(module, 'HParams') else []
    found = set()
    while waiting:
        cls = waiting.pop()
        if dataclasses.is_dataclass(cls) and cls not in found:
            found.add(cls)
            waiting += typing.get_type_hints(cls).values()
        waiting += typing.get_args(cls)
    return found


def test_defaults_are_in_their_ranges_and_counts_have_one():
    classes = _all_settings()
    assert {PPOHParams, PolicyHParams, OptimConfig} < classes
    for cls in classes:
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            allowed = range_of(hints[field.name])
            default = field.default
            if isinstance(default, (int, float)) and not isinstance(default, bool):
                assert allowed or field.name in FREE, f'{cls.__name__}.{field.name}'
                assert allowed is None or default in allowed
