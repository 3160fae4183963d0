"""What the settings of a stage name, however deep."""

import dataclasses

from rlhf_jax.stages.kinds import named, replace_data
from rlhf_jax.stages.settings import DataSpec, ModelName


@dataclasses.dataclass(frozen=True)
class Inner:
    data: DataSpec | None = None
    model: ModelName = 'sft'


@dataclasses.dataclass(frozen=True)
class Outer:
    train: DataSpec
    one: Inner
    many: dict[str, Inner]
    note: str = 'stage:a'  # names no data


def test_names_are_found_and_replaced_at_every_depth():
    settings = Outer('a', Inner('b'), {'x': Inner('c', 'rm'), 'y': Inner()})
    found = [('train', 'a'), ('one.data', 'b'), ('many.x.data', 'c')]
    assert list(named(settings, DataSpec)) == found
    models = [('one.model', 'sft'), ('many.x.model', 'rm'), ('many.y.model', 'sft')]
    assert list(named(settings, ModelName)) == models
    got = replace_data(settings, str.upper)
    assert got == Outer('A', Inner('B'), {'x': Inner('C', 'rm'), 'y': Inner()})
