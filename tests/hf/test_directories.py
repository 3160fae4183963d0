"""Hugging Face directories: there and back bit for bit, and bad input."""

import json
import pathlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from rlhf_jax import hf
from rlhf_jax.hf import families, reader, schema, writer
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import CausalLM, ScalarModel
from rlhf_jax.sharding import ParallelConfig, make_mesh, spec_of

STORIES = pathlib.Path(__file__).resolve().parents[3] / 'shared/data/stories260k'
INDEX = 'model.safetensors.index.json'


def make_config(*, tied=True, attention_bias=False, mlp_bias=False):
    return TransformerConfig(
        vocab_size=48,
        num_layers=3,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,  # not width / heads: the head size has its own entry
        mlp_width=40,
        max_positions=64,
        norm_eps=1e-6,
        rope_theta=5000.0,
        tied_embeddings=tied,
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=mlp_bias,
    )


def make_params(config, head, seed=0):
    model = CausalLM(config) if head == 'lm' else ScalarModel(config)
    tokens = jax.ShapeDtypeStruct((1, 4), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), tokens, tokens)['params']
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.3, x.shape)), shapes)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def exported(tmp_path):
    """An exported language model (tied): (directory, config, parameters)."""
    config = make_config()
    params = make_params(config, 'lm')
    hf.save(tmp_path / 'lm', params, config, head='lm', eos_token_id=2)
    return tmp_path / 'lm', config, params


# -------------------------------------------------------------------------- round trips


@pytest.mark.parametrize('max_shard_bytes', [2**30, 20_000], ids=['one', 'sharded'])
@pytest.mark.parametrize('head', ['lm', 'scalar'])
@pytest.mark.parametrize(
    'options',
    [{}, {'tied': False}, {'tied': False, 'attention_bias': True, 'mlp_bias': True}],
    ids=['tied', 'untied', 'untied with biases'],
)
def test_export_and_import_give_the_same_bits(tmp_path, options, head, max_shard_bytes):
    config = make_config(**options)
    params = make_params(config, head)
    hf.save(
        tmp_path / 'out',
        params,
        config,
        head=head,
        eos_token_id=2,
        pad_token_id=0,
        max_shard_bytes=max_shard_bytes,
    )
    files = sorted((tmp_path / 'out').glob('*.safetensors'))
    assert (len(files) > 3) == (max_shard_bytes < 2**30)
    assert all(file.stat().st_size < max_shard_bytes + 4096 for file in files)
    assert not (tmp_path / 'out.partial').exists()
    assert hf.load_config(tmp_path / 'out') == config
    assert_same(hf.load_params(tmp_path / 'out', config, head=head), params)


@pytest.mark.parametrize('max_shard_bytes', [2**30, 100_000], ids=['one', 'sharded'])
def test_a_pretrained_model_survives_a_round_trip(tmp_path, max_shard_bytes):
    if not STORIES.is_dir():
        pytest.skip(f'the pretrained model is not at {STORIES}')
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    config = hf.load_config(STORIES)
    params = hf.load_params(STORIES, config, head='lm')
    out = tmp_path / 'deep' / 'out'
    hf.save(
        out,
        params,
        config,
        head='lm',
        tokenizer=tokenizer,
        eos_token_id=[1, 2],
        max_shard_bytes=max_shard_bytes,
    )
    assert_same(hf.load_params(out, hf.load_config(out), head='lm'), params)
    theirs = load_file(STORIES / 'model.safetensors')
    ours = {}
    for file in out.glob('*.safetensors'):
        ours.update(load_file(file))
    assert_same(ours, theirs)
    text = 'Once upon a time'
    again = AutoTokenizer.from_pretrained(out)
    assert again(text)['input_ids'] == tokenizer(text)['input_ids']
    entries = json.loads((out / 'config.json').read_text())
    given = json.loads((STORIES / 'config.json').read_text())
    for name in given.keys() - {'eos_token_id', 'transformers_version', 'use_cache'}:
        if name not in (
            'attention_dropout',
            'pretraining_tp',
        ):  # neither changes a logit
            assert entries[name] == given[name], name
    assert entries['eos_token_id'] == [1, 2]
    generation = json.loads((out / 'generation_config.json').read_text())
    assert generation == {
        'bos_token_id': 1,
        'eos_token_id': [1, 2],
        'pad_token_id': None,
    }


