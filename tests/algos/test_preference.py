"""``preference_step``: log-probabilities, metrics, weights, errors, and that it is the
same over microbatches and devices.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algos.preference import (
    PreferenceHParams,
    batch_context,
    batch_logps,
    preference_loss,
    preference_step,
    reference_logps,
)
from rlhf_jax.preference import (
    aot,
    bco,
    cpo,
    dpo,
    ipo,
    kto,
    ld_dpo,
    orpo,
    tdpo,
    wants_tokens,
)
from rlhf_jax.sharding import ParallelConfig, compile_step, make_mesh, place
from rlhf_jax.types import (
    JudgedBatch,
    TokenBatch,
    TrainState,
)

VOCABULARY, ROWS, LENGTH = 7, 16, 9


def _table(seed):
    return {
        'table': jnp.asarray(
            np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY)),
            jnp.float32,
        )
    }


PARAMS, REF = _table(0), _table(1)


def _texts(rng, *shape):
    """Right-padded texts: a prompt of 2 tokens, a response of 1 to 7."""
    place = np.arange(LENGTH)
    ends = rng.integers(3, LENGTH + 1, size=(*shape, 1))
    mask = place < ends
    tokens = rng.integers(0, VOCABULARY, size=mask.shape).astype(np.int32)
    return tokens, mask, mask & (place >= 2)


def _pairs(bigram, with_reference=True):
    rng = np.random.default_rng(2)
    tokens, mask, response = _texts(rng, ROWS, 2)
    weight = np.ones(ROWS, np.float32)
    weight[[3, 8, 9]] = 0
    batch = JudgedBatch(tokens=tokens, mask=mask, response_mask=response, weight=weight)
    return _referenced(batch, bigram) if with_reference else batch


def _unpaired(bigram):
    rng = np.random.default_rng(3)
    tokens, mask, response = (x[:, None] for x in _texts(rng, ROWS))
    other = TokenBatch(**dict(zip(('tokens', 'mask', 'loss_mask'), _texts(rng, ROWS))))
    weight = np.ones(ROWS, np.float32)
    weight[[0, 5]] = 0
    batch = JudgedBatch(
        tokens=tokens,
        mask=mask,
        response_mask=response,
        labels=(rng.uniform(size=(ROWS, 1, 1)) < 0.5).astype(np.float32),
        weight=weight,
        mismatched=other,
    )
    return _referenced(batch, bigram)


def _referenced(batch, model):
    fields = reference_logps(REF, batch, model=model)
    return batch.replace(**jax.tree.map(np.asarray, fields))


def _batch(loss, bigram):
    return _pairs(bigram) if loss.DATA == 'pairs' else _unpaired(bigram)


def _ref(loss):
    """What a step is given behind the batch."""
    return (REF,) if wants_tokens(loss) else ()


def _slow_logps(params, tokens, mask, upto=10**6):
    """Log-probabilities of the response of one text, token by token."""
    table = np.asarray(params['table'], np.float64)
    total, count = 0.0, 0
    for t in range(2, int(mask.sum())):
        row = table[tokens[t - 1]]
        if count < upto:
            total += row[tokens[t]] - np.log(np.exp(row).sum())
        count += 1
    return total, count


# -------------------------------------------------------------------- log-probabilities


def test_sums_of_pairs_against_a_loop(bigram):
    batch = _pairs(bigram)
    got = batch_logps(PARAMS, batch, model=bigram)
    for p in np.flatnonzero(batch.weight):
        lengths = batch.response_mask[p].sum(-1)
        for side in range(2):
            text = batch.tokens[p, side], batch.mask[p, side]
            total, count = _slow_logps(PARAMS, *text)
            shared, _ = _slow_logps(PARAMS, *text, upto=lengths.min())
            ref, _ = _slow_logps(REF, *text)
            assert got.lengths[p, side] == count == lengths[side]
            np.testing.assert_allclose(got.logps[p, side], total, rtol=1e-5)
            np.testing.assert_allclose(got.shared_logps[p, side], shared, rtol=1e-5)
            np.testing.assert_allclose(got.ref_logps[p, side], ref, rtol=1e-5)
    assert np.any(got.shared_logps != got.logps)


def test_tokens_of_pairs_against_a_loop(bigram):
    """Log-probabilities of both policies, and their KL over the vocabulary."""
    batch = _pairs(bigram, with_reference=False)
    got = batch_logps(PARAMS, batch, REF, model=bigram, tokens=True)
    mine, ref = (np.asarray(p['table'], np.float64) for p in (PARAMS, REF))
    mine, ref = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (mine, ref))
    for p, side in np.ndindex(ROWS, 2):
        tokens, seen = (
            batch.tokens[p, side],
            jax.tree.map(lambda x, p=p, side=side: np.asarray(x[p, side]), got.tokens),
        )
        if not batch.weight[p]:
            assert not seen.mask.any() and not seen.kl.any() and not seen.logps.any()
            continue
        np.testing.assert_array_equal(seen.mask, batch.response_mask[p, side])
        for t in range(LENGTH):
            before, token = tokens[t - 1], tokens[t]
            here = float(seen.mask[t])
            kl = (np.exp(ref[before]) * (ref[before] - mine[before])).sum()
            np.testing.assert_allclose(seen.kl[t], here * kl, atol=1e-5)
            want = here * mine[before, token], here * ref[before, token]
            np.testing.assert_allclose(seen.logps[t], want[0], atol=1e-5)
            np.testing.assert_allclose(seen.ref_logps[t], want[1], atol=1e-5)
    known = batch_logps(PARAMS, _referenced(batch, bigram), model=bigram)
    for name in ('logps', 'shared_logps', 'ref_logps', 'ref_shared_logps', 'lengths'):
        np.testing.assert_allclose(
            getattr(got, name), getattr(known, name), rtol=1e-5, err_msg=name
        )


def test_tokens_without_a_reference_and_of_unpaired(bigram):
    batch = _unpaired(bigram)
    got = batch_logps(PARAMS, batch, model=bigram, tokens=True)
    assert got.tokens.kl is None and got.tokens.ref_logps is None
    assert got.tokens.logps.shape == (ROWS, LENGTH)
    real = batch.weight > 0
    np.testing.assert_allclose(
        got.tokens.logps.sum(-1)[real], got.logps[real], rtol=1e-5
    )


def test_sums_of_unpaired_responses_against_a_loop(bigram):
    batch = _unpaired(bigram)
    got = batch_logps(PARAMS, batch, model=bigram)
    for p in np.flatnonzero(batch.weight):
        total, count = _slow_logps(PARAMS, batch.tokens[p, 0], batch.mask[p, 0])
        other, _ = _slow_logps(
            PARAMS, batch.mismatched.tokens[p], batch.mismatched.mask[p]
        )
        assert got.lengths[p] == count
        np.testing.assert_allclose(got.logps[p], total, rtol=1e-5)
        np.testing.assert_allclose(got.mismatched_logps[p], other, rtol=1e-5)


def test_left_padding_changes_nothing(bigram):
    batch = _pairs(bigram)
    order = np.argsort(batch.mask, axis=-1, kind='stable')
    left = batch.replace(
        **{
            name: np.take_along_axis(getattr(batch, name), order, -1)
            for name in ('tokens', 'mask', 'response_mask')
        }
    )
    one, other = (batch_logps(PARAMS, b, model=bigram) for b in (batch, left))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_response_without_anything_before_it_starts_at_its_second_token(bigram):
    batch = _pairs(bigram)
    whole = batch.replace(response_mask=batch.mask)
    got = batch_logps(PARAMS, whole, model=bigram)
    np.testing.assert_array_equal(got.lengths, batch.mask.sum(-1) - 1)


@pytest.mark.parametrize('kind', ['pairs', 'unpaired'])
def test_the_last_layer_for_responses_alone_changes_nothing(
    bigram, unrolled, policy_params, kind
):
    batch = _pairs(bigram) if kind == 'pairs' else _unpaired(bigram)
    whole, part = (
        jax.jit(functools.partial(reference_logps, model=unrolled))(policy_params, b)
        for b in (batch, batch.replace(response_length=LENGTH - 2))
    )
    assert len(whole) == 2 and all(np.all(x < 0) for x in whole.values())
    for name, values in whole.items():
        np.testing.assert_allclose(part[name], values, rtol=1e-5)
    loss = dpo if kind == 'pairs' else kto
    how = {'model': unrolled, 'loss': loss, 'loss_hp': loss.HParams()}

    def total(params, batch):
        context = batch_context(params, batch, **how)
        return preference_loss(params, batch, context, **how)[0]

    gradient = jax.jit(jax.grad(total))
    one, other = (
        gradient(policy_params, batch.replace(response_length=length))
        for length in (None, LENGTH - 2)
    )
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(one)) > 1e-2
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, atol=1e-5)


# --------------------------------------------------------------------------------- loss


def test_loss_and_metrics_of_pairs_by_hand(bigram):
    batch = _pairs(bigram)
    hp = dpo.HParams(beta=0.5)
    total, weight, metrics = preference_loss(
        PARAMS, batch, {}, model=bigram, loss=dpo, loss_hp=hp
    )
    logps = np.array([
        [_slow_logps(PARAMS, t, m)[0] for t, m in zip(*row)]
        for row in zip(batch.tokens, batch.mask)
    ])  # fmt: skip
    real = batch.weight > 0
    rewards = (0.5 * (logps - batch.ref_logps))[real]
    margins = rewards[:, 0] - rewards[:, 1]
    losses = np.log1p(np.exp(-margins))
    assert float(weight) == 13
    assert float(total) == pytest.approx(losses.sum(), rel=1e-5)
    want = {
        'loss': losses.mean(),
        'rewards/chosen': rewards[:, 0].mean(),
        'rewards/rejected': rewards[:, 1].mean(),
        'rewards/margins': margins.mean(),
        'rewards/accuracies': (margins > 0).mean(),
        'logps/chosen': logps[real, 0].mean(),
        'logps/rejected': logps[real, 1].mean(),
    }
    assert {k: float(m.value()) for k, m in metrics.items()} == pytest.approx(
        want, rel=1e-5
    )
    assert 0 < want['rewards/accuracies'] < 1


def test_metrics_of_unpaired_responses_by_hand(bigram):
    batch = _unpaired(bigram)
    hp = kto.HParams(beta=0.5)
    how = {'model': bigram, 'loss': kto, 'loss_hp': hp}
    context = batch_context(PARAMS, batch, **how)
    _, weight, metrics = preference_loss(PARAMS, batch, context, **how)
    texts = zip(batch.tokens[:, 0], batch.mask[:, 0])
    logps = np.array([_slow_logps(PARAMS, *text)[0] for text in texts])
    rewards = 0.5 * (logps - batch.ref_logps[:, 0])
    other = batch.mismatched
    ratios = [
        _slow_logps(PARAMS, *text)[0] - _slow_logps(REF, *text)[0]
        for text in zip(other.tokens, other.mask)
    ]
    kl = max(0, np.mean(np.array(ratios)[batch.weight > 0]))
    value = {k: float(m.value()) for k, m in metrics.items()}
    good = batch.desirable & (batch.weight > 0)
    bad = ~batch.desirable & (batch.weight > 0)
    assert float(weight) == 14 and kl > 0
    assert value['kl'] == pytest.approx(kl, rel=1e-4)
    assert value['rewards/chosen'] == pytest.approx(rewards[good].mean(), rel=1e-5)
    assert value['rewards/rejected'] == pytest.approx(rewards[bad].mean(), rel=1e-5)
    assert value['logps/chosen'] == pytest.approx(logps[good].mean(), rel=1e-5)
    assert value['logps/rejected'] == pytest.approx(logps[bad].mean(), rel=1e-5)


@pytest.mark.parametrize('loss', [dpo, orpo, cpo, ipo, aot, kto, bco, tdpo])
def test_filling_rows_count_nothing_whatever_they_hold(loss, bigram):
    """Not even without a token, where an odds ratio is infinite, or with a NaN."""
    batch = _batch(loss, bigram)
    filling = batch.weight == 0
    rows = filling.reshape(-1, *(1,) * (batch.mask.ndim - 1))
    empty = batch.replace(
        tokens=np.where(rows, 0, batch.tokens),
        mask=batch.mask & ~rows,
        response_mask=batch.response_mask & ~rows,
        ref_logps=np.where(filling.reshape(rows.shape[:-1]), np.nan, batch.ref_logps),
    )
    how = {'model': bigram, 'loss': loss, 'loss_hp': loss.HParams()}
    ref = _ref(loss)

    def run(batch):
        context = batch_context(PARAMS, batch, *ref, **how)
        return jax.value_and_grad(
            lambda p: preference_loss(p, batch, context, *ref, **how)[0]
        )(PARAMS)

    for a, b in zip(jax.tree.leaves(run(batch)), jax.tree.leaves(run(empty))):
        assert np.isfinite(a).all() and np.any(a)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_no_gradient_passes_through_a_context(bigram):
    """The KL of KTO is a constant: moving it would pay where nothing is learnt."""
    batch = _unpaired(bigram)
    how = {'model': bigram, 'loss': kto, 'loss_hp': kto.HParams()}
    gradient = jax.grad(
        lambda p: jnp.sum(batch_context(p, batch, **how)['kl'])
    )(PARAMS)  # fmt: skip
    np.testing.assert_array_equal(gradient['table'], 0)


# --------------------------------------------------------------------------------- step


def _state(tx, params=PARAMS):
    params = jax.tree.map(jnp.array, params)
    return TrainState(
        step=jnp.int32(0),
        rng=jax.random.PRNGKey(0),
        params=params,
        opt_state=tx.init(params),
    )


def _step(loss, model, tx, parts=1):
    return functools.partial(
        preference_step,
        model=model,
        tx=tx,
        hp=PreferenceHParams(num_microbatches=parts),
        loss=loss,
        loss_hp=loss.HParams(),
    )


def _results(state, metrics):
    return state.params, {name: metric.value() for name, metric in metrics.items()}


@pytest.mark.parametrize('loss', [dpo, ld_dpo, aot, kto, bco, tdpo])
def test_accumulation_equals_the_full_batch(loss, bigram):
    """Also where a row's loss depends on the others: ranks, a KL, a mean reward."""
    tx, batch = optax.sgd(1.0), _batch(loss, bigram)
    rest = batch, *_ref(loss)
    whole = _results(*_step(loss, bigram, tx)(_state(tx), *rest))
    parts = _results(*_step(loss, bigram, tx, parts=4)(_state(tx), *rest))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert np.abs(whole[0]['table'] - PARAMS['table']).max() > 1e-3


