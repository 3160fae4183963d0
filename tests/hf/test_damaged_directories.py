"""Model directories that are not what they say: a clear error for each."""

import json
import math
import pathlib
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax import hf
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.hf.schema import CHANGING
from tests.hf.small_families import FAMILIES
from tests.hf.small_tokenizers import byte_tokenizer
from tests.hf.test_directories import INDEX, edit_json, make_config, make_params

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
ODD = [math.nan, math.inf, -1, 0, 10**400, 'x', [], [3], {}, {'x': 3}, True, 1.5, 10**6]
# Read by nobody here, or free to take any value.
FREE = {'bos_token_id', 'eos_token_id', 'dtype', 'model_type', 'transformers_version'}


@pytest.fixture
def exported(tmp_path):
    """An exported language model, sharded: (directory, config)."""
    config = make_config()
    params = make_params(config, 'lm')
    hf.save(tmp_path / 'lm', params, config, head='lm', max_shard_bytes=20_000)
    return tmp_path / 'lm', config


@pytest.mark.parametrize('name', list(FAMILIES))
def test_odd_values_end_in_an_error_that_names_file_and_key(name, tmp_path):
    for file in ('config.json', 'model.safetensors'):
        shutil.copy(FIXTURES / name / file, tmp_path)
    path, before = tmp_path / 'config.json', hf.load_config(tmp_path)
    entries = json.loads(path.read_text())
    refused = 0
    for key in entries.keys() - FREE:
        for odd in ODD:
            path.write_text(json.dumps({**entries, key: odd}))
            try:
                config = hf.load_config(tmp_path)
            except ValueError as error:
                refused += 1
                assert 'config.json' in str(error), (key, odd, error)
                assert _names(key, str(error)), (key, odd, error)
            else:
                _check_meaning(before, config, key, odd)
    assert refused > 100


def _names(key, message):
    """The message has the key, or for two that depend on each other the other one."""
    others = {
        'num_hidden_layers': ('layers', 'layer_types'),
        'n_layer': ('layers',),
        'num_attention_heads': ('num_heads', 'head_dim'),
        'n_head': ('num_heads', 'head_dim'),
        'num_key_value_heads': ('num_kv_heads',),
        'hidden_size': ('head_dim',),
        'n_embd': ('head_dim',),
        'pad_token_id': ('max_position_embeddings',),
        'id2label': ('labels',),
        'rope_parameters': ('full_attention', 'rope_fraction'),
    }
    return any(word in message for word in (key, *others.get(key, ())))


def _check_meaning(before, config, key, odd):
    """What is accepted is either not read at all, or read as what it says."""
    if config != before:
        assert type(odd) in (bool, int, float, dict), (key, odd)
        assert not isinstance(odd, float) or math.isfinite(odd), (key, odd)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'quantization_config': {'quant_method': 'fp8'}}, "quantization_config={'qu"),
        ({'num_hidden_layers': 10**6}, 'has 1000000 layers, and the weights have 3'),
        ({'hidden_size': 'x'}, "hidden_size='x' must be a whole number ≥ 1"),
        ({'vocab_size': True}, 'vocab_size=True must be a whole number'),
        ({'rms_norm_eps': math.nan}, 'rms_norm_eps=nan must be a finite number'),
        ({'hidden_act': ['silu']}, r"hidden_act=\['silu'\] is not supported"),
        ({'tie_word_embeddings': 1}, 'tie_word_embeddings=1 must be true or false'),
        ({'rope_parameters': [1]}, r'rope_parameters=\[1\] must be an object'),
        ({'rope_parameters': {'rope_type': 'linear'}}, "'linear' lacks factor"),
        ({'architectures': 'LlamaForCausalLM'}, 'must name one class'),
        ({'architectures': [None]}, 'must name one class'),
    ],
)
def test_a_config_that_is_refused(exported, changes, message):
    directory, _ = exported
    edit_json(directory / 'config.json', **changes)
    with pytest.raises(ValueError, match=f'config.json: .*{message}'):
        hf.load_config(directory)


LINEAR = {'rope_type': 'linear', 'factor': 2.0}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'rope_theta': 7.0, 'rope_parameters': {'rope_theta': 8.0}},
            'rope_theta is 7.0, and rope_parameters.rope_theta is 8.0: two spellings',
        ),
        (
            {'rope_scaling': LINEAR, 'rope_parameters': {'factor': 2.0}},
            "rope_scaling.rope_type is 'linear', and rope_parameters.rope_type is 'def",
        ),
        (
            {'rope_scaling': LINEAR, 'rope_parameters': {**LINEAR, 'factor': 3.0}},
            'rope_scaling.factor is 2.0, and rope_parameters.factor is 3.0',
        ),
        (
            {'rope_scaling': {**LINEAR, 'type': 'default'}, 'rope_parameters': None},
            'two types that differ',
        ),
        (
            {'rope_parameters': {'mrope_section': [1]}},
            'mrope_section=.1., which is not',
        ),
        (
            {'rope_parameters': {'full_attention': {}}},
            'full_attention={}, which is not',
        ),
    ],
)
def test_rope_settings_that_contradict_each_other(exported, changes, message):
    directory, config = exported
    same = {'rope_theta': config.rope_theta, 'rope_scaling': LINEAR}
    both = {'rope_theta': config.rope_theta, **LINEAR}
    edit_json(directory / 'config.json', **{**same, 'rope_parameters': both})
    assert hf.load_config(directory).rope_scaling.factor == 2
    edit_json(directory / 'config.json', **{'rope_scaling': None, **changes})
    with pytest.raises(ValueError, match=f'config.json: .*{message}'):
        hf.load_config(directory)