def test_a_scalar_model_starts_from_a_language_model(exported):
    directory, config, params = exported
    loaded = hf.load_params(directory, config, head='scalar')
    assert_same(loaded, {'backbone': params['backbone']})


def test_an_untied_head_is_left_out_of_a_scalar_model(tmp_path):
    config = make_config(tied=False)
    params = make_params(config, 'lm')
    hf.save(tmp_path / 'lm', params, config, head='lm')
    loaded = hf.load_params(tmp_path / 'lm', config, head='scalar')
    assert_same(loaded, {'backbone': params['backbone']})


@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_precisions_arrive_as_float32(exported, dtype):
    directory, config, params = exported
    tensors = load_file(directory / 'model.safetensors')
    save_file(
        {name: x.astype(dtype) for name, x in tensors.items()},
        directory / 'model.safetensors',
    )
    loaded = hf.load_params(directory, config, head='lm')
    rounded = jax.tree.map(
        lambda x: np.asarray(x).astype(dtype).astype(np.float32), params
    )
    assert_same(loaded, rounded)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(loaded))


def test_place_sees_every_parameter_once_and_whole(exported):
    directory, config, params = exported
    seen = {}

    def place(path, array):
        assert path not in seen
        seen[path] = array.shape
        return jnp.asarray(array)

    hf.load_params(directory, config, head='lm', place=place)
    assert seen[('backbone', 'layers', 'attention', 'query_kernel')] == (3, 32, 4, 6)
    assert len(seen) == len(jax.tree.leaves(params))


def test_parameters_go_straight_to_their_sharding_and_dtype(exported):
    directory, config, params = exported
    mesh = make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2))

    def place(path, array):
        spec = spec_of('/'.join(path), array.shape, mesh)
        return jax.device_put(array, NamedSharding(mesh, spec))

    loaded = hf.load_params(
        directory, config, head='lm', dtype=ml_dtypes.bfloat16, place=place
    )
    kernel = loaded['backbone']['layers']['mlp']['up_kernel']
    assert kernel.sharding.spec == PartitionSpec(None, 'fsdp', 'tensor')
    assert kernel.addressable_shards[0].data.shape == (3, 16, 20)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(loaded))
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), params)
    assert_same(loaded, rounded)


def test_spare_tensors_of_other_writers_are_let_pass(exported):
    directory, config, params = exported
    tensors = load_file(directory / 'model.safetensors')
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
    tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(3, np.float32)
    save_file(tensors, directory / 'model.safetensors')
    assert_same(hf.load_params(directory, config, head='lm'), params)


def test_both_spellings_of_the_rotary_base(exported):
    directory, config, _ = exported
    entries = json.loads((directory / 'config.json').read_text())
    assert entries['rope_theta'] == 5000.0
    del entries['rope_theta']
    (directory / 'config.json').write_text(json.dumps(entries))
    assert hf.load_config(directory) == config
    del entries['rope_parameters']
    entries['rope_theta'], entries['rope_scaling'] = 5000, None
    (directory / 'config.json').write_text(json.dumps(entries))
    assert hf.load_config(directory) == config