@pytest.mark.parametrize('backend', ['jit', 'pmap'])
@pytest.mark.parametrize('loss', [dpo, aot, kto, tdpo])
def test_eight_devices_equal_one(loss, backend, bigram):
    tx, batch = optax.sgd(1.0), _batch(loss, bigram)
    one = _results(*_step(loss, bigram, tx)(_state(tx), batch, *_ref(loss)))
    mesh = make_mesh(ParallelConfig(backend=backend))
    assert mesh.size == 8
    step = compile_step(
        _step(loss, bigram, tx, parts=2),
        mesh=mesh,
        backend=backend,
        inputs=('params', 'batch') + ('params',) * len(_ref(loss)),
    )
    many = _results(*step(place(_state(tx), mesh, 'params'), batch, *_ref(loss)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_dpo_starts_at_log_two_and_learns(bigram):
    batch, tx = _pairs(bigram, with_reference=False), optax.adam(0.1)
    batch = batch.replace(**reference_logps(PARAMS, batch, model=bigram))
    step, state, seen = jax.jit(_step(dpo, bigram, tx)), _state(tx), []
    for _ in range(30):
        state, metrics = step(state, batch)
        seen.append({name: float(m.value()) for name, m in metrics.items()})
    assert seen[0]['loss'] == pytest.approx(np.log(2), rel=1e-6)
    assert seen[-1]['rewards/accuracies'] == 1
    assert seen[-1]['loss'] < 0.5 and seen[-1]['rewards/margins'] > 0.5
    assert int(state.step) == 30 and step._cache_size() == 1


def test_a_step_takes_the_reference_policy_or_its_sums(bigram):
    tx, batch = optax.sgd(1.0), _pairs(bigram, with_reference=False)
    given = _step(dpo, bigram, tx)(_state(tx), batch, REF)
    known = _step(dpo, bigram, tx)(_state(tx), _referenced(batch, bigram))
    for a, b in zip(
        jax.tree.leaves(_results(*given)), jax.tree.leaves(_results(*known))
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_tdpo_starts_at_log_two_and_holds_the_kl_of_the_rejected_down(bigram):
    """After as many steps as DPO the forward KL at rejected responses is smaller."""
    tx, batch, kl = optax.sgd(0.5), _pairs(bigram, with_reference=False), {}
    for loss, hp in ((dpo, {}), (tdpo, {'alpha': 5.0})):
        step = functools.partial(
            _step(loss, bigram, tx).func,
            **{**_step(loss, bigram, tx).keywords, 'loss_hp': loss.HParams(**hp)},
        )
        step, state, first = jax.jit(step), _state(tx, REF), None
        for _ in range(40):
            state, metrics = step(state, batch, REF)
            first = first or {n: float(m.value()) for n, m in metrics.items()}
        assert first['loss'] == pytest.approx(np.log(2), rel=1e-6)
        assert first['rewards/margins'] == pytest.approx(0, abs=1e-6)
        seen = batch_logps(state.params, batch, REF, model=bigram, tokens=True)
        kl[loss] = float(seen.tokens.kl.sum(-1)[:, 1].mean())
    assert 0 < kl[tdpo] < 0.7 * kl[dpo]


def test_a_tie_is_an_error(bigram):
    batch = _pairs(bigram)
    same = jax.tree.map(lambda x: x if x.ndim == 1 else x[:, [0, 0]], batch)
    _, metrics = _step(dpo, bigram, optax.sgd(1.0))(_state(optax.sgd(1.0)), same)
    assert float(metrics['rewards/accuracies'].value()) == 0
    assert float(metrics['loss'].value()) == pytest.approx(np.log(2), rel=1e-6)


def test_kto_learns(bigram):
    batch, tx = _unpaired(bigram), optax.adam(0.1)
    batch = batch.replace(**reference_logps(PARAMS, batch, model=bigram))
    step, state = jax.jit(_step(kto, bigram, tx)), _state(tx)
    for _ in range(30):
        state, metrics = step(state, batch)
    value = {name: float(metric.value()) for name, metric in metrics.items()}
    assert value['loss'] < 0.45
    assert value['rewards/chosen'] > 0 > value['rewards/rejected']


def test_the_real_policy_at_its_own_reference(policy, policy_params):
    """Log 2, in the real model, with garbage in the padding and an odd batch size."""
    rng = np.random.default_rng(4)
    tokens, mask, response = _texts(rng, 3, 2)
    batch = JudgedBatch(
        tokens=np.where(mask, tokens, 10**6).astype(np.int32),
        mask=mask,
        response_mask=response,
        weight=np.ones(3, np.float32),
    )

    @jax.jit
    def run(params, batch):
        refs = reference_logps(params, batch, model=policy)
        return preference_loss(
            params,
            batch.replace(**refs),
            {},
            model=policy,
            loss=dpo,
            loss_hp=dpo.HParams(),
        )

    total, weight, _ = run(policy_params, batch)
    assert float(total / weight) == pytest.approx(np.log(2), rel=1e-6)


def test_a_loss_of_ones_own(bigram):
    """Anything with the names of a loss module is one."""
    mine = types.SimpleNamespace(
        __name__='mine',
        DATA='pairs',
        REFERENCE=False,
        loss=lambda batch, hp: (-hp * batch.logps[:, 0], batch.logps),
    )
    total, _, metrics = preference_loss(
        PARAMS, _pairs(bigram, False), {}, model=bigram, loss=mine, loss_hp=2.0
    )
    chosen = metrics['logps/chosen']
    assert float(total) == pytest.approx(-2 * float(chosen.sum), rel=1e-6)


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    'loss, kind, message',
    [
        (ipo, 'unpaired', r'ipo is a loss on comparisons .* data are single responses'),
        (kto, 'pairs', r'kto is a loss on single responses.* data are comparisons'),
        (bco, 'pairs', r"a loss whose DATA is 'pairs'"),
        (tdpo, 'pairs', r'tdpo looks at single tokens .* give it ref_params'),
        (dpo, 'no reference', r'dpo needs log-probabilities of a reference'),
        (aot, 'no reference', r'aot needs log-probabilities of a reference'),
        (kto, 'no mismatched', r'kto needs mismatched responses'),
    ],
)
def test_data_that_do_not_fit_the_loss(loss, kind, message, bigram):
    batch = {
        'unpaired': lambda: _unpaired(bigram),
        'pairs': lambda: _pairs(bigram),
        'no reference': lambda: _pairs(bigram, with_reference=False),
        'no mismatched': lambda: _unpaired(bigram).replace(
            mismatched=None, ref_mismatched_logps=None
        ),
    }[kind]()
    tx = optax.sgd(1.0)
    with pytest.raises(ValueError, match=message):
        _step(loss, bigram, tx)(_state(tx), batch)


def test_rows_that_do_not_divide_into_microbatches(bigram):
    tx = optax.sgd(1.0)
    for loss in (dpo, aot):
        with pytest.raises(ValueError, match='16 rows .* num_microbatches=5'):
            _step(loss, bigram, tx, parts=5)(_state(tx), _pairs(bigram))
