"""The Transformer against itself (padding, garbage, caches) and a known loss."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from rlhf_jax import hf
from rlhf_jax.models import attention, presets
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import (
    CausalLM,
    ScalarModel,
    apply_to_last,
    fuse_projections,
    in_compute_dtype,
    start_from,
    unstack_layers,
)
from rlhf_jax.models.layers import MLP, Norm
from rlhf_jax.ops.logprobs import token_logprobs
from rlhf_jax.sharding import COMPILER_OPTIONS

DATA = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'
STORIES = DATA / 'stories260k'

ROPE = TransformerConfig(
    vocab_size=50,
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_positions=64,
    init_std=0.2,
)
CONFIGS = {
    'rope, grouped queries, gated, tied': ROPE,
    'one key-value head, untied, every bias': dataclasses.replace(
        ROPE,
        num_kv_heads=1,
        tied_embeddings=False,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    ),
    'learned positions, LayerNorm, plain GELU, untied': dataclasses.replace(
        ROPE,
        num_kv_heads=4,
        norm='layer',
        position='learned',
        activation='gelu',
        gated_mlp=False,
        tied_embeddings=False,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    ),
}
configs = pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS.keys())


@pytest.fixture(scope='module')
def stories():
    """The pretrained model (config, parameters) and its tokenizer."""
    if not STORIES.is_dir():
        pytest.skip(f'the pretrained model is not at {STORIES}')
    config = hf.load_config(STORIES)
    params = hf.load_params(STORIES, config, head='lm')
    return config, params, Tokenizer.from_file(str(STORIES / 'tokenizer.json'))


def random_params(model, seed=0):
    """Parameters without zeros or ones: every bias and scale counts."""
    tokens = jax.ShapeDtypeStruct((1, 4), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), tokens, tokens)['params']
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.2, x.shape)), shapes)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens, mask):
    return CausalLM(config).apply({'params': params}, tokens, mask)


def pad(rows, length, *, left, fill=0):
    """Rows of ids → (tokens, mask) [B, length], padded on one side."""
    tokens = np.full((len(rows), length), fill, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for row, ids in enumerate(rows):
        place = slice(length - len(ids), None) if left else slice(len(ids))
        tokens[row, place], mask[row, place] = ids, True
    return tokens, mask


def test_loss_of_a_pretrained_model(stories):
    """1.472 nats per token: README of the data, from another implementation."""
    config, params, tokenizer = stories
    text = (DATA / 'tinystories' / 'tinystories_sample.txt').read_text(encoding='utf-8')
    texts = [story.strip() for story in text.split('<|endoftext|>')][1:200]
    rows = sorted((tokenizer.encode(story).ids for story in texts), key=len)
    rows = [ids for ids in rows if len(ids) < 512]
    assert rows[0][0] == 1  # BOS

    @jax.jit
    def score(tokens, mask):
        hidden = CausalLM(config).apply({'params': params}, tokens, mask)
        return token_logprobs(hidden, CausalLM(config).unembedding(params), tokens)[0]

    total = count = 0
    for start in range(0, len(rows), 25):
        batch = rows[start : start + 25]
        tokens, mask = pad(batch, -(-len(batch[-1]) // 128) * 128, left=False)
        logprobs = np.asarray(score(tokens, mask), np.float64)
        predicted = mask & (np.arange(tokens.shape[1]) > 0)
        total, count = total - logprobs[predicted].sum(), count + predicted.sum()
    assert total / count == pytest.approx(1.472, abs=0.005)


def test_greedy_decoding_with_a_cache_follows_the_full_forward(stories):
    config, params, tokenizer = stories
    model = CausalLM(config)
    prompts = ['Once upon a time, there was a', 'Lily saw']
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    width, steps = max(map(len, rows)), 200
    assert len(rows[0]) != len(rows[1])
    tokens, mask = pad(rows, width, left=True)

    def pick(hidden):
        return jnp.argmax(hidden @ model.unembedding(params), -1).astype(jnp.int32)

    @jax.jit
    def start():
        hidden, cache = model.apply(
            {'params': params}, tokens, mask, width + steps, method='prefill'
        )
        return pick(hidden[:, -1]), cache

    @jax.jit
    def step(last, cache):
        real = jnp.ones(len(prompts), bool)
        hidden, cache = model.apply(
            {'params': params}, last, real, cache, method='decode'
        )
        return pick(hidden), cache

    last, cache = start()
    written = [last]
    for _ in range(steps - 1):
        last, cache = step(last, cache)
        written.append(last)
    written = np.stack(written, 1)

    for row, ids in enumerate(rows):  # no padding and no cache here
        whole = np.concatenate([ids, written[row]])[None]
        hidden = forward(config, params, whole, np.ones_like(whole, bool))
        np.testing.assert_array_equal(
            np.asarray(pick(hidden))[0, len(ids) - 1 : -1], written[row]
        )
    assert len(set(written[0])) > 30  # a story, not one token over and over


@configs
def test_padding_and_what_lies_under_it_change_nothing(config):
    params = random_params(CausalLM(config))
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, config.vocab_size, size) for size in (9, 4, 1)]
    alone = [
        forward(config, params, ids[None], np.ones((1, len(ids)), bool)) for ids in rows
    ]
    for left in (False, True):
        for fill in (0, -1, 10**6):
            tokens, mask = pad(rows, 9, left=left, fill=fill)
            hidden = np.asarray(forward(config, params, tokens, mask))
            if fill == 0:
                clean = hidden
            np.testing.assert_array_equal(hidden, clean)  # under the mask as well
            assert np.isfinite(hidden).all()
            for row in range(3):
                np.testing.assert_allclose(
                    hidden[row][mask[row]], alone[row][0], rtol=0, atol=1e-5
                )


@configs
def test_cached_decoding_gives_the_states_of_the_full_forward(config):
    model = CausalLM(config)
    params = random_params(model)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, config.vocab_size, size) for size in (5, 2)]
    more = rng.integers(0, config.vocab_size, (2, 6)).astype(np.int32)
    tokens, mask = pad(prompts, 5, left=True, fill=-1)
    _, cache = model.apply({'params': params}, tokens, mask, 11, method='prefill')
    decode = jax.jit(
        lambda *args: model.apply({'params': params}, *args, method='decode')
    )
    states = []
    for token in more.T:
        hidden, cache = decode(token, np.ones(2, bool), cache)
        states.append(hidden)
    for row, prompt in enumerate(prompts):
        whole = np.concatenate([prompt, more[row]])[None]
        expected = forward(config, params, whole, np.ones_like(whole, bool))[0]
        np.testing.assert_allclose(
            np.stack(states, 1)[row], expected[len(prompt) :], rtol=0, atol=1e-5
        )


@configs
def test_a_token_that_is_not_real_is_never_seen(config):
    model = CausalLM(config)
    params = random_params(model)
    prompt, token = np.array([[3, 1, 4]], np.int32), np.array([7], np.int32)
    _, cache = model.apply({'params': params}, prompt, prompt > 0, 5, method='prefill')

    @jax.jit
    def decode(token, real, cache):
        return model.apply({'params': params}, token, real, cache, method='decode')

    yes, no = np.array([True]), np.array([False])
    expected, _ = decode(token, yes, cache)
    _, cache = decode(np.array([-1], np.int32), no, cache)
    hidden, _ = decode(token, yes, cache)
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=1e-6)


def test_remat_and_unrolling_change_nothing_but_speed():
    params = random_params(CausalLM(ROPE))
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)

    def loss(params, config):
        hidden = CausalLM(config).apply({'params': params}, tokens, tokens >= 0)
        return jnp.sum(jnp.sin(hidden))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    expected = gradient(params, ROPE)
    for change in ({'remat': True}, {'scan_unroll': 2}):
        same = gradient(params, dataclasses.replace(ROPE, **change))
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(same)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_remat_saves_memory_and_is_refused_where_it_would_not():
    tokens = jax.ShapeDtypeStruct((4, 64), np.int32)

    def temporary(**changes):
        cfg = dataclasses.replace(ROPE, num_layers=6, max_positions=64, **changes)
        model = CausalLM(cfg)
        params = jax.eval_shape(model.init, jax.random.PRNGKey(0), tokens, tokens)

        def loss(params, tokens):
            return jnp.sum(jnp.sin(model.apply(params, tokens, tokens >= 0)))

        compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(remat=True) < 0.7 * temporary()
    with pytest.raises(ValueError, match='remat=True with scan_unroll=6'):
        temporary(remat=True, scan_unroll=6)


@configs
def test_a_frozen_model_says_the_same_in_half_the_memory(config):
    """Bit by bit, in bfloat16; in float32 nothing is touched."""
    params = random_params(ScalarModel(config)) | random_params(CausalLM(config))
    assert in_compute_dtype(params, config) == params
    config = dataclasses.replace(config, dtype='bfloat16')
    stored = in_compute_dtype(params, config)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def say(params):
        model = CausalLM(config)
        hidden = model.apply({'params': params}, tokens, tokens >= 0)
        scores = ScalarModel(config).apply({'params': params}, tokens, tokens >= 0)
        return token_logprobs(hidden, model.unembedding(params), tokens), scores

    jax.tree.map(np.testing.assert_array_equal, say(stored), say(params))
    kernels = stored['backbone']['layers']['mlp']
    assert {x.dtype for x in jax.tree.leaves(kernels)} == {jnp.dtype('bfloat16')}
    kept = {x.dtype for x in jax.tree.leaves(stored['head'])}
    assert kept == {stored['backbone']['final_norm']['scale'].dtype}
    learned = config.position == 'learned'
    assert (stored['backbone']['embed']['tokens'].dtype == np.float32) == learned


WINDOWS = dataclasses.replace(
    ROPE,
    num_layers=3,
    sliding_window=5,
    windowed=(True, False, True),
    attention_softcap=20.0,
    scan_unroll=2,
)


@pytest.mark.parametrize('config', [ROPE, WINDOWS], ids=['rope', 'windows'])
@pytest.mark.parametrize('size', [4, 5])
def test_attention_in_blocks_is_attention(config, size, monkeypatch):
    """Values and gradients, with padding on both sides and a last block not full."""
    model = CausalLM(config)
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 14)).astype(np.int32)
    mask = np.ones((2, 14), bool)
    mask[0, :6], mask[1, 11:] = False, False

    def loss(params):
        hidden = model.apply({'params': params}, tokens, mask)
        return jnp.sum(jnp.where(mask[..., None], jnp.sin(hidden), 0))

    expected = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(attention, 'BLOCK', size)
    in_blocks = jax.value_and_grad(lambda p: loss(p))  # another function: traced anew
    blocks = jax.jit(in_blocks)(params)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(blocks)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# Unrolled, the last layer is run for the last places alone; scanned, the head.
UNROLLED = [dataclasses.replace(c, scan_unroll=9) for c in (*CONFIGS.values(), WINDOWS)]


@pytest.mark.parametrize('config', [*UNROLLED, WINDOWS])
@pytest.mark.parametrize('kind', [CausalLM, ScalarModel])
def test_the_last_places_alone_are_those_of_all(kind, config, monkeypatch):
    model = kind(config)
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 11)).astype(np.int32)
    mask = np.arange(11) >= np.array([[4], [0]])

    def loss(params, last):
        out = apply_to_last(model, params, tokens, mask, last)
        assert out.shape[1] == (last or 11)
        return jnp.sum(jnp.sin(out[:, -5:]))

    def gradient(last):  # traced anew each time, with the block of that time
        return jax.jit(jax.value_and_grad(functools.partial(loss, last=last)))(params)

    expected = gradient(None)
    for block in (attention.BLOCK, 2):
        monkeypatch.setattr(attention, 'BLOCK', block)
        alone = gradient(5)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('config', UNROLLED)
def test_fused_projections_are_their_parts(config):
    model = CausalLM(config)
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 11)).astype(np.int32)
    mask = np.arange(11) >= np.array([[4], [0]])
    expected = model.apply({'params': params}, tokens, mask)
    fused, in_one = fuse_projections(*unstack_layers(model, params, 0))
    for i in range(config.num_layers):
        layer = in_one['backbone'][f'layers_{i}']
        assert layer['attention'].keys() & {'query_kernel', 'key_kernel'} == set()
        assert ('gate_up_kernel' in layer['mlp']) == config.gated_mlp
    out = fused.apply({'params': in_one}, tokens, mask)
    np.testing.assert_allclose(out[mask], expected[mask], rtol=1e-4, atol=1e-5)
    last = fused.clone(last=1).apply({'params': in_one}, tokens, mask)
    np.testing.assert_allclose(last[:, 0], expected[:, -1], rtol=1e-4, atol=1e-5)


def test_parameters_are_drawn_alike_by_a_program_with_one_layer_in_it():
    tokens = jnp.ones((1, 2), jnp.int32)

    def init(unroll):
        model = CausalLM(dataclasses.replace(ROPE, scan_unroll=unroll))
        args = jax.random.PRNGKey(0), tokens, tokens > 0
        return jax.jit(model.init)(*args), str(jax.make_jaxpr(model.init)(*args))

    (scanned, _), (unrolled, program) = init(1), init(ROPE.num_layers)
    jax.tree.map(np.testing.assert_array_equal, unrolled, scanned)
    assert f'length={ROPE.num_layers}' in program and 'unroll=1' in program
    assert f'unroll={ROPE.num_layers}' not in program


def test_start_from_takes_the_backbone_and_checks_its_shape():
    policy, scalar = random_params(CausalLM(ROPE)), random_params(ScalarModel(ROPE), 1)
    started = start_from(scalar, policy)
    assert started['backbone'] is policy['backbone']
    assert started['head'] is scalar['head']
    wide = random_params(CausalLM(dataclasses.replace(ROPE, mlp_width=40)))
    with pytest.raises(
        ValueError, match=r'mlp/down_kernel is \[2, 40, 32\].*\[2, 48, 32\]'
    ):
        start_from(scalar, wide)
    biased = random_params(CausalLM(dataclasses.replace(ROPE, attention_bias=True)))
    with pytest.raises(ValueError, match=r'key_bias is \[2, 2, 8\] in the.*but absent'):
        start_from(scalar, biased)


def test_configs_that_cannot_be():
    with pytest.raises(ValueError, match='num_heads=4.*num_kv_heads=3'):
        dataclasses.replace(ROPE, num_kv_heads=3)
    with pytest.raises(ValueError, match='head_dim=7'):
        dataclasses.replace(ROPE, head_dim=7)


def test_presets():
    for name in presets.SIZES:
        config = presets.preset(name, 512)
        assert config.vocab_size == 512
        assert config.num_heads * config.head_dim == config.width
    assert presets.preset('nano', 512).width == 64
    with pytest.raises(ValueError, match="'mico' is unknown; did you mean 'micro'"):
        presets.preset('mico', 512)
    with pytest.raises(ValueError, match='known are nano, micro, small, 1b'):
        presets.preset('gigantic', 512)


@pytest.mark.parametrize('fused', [False, True])
def test_of_an_mlp_the_products_alone_are_kept(fused):
    """Gate and up, [B, T, F] each, wait for the backward pass, and no activation."""
    config = dataclasses.replace(ROPE, fused=fused)
    mlp, x = MLP(config), jnp.ones((2, 5, config.width))
    params = jax.jit(mlp.init)(jax.random.PRNGKey(0), x)
    _, pull = jax.vjp(mlp.apply, params, x)
    shapes = [leaf.shape for leaf in jax.tree.leaves(pull)]
    assert shapes.count((2, 5, config.mlp_width)) == 2
    assert (2, 5, 2 * config.mlp_width) not in shapes


def test_rotary_tables_are_computed_once():
    """Not in each layer for every head: XLA's fusions for CPUs would do so."""
    config = dataclasses.replace(ROPE, scan_unroll=ROPE.num_layers)
    model, tokens = CausalLM(config), jnp.ones((2, 5), jnp.int32)
    params = jax.jit(model.init)(jax.random.PRNGKey(0), tokens, tokens > 0)['params']

    def total(params):
        hidden = model.apply({'params': params}, tokens, tokens > 0)
        return jnp.sum(jax.tree.leaves(hidden)[0])

    program = jax.jit(jax.grad(total)).lower(params).compile().as_text()
    assert program.count(' cosine(') == program.count(' sine(') == 1


