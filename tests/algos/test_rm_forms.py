"""``rm_step`` on rankings, ratings and steps: by hand, against loops, invariances."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algos.rm import RMHParams, rm_loss, rm_step, text_scores
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.reward_losses import (
    bradley_terry,
    davidson,
    robust,
    squared,
    stepwise,
)
from rlhf_jax.sharding import ParallelConfig, compile_step, make_mesh
from rlhf_jax.types import JudgedBatch, TrainState
from tests import own_reward_loss

# Scores by last token: 0 → 0, 1 → 1, 2 → 2.5, 3 → −1.
PARAMS = {
    'table': jnp.array([0.0, 1.0, 2.5, -1.0]),
    'backbone': {'layers': {}},
}
P, K, H, T, V = 8, 4, 2, 7, 64


def _nls(x):
    return math.log1p(math.exp(-x))


def _ranking(last, ranks, weight=None):
    """Completions that end in the given tokens, behind which lies padding."""
    last = np.asarray(last)
    tokens = np.full((*last.shape, 3), 3, np.int32)
    tokens[..., 1] = last
    labels = np.asarray(ranks, np.float32)[..., None]
    return JudgedBatch(
        tokens=tokens,
        mask=np.broadcast_to([True, True, False], tokens.shape),
        labels=labels,
        judged=labels > 0,
        margin=np.zeros(len(last), np.float32),
        weight=np.asarray(weight or [1] * len(last), np.float32),
    )


def _loss(model, batch, loss=bradley_terry, loss_hp=None, params=PARAMS, **hp):
    hp = RMHParams(**hp)
    return rm_loss(params, batch, model=model, hp=hp, loss=loss, loss_hp=loss_hp)


def test_a_ranking_by_hand(token_scores):
    # Scores 2.5, 1, 0 in this order: differences 1.5, 2.5, 1, a third of weight each.
    total, weight, metrics = _loss(token_scores, _ranking([[2, 1, 0]], [[1, 2, 3]]))
    assert float(weight) == 1
    assert float(total) == pytest.approx(
        (_nls(1.5) + _nls(2.5) + _nls(1)) / 3, rel=1e-5
    )
    assert float(metrics['accuracy'].value()) == 1
    assert float(metrics['score_chosen'].value()) == pytest.approx(6 / 3)  # 2.5, 2.5, 1


def test_ties_and_absent_completions_by_hand(token_scores):
    # Scores 1 ~ 0 above −1; the fourth is not there. A tie costs half of both sides.
    batch = _ranking([[1, 0, 3, 2]], [[1, 1, 2, -1]])
    total, _, metrics = _loss(token_scores, batch)
    tie = (_nls(1) + _nls(-1)) / 2
    assert float(total) == pytest.approx((tie + _nls(2) + _nls(1)) / 3, rel=1e-5)
    assert float(metrics['accuracy'].weight) == pytest.approx(2 / 3)  # the tie is none
    total, _, _ = _loss(token_scores, batch, davidson)
    z = [1 + math.exp(-x) + 2 * math.exp(-x / 2) for x in (1, 2, 1)]
    by_hand = -math.log(2 * math.exp(-0.5) / z[0]) + math.log(z[1]) + math.log(z[2])
    assert float(total) == pytest.approx(by_hand / 3, rel=1e-5)


def test_a_ranking_of_ties_alone_has_no_accuracy(token_scores):
    total, weight, metrics = _loss(token_scores, _ranking([[1, 0]], [[1, 1]]))
    assert float(weight) == 1 and float(total) > math.log(2)
    assert math.isnan(float(metrics['accuracy'].value()))


def test_a_prompt_weighs_as_much_as_another_however_many_completions(token_scores):
    batch = _ranking([[2, 1, 0], [3, 0, 0]], [[1, 2, 3], [1, 2, -1]])
    total, weight, _ = _loss(token_scores, batch)
    first = (_nls(1.5) + _nls(2.5) + _nls(1)) / 3
    assert float(weight) == 2
    assert float(total) == pytest.approx(first + _nls(-1), rel=1e-5)


@pytest.mark.parametrize('loss', [bradley_terry, robust, davidson, own_reward_loss])
def test_a_pair_costs_the_same_either_way(
    reward_model, reward_params, pair_batch, loss
):
    """Value, gradient and metrics, with margins, weights and both penalties."""
    ranks = np.broadcast_to(np.array([[1], [2]], np.int32), (16, 2, 1))
    ranks = np.concatenate([ranks[:, ::-1], np.full((16, 1, 1), -1)], 1)
    fields = {name: getattr(pair_batch, name) for name in ('tokens', 'mask')}
    turned = JudgedBatch(  # the better one behind, and a third that is not there
        tokens=np.concatenate([x := fields['tokens'][:, ::-1], x[:, :1]], 1),
        mask=np.concatenate([x := fields['mask'][:, ::-1], x[:, :1]], 1),
        labels=ranks.astype(np.float32),
        judged=ranks > 0,
        margin=pair_batch.margin,
        weight=pair_batch.weight,
    )

    @jax.jit
    def value(params, batch):
        how = {'loss': loss, 'center_coef': 0.02, 'l2_coef': 0.1}
        return _loss(reward_model, batch, params=params, **how)

    def graded(batch):
        grad = jax.grad(lambda p: value(p, batch)[0])(reward_params)
        return jax.tree.leaves((value(reward_params, batch), grad))

    for a, b in zip(graded(pair_batch), graded(turned), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def _virtual(batch, place):
    """The batch with the virtual response in the place of a completion."""
    mask = np.array(batch.mask)
    mask[:, place] = False
    return batch.replace(mask=mask)


@pytest.mark.parametrize('token', [2, 3])  # what scores 2.5 or −1 where it is read
@pytest.mark.parametrize(
    ('harmful', 'ranks'),  # of w, l and the virtual response, which is the third
    [
        ((True, True), [1, 2, 3]),
        ((True, False), [1, 3, 2]),
        ((False, False), [2, 3, 1]),
    ],
)
def test_a_ranking_with_the_virtual_response_is_a_cost_model(
    token_scores, harmful, ranks, token
):
    for worse, better in ((2, 1), (1, 3), (3, 2), (0, 3)):
        batch = _virtual(_ranking([[worse, better, token]], [ranks]), 2)
        total, weight, metrics = _loss(token_scores, batch)
        costs = [float(PARAMS['table'][x]) for x in (worse, better)]
        # Dai et al. 2023, eq. 6: the order, and the sign of each.
        signs = sum(_nls(c if s else -c) for c, s in zip(costs, harmful))
        formula = _nls(costs[0] - costs[1]) + signs
        assert float(weight) == 1
        assert 3 * float(total) == pytest.approx(formula, rel=1e-5)
        # What is logged of pairs is of the two texts.
        assert float(metrics['accuracy'].value()) == (costs[0] > costs[1])
        assert float(metrics['score_gap'].value()) == pytest.approx(
            abs(costs[0] - costs[1])
        )


def test_penalties_leave_the_virtual_response_out(token_scores):
    # Scores 2.5 and 1: (2.5 + 1)² in one of three pairs, and (2.5² + 1²)/2.
    batch = _virtual(_ranking([[2, 1, 3]], [[1, 3, 2]]), 2)
    plain, _, _ = _loss(token_scores, batch)
    centred, _, _ = _loss(token_scores, batch, center_coef=0.3)
    small, _, _ = _loss(token_scores, batch, l2_coef=0.1)
    assert float(centred - plain) == pytest.approx(0.1 * 3.5**2, rel=1e-5)
    assert float(small - plain) == pytest.approx(0.1 * 7.25 / 2, rel=1e-5)


@pytest.mark.parametrize('attention', ['causal', 'bidirectional'])
def test_the_virtual_response_is_finite_and_has_no_gradient(config, attention):
    """Of a decoder and of an encoder, whatever stands in its tokens."""
    model = ScalarModel(dataclasses.replace(config, attention=attention))
    batch = _virtual(_random('rankings', heads=1), 1)

    @jax.jit
    def graded(tokens):
        changed = batch.replace(tokens=tokens)

        def total(p):
            return _loss(model, changed, params=p, l2_coef=0.1, center_coef=0.1)[0]

        tokens = batch.tokens[:1, 0]
        params = jax.jit(model.init)(jax.random.PRNGKey(0), tokens, tokens == 0)[
            'params'
        ]
        scores = text_scores(params, changed, model=model)
        return scores, jax.value_and_grad(total)(params)

    other = np.array(batch.tokens)
    other[:, 1] = 7
    for a, b in zip(*(jax.tree.leaves(graded(x)) for x in (batch.tokens, other))):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)
    scores, _ = graded(other)
    assert not np.asarray(scores[:, 1]).any() and np.asarray(scores[:, 0]).all()


def test_l2_is_the_mean_square_of_a_pair(token_scores):
    # safe-rlhf's 0.1·mean(2.5², 1²) = 0.3625
    batch = JudgedBatch(
        tokens=np.array([[[2], [1]]]),
        mask=np.ones((1, 2, 1), bool),
        margin=np.zeros(1, np.float32),
        weight=np.ones(1, np.float32),
    )
    plain, _, _ = _loss(token_scores, batch)
    total, _, metrics = _loss(token_scores, batch, l2_coef=0.1)
    assert float(total - plain) == pytest.approx(0.3625, rel=1e-5)
    assert float(metrics['loss'].value()) == pytest.approx(float(plain), rel=1e-6)


# ------------------------------------------------------------------- named heads, loops


@pytest.fixture(scope='module')
def headed(config):
    model = ScalarModel(config, ('helpful', 'safe'))
    tokens = np.zeros((1, 4), np.int32)
    params = jax.jit(model.init)(jax.random.PRNGKey(3), tokens, tokens == 0)['params']
    bias = jnp.array([0.3, -0.2])
    return model, {**params, 'head': {**params['head'], 'bias': bias}}


def _texts(rng, *shape):
    mask = np.arange(T) < rng.integers(2, T + 1, size=(*shape, 1))
    return rng.integers(0, V, size=mask.shape).astype(np.int32), mask


def _random(kind, heads=H):
    rng = np.random.default_rng(0)
    weight = np.ones(P, np.float32)
    weight[3] = 0
    if kind == 'rankings':
        tokens, mask = _texts(rng, P, K)
        ranks = rng.integers(1, 4, size=(P, K, heads)).astype(np.int32)
        ranks[rng.uniform(size=ranks.shape) < 0.3] = -1
        ranks[5, :, 0] = -1  # nobody looked at this
        margin = rng.uniform(0, 1, P).astype(np.float32)
        labels = ranks.astype(np.float32)
        return JudgedBatch(
            tokens=tokens,
            mask=mask,
            labels=labels,
            judged=labels > 0,
            margin=margin,
            weight=weight,
        )
    tokens, mask = _texts(rng, P)
    texts = {'tokens': tokens[:, None], 'mask': mask[:, None], 'weight': weight}
    if kind == 'ratings':
        rated = rng.uniform(size=(P, heads)) < 0.7
        ratings = np.where(rated, rng.normal(size=rated.shape), 0).astype(np.float32)
        return JudgedBatch(**texts, labels=ratings[:, None], judged=rated[:, None])
    step_mask = mask & (rng.uniform(size=mask.shape) < 0.4)
    right = rng.uniform(size=mask.shape) < 0.6
    labels = right.astype(np.float32)
    return JudgedBatch(**texts, labels=labels[:, None], judged=step_mask[:, None])


def _read(model, params, tokens, mask):
    """The scores of one text, at its last token, by itself."""
    length = int(mask.sum())
    values = _values(model, params, tokens[None, :length], mask[None, :length])
    return np.asarray(values[0, -1], np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _values(model, params, tokens, mask):
    return model.apply({'params': params}, tokens, mask)


def test_rankings_by_several_heads_against_a_loop(headed):
    model, params = headed
    batch = _random('rankings')
    total, weight, _ = _loss(model, batch, params=params, center_coef=0.05, l2_coef=0.2)
    expected = count = 0.0
    for p in range(P):
        scores = [
            _read(model, params, batch.tokens[p, k], batch.mask[p, k]) for k in range(K)
        ]
        for h in range(H):
            ranked = [k for k in range(K) if batch.judged[p, k, h]]
            pairs = [(a, b) for a in ranked for b in ranked if a < b]
            if not pairs:
                continue
            part = 0.0
            for a, b in pairs:
                ra, rb = batch.labels[p, a, h], batch.labels[p, b, h]
                gap = scores[a][h] - scores[b][h]
                if ra == rb:
                    part += (_nls(gap) + _nls(-gap)) / 2
                else:
                    part += _nls((gap if ra < rb else -gap) - batch.margin[p])
                part += 0.05 * (scores[a][h] + scores[b][h]) ** 2
            size = np.mean([scores[k][h] ** 2 for k in ranked])
            expected += batch.weight[p] * (part / len(pairs) + 0.2 * size)
            count += batch.weight[p]
    assert float(weight) == count
    assert float(total) == pytest.approx(expected, rel=1e-4)


def test_ratings_by_several_heads_against_a_loop(headed):
    model, params = headed
    batch = _random('ratings')
    total, weight, metrics = _loss(model, batch, squared, params=params, l2_coef=0.1)
    expected, errors = 0.0, []
    for b in range(P):
        scores = _read(model, params, batch.tokens[b, 0], batch.mask[b, 0])
        for h in range(H):
            if batch.judged[b, 0, h] and batch.weight[b]:
                gap = scores[h] - batch.labels[b, 0, h]
                expected += gap**2 + 0.1 * scores[h] ** 2
                errors.append(abs(gap))
    assert float(weight) == len(errors) > 5
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert float(metrics['error'].value()) == pytest.approx(np.mean(errors), rel=1e-4)


def test_steps_against_a_loop(reward_model, reward_params):
    batch = _random('steps')
    total, weight, metrics = _loss(reward_model, batch, stepwise, params=reward_params)
    losses, hits = [], []
    for b, t in zip(*np.nonzero(batch.judged[:, 0])):
        if batch.weight[b]:
            cut = batch.mask[b, 0] & (np.arange(T) <= t)  # later tokens are not seen
            score = float(_read(reward_model, reward_params, batch.tokens[b, 0], cut))
            right = batch.labels[b, 0, t] > 0
            losses.append(_nls(score if right else -score))
            hits.append((score > 0) == right)
    assert float(weight) == len(losses) > 5
    assert float(total) == pytest.approx(sum(losses), rel=1e-4)
    assert float(metrics['accuracy'].value()) == pytest.approx(np.mean(hits))


def test_one_head_by_name_is_the_plain_head(config, reward_model, reward_params):
    named = ScalarModel(config, ('only',))
    head = jax.tree.map(lambda x: x[..., None], reward_params['head'])
    tokens, mask = _texts(np.random.default_rng(0), 4)
    one = reward_model.apply({'params': reward_params}, tokens, mask)
    other = named.apply({'params': {**reward_params, 'head': head}}, tokens, mask)
    assert other.shape == (4, T, 1) and reward_params['head']['kernel'].ndim == 1
    np.testing.assert_allclose(other[..., 0], one, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------- invariances

KINDS = {'rankings': bradley_terry, 'ratings': squared, 'steps': stepwise}


def _case(kind, headed, reward_model, reward_params):
    if kind == 'steps':
        return reward_model, reward_params, _random(kind)
    return *headed, _random(kind)


@pytest.mark.parametrize('kind', KINDS)
def test_garbage_in_padding_changes_nothing(kind, headed, reward_model, reward_params):
    model, params, batch = _case(kind, headed, reward_model, reward_params)

    @jax.jit
    def graded(batch):
        def total(p):
            return _loss(model, batch, KINDS[kind], params=p, l2_coef=0.1)[0]

        return jax.value_and_grad(total)(params)

    dirty = {'tokens': np.where(batch.mask, batch.tokens, 10**6)}
    if kind == 'ratings':
        dirty['labels'] = np.where(batch.judged, batch.labels, np.nan)
    if kind == 'steps':
        dirty['labels'] = np.where(batch.judged, batch.labels, 1)
    pairs = zip(*map(jax.tree.leaves, (graded(batch), graded(batch.replace(**dirty)))))
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_microbatches_and_devices_change_nothing(
    kind, headed, reward_model, reward_params
):
    """One device, four microbatches, eight devices by jit and by pmap."""
    model, params, batch = _case(kind, headed, reward_model, reward_params)
    tx = optax.sgd(1.0)

    def after(parts, devices, backend):
        hp = RMHParams(num_microbatches=parts, l2_coef=0.05, center_coef=0.01)
        how = {'model': model, 'tx': tx, 'hp': hp, 'loss': KINDS[kind]}
        mesh = make_mesh(ParallelConfig(backend=backend), jax.devices()[:devices])
        step = functools.partial(rm_step, **how)
        step = compile_step(step, mesh=mesh, backend=backend)
        state = TrainState(
            step=jnp.int32(0),
            rng=jax.random.PRNGKey(0),
            params=jax.tree.map(jnp.array, params),
            opt_state=tx.init(params),
        )
        state, metrics = step(state, batch)
        values = {name: metric.value() for name, metric in metrics.items()}
        return jax.tree.leaves(jax.device_get((state.params, values)))

    one = after(1, 1, 'jit')
    moved = [np.abs(a - b).max() for a, b in zip(one, jax.tree.leaves(params))]
    assert max(moved) > 1e-3
    for other in ((4, 1, 'jit'), (1, 8, 'jit'), (1, 8, 'pmap')):
        for a, b in zip(one, after(*other), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
