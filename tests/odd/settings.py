"""Odd settings: in a config, and on the command line. Nothing is compiled."""

import contextlib
import copy
import functools
import json
import math
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from absl import flags
from ml_collections import ConfigDict, config_flags

from rlhf_jax.command_line import read_flags
from tests.data.test_chat import CHATML, made
from tests.odd.cases import NUMBERS, TEXTS, Case, nested
from tests.small_config import ROOT, config_file

RECIPES = (
    'quickstart',
    'policy_gradient:name=grpo',
    'policy_gradient:name=dapo',
    'policy_gradient:name=remax',
    'policy_gradient:name=reinforce_pp',
    'preference',
    'online_dpo',
    'expert_iteration',
    'ppo_lagrangian',
)
DATA = ('train', 'eval', 'references', 'prompts', 'eval_prompts', 'ptx')


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward."""
    return [float(len(response)) for response in responses]


class Compiled(Exception):
    """The config has passed all checks, and a stage would begin."""


def _refuse(*_: Any, **__: Any) -> None:
    raise Compiled


@contextlib.contextmanager
def nothing_compiles() -> Iterator[None]:
    """Ends its body where a stage would begin to compile."""
    places = ('run.compile_step', 'sources.init_sharded')
    with contextlib.suppress(Compiled), contextlib.ExitStack() as stack:
        for place in places:
            stack.enter_context(mock.patch(f'rlhf_jax.stages.{place}', _refuse))
        yield


@functools.cache
def tokenizer() -> Any:
    """What the configs name as their tokenizer."""
    return made(CHATML)


@functools.cache
def data() -> str:
    """A spec of records that every stage can read."""
    path = Path(tempfile.mkdtemp()) / 'data.jsonl'
    row = {'prompt': 'so', 'chosen': ' it is', 'rejected': ' all', 'label': True}
    rows = [{**row, 'prompt': f'so {i}', 'label': bool(i % 2)} for i in range(32)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return f'jsonl:{path}'


@functools.cache
def _recipe(name: str) -> ConfigDict:
    name, _, method = name.partition(':')
    config = config_file(name).get_config(f'smoke,{method}')
    config.tokenizer = 'tests.odd.settings:tokenizer'
    for stage in config.stages:
        section = config[stage]
        for key in DATA:
            if key in section and section[key] is not None:
                section[key] = data()
        if section.init == 'tiny':
            section.init = 'scratch'
        if 'references' in section:
            section.references = data()
        for source in (section.get('gold'), section.get('cost')):
            if source is not None:
                source.fn, source.args = 'tests.odd.settings:score', {}
    config.model.preset = 'nano'
    return config


def recipe(rng: random.Random) -> ConfigDict:
    """A good config."""
    return copy.deepcopy(_recipe(rng.choice(RECIPES)))


def places_of(config: ConfigDict, above: tuple = ()) -> list[tuple]:
    """Keys of all values and sections."""
    found = [above] if above else []
    for name in config.keys():
        value = config[name]
        if isinstance(value, ConfigDict):
            found += places_of(value, (*above, name))
        else:
            found.append((*above, name))
    return found


def odd_setting(rng: random.Random) -> Any:
    """Something that a config file could hold."""
    kind = rng.randrange(8)
    if kind < 2:
        return rng.choice(TEXTS)
    if kind < 4:
        return rng.choice(NUMBERS)
    return rng.choice(
        (
            None,
            True,
            False,
            (),
            (0,),
            (-1,),
            (3, 2),
            (8, 16, 10**9),
            (math.nan,),
            ('x',),
            ('', 'a'),
            [1],
            {},
            {'x': 1},
            {'fn': 'os:getcwd'},
            {'fn': 'tests.odd.settings:none'},
            {'model': 'rm', 'fn': 'a:b'},
            {'model': 'nowhere'},
            {'init': 'sft'},
            ConfigDict({'x': 3}),
            nested(3),
            'sft',
            'rm',
            'ppo',
            'scratch',
            'tiny',
            'jsonl:/nowhere',
            'float16',
            'cosine',
            b'x',
            {1: 2},
            object,
            10**9,
            128,
            12,
        )
    )


def odd_configs(rng: random.Random, folder: Path) -> Case:
    """A config with one odd setting."""
    config = recipe(rng)
    place = rng.choice(places_of(config))
    section: Any = config
    for name in place[:-1]:
        section = section[name]
    last, kind, shown = place[-1], rng.randrange(8), place[-1]
    key = '.'.join(place)
    with config.unlocked(), config.ignore_type():
        if kind == 0:
            del section[last]
            about = f'without {key}'
        elif kind == 1:
            section[f'{last}x'] = section[last]
            about = f'with {key}x'
        else:
            value = odd_setting(rng)
            try:
                section[last] = value
            except (TypeError, ValueError, KeyError, OverflowError):
                section[last] = None
                value = None
            about = f'{key}={value!r:.80}'
            shown = repr(value)
    # The error of a file that is not there names the file.
    names = (*place, shown, 'nothing is left', '/nowhere does not exist')
    return Case(f'config {about}', lambda: _launch(config, folder), names)


def _launch(config: ConfigDict, folder: Path) -> None:
    from rlhf_jax.main import launch

    with nothing_compiles():
        launch(config, folder / 'run')


# ------------------------------------------------------------------------------- flags


def odd_flags(rng: random.Random, folder: Path) -> Case:
    """Flags as they are typed."""
    config = _recipe('quickstart')
    key = '.'.join(rng.choice(places_of(config)))
    kind = rng.randrange(6)
    if kind == 0:
        key = key[: rng.randrange(len(key))] + rng.choice('x._-= ') + key[-3:]
    if kind == 1:
        key += rng.choice(('.x', '.', '..', '.x.y', 's'))
    value = str(rng.choice((*TEXTS, *NUMBERS[:11], *NUMBERS[12:], odd_setting(rng))))
    written = rng.choice(
        (
            [f'--config.{key}={value}'],
            [f'-config.{key}={value}'],
            [f'--config.{key}', value],
            [f'--config.{key}'],
            [f'--noconfig.{key}'],
            [f'--config.{key}={value}', f'--config.{key}=None'],
            [f'--config.{key}=None', f'--config.{key}.x={value}'],
            [f'--config={value}'],
            [f'--config=configs/quickstart.py:{value}'],
            ['--config'],
            [f'--{value}'],
            [value],
        )
    )
    typed = (part.lstrip('-')[:60] for part in (*written, value))
    places = (*typed, key.split('.')[-1], key, 'config')
    return Case(
        f'flags {written!s:.150}',
        lambda: _parse(written, folder),
        tuple(part for part in places if part),
        (flags.Error,),
    )


def _parse(written: list[str], folder: Path) -> None:
    """What ``main.run`` does with the command line."""
    default = str(ROOT / 'configs' / 'quickstart.py')
    config, left = read_flags(['--workdir', str(folder), *written], default)
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict('config', config, flag_values=values)
    flags.DEFINE_string('workdir', None, 'x', flag_values=values)
    flags.DEFINE_bool('profile', False, 'x', flag_values=values)
    values(['main', *left])
    values.config.to_json_best_effort()