def test_a_killed_export_leaves_nothing_and_the_next_one_succeeds(
    tmp_path, monkeypatch
):
    config = make_config()
    params = make_params(config, 'lm')

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, '_write_json', die)
        with pytest.raises(KeyboardInterrupt):
            hf.save(tmp_path / 'out', params, config, head='lm')
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'out').mkdir()  # an empty directory is as good as none
    hf.save(tmp_path / 'out', params, config, head='lm')
    assert_same(hf.load_params(tmp_path / 'out', config, head='lm'), params)
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_a_scalar_export_needs_a_pad_id_that_ends_no_text(tmp_path):
    config = make_config()
    params = make_params(config, 'scalar')

    def save(**ids):
        place = tmp_path / f'rm{len(list(tmp_path.iterdir()))}'
        hf.save(place, params, config, head='scalar', **ids)

    save(eos_token_id=[7, 2], pad_token_id=3)
    entries = json.loads((tmp_path / 'rm0' / 'config.json').read_text())
    assert (entries['eos_token_id'], entries['pad_token_id']) == ([7, 2], 3)
    assert np.float32(entries['rlhf_jax']['score_bias']) == params['head']['bias']
    with pytest.raises(ValueError, match='no pad_token_id, and no tokenizer'):
        save(eos_token_id=2)
    with pytest.raises(ValueError, match='pad_token_id=2, which may end a text'):
        save(eos_token_id=[7, 2], pad_token_id=2)


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'architectures': ['BertModel']},
            "config.json: architecture 'BertModel' is not supported.*LlamaForCausalLM, "
            'LlamaForSequenceClassification',
        ),
        ({'architectures': None}, r'architectures=\[\] must name one class'),
        ({'hidden_size': None}, "config.json: config.json has no 'hidden_size'"),
        ({'hidden_act': 'swiglu'}, "hidden_act='swiglu' is not supported.*silu, swish"),
        (
            {'rope_parameters': {'rope_type': 'llama3', 'factor': 8.0}},
            "rope_type='llama3' lacks high_freq_factor, low_freq_factor, original_max_",
        ),
        (
            {'rope_parameters': None, 'rope_scaling': {'type': 'yarn', 'factor': 2}},
            "rope_type='yarn' is not supported; supported are default, linear, llama3",
        ),
        (
            {'rope_parameters': {'partial_rotary_factor': 0.5}},
            'partial_rotary_factor=0.5 is not supported',
        ),
        ({'num_key_value_heads': 3}, 'num_heads=4.*num_kv_heads=3'),
    ],
)
def test_configs_that_are_not_supported(exported, changes, message):
    directory, _, _ = exported
    edit_json(directory / 'config.json', **changes)
    with pytest.raises(ValueError, match=message):
        hf.load_config(directory)


def test_tensors_that_do_not_fit_are_all_named(exported):
    directory, config, _ = exported
    tensors = load_file(directory / 'model.safetensors')
    del tensors['model.norm.weight']
    tensors['model.layers.1.mlp.up_proj.weight'] = np.zeros((41, 32), np.float32)
    tensors['model.layers.2.self_attn.q_proj.bias'] = np.zeros(24, np.float32)
    tensors['model.layers.0.mlp.gate_proj.weight'] = np.zeros((40, 32), np.int8)
    save_file(tensors, directory / 'model.safetensors')
    with pytest.raises(ValueError) as error:
        hf.load_params(directory, config, head='lm')
    for part in (
        str(directory),
        'model.norm.weight is missing',
        'model.layers.1.mlp.up_proj.weight is [41, 32], not [40, 32]',
        'model.layers.2.self_attn.q_proj.bias belongs to nothing',
        'model.layers.0.mlp.gate_proj.weight is I8, not one of F64, F32',
    ):
        assert part in str(error.value)


def test_a_head_that_contradicts_tied_embeddings(exported):
    directory, config, _ = exported
    tensors = load_file(directory / 'model.safetensors')
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'] + 1
    save_file(tensors, directory / 'model.safetensors')
    with pytest.raises(ValueError, match='lm_head.weight differs from model.embed_tok'):
        hf.load_params(directory, config, head='lm')


