import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import cpu
from rlhf_jax.ops.memory import after, look_up, recomputed


@pytest.fixture(params=['cpu', 'cuda'])
def platform(request, monkeypatch):
    """What is run on a GPU, too, here: optimization barriers."""
    monkeypatch.setattr(cpu, 'platform', lambda: request.param)


def temporary(fn, *args):
    """Bytes that the compiled ``fn`` takes and gives back."""
    compiled = jax.jit(fn).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_after_changes_nothing(platform):
    tree = {'a': jnp.array([1.5, -0.25]), 'b': jnp.array([[3]], jnp.bfloat16)}
    for fn in (after, jax.jit(after)):
        result = fn(tree, jnp.array([[7.0], [2.0]]))
        assert jax.tree.map(lambda x: x.dtype, result) == {
            'a': jnp.float32,
            'b': jnp.bfloat16,
        }
        jax.tree.map(np.testing.assert_array_equal, result, tree)


@pytest.mark.parametrize('scale', [None, 0.5])
def test_recomputed_has_the_gradient_of_its_function(scale, platform):
    def fn(kernel, x, scale):
        return jnp.tanh(x if scale is None else x * scale) @ kernel

    keys = jax.random.split(jax.random.PRNGKey(0))
    kernel, x = jax.random.normal(keys[0], (4, 3)), jax.random.normal(keys[1], (2, 4))
    out, pull = jax.vjp(recomputed(fn), kernel, x, scale)
    expected, pull_of_fn = jax.vjp(fn, kernel, x, scale)
    np.testing.assert_array_equal(out, expected)
    d_out = jnp.arange(6.0).reshape(2, 3)
    got, want = pull(d_out), pull_of_fn(d_out)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_recomputed_keeps_its_arguments_alone():
    def fn(x):
        return jnp.sin(jnp.exp(jnp.tanh(x)))

    x = jnp.ones((2, 3))
    kept = jax.tree.leaves(jax.vjp(recomputed(fn), x)[1])
    assert [a.shape for a in kept if a.shape] == [(2, 3)]
    np.testing.assert_array_equal([a for a in kept if a.shape][0], x)
    assert len([a for a in jax.tree.leaves(jax.vjp(fn, x)[1]) if a.shape]) > 1


def test_an_activation_is_computed_anew_when_its_turn_comes():
    """Of 8 layers x ← x + tanh(x·W)²·W' the backward pass finds x·W, and no other
    array of this width from its start.
    """

    def total(layer, x, kernels):
        for up, down in kernels:
            x = x + layer(down, x @ up)
        return jnp.sum(x)

    def layer(down, y):
        return jnp.square(jnp.tanh(y)) @ down

    depth, rows, width, wide = 8, 64, 8, 512
    x = jnp.ones((rows, width))
    kernels = [(jnp.ones((width, wide)), jnp.ones((wide, width)))] * depth

    def arrays(layer):
        gradient = jax.grad(total, argnums=2)
        used = temporary(lambda x, kernels: gradient(layer, x, kernels), x, kernels)
        return used / (rows * wide * 4)

    assert arrays(recomputed(layer)) < depth + 4
    assert arrays(layer) > 2 * depth - 2


def test_look_up_has_the_gradient_of_indexing(platform):
    table = jnp.arange(10.0).reshape(5, 2)
    indices = jnp.array([[1, 3, 1], [0, 1, -1]])
    weights = jnp.arange(12.0).reshape(2, 3, 2) + 1
    np.testing.assert_array_equal(look_up(table, indices), table[indices])
    d_table = jax.grad(lambda t: jnp.vdot(look_up(t, indices), weights))(table)
    # Row 1 is read at (0, 0), (0, 2) and (1, 1), row 4 as −1.
    np.testing.assert_array_equal(
        d_table, [[7, 8], [1 + 5 + 9, 2 + 6 + 10], [0, 0], [3, 4], [11, 12]]
    )


def test_the_gradient_of_a_table_is_begun_last():
    """Its zeros are not there while the head, as large, has its turn."""
    vocabulary, width = 4096, 16
    table = jnp.ones((vocabulary, width))
    head = jnp.ones((width, vocabulary))
    tokens = jnp.arange(8)

    def used(read):
        def loss(table, head):
            logits = jnp.tanh(read(table, tokens)) @ head
            return -jnp.sum(jax.nn.log_softmax(logits)[:, 0])

        def step(table, head):
            d_table, d_head = jax.grad(loss, argnums=(0, 1))(table, head)
            return table - d_table, jnp.sum(jnp.square(d_head @ d_head.T))

        return temporary(step, table, head)

    assert used(look_up) < 1.1 * table.nbytes
    assert used(lambda table, tokens: table[tokens]) > 1.4 * table.nbytes
