"""The matrix product against JAX's own, forward and backward."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import cpu
from rlhf_jax.ops.cpu import FEW_ROWS
from rlhf_jax.ops.linear import linear


def _plain(x, kernel):
    return jnp.einsum('...d,df->...f', x, kernel)


@pytest.mark.parametrize(
    'shape', [(5,), (1, 5), (2, 5), (2, 3, 5), (FEW_ROWS, 5), (2, FEW_ROWS, 5)]
)
@pytest.mark.parametrize('outputs', [3, 5, 11])
def test_value_and_gradient_are_those_of_einsum(shape, outputs):
    x, kernel, weight = (
        jax.random.normal(jax.random.PRNGKey(i), size)
        for i, size in enumerate([shape, (5, outputs), (*shape[:-1], outputs)])
    )

    def both(product):
        return jax.value_and_grad(
            lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel)) * weight), (0, 1)
        )(x, kernel)

    for ours, plain in zip(
        jax.tree.leaves(both(linear)), jax.tree.leaves(both(_plain))
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('rows', [1, 2, FEW_ROWS + 1])
def test_bfloat16_factors_give_a_float32_product(rows):
    x = jnp.asarray([[1.0, 2.0**-9]] * rows, jnp.bfloat16)
    kernel = jnp.asarray([[1.0], [1.0]], jnp.bfloat16)
    # 1 + 2⁻⁹ needs 10 bits, of which bfloat16 has 8.
    assert np.asarray(linear(x, kernel, jnp.float32) == 1 + 2**-9).all()
    assert np.asarray(linear(x, kernel) == 1.0).all()
    gradient = jax.grad(lambda k: linear(x, k, jnp.float32).sum())(kernel)
    assert gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ('platform', 'rows', 'turned'),
    [
        ('cpu', 1, False),
        ('cpu', 2, True),
        ('cpu', FEW_ROWS, True),
        ('cpu', FEW_ROWS + 1, False),
        ('cuda', 2, False),
    ],
)
def test_few_rows_are_turned_on_a_cpu(monkeypatch, platform, rows, turned):
    monkeypatch.setattr(cpu, 'platform', lambda: platform)
    text = str(
        jax.make_jaxpr(lambda x, k: linear(x, k))(jnp.ones((rows, 5)), jnp.ones((5, 3)))
    )
    assert ('optimization_barrier' in text) == turned


@pytest.mark.parametrize('shape', [(5, 2048), (2048, 5), (5, 5)])
def test_the_gradient_of_a_kernel_by_whole_numbers(shape):
    """Small whole numbers, whose products and sums float32 holds exactly."""
    x, kernel, weight = (
        jax.random.randint(jax.random.PRNGKey(i), size, -8, 9).astype(jnp.float32)
        for i, size in enumerate([(2, 3, shape[0]), shape, (2, 3, shape[1])])
    )
    d_x, d_kernel = jax.grad(
        lambda x, kernel: jnp.sum(linear(x, kernel) * weight), (0, 1)
    )(x, kernel)
    rows, heights = np.asarray(x).reshape(6, -1), np.asarray(weight).reshape(6, -1)
    np.testing.assert_array_equal(d_kernel, rows.T @ heights)
    np.testing.assert_array_equal(d_x.reshape(6, -1), heights @ np.asarray(kernel).T)


@pytest.mark.parametrize(
    ('platform', 'shape', 'copied'),
    [
        ('cpu', (5, 7), True),
        ('cpu', (7, 5), True),
        ('cpu', (5, 5), True),
        ('cuda', (5, 7), False),
        ('cuda', (7, 5), False),
    ],
)
def test_the_gradient_of_a_kernel_copies_its_narrow_factor(
    monkeypatch, platform, shape, copied
):
    monkeypatch.setattr(cpu, 'platform', lambda: platform)
    rows = FEW_ROWS + 1
    x = jnp.ones((rows, shape[0]))
    gradient = jax.grad(lambda k: jnp.sum(linear(x, k)))
    text = str(jax.make_jaxpr(gradient)(jnp.ones(shape)))
    assert (f'f32[5,{rows}] = optimization_barrier' in text) == copied


@pytest.mark.parametrize('shape', [(6, 40), (40, 6), (6, 2048), (2048, 6)])
def test_xla_leaves_the_smaller_factor_the_transposed_one(shape):
    """Simplified, (dyᵀ·x)ᵀ would be xᵀ·dy, whose transposed factor is the wide one."""
    rows = FEW_ROWS + 1
    x = jnp.ones((rows, shape[0]))
    weight = jnp.ones((rows, shape[1]))
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(jnp.sin(linear(x, k)) * weight)))
    text = gradient.lower(jnp.ones(shape)).compile().as_text()
    wide = max(shape)
    assert re.search(rf'= f32\[6,{wide}\]\S* dot\(', text)
    assert not re.search(rf'= f32\[{wide},6\]\S* dot\(', text)


def test_members_of_an_ensemble_are_mapped():
    x = jax.random.normal(jax.random.PRNGKey(0), (3, 4, 5))
    kernels = jax.random.normal(jax.random.PRNGKey(1), (3, 5, 2))

    def loss(kernel, x):
        return jnp.sum(linear(x, kernel) ** 2)

    mapped = jax.vmap(jax.grad(loss))(kernels, x)
    for i in range(3):
        np.testing.assert_allclose(
            mapped[i], jax.grad(loss)(kernels[i], x[i]), rtol=1e-5
        )
