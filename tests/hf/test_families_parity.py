"""Every model family against transformers, live: padding, gradients, exports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax import hf
from rlhf_jax.generate import generate, sampling
from rlhf_jax.models.heads import CausalLM, ScalarModel
from rlhf_jax.ops.logprobs import logits_of, token_logprobs
from rlhf_jax.rewards import reward_model_scores
from tests.hf.small_families import ENCODERS, FAMILIES

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.parity

from tests.hf.make_fixtures import build  # noqa: E402  (needs torch)

DECODERS = [name for name in FAMILIES if name not in ENCODERS]


@pytest.fixture
def quiet(caplog, recwarn):
    """Fails a test in which transformers warns of anything."""
    transformers.utils.logging.enable_propagation()
    yield
    assert not recwarn.list and not caplog.get_records('call'), caplog.text
    transformers.utils.logging.disable_propagation()


def load_strictly(cls, directory):
    """from_pretrained, refusing missing, unexpected and misshaped keys."""
    model, info = cls.from_pretrained(
        directory, output_loading_info=True, attn_implementation='eager'
    )
    assert not any(info.values()), info
    return model.eval()


def padded(side, pad):
    """Three rows of 9, 5 and 2 tokens; the pad id never stands inside a row."""
    rng = np.random.default_rng(5)
    tokens, mask = np.full((3, 9), pad), np.zeros((3, 9), bool)
    for row, size in enumerate((9, 5, 2)):
        place = slice(9 - size, None) if side == 'left' else slice(size)
        tokens[row, place], mask[row, place] = rng.integers(3, 37, size), True
    return tokens, mask


def their_logits(model, tokens, mask):
    inputs = {
        'input_ids': torch.tensor(tokens),
        'attention_mask': torch.tensor(mask.astype(np.int64)),
    }
    if model.config.model_type not in ENCODERS:  # those derive positions themselves
        positions = np.maximum(np.cumsum(mask, -1) - 1, 0)
        inputs['position_ids'] = torch.tensor(positions)
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def our_logits(model, params, tokens, mask):
    hidden = model.apply({'params': params}, tokens, mask)
    cap = model.config.logit_softcap
    return np.asarray(logits_of(hidden, model.unembedding(params), cap))


def random_params(model):
    tokens = jax.ShapeDtypeStruct((1, 4), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), tokens, tokens)['params']
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.3, x.shape)), shapes)


def our_config(name, tmp_path):
    """The family's config, as transformers writes it."""
    kind = 'SequenceClassification' if name in ENCODERS else 'CausalLM'
    build(name, kind).save_pretrained(tmp_path / 'theirs')
    return hf.load_config(tmp_path / 'theirs')


@pytest.mark.parametrize('name', DECODERS)
def test_transformers_reads_our_policy(name, tmp_path, quiet):
    config = our_config(name, tmp_path)
    model = CausalLM(config)
    params = random_params(model)
    out = tmp_path / 'out'
    hf.save(out, params, config, head='lm', eos_token_id=2, pad_token_id=0)
    theirs = load_strictly(transformers.AutoModelForCausalLM, out)
    for side in ('left', 'right'):
        tokens, mask = padded(side, pad=0)
        ours = our_logits(model, params, tokens, mask)[mask]
        expected = their_logits(theirs, tokens, mask)[mask]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', FAMILIES)
def test_transformers_reads_our_reward_model(name, tmp_path, quiet):
    config = our_config(name, tmp_path)
    model = ScalarModel(config)
    params = random_params(model)
    pad = 1 if name == 'roberta' else 0
    out = tmp_path / 'out'
    hf.save(out, params, config, head='scalar', eos_token_id=2, pad_token_id=pad)
    theirs = load_strictly(transformers.AutoModelForSequenceClassification, out)
    bias = 0 if name in ENCODERS else params['head']['bias']
    for side in ('left', 'right'):
        if side == 'left' and name in ENCODERS:
            continue  # transformers reads an encoder at column 0, padding or not
        tokens, mask = padded(side, pad)
        scores = reward_model_scores(params, tokens, mask, model=model) - bias
        expected = their_logits(theirs, tokens, mask)[:, 0]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', DECODERS)
def test_every_gradient(name, tmp_path):
    theirs = build(name, 'CausalLM')
    theirs.save_pretrained(tmp_path / 'theirs')
    config = hf.load_config(tmp_path / 'theirs')
    params = hf.load_params(tmp_path / 'theirs', config, head='lm')
    model = CausalLM(config)
    tokens, mask = padded('right', pad=0)
    counted = mask.copy()
    counted[:, 0] = False

    def mean_loss(params):
        hidden = model.apply({'params': params}, tokens, mask)
        logprobs, _ = token_logprobs(
            hidden,
            model.unembedding(params),
            jnp.asarray(tokens),
            softcap=config.logit_softcap,
        )
        return -jnp.sum(logprobs * counted) / counted.sum()

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
    labels = torch.tensor(np.where(counted, tokens, -100))
    expected = theirs(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask.astype(int)),
        labels=labels,
    ).loss
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    hf.save(tmp_path / 'gradient', gradient, config, head='lm')
    ours = load_file(tmp_path / 'gradient' / 'model.safetensors')
    for key, parameter in theirs.named_parameters():
        if key not in ours:  # GPT-NeoX saves its head under an older name
            key = key.replace('lm_head', 'embed_out')
        g = parameter.grad.numpy()
        # A gradient that is zero by symmetry (of a key's bias) is noise on both sides.
        error = np.linalg.norm(ours[key] - g) / max(np.linalg.norm(g), 1e-4)
        assert error <= 1e-4, (key, error)


@pytest.mark.parametrize('name', DECODERS)
def test_greedy_generation_of_a_padded_batch(name, tmp_path):
    theirs = build(name, 'CausalLM')
    theirs.save_pretrained(tmp_path)
    config = hf.load_config(tmp_path)
    params = hf.load_params(tmp_path, config, head='lm')
    tokens, mask = padded('left', pad=0)
    expected = theirs.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask.astype(int)),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
    )[:, 9:]
    out = generate(
        params,
        jnp.asarray(tokens),
        jnp.asarray(mask),
        jnp.arange(3),
        jax.random.PRNGKey(0),
        sampling(eos_ids=[], temperature=0.0),
        model=CausalLM(config),
        max_new_tokens=16,
    )
    np.testing.assert_array_equal(np.asarray(out.tokens)[:, 9:], expected.numpy())
