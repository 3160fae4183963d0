"""The clipped losses, case by case, and the ways to sum tokens up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.masked import masked_mean
from rlhf_jax.ops.policy_loss import (
    aggregate,
    at_level,
    cispo_policy_loss,
    clipped_policy_loss,
    clipped_value_loss,
)


@pytest.mark.parametrize(
    'ratio, advantage, loss, clipped, moves',
    [
        (1.0, 2.0, -2.0, False, True),  # the ratio of a first minibatch: −A
        (1.1, 2.0, -2.2, False, True),  # inside the clip: −A·ρ
        (
            1.5,
            2.0,
            -2.4,
            True,
            False,
        ),  # a good token, raised too far: −2·1.2, no gradient
        (0.5, 2.0, -1.0, False, True),  # a good token, lowered: always pulled back
        (1.5, -2.0, 3.0, False, True),  # a bad token, raised: always pushed back
        (
            0.5,
            -2.0,
            1.6,
            True,
            False,
        ),  # a bad token, lowered too far: 2·0.8, no gradient
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, clipped, moves):
    def total(logprob):
        return clipped_policy_loss(
            logprob, jnp.float32(-1), jnp.float32(advantage), clip_eps=0.2
        )

    logprob = jnp.float32(np.log(ratio) - 1)
    got, got_ratio, got_clipped = total(logprob)
    assert float(got) == pytest.approx(loss, abs=1e-5)
    assert float(got_ratio) == pytest.approx(ratio, rel=1e-5)
    assert bool(got_clipped) is clipped
    # dL/d log π = −A·ρ where the unclipped term counts, 0 where it does not.
    gradient = float(jax.grad(lambda x: total(x)[0])(logprob))
    assert gradient == pytest.approx(-advantage * ratio if moves else 0.0, abs=1e-5)


def test_dual_clip_bounds_the_loss_of_a_bad_token():
    def loss(ratio, advantage, dual_clip):
        logprob = jnp.float32(np.log(ratio))
        result = clipped_policy_loss(
            logprob,
            jnp.float32(0),
            jnp.float32(advantage),
            clip_eps=0.2,
            dual_clip=dual_clip,
        )
        return float(result[0])

    assert loss(5.0, -1.0, None) == pytest.approx(5)
    assert loss(5.0, -1.0, 3.0) == pytest.approx(3)  # min(5, 1·3)
    assert loss(2.0, -1.0, 3.0) == pytest.approx(2)  # below the bound: as before
    assert loss(5.0, 1.0, 3.0) == pytest.approx(-1.2)  # a good token never meets it


@pytest.mark.parametrize(
    'bounds, ratio, advantage, loss, clipped',
    [
        ((0.2, 0.28), 1.25, 1.0, -1.25, False),  # above 1.2, below 1.28
        ((0.2, 0.28), 1.5, 1.0, -1.28, True),
        ((0.2, 0.28), 0.5, -1.0, 0.8, True),  # the lower bound is its own
        ((0.2, None), 9.0, 1.0, -9.0, False),
        ((None, 0.28), 0.1, -1.0, 0.1, False),
        ((None, None), 9.0, 1.0, -9.0, False),
    ],
)
def test_two_bounds(bounds, ratio, advantage, loss, clipped):
    got, _, was_clipped = clipped_policy_loss(
        jnp.log(ratio), jnp.float32(0), jnp.float32(advantage), clip_eps=bounds
    )
    assert float(got) == pytest.approx(loss, rel=1e-5)
    assert bool(was_clipped) is clipped


@pytest.mark.parametrize(
    'bounds, ratio, weight',
    [
        ((None, 0.5), 1.2, 1.2),
        ((None, 0.5), 3.0, 1.5),  # held at 1.5, and still trained
        ((None, 0.5), 0.01, 0.01),
        ((0.2, 0.5), 0.01, 0.8),
        (0.2, 3.0, 1.2),
    ],
)
@pytest.mark.parametrize('advantage', [2.0, -0.5])
def test_cispo_by_hand(bounds, ratio, weight, advantage):
    """L = −w·A·log π with w held fixed: dL/d log π = −w·A on both sides of the clip."""
    logprob = jnp.float32(-1.0)

    def total(x):
        old = logprob - jnp.log(ratio)
        return cispo_policy_loss(x, old, jnp.float32(advantage), clip_eps=bounds)

    loss, got_ratio, clipped = total(logprob)
    assert float(got_ratio) == pytest.approx(ratio, rel=1e-5)
    assert float(loss) == pytest.approx(weight * advantage, rel=1e-5)  # log π = −1
    assert bool(clipped) is (weight != ratio)
    gradient = float(jax.grad(lambda x: total(x)[0])(logprob))
    assert gradient == pytest.approx(-weight * advantage, rel=1e-5)


def test_the_ratio_of_a_sequence_by_hand():
    logprobs = jnp.array([[0, -1.0, -2.0, 0], [0, -0.5, 0, 0], [0.0] * 4])
    old = jnp.array([[9, -1.5, -1.7, 9], [9, -0.9, 9, 9], [9.0] * 4])
    mask = jnp.array([[0, 1, 1, 0], [0, 1, 0, 0], [0] * 4], bool)
    assert at_level(logprobs, old, mask, 'token') is logprobs
    got = at_level(logprobs, old, mask, 'sequence')
    # Row 1: (0.5 − 0.3)/2 = 0.1 above old at both tokens; row 2: 0.4.
    expected = [[0, -1.4, -1.6, 0], [0, -0.5, 0, 0], [0] * 4]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    # The mean of the tokens' ratios has the gradient s·(1/|y|) for every token.
    gradient = jax.grad(
        lambda x: jnp.sum(
            jnp.where(mask, jnp.exp(at_level(x, old, mask, 'sequence') - old), 0)[0] / 2
        )
    )(logprobs)
    np.testing.assert_allclose(gradient[0], [0, *[np.exp(0.1) / 2] * 2, 0], atol=1e-6)
    with pytest.raises(ValueError, match="'word' is unknown; use 'token' or"):
        at_level(logprobs, old, mask, 'word')


def test_an_absurd_ratio_stays_finite():
    def total(logprob):
        return clipped_policy_loss(
            logprob, jnp.float32(-500), jnp.float32(-1), clip_eps=0.2
        )[0]

    assert np.isfinite(float(total(jnp.float32(0))))
    assert np.isfinite(float(jax.grad(total)(jnp.float32(0))))


def test_seven_tokens_by_hand():
    logprobs = jnp.array([[-1, -0.5, -2, -0.1], [-0.7, -1.2, -0.3, -0.9]])
    old = jnp.array([[-1.2, -0.45, -1.7, -0.1], [-0.9, -1, -0.35, -0.9]])
    advantages = jnp.array([[1, -0.5, 2, -1.5], [0.3, -1, 0.8, 0]])
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
    loss, _, clipped = clipped_policy_loss(logprobs, old, advantages, clip_eps=0.2)
    # ρ = e^.2, e^−.05, e^−.3, 1 | e^.2, e^−.2, e^.05. Clipped: both e^.2 = 1.2214.
    expected = [[-1.2, 0.475615, -1.481636, 1.5], [-0.36, 0.818731, -0.841017, 0]]
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    total, weight = aggregate(loss, mask, 'token_mean')
    # −1.088308 / 7
    assert float(total / weight) == pytest.approx(-0.1554725504, abs=1e-6)
    assert float(masked_mean(clipped, mask)) == pytest.approx(2 / 7, abs=1e-6)


@pytest.mark.parametrize(
    'value, target, loss, clipped',
    [
        (0.1, 1.0, 0.405, False),  # moved less than ε from 0: ½·0.9²
        (0.5, 1.0, 0.32, True),  # moved too far towards the target: held at 0.2, ½·0.8²
        (-0.5, 1.0, 1.125, False),  # moved away: the plain error is larger, ½·1.5²
    ],
)
def test_value_loss_by_hand(value, target, loss, clipped):
    got, got_clipped = clipped_value_loss(
        jnp.float32(value), jnp.float32(0), jnp.float32(target), clip_eps=0.2
    )
    assert float(got) == pytest.approx(loss, abs=1e-6)
    assert bool(got_clipped) is clipped
    plain, never = clipped_value_loss(
        jnp.float32(value), jnp.float32(0), jnp.float32(target), clip_eps=None
    )
    assert float(plain) == pytest.approx((value - target) ** 2 / 2, abs=1e-6)
    assert not bool(never)


def test_aggregations_by_hand():
    loss = jnp.array(
        [[1.0, 2.0, 3.0, np.nan], [5.0, np.nan, np.nan, np.nan], [np.nan] * 4]
    )
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    # Four tokens summing to 11; rows with means 2 and 5, sums 6 and 5; one is empty.
    for how, length, total, weight in [
        ('token_mean', None, 11, 4),
        ('sequence_mean', None, 7, 2),
        ('sequence_sum', None, 11, 2),
        ('fixed_length', 10, 11, 20),
    ]:
        got = aggregate(loss, mask, how, length)
        assert [float(x) for x in got] == [total, weight], how


@pytest.mark.parametrize('how', ['token_mean', 'sequence_mean', 'sequence_sum'])
def test_sums_and_weights_add_up_over_parts(how):
    """Rows of very different lengths: a mean of the parts' means would be wrong."""
    rng = np.random.default_rng(0)
    loss = rng.normal(size=(4, 6)).astype(np.float32)
    mask = np.arange(6) < np.array([1, 6, 2, 5])[:, None]
    total, weight = aggregate(loss, mask, how)
    parts = [aggregate(loss[i : i + 2], mask[i : i + 2], how) for i in (0, 2)]
    np.testing.assert_allclose(sum(part[0] for part in parts), total, rtol=1e-6)
    np.testing.assert_allclose(sum(part[1] for part in parts), weight)


