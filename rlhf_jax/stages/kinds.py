"""A kind of stage is a module; this says what stands in one, and finds it.

``config.NAME.kind`` names a file of this package (``'reward_model'``) or a module of
the user's own (``'my_package.my_stage'``); where it is not set, the stage's name is its
kind. The module has:

* ``SETTINGS``: dataclasses with disjoint fields, which hold what this stage reads and
  nothing else. A field that names a model is a ``ModelName``, one that names data a
  ``DataSpec`` (``stages/settings.py``);
* ``CHOICE``, if a setting chooses a part with settings of its own, as ``loss`` does;
* ``makes(*settings)``: what the stage leaves to others, known before it has run;
* ``reads(*settings)``, if it takes records of stages: what each of its data settings
  takes, as ``order.READABLE_AS`` calls it;
* ``load(run, stage, *settings)``: reads its data and checks everything that can be
  wrong, before anything compiles;
* ``train(run, job)``: does the work on what ``load`` gave; gives a ``run.Result``;
* ``PAGE``: a ``pages.page.Page``, what the report says of it.

``settings`` are an instance of every class of ``SETTINGS``, and of a ``CHOICE`` the
module and its ``HParams``. Nothing else in the package knows which kinds there are.
Read ``stages/settings.py`` next.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from ml_collections import ConfigDict

from rlhf_jax.checkpoint import ScoreFacts
from rlhf_jax.config import build, build_named, section, unset
from rlhf_jax.named import load_module
from rlhf_jax.stages.settings import DataSpec

if typing.TYPE_CHECKING:
    from rlhf_jax.pages.page import Page

PACKAGE = 'rlhf_jax.stages'
NEEDED = ('SETTINGS', 'makes', 'load', 'train', 'PAGE')


class Choice(typing.NamedTuple):
    """A setting that chooses a module with ``HParams`` of its own."""

    setting: str  # 'loss', 'name'
    load: Callable[[str, str], Any]  # (name, where in the config) -> the module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Makes:
    """What a stage leaves to others."""

    # By part ('policy', 'reward', 'critic'): what its Transformer is that of.
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    members: int = 1  # models that are stacked in the part 'reward'
    facts: ScoreFacts = ScoreFacts()  # of the part 'reward'
    tokenizer: str | None = None  # of its models; None for that of the run
    records: str | None = None  # what records.jsonl holds: a name of ``data.formats``


class Kind(Protocol):
    """The names of such a module; ``CHOICE`` and ``reads`` may be absent."""

    SETTINGS: tuple[type, ...]
    makes: Callable[..., Makes]
    load: Callable[..., Any]
    train: Callable[..., Any]
    PAGE: Page


def load_kind(name: str, where: str) -> Kind:
    """The module of a kind.

    Raises:
        ValueError: no such module, or one that lacks a name.
    """
    return load_module(PACKAGE, name, where=where, what='kind of stage', needed=NEEDED)


def kind_of(config: Mapping[str, Any], stage: str) -> Kind:
    """The kind of a stage of a config.

    Args:
        config: of the run, as the recipe gives it or as ``config.json`` has it.
        stage: its name.
    """
    settings = config[stage]
    if 'kind' in settings:
        return load_kind(settings['kind'], f'config.{stage}.kind')
    return load_kind(stage, f"config.{stage}.kind (by default the stage's name)")


def stage(kind: str, **values: Any) -> ConfigDict:
    """The section of a stage: the defaults of its kind, with some values set.

    Args:
        kind: of the stage.
        **values: what differs from the defaults; see ``config.section``.

    Raises:
        ValueError: no such kind, or a value for a setting that it does not have.
    """
    module = load_kind(kind, 'kind')
    classes = module.SETTINGS
    if (choice := choice_of(module)) is not None:
        name = {choice.setting: _choice_default(module, choice), **values}
        part = choice.load(name[choice.setting], choice.setting)
        classes = (*classes, unset(part.HParams))
    result = section(*classes, **values)
    result.kind = kind
    return result


def choice_of(kind: Kind) -> Choice | None:
    """Its ``CHOICE``, if it has one."""
    return getattr(kind, 'CHOICE', None)


def _choice_default(kind: Kind, choice: Choice) -> Any:
    """The default of the setting that chooses; MISSING where it has none."""
    fields = (f for cls in kind.SETTINGS for f in dataclasses.fields(cls))
    return next(field.default for field in fields if field.name == choice.setting)


def read_settings(kind: Kind, config: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    """The settings of a stage, checked: the inverse of :func:`stage`.

    Args:
        kind: of the stage.
        config: its section.
        where: how the user knows it, e.g. ``'config.ppo'``.

    Returns:
        An instance of every class in ``SETTINGS``; of a ``CHOICE`` the module, and its
        settings.

    Raises:
        ValueError: see ``config.build``.
    """
    own = {name: value for name, value in config.items() if name != 'kind'}
    choice = choice_of(kind)
    if choice is None:
        return build(own, *kind.SETTINGS, where=where)
    own = {choice.setting: _choice_default(kind, choice), **own}
    if own[choice.setting] in (None, dataclasses.MISSING):
        raise ValueError(f'{where}.{choice.setting} is needed and not set')
    part = choice.load(own[choice.setting], f'{where}.{choice.setting}')
    *settings, hp = build_named(
        own, *kind.SETTINGS, named=part.HParams, where=where, setting=choice.setting
    )
    return (*settings, part, hp)


# ------------------------------------------------------------------ what settings name


def named(settings: Any, marker: type) -> Iterator[tuple[str, str]]:
    """What the fields of settings name, e.g. ('rewards.rm.model', 'rm').

    Args:
        settings: an instance of a dataclass.
        marker: ``ModelName`` or ``DataSpec``.
    """
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        return
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, str):
            if _has_marker(hints[field.name], marker):
                yield field.name, value
            continue
        inner = value.items() if isinstance(value, Mapping) else [(None, value)]
        for name, part in inner:
            place = field.name if name is None else f'{field.name}.{name}'
            for deeper, found in named(part, marker):
                yield f'{place}.{deeper}', found


def replace_data(settings: Any, read: Callable[[str], str]) -> Any:
    """The settings with every ``DataSpec``, as :func:`named` finds them, replaced by
    what ``read`` gives for it.
    """
    if isinstance(settings, Mapping):
        return {name: replace_data(part, read) for name, part in settings.items()}
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        return settings
    hints = typing.get_type_hints(type(settings), include_extras=True)
    changes = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, str) and _has_marker(hints[field.name], DataSpec):
            value = read(value)
        changes[field.name] = replace_data(value, read)
    return dataclasses.replace(settings, **changes)


def _has_marker(hint: Any, marker: Any) -> bool:
    wanted = marker.__metadata__[0]
    return any(
        part is wanted or (part is not hint and _has_marker(part, marker))
        for part in (*getattr(hint, '__metadata__', ()), *typing.get_args(hint))
    )