@pytest.mark.parametrize(('norm', 'axes'), [('rms', 1), ('rms', 2), ('layer', 1)])
def test_a_norm_keeps_what_it_is_given_alone(config, norm, axes):
    """For its backward pass, which has the gradient of the formula written out."""
    cfg = dataclasses.replace(config, norm=norm)
    module = Norm(cfg, axes)
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    x = jax.random.normal(keys[0], (2, 3, 4, 5))
    params = jax.jit(module.init)(keys[1], x)['params']
    params = {k: p + jax.random.normal(keys[2], p.shape) for k, p in params.items()}

    def written_out(params, x):
        over = tuple(range(-axes, 0))
        if norm == 'layer':
            x = x - x.mean(over, keepdims=True)
        square = jnp.square(x).mean(over, keepdims=True)
        y = x / jnp.sqrt(square + cfg.norm_eps) * (params['scale'] + cfg.norm_offset)
        return y + params.get('bias', 0)

    y, pull = jax.vjp(lambda params, x: module.apply({'params': params}, x), params, x)
    expected, pull_of_formula = jax.vjp(written_out, params, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    d_y = jax.random.normal(keys[3], x.shape)
    got, want = pull(d_y), pull_of_formula(d_y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    kept = [a for a in jax.tree.leaves(pull) if getattr(a, 'shape', ()) == x.shape]
    assert len(kept) == 1
    np.testing.assert_array_equal(kept[0], x)


@pytest.mark.parametrize('kind', [CausalLM, ScalarModel])
def test_more_tokens_than_learned_positions_are_refused(config, kind):
    """Where a table ends, an index would silently be that of its last row."""
    model = kind(dataclasses.replace(config, position='learned', max_positions=6))
    fits, long = (jnp.zeros((2, length), jnp.int32) for length in (6, 7))
    params = jax.eval_shape(model.init, jax.random.PRNGKey(0), fits, fits == 0)
    jax.eval_shape(model.apply, params, fits, fits == 0)
    for mask in (long == 0, jnp.arange(7) < jnp.array([[3], [3]])):
        with pytest.raises(ValueError, match='7 tokens exceed the 6 learned positions'):
            jax.eval_shape(model.apply, params, long, mask)
    if kind is CausalLM:
        prefill = functools.partial(model.apply, cache_length=7, method='prefill')
        with pytest.raises(ValueError, match='7 tokens exceed the 6 learned positions'):
            jax.eval_shape(prefill, params, fits, fits == 0)