def test_weights_that_cannot_be_read(exported):
    directory, config, _ = exported
    whole = (directory / 'model.safetensors').read_bytes()
    for broken in (b'nonsense', b'', whole[:-1], whole[:100]):
        (directory / 'model.safetensors').write_bytes(broken)
        with pytest.raises(ValueError, match='model.safetensors cannot be read'):
            hf.load_params(directory, config, head='lm')
    (directory / 'model.safetensors').unlink()
    with pytest.raises(ValueError, match='neither.*no weights that can be read'):
        hf.load_params(directory, config, head='lm')
    (directory / 'pytorch_model.bin').write_bytes(b'')
    with pytest.raises(
        ValueError, match='pytorch_model.bin is not read, because a pick'
    ):
        hf.load_params(directory, config, head='lm')
    (directory / INDEX).write_text(
        json.dumps({'weight_map': {'a': 'gone.safetensors'}})
    )
    with pytest.raises(ValueError, match='gone.safetensors cannot be read'):
        hf.load_params(directory, config, head='lm')
    (directory / 'config.json').unlink()
    with pytest.raises(ValueError, match='config.json is missing'):
        hf.load_config(directory)


def test_a_classifier_is_no_language_model(tmp_path):
    config = make_config()
    params = make_params(config, 'scalar')
    hf.save(tmp_path / 'rm', params, config, head='scalar', pad_token_id=0)
    with pytest.raises(
        ValueError, match='SequenceClassification, which has no language'
    ):
        hf.load_params(tmp_path / 'rm', config, head='lm')
    with pytest.raises(ValueError, match="head='critic' is unknown"):
        hf.load_params(tmp_path / 'rm', config, head='critic')


def test_a_name_that_is_nowhere(monkeypatch, tmp_path):
    def offline(name, allow_patterns):
        assert '*.safetensors' in allow_patterns and '*.bin' not in allow_patterns
        raise OSError('no network')

    monkeypatch.setattr(reader.huggingface_hub, 'snapshot_download', offline)
    with pytest.raises(ValueError, match="'who/what' is no directory.*no network"):
        hf.load_config('who/what')
    monkeypatch.undo()
    with pytest.raises(ValueError, match='no/such/place.* is no directory'):
        hf.load_config(tmp_path / 'no/such/place')


def test_a_hub_name_is_read_from_its_snapshot(exported, monkeypatch):
    directory, config, _ = exported
    monkeypatch.setattr(
        reader.huggingface_hub, 'snapshot_download', lambda name, **_: str(directory)
    )
    assert hf.load_config('who/what') == config


def test_exports_that_cannot_be(exported, tmp_path):
    directory, config, params = exported
    with pytest.raises(ValueError, match='lm exists already'):
        hf.save(directory, params, config, head='lm')
    out = tmp_path / 'new'
    with pytest.raises(ValueError, match='eos_token_id=48 lies outside.*of 48'):
        hf.save(out, params, config, head='lm', eos_token_id=[2, 48])
    with pytest.raises(ValueError, match='lm_head is missing'):
        hf.save(out, params, make_config(tied=False), head='lm')
    with pytest.raises(ValueError, match=r'tokens is \[48, 32\], not \[99, 32\]'):
        hf.save(out, params, replace(config, vocab_size=99), head='lm')
    with pytest.raises(
        ValueError, match="llama, the nearest, has no norm='layer', activation='relu2'"
    ):
        hf.save(
            out, params, replace(config, norm='layer', activation='relu2'), head='lm'
        )
    with pytest.raises(
        ValueError, match='llama, the nearest, has no attention_out_bias=True'
    ):
        hf.save(out, params, replace(config, attention_out_bias=True), head='lm')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['lm']


def test_every_name_of_a_family_stands_for_one_parameter():
    for family in families.FAMILIES:
        paths = [path for weight in family.weights for path in weight.paths]
        names = [weight.name for weight in family.weights]
        assert len(set(paths)) == len(paths) and len(set(names)) == len(names)
        assert {weight.layout for weight in family.weights} <= set(schema.LAYOUTS)
