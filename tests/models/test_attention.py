"""The forms of attention agree; the fused one is chosen where cuDNN has it."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import attention
from rlhf_jax.ops.logprobs import soft_cap

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
    cuda = types.SimpleNamespace(platform_version='cuda 13010')
    monkeypatch.setattr(attention, 'get_backend', lambda: cuda)
    assert attention.has_fused(cfg, queries, keys) == there
    asked = []

    def note(*args):
        asked.append(args[-1])

    monkeypatch.setattr(attention, 'fused_attention', note)
    q = jnp.zeros((2, queries, 2, 3, cfg.head_dim))
    kv = jnp.zeros((2, 2, keys, cfg.head_dim))
    attention.attend(q, kv, kv, jnp.ones((2, queries, keys), bool), cfg)
    assert asked == (['cudnn'] if there else [])
