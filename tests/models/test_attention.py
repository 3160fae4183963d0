"""The forms of attention agree; each is chosen where it is at home."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos.gradients import mean_gradient
from rlhf_jax.algos.sft import sft_loss
from rlhf_jax.models import attention
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.ops.logprobs import soft_cap
from rlhf_jax.sharding import ParallelConfig, compile_step, make_mesh
from rlhf_jax.types import TokenBatch

SHAPE = {'rows': 2, 'keys': 12, 'heads': 2, 'groups': 3, 'size': 8}


@pytest.fixture
def grouped(config):
    return dataclasses.replace(config, num_heads=6, num_kv_heads=2, head_dim=8)


def inputs(queries):
    """Random q, k and v; row 0 is padded on the left, row 1 on the right."""
    b, s, k, g, h = SHAPE.values()
    rng = np.random.default_rng(queries)
    q = rng.normal(size=(b, queries, k, g, h)).astype(np.float32)
    keys, values = rng.normal(size=(2, b, k, s, h)).astype(np.float32)
    real = np.stack([np.arange(s) >= 3, np.arange(s) < 9])
    causal = np.tril(np.ones((s, s), bool))[-queries:]
    return q, keys, values, real[:, None] & causal


def by_hand(q, keys, values, visible, scale):
    """A loop over rows, queries and heads."""
    out = np.zeros(q.shape)
    for b, t, k, g in np.ndindex(*q.shape[:-1]):
        seen = visible[b, t]
        scores = keys[b, k][seen] @ q[b, t, k, g] * scale
        weights = np.exp(scores - scores.max(initial=-np.inf))
        out[b, t, k, g] = weights @ values[b, k][seen] / max(weights.sum(), 1e-30)
    return out


def fused(q, keys, values, visible, cfg):
    return attention.fused_attention(q, keys, values, visible, cfg, 'xla')


FORMS = [attention.blockwise_attention, fused]


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('queries', [12, 4])
@pytest.mark.parametrize('scalar', [None, 3.0])
def test_attention_is_that_of_a_loop(grouped, form, queries, scalar, monkeypatch):
    monkeypatch.setattr(attention, 'BLOCK', 5)
    cfg = dataclasses.replace(grouped, query_scalar=scalar)
    q, keys, values, visible = inputs(queries)
    expected = by_hand(q, keys, values, visible, (scalar or 8) ** -0.5)
    sees = visible.any(-1)
    out = np.asarray(form(q, keys, values, visible, cfg))
    np.testing.assert_allclose(out[sees], expected[sees], atol=2e-6)
    assert np.isfinite(out).all()


def test_both_ways_where_nothing_is_causal(grouped):
    cfg = dataclasses.replace(grouped, attention='bidirectional')
    q, keys, values, visible = inputs(12)
    visible = np.broadcast_to(visible[:, -1:], visible.shape)
    expected = by_hand(q, keys, values, visible, 8**-0.5)
    for form in FORMS:
        out = form(q, keys, values, visible, cfg)
        np.testing.assert_allclose(out, expected, atol=2e-6)


def plain(q, keys, values, visible, cfg):
    """Softmax of all scores at once, left to JAX's own differentiation."""
    scores = jnp.einsum('btkgh,bksh->bkgts', q, keys) * cfg.head_dim**-0.5
    scores = soft_cap(scores, cfg.attention_softcap)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30))
    return jnp.einsum('bkgts,bksh->btkgh', weights, values)


