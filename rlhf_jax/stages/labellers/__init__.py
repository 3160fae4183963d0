"""Who labels, one module each, named by ``by`` of the kind ``label``.

``by='simulated'`` names a file here, and ``by='package.module'`` one of the user's. It
has

* ``HParams``: a dataclass of its settings, which stand beside those of the stage;
* ``asks(hp)``: what its items are, an :class:`Asks`;
* ``check(run, where, hp)``: finds what is wrong before anything compiles, and gives
  what ``label`` wants;
* ``label(asked)``: the labels of items, as an :class:`Answered`, or ``SystemExit``
  where they are still to come.

Read ``stages/labellers/fn.py`` next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from rlhf_jax.labels.records import Form, Item, Label
from rlhf_jax.named import load_module
from rlhf_jax.stages.run import Run


@dataclasses.dataclass(frozen=True)
class Asked:
    """What ``label`` is given."""

    run: Run
    where: str  # the stage's section, e.g. 'config.labelled'
    folder: Path  # of the stage, which is there
    hp: Any  # the module's HParams
    checked: Any  # what its ``check`` gave
    items: list[Item]  # with a purpose 'main'
    rng: np.random.Generator


class Asks(NamedTuple):
    """What a labeller's items are."""

    form: Form
    size: int  # responses of an item


class Answered(NamedTuple):
    """What a labeller says."""

    items: list[Item]  # those asked, and gold or training items beside them
    labels: list[Label]
    facts: Mapping[str, Any] = {}  # fields of eval.json


class Labeller(Protocol):
    """The names of such a module."""

    HParams: type
    asks: Callable[[Any], Asks]
    check: Callable[[Run, str, Any], Any]
    label: Callable[[Asked], Answered]


def load_labeller(name: str, where: str) -> ModuleType:
    """The module of a labeller.

    Raises:
        ValueError: no such module, or one that lacks a name.
    """
    needed = ('HParams', 'asks', 'check', 'label')
    return load_module(__name__, name, where=where, what='labeller', needed=needed)
