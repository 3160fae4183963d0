"""Config plumbing: the argument string of a config file, strict building of
hyperparameters.

Defaults live in dataclasses only. A config file calls :func:`section` to lay those
defaults out in a ``ConfigDict``, so that every value can be set on the command line
(``--config.ppo.clip_eps=0.1``); a stage calls :func:`build` to turn the dict back into
the dataclasses. Both reject a key that no dataclass has. Read ``configs/quickstart.py``
next.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from rlhf_jax.ranges import LARGEST_INTEGER, check_fields


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parses the part of ``--config=file.py:arg`` behind the colon.

    ``'size=1b,smoke'`` with defaults ``size='tiny', smoke=False`` gives
    ``size='1b', smoke=True``. A bare name sets a boolean; values take the type of the
    default.

    Args:
        arg: comma-separated ``name=value`` or bare ``name``; None or '' for none.
        **defaults: every name the config file knows, with its default.

    Returns:
        A ConfigDict with one entry per default.

    Raises:
        ValueError: a name that is not among the defaults, or a value of the wrong type.
    """
    result = dict(defaults)
    for item in filter(None, (part.strip() for part in (arg or '').split(','))):
        name, has_value, text = item.partition('=')
        if name not in defaults:
            raise ValueError(
                f'config argument {name!r} is unknown{nearest(name, defaults)}'
            )
        default = defaults[name]
        if not has_value:
            if not isinstance(default, bool):
                raise ValueError(
                    f'config argument {name!r} needs a value: write {name}=…'
                )
            result[name] = True
        elif isinstance(default, bool):
            if text.lower() not in ('true', 'false', '1', '0'):
                raise ValueError(
                    f'config argument {item!r}: use {name}=true or {name}=false'
                )
            result[name] = text.lower() in ('true', '1')
        else:
            kind = str if default is None else type(default)
            try:
                result[name] = kind(text)
            except ValueError as error:
                raise ValueError(
                    f'config argument {item!r}: {text!r} is no {kind.__name__}'
                ) from error
    return ConfigDict(result)


def cache_dir() -> Path:
    """Where what can be made again is kept between runs: the folder ``rlhf_jax`` in
    ``XDG_CACHE_HOME``, or else in ``~/.cache``.
    """
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'rlhf_jax'


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The tail of an error message: the nearest right name, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return (
        f'; did you mean {close[0]!r}?'
        if close
        else f'; known are {", ".join(sorted(known))}'
    )


def _fields(*classes: type) -> dict[str, tuple[type, dataclasses.Field, Any]]:
    table: dict[str, tuple[type, dataclasses.Field, Any]] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name in table:
                raise ValueError(
                    f'{field.name!r} is a field of {table[field.name][0].__name__} and '
                    f'of {cls.__name__}; rename one'
                )
            table[field.name] = (cls, field, hints[field.name])
    return table


