"""Masked reductions: by hand, with garbage in the padding, and over mapped devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.masked import (
    at_last,
    last_index,
    masked_mean,
    masked_sum,
    right_align,
    whiten,
)

GARBAGE = [np.nan, np.inf, -1e30]


def test_sum_and_mean_by_hand():
    x = jnp.array([[1.0, 2.0, 100.0], [4.0, 100.0, 100.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    assert float(masked_sum(x, mask)) == 7
    assert masked_sum(x, mask, axis=-1).tolist() == [3, 4]
    assert float(masked_mean(x, mask)) == pytest.approx(7 / 3)
    assert masked_mean(x, mask, axis=-1).tolist() == [1.5, 4]
    assert float(masked_mean(x > 1.5, mask)) == pytest.approx(
        2 / 3
    )  # of booleans: a share


def test_nothing_counted_gives_zero_and_not_nan():
    nothing = jnp.zeros((2, 2), bool)
    assert float(masked_mean(jnp.ones((2, 2)), nothing)) == 0
    assert whiten(jnp.ones((2, 2)), nothing).tolist() == [[0, 0], [0, 0]]


def test_whiten_by_hand():
    x, mask = jnp.array([[2.0, 6.0, 9.0]]), jnp.array([[True, True, False]])
    # μ = 4, population variance ((2−4)² + (6−4)²)/2 = 4, σ = 2.
    np.testing.assert_allclose(whiten(x, mask), [[-1, 1, 0]], atol=1e-6)
    # The mean comes back: −1 + 4 and 1 + 4.
    np.testing.assert_allclose(
        whiten(x, mask, shift_mean=False), [[3, 5, 0]], atol=1e-6
    )
    # With n − 1 the variance is 8: ∓2/√8.
    unbiased = whiten(x, mask, unbiased=True)
    np.testing.assert_allclose(unbiased, [[-(2**-0.5), 2**-0.5, 0]], atol=1e-6)


def test_whiten_eight_numbers_by_hand():
    x = jnp.array([[-0.1, 0.2, 0, 1], [0.05, -0.3, 0.7, 0]])
    # Σx = 1.55, μ = 0.19375; Σx² = 0.01 + 0.04 + 1 + 0.0025 + 0.09 + 0.49 = 1.6325,
    # σ² = 1.6325/8 − 0.19375² = 0.1665234375, σ = 0.4080729;
    # (−0.1 − μ)/σ = −0.29375/0.4080729 = −0.719847.
    expected = [
        [-0.7198469661, 0.0153158929, -0.4747926797, 1.9757501834],
        [-0.3522655366, -1.2099555387, 1.2405873245, -0.4747926797],
    ]
    every = jnp.ones_like(x, bool)
    np.testing.assert_allclose(whiten(x, every), expected, atol=1e-6)
    kept = whiten(x, every, shift_mean=False)
    np.testing.assert_allclose(kept, np.array(expected) + 0.19375, atol=1e-6)


def test_whitening_a_constant_stays_finite():
    every = jnp.ones((1, 3), bool)
    np.testing.assert_allclose(whiten(jnp.full((1, 3), 5.0), every), 0, atol=1e-6)
    np.testing.assert_allclose(
        whiten(jnp.full((1, 1), 5.0), every[:, :1], unbiased=True), 0
    )


@pytest.mark.parametrize('garbage', GARBAGE)
def test_garbage_under_the_mask_changes_neither_value_nor_gradient(garbage):
    rng = np.random.default_rng(0)
    clean, mask = (
        rng.normal(size=(4, 6)).astype(np.float32),
        rng.uniform(size=(4, 6)) > 0.4,
    )
    dirty = np.where(mask, clean, garbage).astype(np.float32)
    functions = [
        masked_sum,
        masked_mean,
        lambda x, m: jnp.sum(jnp.square(whiten(x, m, shift_mean=False, unbiased=True))),
    ]
    for function in functions:
        value, gradient = jax.value_and_grad(function)(jnp.asarray(clean), mask)
        dirty_value, dirty_gradient = jax.value_and_grad(function)(
            jnp.asarray(dirty), mask
        )
        assert value == dirty_value
        np.testing.assert_array_equal(gradient, dirty_gradient)
        assert np.all(gradient[~mask] == 0)


def test_statistics_are_global_over_a_mapped_axis():
    """Four devices with unequal token counts give the numbers of one device."""
    rng = np.random.default_rng(1)
    x = rng.normal(2, 3, size=(4, 2, 5)).astype(np.float32)
    mask = np.arange(5) < rng.integers(1, 6, size=(4, 2))[..., None]
    mapped = jax.vmap(lambda a, m: masked_mean(a, m, axis_name='d'), axis_name='d')(
        x, mask
    )
    np.testing.assert_allclose(mapped, x[mask].mean(), rtol=1e-6)
    per_device = [x[i][mask[i]].mean() for i in range(4)]
    assert (
        abs(np.mean(per_device) - x[mask].mean()) > 1e-3
    )  # a mean of means would differ
    for unbiased in (False, True):

        def device(a, m, unbiased=unbiased):
            return whiten(a, m, unbiased=unbiased, axis_name='d')

        one = whiten(x.reshape(8, 5), mask.reshape(8, 5), unbiased=unbiased)
        many = jax.vmap(device, axis_name='d')(x, mask)
        np.testing.assert_allclose(many.reshape(8, 5), one, atol=1e-5)


def test_the_last_true_of_every_row():
    mask = jnp.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    assert last_index(mask).tolist() == [1, 3, 1, 0]
    x = jnp.arange(16.0).reshape(4, 4)
    assert at_last(x, mask).tolist() == [1, 7, 9, 12]


def test_rows_that_end_together():
    x = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
    mask = jnp.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
    turned = right_align(x, mask)
    expected = [[3, 4, 1, 2], [5, 6, 7, 8], [12, 9, 10, 11], [14, 15, 16, 13]]
    assert turned.tolist() == expected  # a row without any ends with its first
    turned = right_align(mask, mask)
    assert turned.astype(int).tolist() == [
        [0, 0, 1, 1],
        [0, 1, 0, 1],
        [0, 0, 0, 1],
        [0] * 4,
    ]
