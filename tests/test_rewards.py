"""Scores: where they are read, and what is done to them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.rewards import (
    ScoreHParams,
    combine_members,
    ensemble_scores,
    initial_moments,
    overlong_penalty,
    reward_model_scores,
    scale_scores,
    shape_scores,
    weighted_sum,
)

SCORES = jnp.array([0.25, 3.5, -7.0, 0.5])
ENDED = jnp.array([True, False, True, False])
LENGTHS = jnp.array([5, 7, 8, 10])


def test_the_weighted_sum_by_hand():
    scores = {'rm': SCORES, 'length': np.array([1, 2, 3, 4]), 'gold': np.full(4, 99)}
    total = weighted_sum(scores, {'length': -0.5, 'rm': 2.0})
    # 2 · 0.25 − ½, 2 · 3.5 − 1, −14 − 1.5, 1 − 2
    assert total.tolist() == [0.0, 6.0, -15.5, -1.0]
    assert total.dtype == jnp.float32


def _shaped(scores=SCORES, lengths=LENGTHS, **settings):
    hp = ScoreHParams(**settings)
    return shape_scores(scores, ENDED, lengths, hp=hp, max_length=10)


def test_nothing_switched_on_changes_nothing():
    assert _shaped().tolist() == SCORES.tolist()


def test_a_response_without_eos_is_rescored():
    # −0.5 and not the integer that the type of token ids would make of it.
    shaped = _shaped(missing_eos_score=-0.5)
    assert shaped.tolist() == [0.25, -0.5, -7.0, -0.5]
    assert shaped.dtype == jnp.float32


def test_a_response_without_eos_is_marked_down():
    assert _shaped(missing_eos_penalty=1.0).tolist() == [0.25, 2.5, -7.0, -0.5]


def test_the_clip_bounds_the_score_alone():
    assert _shaped(score_clip=3.0).tolist() == [0.25, 3.0, -3.0, 0.5]
    shaped = _shaped(score_clip=3.0, missing_eos_score=-10.0)
    assert shaped.tolist() == [0.25, -10.0, -3.0, -10.0]
    shaped = _shaped(score_clip=3.0, missing_eos_penalty=5.0)
    assert shaped.tolist() == [0.25, -2.0, -3.0, -4.5]


def test_long_responses_are_marked_down_behind_the_clip():
    """Lengths 5, 7, 8, 10 of 10 with a buffer of 4: 0, −¼, −½, −1."""
    shaped = _shaped(score_clip=3.0, overlong_buffer=4)
    assert shaped.tolist() == [0.25, 2.75, -3.5, -0.5]
    # A score that replaces replaces everything.
    shaped = _shaped(overlong_buffer=4, missing_eos_score=-1.0)
    assert shaped.tolist() == [0.25, -1.0, -7.5, -1.0]
    with pytest.raises(ValueError, match='buffer=11 tokens of max_length=10'):
        _shaped(overlong_buffer=11)


def test_zero_is_a_value_and_not_off():
    assert _shaped(missing_eos_score=0.0).tolist() == [0.25, 0, -7.0, 0]
    with pytest.raises(ValueError, match='score_clip=0.0: use above 0'):
        ScoreHParams(score_clip=0.0)  # every score would be the same


@pytest.mark.parametrize('kind', ['running', 'running_std'])
def test_scores_are_scaled_by_all_scores_so_far_by_hand(kind):
    """1, 3 have mean 2 and variance 1; 1, 3, 6, 6 have mean 4 and variance 4.5."""
    hp = ScoreHParams(score_scaling=kind)
    first, moments = scale_scores(jnp.array([1.0, 3.0]), initial_moments(hp), hp=hp)
    assert first.tolist() == ([-1.0, 1.0] if kind == 'running' else [1.0, 3.0])
    assert [float(x) for x in vars(moments).values()] == [2, 2, 2]
    second, moments = scale_scores(jnp.array([6.0, 6.0]), moments, hp=hp)
    expected = (6 - 4 * (kind == 'running')) / 4.5**0.5
    np.testing.assert_allclose(second, [expected] * 2, rtol=1e-6)
    assert [float(x) for x in vars(moments).values()] == [4, 4, 18]


def test_running_moments_are_those_of_everything():
    """Over batches of all sizes, far from 0, as NumPy has it; and over 8 devices."""
    rng = np.random.default_rng(0)
    batches = [rng.normal(50, 2, 8 * n).astype(np.float32) for n in (1, 4, 2, 8)]
    hp = ScoreHParams(score_scaling='running')
    scale = jax.jit(functools.partial(scale_scores, hp=hp))
    spread = jax.pmap(
        functools.partial(scale_scores, hp=hp, axis_name='i'),
        axis_name='i',
        in_axes=(0, None),
        out_axes=(0, None),
    )
    moments = parted = initial_moments(hp)
    for i, batch in enumerate(batches):
        scaled, moments = scale(batch, moments)
        parts, parted = spread(batch.reshape(8, -1), parted)
        seen = np.concatenate(batches[: i + 1])
        expected = (batch - seen.mean()) / seen.std()
        np.testing.assert_allclose(scaled, expected, atol=1e-4)
        np.testing.assert_allclose(parts.reshape(-1), scaled, atol=1e-5)
        assert float(moments.count) == float(parted.count) == len(seen)


@pytest.mark.parametrize('kind', ['running', 'running_std'])
def test_equal_scores_have_no_scale(kind):
    hp = ScoreHParams(score_scaling=kind)
    scores, _ = scale_scores(jnp.full(7, 0.1), initial_moments(hp), hp=hp)
    expected = 0.0 if kind == 'running' else 0.1
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_scaling_that_cannot_be():
    assert initial_moments(ScoreHParams()) is None
    assert scale_scores(SCORES, None, hp=ScoreHParams()) == (SCORES, None)
    hp = ScoreHParams(score_scaling='running')
    with pytest.raises(ValueError, match=r'score_moments=initial_moments\(hp\)'):
        scale_scores(SCORES, None, hp=hp)
    with pytest.raises(ValueError, match="score_scaling='std' is unknown"):
        ScoreHParams(score_scaling='std')
    with pytest.raises(ValueError, match='both set'):
        ScoreHParams(missing_eos_score=-1.0, missing_eos_penalty=1.0)


def test_the_score_is_read_at_the_last_real_token(token_scores):
    table = jnp.array([10.0, 20.0, 30.0, 40.0])
    params = {'table': table, 'backbone': {'layers': {}}}
    tokens = jnp.array([[0, 1, 2, 3], [3, 0, 1, 2], [2, 2, 1, 3]])
    mask = jnp.array([[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]], bool)
    scores = reward_model_scores(params, tokens, mask, model=token_scores)
    assert scores.tolist() == [30, 20, 40]


@pytest.mark.parametrize(('layers', 'unroll'), [(1, 1), (2, 2), (2, 1)])
def test_one_token_of_the_last_layer_is_enough(config, layers, unroll):
    """Values and gradients, beside those of the whole sequence; a row of holes too."""
    config = dataclasses.replace(config, num_layers=layers, scan_unroll=unroll)
    model = ScalarModel(config, heads=('one', 'two'))
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 64, (4, 9)).astype(np.int32)
    mask = np.arange(9) < np.array([9, 4, 6, 1])[:, None]
    mask[2] = [0, 0, 1, 0, 1, 1, 0, 1, 0]
    params = jax.jit(model.init)(jax.random.PRNGKey(0), tokens, mask)['params']

    def whole(params):
        values = model.apply({'params': params}, tokens, mask)
        return jnp.stack([values[i, k] for i, k in enumerate((8, 3, 7, 0))])

    def ours(params):
        return reward_model_scores(params, tokens, mask, model=model)

    def value_and_grad(scores):
        def total(params):
            out = scores(params)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    ((_, values), expected), ((_, scores), found) = map(value_and_grad, (whole, ours))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(values, scores, atol=1e-5)


@pytest.mark.parametrize('garbage', [0, 63, -1, 10**6])
def test_a_score_does_not_depend_on_the_side_of_the_padding(
    reward_model, reward_params, garbage
):
    rng = np.random.default_rng(0)
    lengths = [3, 9, 6, 1]
    texts = [rng.integers(0, 64, size=n) for n in lengths]
    score = jax.jit(
        lambda t, m: reward_model_scores(reward_params, t, m, model=reward_model)
    )

    def padded(side):
        tokens, mask = np.full((4, 10), garbage, np.int32), np.zeros((4, 10), bool)
        for i, text in enumerate(texts):
            place = {
                'right': 0,
                'left': 10 - len(text),
                'middle': (10 - len(text)) // 2,
            }[side]
            tokens[i, place : place + len(text)] = text
            mask[i, place : place + len(text)] = True
        return score(tokens, mask)

    right = padded('right')
    assert float(jnp.std(right)) > 0.1
    np.testing.assert_allclose(padded('left'), right, atol=1e-5)
    np.testing.assert_allclose(padded('middle'), right, atol=1e-5)


@pytest.mark.parametrize(
    ('combine', 'expected'),
    # Means 3 and 2, variances (4 + 1 + 9)/3 and 0, λ = 0.3.
    [('mean', [3, 2]), ('worst', [1, 2]), ('uncertainty', [3 - 0.3 * 14 / 3, 2])],
)
def test_the_scores_of_members_become_one(combine, expected):
    scores = jnp.array([[1.0, 2, 6], [2, 2, 2]])
    together, deviation = combine_members(scores, combine, 0.3)
    np.testing.assert_allclose(together, expected, rtol=1e-6)
    np.testing.assert_allclose(deviation, [(14 / 3) ** 0.5, 0], rtol=1e-6)
    moved, same = combine_members(scores + 7, combine, 0.3)
    np.testing.assert_allclose(moved, together + 7, rtol=1e-5)
    np.testing.assert_allclose(same, deviation, rtol=1e-5)


@pytest.mark.parametrize('combine', ['mean', 'worst', 'uncertainty'])
@pytest.mark.parametrize('broken', [np.nan, -np.inf])
def test_a_member_that_broke_is_not_hidden(combine, broken):
    """The run stops at the metric: a minimum of the others would go on."""
    scores = jnp.array([[1.0, broken, 6], [2, 2, 2]])
    together, deviation = combine_members(scores, combine, 0.1)
    assert not np.isfinite(together[0]) and not np.isfinite(deviation[0])
    assert float(together[1]) == 2


def test_ways_to_combine_are_checked():
    with pytest.raises(ValueError, match="combine='max' is unknown; use 'mean'"):
        combine_members(jnp.ones((2, 3)), 'max', 0.1)
    with pytest.raises(ValueError, match='there is 1; use .* at least 2'):
        combine_members(jnp.ones((2, 1)), 'uncertainty', 0.1)


def test_members_score_as_they_would_alone(reward_model):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, size=(4, 7)).astype(np.int32)
    mask = np.arange(7) < np.array([[7], [3], [5], [1]])
    keys = jax.random.split(jax.random.PRNGKey(5), 3)
    members = [jax.jit(reward_model.init)(key, tokens, mask)['params'] for key in keys]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    scores = ensemble_scores(stacked, tokens, mask, model=reward_model)
    assert scores.shape == (4, 3)
    for m, params in enumerate(members):
        alone = reward_model_scores(params, tokens, mask, model=reward_model)
        np.testing.assert_allclose(scores[:, m], alone, atol=1e-5)


def test_the_overlong_penalty_by_hand():
    """L_max 10, buffer 4: free up to 6 tokens, a quarter for each one more."""
    lengths = jnp.array([0, 5, 6, 7, 8, 10, 11, 50])
    got = overlong_penalty(lengths, max_length=10, buffer=4)
    assert got.tolist() == [0, 0, 0, -0.25, -0.5, -1, -1, -1]
    assert got.dtype == jnp.float32
    for buffer in (0, 11):
        with pytest.raises(
            ValueError, match=f'buffer={buffer} tokens of max_length=10'
        ):
            overlong_penalty(lengths, max_length=10, buffer=buffer)