def _default(field: dataclasses.Field, hint: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = None  # required: a placeholder, which `build` refuses while it is empty
    if dataclasses.is_dataclass(value):
        return section(type(value), **dataclasses.asdict(value))
    return _off(hint) if value is None else value


def _off(hint: Any) -> Any:
    """What stands for None in a ConfigDict, until a value of the right type comes."""
    if _nested(hint) is not None:
        return (
            None  # a ConfigDict takes a dict in its place, but not in a placeholder's
        )
    kinds = [a for a in typing.get_args(hint) if a is not types.NoneType] or [hint]
    kind = typing.get_origin(kinds[0]) or kinds[0]
    if kind is typing.Literal:
        kind = type(typing.get_args(kinds[0])[0])
    return config_dict.placeholder(kind if isinstance(kind, type) else object)


def _nested(hint: Any) -> type | None:
    """The dataclass in ``C``, ``C | None`` or ``dict[str, C]``."""
    options = [hint, *typing.get_args(hint)]
    return next((kind for kind in options if dataclasses.is_dataclass(kind)), None)


def _convert(
    value: Any, hint: Any, where: str, one: Callable[[Any, type, str], Any]
) -> Any:
    """``_fit``, but ``one(part, dataclass, place)`` for every nested dataclass."""
    cls, is_mapping = _nested(hint), isinstance(value, (Mapping, ConfigDict))
    if cls is None or not is_mapping:
        return _fit(value, hint, where)
    if typing.get_origin(hint) is not dict:
        return one(value, cls, where)
    return {
        name: _convert(part, cls, f'{where}.{name}', one)
        for name, part in value.items()
    }


def _is_required(field: dataclasses.Field, hint: Any) -> bool:
    has_default = (
        field.default is not dataclasses.MISSING
        or field.default_factory is not dataclasses.MISSING
    )
    return not has_default and types.NoneType not in typing.get_args(hint)


def _fit(value: Any, hint: Any, where: str) -> Any:
    """The value as a field of this type holds it: ints become floats, lists tuples."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for option in typing.get_args(hint) if is_union else (hint,):
        kind = typing.get_origin(option) or option
        if kind is Any or (kind is typing.Literal and value in typing.get_args(option)):
            return value
        if kind is dict and isinstance(value, ConfigDict):
            return value.to_dict()
        if kind is tuple and isinstance(value, (list, tuple)):
            return tuple(_fit(v, typing.get_args(option)[0], where) for v in value)
        if isinstance(value, bool) != (kind is bool):
            continue  # Python's True is an int, a setting's is not
        if kind is float and isinstance(value, (int, float)):
            if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
                raise ValueError(f'{where} is beyond ±2⁶³; use a smaller number')
            return float(value)
        if isinstance(kind, type) and isinstance(value, kind):
            return value
    wanted = hint.__name__ if isinstance(hint, type) else str(hint)
    raise ValueError(f'{where}={value!r} is not {wanted.replace("typing.", "")}')


def unset(cls: type) -> type:
    """The dataclass with None, 'not set', as the default of every field.

    For the settings of a part that a name chooses, so that another one can be named on
    the command line: what is not set has the default of the part that is named, see
    ``stages/preference.py``.
    """
    hints = typing.get_type_hints(cls)
    fields = [(f.name, hints[f.name] | None, None) for f in dataclasses.fields(cls)]
    return dataclasses.make_dataclass(cls.__name__, fields, frozen=True, kw_only=True)


def section(*classes: type, **values: Any) -> ConfigDict:
    """Lays out the defaults of dataclasses as one flat ``ConfigDict``, with some values
    set.

    Args:
        *classes: dataclasses whose field names are disjoint; a nested dataclass becomes
            a nested dict, and so does each of a ``dict[str, dataclass]``.
        **values: what differs from the defaults; a dict for a nested dataclass.

    Raises:
        ValueError: a value for a field that no class has, or of the wrong type.
    """
    table = _fields(*classes)
    result = ConfigDict(
        {name: _default(field, hint) for name, (_, field, hint) in table.items()}
    )
    for name, value in values.items():
        if name not in table:
            raise ValueError(f'{name!r} is no setting here{nearest(name, table)}')
        hint = table[name][2]
        value = _convert(value, hint, name, lambda part, cls, _: section(cls, **part))
        with result.ignore_type():
            if isinstance(value, dict):
                value = ConfigDict(value)
            result[name] = _off(hint) if value is None else value
    return result


def build(
    config: Mapping[str, Any], *classes: type, where: str = 'config'
) -> tuple[Any, ...]:
    """Builds dataclasses from a flat mapping: the inverse of :func:`section`.

    Args:
        config: a ConfigDict or dict.
        *classes: dataclasses whose field names are disjoint.
        where: how the user knows this part of the config, e.g. ``'config.ppo'``.

    Returns:
        One instance per class, in order.

    Raises:
        ValueError: an unknown key (with the nearest right one), a value of the wrong
            type, one outside the range of its field (``ranges.py``), or a required one
            that is empty.
    """
    table = _fields(*classes)
    arguments: dict[type, dict[str, Any]] = {cls: {} for cls in classes}
    for name in config.keys():
        if name not in table:
            raise ValueError(f'{where}.{name} is unknown{nearest(name, table)}')
        cls, field, hint = table[name]
        value = config[name]
        if value is not None or not _is_required(field, hint):
            value = _convert(
                value,
                hint,
                f'{where}.{name}',
                lambda part, kind, at: build(part, kind, where=at)[0],
            )
        arguments[cls][name] = value
    for name, (cls, field, hint) in table.items():
        if _is_required(field, hint) and arguments[cls].get(name) is None:
            raise ValueError(f'{where}.{name} is needed and not set')
    return tuple(_make(cls, arguments[cls], where) for cls in classes)


def _make(cls: type, arguments: dict[str, Any], where: str) -> Any:
    try:
        result = cls(**arguments)
    except ValueError as error:  # of the dataclass itself, which begins with the field
        raise ValueError(f'{where}.{error}') from error
    check_fields(result, where)
    return result


def build_named(
    config: Mapping[str, Any],
    *classes: type,
    named: type,
    where: str,
    setting: str = 'name',
) -> tuple[Any, ...]:
    """:func:`build` where ``config.name`` chooses a part with settings of its own.

    A setting of the part that is None is not set: the part's own default holds, and a
    part without that setting does not mind (see :func:`unset`).

    Args:
        config: a ConfigDict or dict, with ``name``, or with another ``setting``.
        *classes: dataclasses of the stage.
        named: the settings of what ``config.name`` names.
        where: how the user knows this part of the config.
        setting: what chooses it, where that is not ``name``.

    Returns:
        One instance per class, in order, and one of ``named``.

    Raises:
        ValueError: a setting that neither has, or as in :func:`build`.
    """
    shared = {field.name for cls in classes for field in dataclasses.fields(cls)}
    own = {field.name for field in dataclasses.fields(named)}
    values = {k: v for k, v in config.items() if k in shared or v is not None}
    for name in values.keys() - shared - own:
        raise ValueError(
            f'{where}.{name}={values[name]!r} is no setting of the stage, nor of '
            f'{where}.{setting}={config[setting]!r}{nearest(name, shared | own)}'
        )
    return build(values, *classes, named, where=where)


def failure(error: Exception) -> str:
    """What code of the user's own failed with, and in which line, for an error."""
    if isinstance(error, SyntaxError):
        place, reason = f'{error.filename}:{error.lineno}', error.msg
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place, reason = f'{frame.filename}:{frame.lineno}', error
    return f'{type(error).__name__}: {reason} ({place})'


def load_dotted(name: str, where: str) -> Callable[..., Any]:
    """Imports ``'package.module:function'``.

    Raises:
        ValueError: the module or the attribute does not exist, or is not callable.
    """
    module_name, _, attribute = name.partition(':')
    try:
        result = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f'{where}={name!r} cannot be imported ({error}); write '
            'package.module:function'
        ) from error
    except Exception as error:  # whatever the user's own module raises
        raise ValueError(
            f'{where}={name!r} cannot be imported: {failure(error)}'
        ) from error
    if not callable(result):
        raise ValueError(
            f'{where}={name!r} is a {type(result).__name__}, not a function'
        )
    return result
