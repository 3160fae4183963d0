"""config.json in the spelling of transformers 4, beside that of version 5.

The values of ``OLD`` are those of the configurations in ``small_families.py`` under the
names that transformers 4.57 reads; ``test_transformers4.py`` runs that version.
"""

import json
import pathlib
from dataclasses import replace

import pytest

from rlhf_jax import hf
from rlhf_jax.hf.families import family_for, family_of
from rlhf_jax.hf.schema import read_config, write_config
from rlhf_jax.models.config import RopeScaling
from tests.hf.small_families import FAMILIES

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
ABSENT = None
ROPE = {'rope_theta': 10_000.0, 'rope_scaling': ABSENT}
LLAMA3 = {
    'rope_type': 'llama3',
    'factor': 4.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 3.0,
    'original_max_position_embeddings': 16,
}
OLD = {
    'llama': {**ROPE, 'rope_scaling': {'rope_type': 'linear', 'factor': 3.0}},
    'llama3': {**ROPE, 'rope_scaling': LLAMA3},
    'mistral': {**ROPE, 'sliding_window': 4},
    'qwen2': {
        **ROPE,
        'use_sliding_window': True,
        'sliding_window': 3,
        'max_window_layers': 1,
    },
    'qwen3': ROPE,
    'olmo2': ROPE,
    'gemma2': {**ROPE, 'sliding_window': 4, 'sliding_window_pattern': 2},
    'gemma3': {
        'rope_theta': 50_000.0,
        'rope_local_base_freq': 500.0,
        'rope_scaling': {'rope_type': 'linear', 'factor': 4.0},
        'sliding_window': 4,
        'sliding_window_pattern': 2,
    },
    'gpt2': {'rope_theta': ABSENT, 'rope_scaling': ABSENT},
    'gpt_neox': {
        'rotary_pct': 0.25,
        'rotary_emb_base': 10_000.0,
        'rope_scaling': ABSENT,
    },
    'gpt_neox_sequential': {'rotary_pct': 1.0, 'rotary_emb_base': 500.0},
    'bert': {'rope_theta': ABSENT, 'position_embedding_type': 'absolute'},
    'roberta': {'rope_theta': ABSENT, 'position_embedding_type': 'absolute'},
}
# 'layer_types' is known to transformers 4.57 and says what sliding_window_pattern does.
NEW = ('rope_parameters', 'layer_types')


def entries_of(name):
    """config.json of a family's fixture as it is exported again."""
    given = json.loads((FIXTURES / name / 'config.json').read_text())
    family, _ = family_of(given['architectures'][0])
    return family, write_config(family, hf.load_config(FIXTURES / name))


@pytest.mark.parametrize('name', list(FAMILIES))
def test_every_old_key_is_there_with_its_value(name):
    _, entries = entries_of(name)
    assert {key: entries.get(key) for key in OLD[name]} == OLD[name]


@pytest.mark.parametrize('name', list(FAMILIES))
def test_the_old_keys_alone_describe_the_same_model(name):
    family, entries = entries_of(name)
    old = {key: value for key, value in entries.items() if key not in NEW}
    assert read_config(family, old) == hf.load_config(FIXTURES / name)


@pytest.mark.parametrize(
    ('name', 'key'), [('olmo2', 'type'), ('gpt_neox', 'rope_type')]
)
def test_a_stretched_family_calls_the_kind_as_it_does_in_version_4(name, key):
    scaling = RopeScaling(kind='linear', factor=3.0)
    config = replace(hf.load_config(FIXTURES / name), rope_scaling=scaling)
    entries = write_config(family_for(config), config)
    assert entries['rope_scaling'] == {key: 'linear', 'factor': 3.0}
    del entries['rope_parameters']
    assert read_config(family_for(config), entries) == config


def test_windows_without_a_period_have_no_pattern():
    config = replace(hf.load_config(FIXTURES / 'gemma3'), windowed=(False, True, True))
    entries = write_config(family_for(config), config)
    assert 'sliding_window_pattern' not in entries
    assert read_config(family_for(config), entries) == config
