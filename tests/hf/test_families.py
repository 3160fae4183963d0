"""Every model family against what transformers computed (``make_fixtures.py``)."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax import hf
from rlhf_jax.generate import generate, sampling
from rlhf_jax.hf.families import family_for
from rlhf_jax.models.heads import CausalLM, ScalarModel
from rlhf_jax.ops.logprobs import logits_of, token_logprobs
from rlhf_jax.rewards import reward_model_scores
from tests.hf.small_families import ENCODERS, FAMILIES

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
DECODERS = [name for name in FAMILIES if name not in ENCODERS]
decoders = pytest.mark.parametrize('name', DECODERS)
everyone = pytest.mark.parametrize('name', list(FAMILIES))


@functools.cache
def expected_of(name):
    with np.load(FIXTURES / name / 'expected.npz') as file:
        return dict(file)


def rows_of(name):
    return [expected_of(name)[f'tokens/{i}'] for i in range(3)]


def policy_of(name):
    config = hf.load_config(FIXTURES / name)
    return CausalLM(config), hf.load_params(FIXTURES / name, config, head='lm')


def padded(rows, side, length=14, pad=36):
    """Rows [3, T] with garbage in the padding, and their mask."""
    tokens, mask = (
        np.full((len(rows), length), pad),
        np.zeros((len(rows), length), bool),
    )
    for i, row in enumerate(rows):
        place = slice(len(row)) if side == 'right' else slice(length - len(row), None)
        tokens[i, place], mask[i, place] = row, True
    return tokens, mask


def logits(model, params, *inputs):
    hidden = model.apply({'params': params}, *inputs)
    return np.asarray(
        logits_of(hidden, model.unembedding(params), model.config.logit_softcap)
    )


@pytest.mark.parametrize('side', ['left', 'right'])
@decoders
def test_logits_of_padded_rows(name, side):
    model, params = policy_of(name)
    tokens, mask = padded(rows_of(name), side)
    ours = logits(model, params, tokens, mask)
    for i in range(3):
        theirs = expected_of(name)[f'logits/{i}']
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours[i][mask[i]], theirs, rtol=0, atol=1e-4)


@decoders
def test_logits_of_packed_rows(name):
    model, params = policy_of(name)
    rows = rows_of(name)
    tokens = np.concatenate([*rows, [36, 36]])[None]
    segments = np.repeat([0, 1, 2, 3], [*map(len, rows), 2])[None]
    ours = logits(model, params, tokens, segments < 3, segments)[0]
    theirs = np.concatenate([expected_of(name)[f'logits/{i}'] for i in range(3)])
    np.testing.assert_allclose(ours[:-2], theirs, rtol=0, atol=1e-4)


@decoders
def test_greedy_continuations(name):
    model, params = policy_of(name)
    tokens, mask = padded(rows_of(name), 'left')
    theirs = np.stack([expected_of(name)[f'greedy/{i}'] for i in range(3)])
    out = jax.jit(functools.partial(generate, model=model, max_new_tokens=12))(
        params,
        jnp.asarray(tokens),
        jnp.asarray(mask),
        jnp.arange(3),
        jax.random.PRNGKey(0),
        sampling(eos_ids=[], temperature=0.0),
    )
    np.testing.assert_array_equal(np.asarray(out.tokens)[:, -12:], theirs)


@decoders
def test_gradients_of_the_mean_loss(name, tmp_path):
    model, params = policy_of(name)
    tokens, mask = padded(rows_of(name), 'right')

    def mean_loss(params):
        hidden = model.apply({'params': params}, tokens, mask)
        logprobs, _ = token_logprobs(
            hidden,
            model.unembedding(params),
            jnp.asarray(tokens),
            softcap=model.config.logit_softcap,
        )
        counted = np.copy(mask)
        counted[:, 0] = False
        return -jnp.sum(logprobs * counted) / counted.sum()

    gradient = jax.jit(jax.grad(mean_loss))(params)
    hf.save(tmp_path / 'out', gradient, model.config, head='lm')
    ours = load_file(tmp_path / 'out' / 'model.safetensors')
    theirs = {
        key.removeprefix('gradient/'): value
        for key, value in expected_of(name).items()
        if key.startswith('gradient/')
    }
    assert ours.keys() == theirs.keys()
    for key, (norm, projection) in theirs.items():
        g = ours[key].astype(np.float64).ravel()
        # A gradient that is zero by symmetry (of a key's bias) is noise on both sides.
        scale = max(norm, 1e-4)
        assert abs(np.linalg.norm(g) - norm) <= 1e-4 * scale, key
        assert abs(g @ np.cos(np.arange(g.size)) - projection) <= 1e-4 * scale, key


def classifier_dir(name, folder):
    """The directory of a one-label classifier on the body of the fixture."""
    shutil.copytree(FIXTURES / name, folder)
    if name in ENCODERS:
        return folder
    entries = json.loads((folder / 'config.json').read_text())
    scalar = family_for(hf.load_config(folder)).architectures['scalar']
    entries |= {'architectures': [scalar], 'num_labels': 1}
    (folder / 'config.json').write_text(json.dumps(entries))
    tensors = load_file(folder / 'model.safetensors')
    tensors = {k: x for k, x in tensors.items() if k not in HEADS}
    tensors['score.weight'] = expected_of(name)['score.weight']
    save_file(tensors, folder / 'model.safetensors')
    return folder


HEADS = ('lm_head.weight', 'embed_out.weight')


@pytest.mark.parametrize('side', ['left', 'right'])
@everyone
def test_reward_scores(name, side, tmp_path):
    folder = classifier_dir(name, tmp_path / 'rm')
    config = hf.load_config(folder)
    params = hf.load_params(folder, config, head='scalar')
    tokens, mask = padded(rows_of(name), side)
    scores = reward_model_scores(params, tokens, mask, model=ScalarModel(config))
    theirs = expected_of(name)['scores']
    assert np.ptp(theirs) > 0.01
    np.testing.assert_allclose(scores, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize('head', ['lm', 'scalar'])
@everyone
def test_import_export_import_gives_the_same_bits(name, head, tmp_path):
    if name in ENCODERS and head == 'lm':
        with pytest.raises(ValueError, match='no language-model head to sample from'):
            hf.load_params(FIXTURES / name, hf.load_config(FIXTURES / name), head='lm')
        return
    source = FIXTURES / name
    if head == 'scalar':
        source = classifier_dir(name, tmp_path / 'rm')
    config = hf.load_config(source)
    params = hf.load_params(source, config, head=head)
    out = tmp_path / 'out'
    hf.save(out, params, config, head=head, eos_token_id=2, pad_token_id=0)
    assert hf.load_config(out) == config
    again = hf.load_params(out, config, head=head)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    theirs, ours = (load_file(d / 'model.safetensors') for d in (source, out))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)
    entries = [json.loads((d / 'config.json').read_text()) for d in (source, out)]
    for key in ('architectures', 'model_type'):
        assert entries[0][key] == entries[1][key]


@decoders
def test_a_bare_body_lacks_the_prefix(name, tmp_path):
    """The files of GPT-2 and BERT on the hub are those of the bare body."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / 'bare')
    config = hf.load_config(folder)
    prefix = family_for(config).prefix
    tensors = load_file(folder / 'model.safetensors')
    body = {k.removeprefix(prefix): x for k, x in tensors.items() if k not in HEADS}
    assert not any(key.startswith(prefix) for key in body)
    save_file(body, folder / 'model.safetensors')
    loaded = hf.load_params(folder, config, head='scalar')
    whole = hf.load_params(FIXTURES / name, config, head='lm')
    jax.tree.map(np.testing.assert_array_equal, loaded['backbone'], whole['backbone'])


def test_a_bert_checkpoint_of_old_spelling_starts_a_reward_model(tmp_path):
    """bert-base-uncased: a masked language model, gamma and beta, spare tensors."""
    folder = shutil.copytree(FIXTURES / 'bert', tmp_path / 'old')
    entries = json.loads((folder / 'config.json').read_text())
    entries['architectures'] = ['BertForMaskedLM']
    (folder / 'config.json').write_text(json.dumps(entries))
    tensors = load_file(folder / 'model.safetensors')
    old = {
        key.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
            'LayerNorm.bias', 'LayerNorm.beta'
        ): value
        for key, value in tensors.items()
        if not key.startswith('classifier')
    }
    assert len(old.keys() - tensors.keys()) == 14
    old['cls.predictions.bias'] = np.zeros(37, np.float32)
    save_file(old, folder / 'model.safetensors')
    config = hf.load_config(folder)
    loaded = hf.load_params(folder, config, head='scalar')
    whole = hf.load_params(FIXTURES / 'bert', config, head='scalar')
    assert loaded.keys() == {'backbone'}
    jax.tree.map(np.testing.assert_array_equal, loaded['backbone'], whole['backbone'])