@pytest.mark.parametrize('how', ['token_mean', 'sequence_mean', 'sequence_sum'])
def test_garbage_under_the_mask_changes_nothing(how):
    rng = np.random.default_rng(1)
    mask = np.arange(6) < np.array([1, 6, 2, 5])[:, None]
    logprobs, old, advantages = rng.normal(size=(3, 4, 6)).astype(np.float32)

    def total(logprobs, old, advantages):
        # As the caller does: masked before exp, so that no gradient of a NaN exists.
        logprobs = jnp.where(mask, logprobs, 0)
        loss, _, _ = clipped_policy_loss(logprobs, old, advantages, clip_eps=0.2)
        return aggregate(loss, mask, how)[0]

    clean, gradient = jax.value_and_grad(total)(logprobs, old, advantages)
    dirty = [np.where(mask, x, np.nan) for x in (logprobs, old, advantages)]
    dirty_value, dirty_gradient = jax.value_and_grad(total)(*dirty)
    assert clean == dirty_value
    np.testing.assert_array_equal(gradient, dirty_gradient)


def test_an_unknown_aggregation_names_the_known_ones():
    with pytest.raises(ValueError, match="'mean' is unknown; use 'token_mean'"):
        aggregate(jnp.zeros((1, 1)), jnp.ones((1, 1), bool), 'mean')


@pytest.mark.parametrize('how, length', [('fixed_length', None), ('token_mean', 8)])
def test_a_length_belongs_to_one_aggregation(how, length):
    with pytest.raises(ValueError, match=f'{how!r} with length={length}'):
        aggregate(jnp.zeros((1, 1)), jnp.ones((1, 1), bool), how, length)
