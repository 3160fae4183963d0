"""The clipped losses, case by case, and the ways to sum tokens up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.masked import masked_mean
from rlhf_jax.ops.policy_loss import aggregate, clipped_policy_loss, clipped_value_loss


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
    for how, total, weight in [
        ('token_mean', 11, 4),
        ('sequence_mean', 7, 2),
        ('sequence_sum', 11, 2),
    ]:
        got = aggregate(loss, mask, how)
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