@pytest.mark.parametrize('queries', [12, 4])
@pytest.mark.parametrize(
    ('form', 'changes'),
    [
        (attention.blockwise_attention, {}),
        (attention.blockwise_attention, {'attention_softcap': 0.7}),
        (attention.blockwise_attention, {'attention': 'bidirectional'}),
        (fused, {}),
    ],
)
def test_gradients_are_those_of_the_whole_softmax(
    grouped, form, changes, queries, monkeypatch
):
    monkeypatch.setattr(attention, 'BLOCK', 5)
    cfg = dataclasses.replace(grouped, **changes)
    *qkv, visible = inputs(queries)
    if cfg.attention == 'bidirectional':
        visible = np.broadcast_to(visible[:, -1:], visible.shape)
    sees = visible.any(-1)[..., None, None, None]

    def gradients(form):
        def loss(qkv):
            out = jnp.sin(form(*qkv, visible, cfg))
            return jnp.sum(jnp.where(sees, out, 0))

        return jax.grad(loss)(tuple(qkv))

    for ours, expected in zip(gradients(form), gradients(plain)):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_a_token_that_sees_nothing_moves_no_score(grouped, monkeypatch):
    monkeypatch.setattr(attention, 'BLOCK', 5)
    q, keys, values, visible = inputs(12)
    blind = ~visible.any(-1)[..., None, None, None]
    assert blind.any()

    def loss(q, keys):
        out = attention.blockwise_attention(q, keys, values, visible, grouped)
        return jnp.sum(jnp.where(blind, out, 0))

    for gradient in jax.grad(loss, (0, 1))(q, keys):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    ('changes', 'queries', 'keys', 'there'),
    [
        ({}, 12, 12, True),
        ({}, 4, 12, True),
        ({}, 1, 12, False),
        ({}, 4, 11, False),
        ({'dtype': 'float32'}, 12, 12, False),
        ({'head_dim': 12}, 12, 12, False),
        ({'head_dim': 256}, 12, 12, False),
        ({'attention_softcap': 30.0}, 12, 12, False),
    ],
)
def test_where_cudnn_is_asked(grouped, monkeypatch, changes, queries, keys, there):
    cfg = dataclasses.replace(grouped, **{'dtype': 'bfloat16', **changes})
    assert not attention.has_fused(cfg, queries, keys)  # on this machine
    monkeypatch.setattr(attention, 'platform', lambda: 'cuda')
    assert attention.has_fused(cfg, queries, keys) == there
    asked = []

    def note(*args):
        asked.append(args[-1])

    monkeypatch.setattr(attention, 'fused_attention', note)
    q = jnp.zeros((2, queries, 2, 3, cfg.head_dim))
    kv = jnp.zeros((2, 2, keys, cfg.head_dim))
    attention.attend(q, kv, kv, jnp.ones((2, queries, keys), bool), cfg)
    assert asked == (['cudnn'] if there else [])


@pytest.mark.parametrize(
    ('shape', 'part'), [((8, 1, 1), (1, 6)), ((2, 2, 2), (2, 3)), ((1, 1, 8), (8, 6))]
)
def test_each_device_asks_cudnn_for_its_rows_and_heads(
    grouped, monkeypatch, shape, part
):
    """No partitioner splits cuDNN's attention where keys lie otherwise than queries;
    two heads of keys do not divide over eight devices.
    """
    args = [np.tile(x, (4,) + (1,) * (x.ndim - 1)) for x in inputs(12)]
    expected = jax.jit(functools.partial(fused, cfg=grouped))(*args)
    asked, attention_of = [], jax.nn.dot_product_attention

    def note(q, keys, values, **how):
        asked.append((q.shape[0], q.shape[2]))
        return attention_of(q, keys, values, **how)

    monkeypatch.setattr(jax.nn, 'dot_product_attention', note)
    data, fsdp, tensor = shape
    mesh = make_mesh(ParallelConfig(data=data, fsdp=fsdp, tensor=tensor))
    kinds = {'inputs': ('batch',) * 4, 'outputs': ('batch',), 'donate': ()}
    run = compile_step(functools.partial(fused, cfg=grouped), mesh=mesh, **kinds)
    np.testing.assert_allclose(run(*args), expected, atol=2e-6)
    assert set(asked) == {part}


# ------------------------------------------------------------------------------ on TPUs

interpreted = functools.partial(attention.splash_attention, interpret=True)


