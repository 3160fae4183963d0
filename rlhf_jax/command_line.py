"""The command line: which recipe, and what its flags change.

``ml_collections`` parses the flags that set a value of the recipe. Those that it does
not know are applied here: None for a value or a section, and new entries where names
are free, as of rewards (``--config.ppo.rewards.short.fn=my_module:short``). Read
``main.py`` next.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from rlhf_jax.config import failure, nearest
from rlhf_jax.files import named_path

# Settings that are dicts: new names may stand below them. What else is new there is
# refused when the dataclasses are built (``config.build``).
OPEN = ('rewards', 'args', 'heads')
LONGEST = 200  # characters of the name of a flag
SETTING = re.compile(r'--?(?:no)?config\.([^=]+)(?:=(.*))?', re.S)


class _New(ConfigDict):
    """A section that flags have made; every name can stand in it."""


def read_recipe(text: str) -> ConfigDict:
    """The config of ``file.py`` or ``file.py:argument``.

    Raises:
        ValueError: no such file, one that fails (with its line), no ``get_config`` in
            it, one without an argument where there is one, or that returns no
            ``ConfigDict``; whatever the recipe itself refuses.
    """
    name, has_argument, argument = text.partition(':')
    if not named_path(name).is_file():
        raise ValueError(f'--config: No such file or directory: {name!r}')
    if not name.endswith('.py'):
        raise ValueError(f'--config={text}: name a Python file, which ends in .py')
    spec = importlib.util.spec_from_file_location('config_of_the_run', name)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f'--config={text}: {failure(error)}') from error
    if not hasattr(module, 'get_config'):
        raise ValueError(f'--config: {name} has no function get_config')
    arguments = [argument] if has_argument else []
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError as error:
        raise ValueError(f'--config={text}: its get_config: {error}') from error
    try:
        config = module.get_config(*arguments)
    except ValueError as error:  # what the recipe refuses
        raise ValueError(f'--config={text}: {error}') from error
    except Exception as error:
        raise ValueError(f'--config={text}: {failure(error)}') from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f'--config={text}: its get_config returned a {type(config).__name__}; it '
            'should return an ml_collections.ConfigDict'
        )
    return config


def check_sections(config: ConfigDict) -> None:
    """Checks that a config has what every run needs, each of its kind.

    Args:
        config: of a recipe, with what flags have changed.

    Raises:
        ValueError: an entry that is missing or of another kind, or one that still waits
            for a value.
    """
    _check_filled(config, 'config')
    kinds = {
        'seed': (int, 'a whole number'),
        'stages': (tuple | list, 'a tuple of stages'),
        'tokenizer': (str, 'a text'),
        'model': (ConfigDict, 'a section: section(ModelSettings)'),
        'parallel': (ConfigDict, 'a section: section(ParallelConfig)'),
        'metrics': (tuple | list, 'a tuple of names'),
    }
    for name, (kind, what) in kinds.items():
        if name not in config:
            raise ValueError(f'config.{name} is missing; it should be {what}')
        value = config[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f'config.{name}={value!r}: it should be {what}')
    for name in ('stages', 'metrics'):
        if odd := [part for part in config[name] if not isinstance(part, str)]:
            raise ValueError(f'config.{name}: {odd[0]!r} is no name')


def _check_filled(config: ConfigDict, where: str) -> None:
    for name in config.keys():
        if not isinstance(name, str):
            raise ValueError(f'{where}: the key {name!r} is no name')
        try:
            value = config[name]
        except config_dict.RequiredValueError as error:
            raise ValueError(f'{where}.{name} is needed and not set') from error
        if isinstance(value, ConfigDict):
            _check_filled(value, f'{where}.{name}')


def read_flags(arguments: Sequence[str], default: str) -> tuple[ConfigDict, list[str]]:
    """The recipe with None and new entries applied, and the flags that are left.

    Args:
        arguments: of the command, without its name.
        default: the recipe, where no ``--config`` names one.

    Raises:
        ValueError: as :func:`read_recipe`, or a flag for what the recipe does not have.
    """
    recipe, rest = default, []
    for part in _joined(arguments):
        named = re.fullmatch(r'--?config=(.*)', part, re.S)
        recipe = named[1] if named else recipe
        rest += [] if named else [part]
    config, left = read_recipe(recipe), []
    for part in rest:
        if len(name := part.partition('=')[0]) > LONGEST:
            raise ValueError(f'{name[:LONGEST]}… is no flag')
        setting = SETTING.fullmatch(part)
        if setting is None or not _apply(config, setting[1], setting[2], part):
            left.append(part)
        elif setting[2] == 'None':  # what was set before no longer holds
            key = setting[1]
            left = [p for p in left if not _is_below(SETTING.fullmatch(p), key)]
    return config, left


def _joined(arguments: Sequence[str]) -> list[str]:
    """The same flags, each with its value in one argument."""
    parts: list[str] = []
    for part in arguments:
        waits = parts and re.fullmatch(r'--?config(\.[^=]+)?', parts[-1])
        if waits and not re.match(r'-+[a-z]', part):
            parts[-1] += f'={part}'
        else:
            parts.append(part)
    return parts


def _is_below(setting: re.Match[str] | None, key: str) -> bool:
    return setting is not None and f'{setting[1]}.'.startswith(f'{key}.')


def _apply(config: ConfigDict, key: str, text: str | None, flag: str) -> bool:
    """Whether the flag was one of those that are applied here; then it is."""
    *above, last = key.split('.')
    section, is_free = config, False
    for name in above:
        if name not in section and not is_free:
            raise ValueError(f'{flag}: there is no {name!r}{nearest(name, section)}')
        if name not in section or section[name] is None:
            _put(section, name, _New())
        section = section[name]
        if not isinstance(section, ConfigDict):
            raise ValueError(f'{flag}: {name!r} is a value, nothing stands below it')
        is_free = is_free or name in OPEN or isinstance(section, _New)
    if last not in section:
        if not is_free or text is None:
            raise ValueError(f'{flag}: there is no {last!r}{nearest(last, section)}')
        _put(section, last, _literal(text))
        return True
    if text != 'None':
        return False
    before = section[last]
    is_section = isinstance(before, ConfigDict)
    if (is_section and not above) or (above and above[-1] in OPEN):
        del section[last]  # a stage, or one of several entries
    elif before is not None:
        # It can be set again, to what it could be set to before.
        off = None if is_section else config_dict.placeholder(type(before))
        _put(section, last, off)
    return True


def _put(section: ConfigDict, name: str, value: Any) -> None:
    if name in section:  # otherwise a value of another type is refused
        del section[name]
    section[name] = value


def _literal(text: str) -> Any:
    """A number, a tuple, …, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
