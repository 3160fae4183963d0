"""Hugging Face directories against transformers: logits, scores, loading."""

import numpy as np
import pytest

from rlhf_jax import hf
from rlhf_jax.hf.reader import INDEX
from rlhf_jax.models.heads import CausalLM, ScalarModel
from tests.hf.test_directories import make_config, make_params

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.parity

VARIANTS = [
    {'tied': True},
    {'tied': False},
    {'tied': False, 'attention_bias': True, 'mlp_bias': True},
]
variants = pytest.mark.parametrize(
    'options', VARIANTS, ids=['tied', 'untied', 'biases']
)


@pytest.fixture
def quiet(caplog, recwarn):
    """Fails a test in which transformers warns of anything."""
    transformers.utils.logging.enable_propagation()
    yield
    assert not recwarn.list and not caplog.get_records('call'), caplog.text
    transformers.utils.logging.disable_propagation()


def padded(left, pad=0):
    """Three rows of 9, 5 and 2 tokens; the pad id never stands inside a row."""
    rng = np.random.default_rng(5)
    tokens, mask = np.full((3, 9), pad), np.zeros((3, 9), bool)
    for row, size in enumerate((9, 5, 2)):
        place = slice(9 - size, None) if left else slice(size)
        tokens[row, place], mask[row, place] = rng.integers(1, 48, size), True
    return tokens, mask


def torch_outputs(model, tokens, mask):
    """Logits or scores of transformers, with the positions a padded row needs."""
    positions = np.maximum(np.cumsum(mask, -1) - 1, 0)
    with torch.no_grad():
        return (
            model.eval()(
                input_ids=torch.tensor(tokens),
                attention_mask=torch.tensor(mask.astype(np.int64)),
                position_ids=torch.tensor(positions),
            )
            .logits.float()
            .numpy()
        )


def our_logits(config, params, tokens, mask):
    model = CausalLM(config)
    return np.asarray(
        model.apply({'params': params}, tokens, mask) @ model.unembedding(params)
    )


def load_strictly(cls, directory):
    """from_pretrained, refusing missing, unexpected and misshaped keys."""
    model, info = cls.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model


@variants
@pytest.mark.parametrize('shard', ['5GB', '20KB'])
def test_a_model_written_by_transformers_gives_its_logits(tmp_path, options, shard):
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=48,
            num_hidden_layers=3,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=40,
            max_position_embeddings=64,
            tie_word_embeddings=options['tied'],
            attention_bias=options.get('attention_bias', False),
            mlp_bias=options.get('mlp_bias', False),
            initializer_range=0.3,
        )
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(('bias', 'norm.weight')):  # made as zeros and ones
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / INDEX).exists() == (shard == '20KB')
    config = hf.load_config(tmp_path)
    params = hf.load_params(tmp_path, config, head='lm')
    for left in (False, True):
        tokens, mask = padded(left)
        expected = torch_outputs(theirs, tokens, mask)[mask]
        logits = our_logits(config, params, tokens, mask)[mask]
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@variants
@pytest.mark.parametrize('max_shard_bytes', [2**30, 20_000], ids=['one', 'sharded'])
def test_transformers_reads_our_language_model(
    tmp_path, options, max_shard_bytes, quiet
):
    config = make_config(**options)
    params = make_params(config, 'lm')
    out = tmp_path / 'lm'
    hf.save(out, params, config, head='lm', max_shard_bytes=max_shard_bytes)
    theirs = load_strictly(transformers.AutoModelForCausalLM, out)
    for left in (False, True):
        tokens, mask = padded(left)
        expected = torch_outputs(theirs, tokens, mask)[mask]
        logits = our_logits(config, params, tokens, mask)[mask]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@variants
def test_transformers_reads_our_reward_model(tmp_path, options, quiet):
    config = make_config(**options)
    params = make_params(config, 'scalar')
    hf.save(
        tmp_path / 'rm', params, config, head='scalar', eos_token_id=2, pad_token_id=0
    )
    reader = transformers.AutoModelForSequenceClassification
    theirs = load_strictly(reader, tmp_path / 'rm')
    assert theirs.config.num_labels == 1
    for left in (False, True):
        tokens, mask = padded(left)
        expected = torch_outputs(theirs, tokens, mask)[:, 0]
        values = np.asarray(ScalarModel(config).apply({'params': params}, tokens, mask))
        last = 8 - np.argmax(mask[:, ::-1], -1)
        scores = values[np.arange(3), last] - params['head']['bias']
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)


def test_a_classifier_written_by_transformers_has_bias_zero(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            vocab_size=48,
            num_hidden_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            intermediate_size=40,
            num_labels=1,
            pad_token_id=0,
        )
    )
    theirs.save_pretrained(tmp_path)
    params = hf.load_params(tmp_path, hf.load_config(tmp_path), head='scalar')
    kernel = theirs.score.weight.detach().numpy()[0]
    np.testing.assert_array_equal(params['head']['kernel'], kernel)
    assert params['head']['bias'] == 0