@pytest.fixture
def packed():
    """Random q, k and v of 256 tokens, two blocks, what they see, and which are real:
    row 0 is padded on the left and in the middle, row 1 on the right; each holds two
    documents.
    """
    rng, (b, t, k, g, h) = np.random.default_rng(0), (2, 256, 2, 3, 8)
    q = rng.normal(size=(b, t, k, g, h)).astype(np.float32)
    keys, values = rng.normal(size=(2, b, k, t, h)).astype(np.float32)
    places = np.arange(t)
    real = np.stack([(places >= 30) & (places // 10 != 15), places < 240])
    documents = np.stack([places >= 100, places >= 200])
    same = documents[:, :, None] == documents[:, None]
    causal = np.tril(np.ones((t, t), bool))
    return (q, keys, values), real[:, None] & same & causal, real


@pytest.mark.parametrize('softcap', [None, 0.7])
def test_the_splash_kernel_sees_what_blocks_see(grouped, packed, softcap, monkeypatch):
    monkeypatch.setattr(attention, 'SPLASH_BLOCKS', (128,))
    cfg = dataclasses.replace(grouped, attention_softcap=softcap)
    qkv, visible, real = packed
    real = real[..., None, None, None]

    def run(form):
        def loss(qkv):
            out = form(*qkv, visible, cfg)
            return jnp.sum(jnp.where(real, jnp.sin(out), 0)), out

        return jax.jit(jax.grad(loss, has_aux=True))(qkv)

    (gradients, out), (expected, wanted) = map(
        run, (interpreted, attention.blockwise_attention)
    )
    assert np.isfinite(out).all()  # where there is padding, too
    out, wanted = np.where(real, out, 0), np.where(real, wanted, 0)
    np.testing.assert_allclose(out, wanted, atol=2e-6)
    for got, want in zip(gradients, expected):
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_each_device_runs_the_kernel_for_its_rows_and_heads(grouped, packed, shape):
    (q, keys, values), visible, _ = packed
    args = [np.tile(x, (4,) + (1,) * (x.ndim - 1)) for x in (q, keys, values, visible)]
    form = functools.partial(interpreted, cfg=grouped)
    data, fsdp, tensor = shape
    mesh = make_mesh(ParallelConfig(data=data, fsdp=fsdp, tensor=tensor))
    kinds = {'inputs': ('batch',) * 4, 'outputs': ('batch',), 'donate': ()}
    run = compile_step(form, mesh=mesh, **kinds)
    np.testing.assert_allclose(run(*args), jax.jit(form)(*args), atol=2e-6)
    # On TPUs no partitioner would take the kernel apart, and lowering it is an error.
    form = functools.partial(attention.splash_attention, cfg=grouped)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P(('data', 'fsdp')))
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for x in args]
        program = jax.export.export(jax.jit(form), platforms=['tpu'])(*placed)
    assert program.nr_devices == 8
    assert program.mlir_module().count('@tpu_custom_call') == 1


@pytest.mark.parametrize('backend', ['jit', 'pmap'])
def test_a_step_by_the_kernel_is_the_step(config, policy_params, backend, monkeypatch):
    """Of a model with scanned layers, recomputed, on all devices."""
    model = CausalLM(dataclasses.replace(config, max_positions=128, remat=True))
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, config.vocab_size, (8, 128)).astype(np.int32)
    mask = np.arange(128) < rng.integers(60, 128, (8, 1))
    segments = (np.arange(128) >= 50).astype(np.int32) + np.zeros((8, 1), np.int32)
    batch = TokenBatch(tokens=tokens, mask=mask, loss_mask=mask, segments=segments)

    def gradient(params, batch, axis_name=None):
        return mean_gradient(
            functools.partial(sft_loss, model=model),
            params,
            batch,
            axis_name=axis_name,
        )

    def run():
        mesh = make_mesh(ParallelConfig(fsdp=2 if backend == 'jit' else 1))
        step = compile_step(gradient, mesh=mesh, backend=backend, donate=())
        return step(policy_params, batch)[0]

    expected, asked = run(), []

    def note(*args):
        asked.append(args[0].shape)
        return interpreted(*args)

    monkeypatch.setattr(attention, 'has_splash', lambda cfg, *lengths: True)
    monkeypatch.setattr(attention, 'splash_attention', note)
    got = run()
    assert asked
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, expected
    )


@pytest.mark.parametrize(
    ('changes', 'queries', 'keys', 'there'),
    [
        ({}, 128, 128, True),
        ({}, 384, 384, True),
        ({'attention_softcap': 30.0}, 256, 256, True),
        ({}, 128, 256, False),  # the last layer, for a response
        ({}, 1, 128, False),
        ({}, 64, 64, False),
        ({'dtype': 'float32'}, 128, 128, False),
        ({'attention': 'bidirectional'}, 128, 128, False),
        ({'windowed': (False, True), 'sliding_window': 8}, 128, 128, False),
        ({'windowed': (False, False), 'sliding_window': 8}, 128, 128, True),
    ],
)
def test_where_the_splash_kernel_is_asked(
    grouped, monkeypatch, changes, queries, keys, there
):
    cfg = dataclasses.replace(grouped, **{'dtype': 'bfloat16', **changes})
    assert not attention.has_splash(cfg, queries, keys)  # on this machine
    monkeypatch.setattr(attention, 'platform', lambda: 'tpu')
    assert attention.has_splash(cfg, queries, keys) == there
    q = jax.ShapeDtypeStruct((2, queries, 2, 3, 8), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, 2, keys, 8), jnp.bfloat16)
    visible = jax.ShapeDtypeStruct((2, queries, keys), bool)

    def loss(q, keys, values, visible):
        return jnp.sum(attention.attend(q, keys, values, visible, cfg).astype(float))

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    program = jax.export.export(gradient, platforms=['tpu'])(q, kv, kv, visible)
    # Forward, of the queries, of keys and values.
    kernels = program.mlir_module().count('@tpu_custom_call')
    assert kernels == (3 if there else 0)