def test_windowed_layers_have_no_scaling(tmp_path):
    for file in ('config.json', 'model.safetensors'):
        shutil.copy(FIXTURES / 'gemma3' / file, tmp_path)
    both = {'full_attention': {}, 'sliding_attention': LINEAR}
    flat = {'rope_theta': None, 'rope_scaling': None, 'rope_local_base_freq': None}
    edit_json(tmp_path / 'config.json', rope_parameters=both, **flat)
    with pytest.raises(ValueError, match='sliding_attention=.* is not supported'):
        hf.load_config(tmp_path)
    edit_json(tmp_path / 'config.json', rope_parameters={'rope_theta': 5.0})
    with pytest.raises(ValueError, match='must have full_attention and sliding_att'):
        hf.load_config(tmp_path)


@pytest.mark.parametrize('name', list(FAMILIES))
def test_an_entry_that_changes_the_numbers_is_read_or_refused(name, tmp_path):
    for file in ('config.json', 'model.safetensors'):
        shutil.copy(FIXTURES / name / file, tmp_path)
    path, before = tmp_path / 'config.json', hf.load_config(tmp_path)
    entries = json.loads(path.read_text())
    refused = []
    for key in CHANGING:
        harmless = () if name == 'gpt_neox' and 'rot' in key else CHANGING[key]
        for value in (None, *harmless):
            path.write_text(json.dumps({**entries, key: value}))
            if key not in entries:
                assert hf.load_config(tmp_path) == before, (key, value)
        path.write_text(json.dumps({**entries, key: 0.625}))
        try:
            assert hf.load_config(tmp_path) != before, key
        except ValueError as error:
            refused.append(key)
            assert key in str(error), (key, error)
    assert {'logit_scale', 'clip_qkv', 'residual_multiplier'} <= set(refused)


@pytest.mark.parametrize('text', ['[]', '3', 'null', '"x"', '', '[' * 10**5])
def test_a_config_that_is_no_object(exported, text):
    directory, _ = exported
    (directory / 'config.json').write_text(text)
    with pytest.raises(ValueError, match='config.json is'):
        hf.load_config(directory)


@pytest.mark.parametrize(
    ('index', 'message'),
    [
        ({'metadata': {}}, "has no 'weight_map'"),
        ({'weight_map': ['a']}, "has no 'weight_map'"),
        ({'weight_map': {}}, "has no 'weight_map'"),
        ({'weight_map': {'a': 3}}, 'name of a file for every tensor'),
        ({'weight_map': {'a': '../x.safetensors'}}, 'name of a file for every tensor'),
        ([], 'is a list, not a JSON object'),
    ],
)
def test_an_index_that_is_none(exported, index, message):
    directory, config = exported
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f'{INDEX} ?.*{message}'):
        hf.load_params(directory, config, head='lm')


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(exported, bad):
    directory, config = exported
    name = 'model.layers.1.mlp.up_proj.weight'
    file = json.loads((directory / INDEX).read_text())['weight_map'][name]
    tensors = load_file(directory / file)
    tensors[name][-1, -1] = bad
    save_file(tensors, directory / file)
    with pytest.raises(ValueError, match=f'{file}: {name} holds NaN or infinite'):
        hf.load_params(directory, config, head='lm')


@pytest.mark.parametrize('key', ['hidden_size', 'intermediate_size', 'vocab_size'])
@pytest.mark.parametrize('name', ['llama', 'gpt2', 'gpt_neox'])
def test_a_size_beyond_all_memory_is_told_quickly(name, key, tmp_path):
    for file in ('config.json', 'model.safetensors'):
        shutil.copy(FIXTURES / name / file, tmp_path)
    if name == 'gpt2':
        key = {'hidden_size': 'n_embd', 'intermediate_size': 'n_inner'}.get(key, key)
    edit_json(tmp_path / 'config.json', **{key: 2 * 10**9})
    start = time.monotonic()
    with pytest.raises(ValueError, match='does not fit its config'):
        hf.load_params(tmp_path, hf.load_config(tmp_path), head='lm')
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    'ours', [3, {'score_bias': 'x'}, {'score_bias': [1, 2]}, {'score_names': 'ab'}]
)
def test_our_own_entries_damaged(tmp_path, ours):
    config, out = make_config(), tmp_path / 'rm'
    params = make_params(config, 'scalar')
    hf.save(out, params, config, head='scalar', pad_token_id=0)
    edit_json(out / 'config.json', rlhf_jax=ours)
    with pytest.raises(ValueError, match='config.json: (rlhf_jax|score_)'):
        hf.load_params(out, config, head='scalar')


def test_an_entry_of_a_tokenizer_that_is_no_setting(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    edit_json(tmp_path / 'tokenizer_config.json', model_max_length='long')
    with pytest.raises(ValueError, match='an entry of its files is damaged .TypeError'):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize('file', ['tokenizer.json', 'tokenizer_config.json'])
@pytest.mark.parametrize('text', ['', '{', '[]', '3', '{"model": 3}', 'cut'])
def test_a_malformed_tokenizer(tmp_path, file, text):
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / file
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2] if text == 'cut' else text)
    with pytest.raises(ValueError, match='tokenizer'):
        load_tokenizer(str(tmp_path))
