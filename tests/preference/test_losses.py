"""Every preference loss by hand, at its identities, and its gradient by differences.

The pairs are those of the golden numbers: log π of the chosen (−10, −12) and of the
rejected responses (−14, −11), of the reference (−11, −12.5) and (−13, −12). So the
log-ratios are d_w = (1, 0.5), d_l = (−1, 1) and d_w − d_l = (2, −0.5); with β = 0.1 the
margin is u = (0.2, −0.05).
"""

import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import preference
from rlhf_jax.types import PairLogps, TokenLogps, UnpairedLogps

GOLDENS = pathlib.Path(__file__).resolve().parents[3] / 'shared/data/goldens'
PAIRWISE = (
    'aot apo_down apo_zero cpo discopop dpo exo hinge ipo ld_dpo nca orpo r_dpo '
    'robust_dpo simpo sppo tdpo'
).split()
SINGLE = ['bco', 'kto']


def _load(name):
    return preference.load(name, 'name')


def _pairs():
    """Lengths (4, 10) and (2, 20); of the longer ones the tail has 3 and 5 nats."""
    return PairLogps(
        logps=jnp.array([[-10.0, -14], [-12, -11]]),
        ref_logps=jnp.array([[-11.0, -13], [-12.5, -12]]),
        shared_logps=jnp.array([[-10.0, -11], [-12, -6]]),
        ref_shared_logps=jnp.array([[-11.0, -11], [-12.5, -6]]),
        lengths=jnp.array([[4.0, 10], [2, 20]]),
        weight=jnp.ones(2),
        # Of two tokens each; the KL of the responses is (3, 1) and (1, 4).
        tokens=TokenLogps(
            mask=jnp.ones((2, 2, 2), bool),
            logps=jnp.array([[[-4.0, -6], [-7, -7]], [[-6, -6], [-1, -10]]]),
            ref_logps=jnp.array([[[-5.0, -6], [-7, -6]], [[-6, -6.5], [-2, -10]]]),
            kl=jnp.array([[[1.0, 2], [0.5, 0.5]], [[1, 0], [3, 1]]]),
        ),
    )


def _unpaired():
    """d = (1, −2, 0.5, 3); mismatched ratios (0.5, 1.5, −1, 1), whose mean is 0.5."""
    ref = jnp.array([-4.0, -5, -6, -7])
    return UnpairedLogps(
        logps=ref + jnp.array([1, -2, 0.5, 3]),
        ref_logps=ref,
        mismatched_logps=ref + jnp.array([0.5, 1.5, -1, 1]),
        ref_mismatched_logps=ref,
        lengths=jnp.array([1.0, 2, 3, 4]),
        desirable=jnp.array([True, False, True, False]),
        weight=jnp.ones(4),
    )


def _run(name, batch, **hp):
    module = _load(name)
    hp = module.HParams(**hp)
    if hasattr(module, 'context'):
        batch = batch.replace(context=module.context(batch, hp))
    return module.loss(batch, hp)


def _nls(x):
    """−log σ(x)."""
    return np.log1p(np.exp(-x))


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


LOG2 = math.log(2)
A, B = -2.5, -1.4  # mean log π of the first pair's responses: −10/4 and −14/10
LOG_ODDS = (A - math.log(1 - math.exp(A))) - (B - math.log(1 - math.exp(B)))

# (loss, hyperparameters, loss of the first pair, loss of the second)
BY_HAND = [
    ('dpo', {}, _nls(0.2), _nls(-0.05)),
    (
        'dpo',
        {'label_smoothing': 0.1},
        0.9 * _nls(0.2) + 0.1 * _nls(-0.2),
        0.9 * _nls(-0.05) + 0.1 * _nls(0.05),
    ),
    # 1 − e⁻¹ − (1 − e¹) = e − 1/e;   e⁻¹ − e⁻⁰·⁵.
    (
        'dpo',
        {'divergence': 'forward_kl'},
        _nls(0.1 * (math.e - 1 / math.e)),
        _nls(0.1 * (math.exp(-1) - math.exp(-0.5))),
    ),
    # log σ(1) − log σ(−1) = 1;   log σ(0.5) − log σ(1).
    (
        'dpo',
        {'divergence': 'js'},
        _nls(0.1),
        _nls(0.1 * math.log(_sigmoid(0.5) / _sigmoid(1))),
    ),
    # α = ½: 2·(e^½ − e^−½);   2·(e^−½ − e^−¼).
    (
        'dpo',
        {'divergence': 'alpha', 'alpha': 0.5},
        _nls(0.2 * (math.exp(0.5) - math.exp(-0.5))),
        _nls(0.2 * (math.exp(-0.5) - math.exp(-0.25))),
    ),
    (
        'robust_dpo',
        {'label_smoothing': 0.1},
        (0.9 * _nls(0.2) - 0.1 * _nls(-0.2)) / 0.8,
        (0.9 * _nls(-0.05) - 0.1 * _nls(0.05)) / 0.8,
    ),
    ('ipo', {}, 9.0, 30.25),  # (2 − 5)², (−0.5 − 5)²
    # 1/4 + 1/10 = 0.35;   0.5/2 − 1/20 = 0.2.
    ('ipo', {'over': 'token'}, 4.65**2, 4.8**2),
    ('hinge', {}, 0.8, 1.05),
    ('hinge', {'beta': 1.0}, 0.0, 1.5),
    # 2·(−2.5 + 1.4) − 0.5 = −2.7;   2·(−6 + 0.55) − 0.5 = −11.4.
    ('simpo', {}, _nls(-2.7), _nls(-11.4)),
    # 0.1·4, and 10 nats of the chosen; 0.1·(−1) and 12.
    ('cpo', {}, _nls(0.4) + 10, _nls(-0.1) + 12),
    ('cpo', {'nll_over': 'token', 'nll_coef': 0.5}, _nls(0.4) + 1.25, _nls(-0.1) + 3),
    (
        'orpo',
        {},
        2.5 + 0.1 * _nls(LOG_ODDS),
        # a = −6 and −0.55.
        6
        + 0.1
        * _nls(-6 - math.log(1 - math.exp(-6)) + 0.55 + math.log(1 - math.exp(-0.55))),
    ),
    # r = (0.1, −0.1) and (0.05, 0.1).
    (
        'nca',
        {},
        _nls(0.1) + 0.5 * _nls(-0.1) + 0.5 * _nls(0.1),
        _nls(0.05) + 0.5 * _nls(-0.05) + 0.5 * _nls(-0.1),
    ),
    (
        'exo',
        {'label_smoothing': 0.1},
        _sigmoid(0.2) * math.log(_sigmoid(0.2) / 0.9)
        + _sigmoid(-0.2) * math.log(_sigmoid(-0.2) / 0.1),
        _sigmoid(-0.05) * math.log(_sigmoid(-0.05) / 0.9)
        + _sigmoid(0.05) * math.log(_sigmoid(0.05) / 0.1),
    ),
    ('sppo', {'beta': 0.1}, 16 + 16, 4.5**2 + 36),  # targets ±5
    ('apo_zero', {}, 2 * _sigmoid(-0.1), _sigmoid(-0.05) + _sigmoid(0.1)),
    ('apo_down', {}, _sigmoid(0.1) + _sigmoid(-0.2), 2 * _sigmoid(0.05)),
    # u = (0.1, −0.025), u/τ = (2, −0.5).
    (
        'discopop',
        {},
        _sigmoid(-2) * _nls(0.1) + _sigmoid(2) * math.exp(-0.1),
        _sigmoid(0.5) * _nls(-0.025) + _sigmoid(-0.5) * math.exp(0.025),
    ),
    # Lengths differ by −6 and −18 tokens.
    ('r_dpo', {'alpha': 0.05}, _nls(0.2 - 0.3), _nls(-0.05 - 0.9)),
    # The rejected ones are longer: d_l = 0 − 0.5·1 and 0 + 0.5·1.
    ('ld_dpo', {'alpha': 0.5}, _nls(0.15), _nls(0.0)),
    # 0.1·(2 + 0.5·(3 − 1)) and 0.1·(−0.5 + 0.5·(1 − 4)); with α = 1 0.4 and −0.35.
    ('tdpo', {}, _nls(0.3), _nls(-0.2)),
    ('tdpo', {'alpha': 1.0, 'kl_gradient': 'both'}, _nls(0.4), _nls(-0.35)),
    # Margins (4, −1), the reference's (2, −0.5): sorted alike, (2, −0.5) between them.
    ('aot', {}, _nls(0.2), _nls(-0.05)),
]


@pytest.mark.parametrize('name, hp, first, second', BY_HAND)
def test_pairs_by_hand(name, hp, first, second):
    per_row, rewards = _run(name, _pairs(), **hp)
    np.testing.assert_allclose(per_row, [first, second], rtol=2e-6, atol=1e-6)
    assert rewards.shape == (2, 2) and per_row.dtype == jnp.float32


def test_every_loss_of_the_package_is_tested_here():
    assert {name for name, *_ in BY_HAND} == set(PAIRWISE)
    folder = pathlib.Path(preference.__file__).parent
    files = {path.stem for path in folder.glob('*.py')}
    assert files == {*PAIRWISE, *SINGLE, '__init__'}
    for name in PAIRWISE:
        assert _load(name).DATA == 'pairs'
    for name in SINGLE:
        assert _load(name).DATA == 'unpaired'


def test_kto_by_hand():
    # z = 0.5: d − z = (0.5, −2.5, 0, 2.5), times β = 0.1.
    per_row, rewards = _run('kto', _unpaired())
    want = [_sigmoid(-0.05), _sigmoid(-0.25), 0.5, _sigmoid(0.25)]
    np.testing.assert_allclose(per_row, want, rtol=1e-6)
    np.testing.assert_allclose(rewards, [0.1, -0.2, 0.05, 0.3], rtol=1e-5)
    weighted, _ = _run('kto', _unpaired(), desirable_weight=2.0, undesirable_weight=3.0)
    np.testing.assert_allclose(weighted, np.multiply(want, [2, 3, 2, 3]), rtol=1e-6)


def test_the_kl_of_kto_counts_real_rows_and_is_never_negative():
    kto, batch = _load('kto'), _unpaired()
    hp = kto.HParams()
    np.testing.assert_allclose(kto.context(batch, hp)['kl'], 0.5)
    filled = batch.replace(weight=jnp.array([1.0, 0, 0, 1]))  # (0.5 + 1)/2
    np.testing.assert_allclose(kto.context(filled, hp)['kl'], 0.75)
    below = batch.replace(mismatched_logps=batch.mismatched_logps - 3)
    np.testing.assert_array_equal(kto.context(below, hp)['kl'], 0)
    with pytest.raises(ValueError, match='mismatched responses'):
        kto.context(batch.replace(mismatched_logps=None), hp)


def test_kto_is_symmetric():
    """A log-ratio above z costs a good response what one below it costs a bad one."""
    kto = _load('kto')
    d = jnp.array([1.7, -1.7])
    batch = _unpaired().replace(
        logps=d,
        ref_logps=jnp.zeros(2),
        desirable=jnp.array([True, False]),
        context={'kl': jnp.zeros(2)},
    )
    per_row, _ = kto.loss(batch, kto.HParams(beta=0.5))
    assert float(per_row[0]) == pytest.approx(float(per_row[1]), rel=1e-6)
    flipped, _ = kto.loss(batch.replace(desirable=~batch.desirable), kto.HParams())
    same, _ = kto.loss(batch, kto.HParams())
    np.testing.assert_allclose(flipped + same, 1, rtol=1e-6)


def test_bco_by_hand():
    # r = (0.1, −0.2, 0.05, 0.3), δ = 0.0625.
    per_row, _ = _run('bco', _unpaired())
    want = [_nls(0.0375), _nls(0.2625), _nls(-0.0125), _nls(-0.2375)]
    np.testing.assert_allclose(per_row, want, rtol=1e-6)


def test_aot_matches_ranks_and_leaves_filling_rows_out():
    """Margins (3, −1, 2) get the reference's (0, 5, 1) as (5, 0, 1)."""
    aot = _load('aot')
    zeros = jnp.zeros(4)
    batch = _pairs().replace(
        logps=jnp.stack([jnp.array([3.0, -1, -9, 2]), zeros], 1),
        ref_logps=jnp.stack([jnp.array([0.0, 5, 7, 1]), zeros], 1),
        weight=jnp.array([1.0, 1, 0, 1]),
    )
    context = aot.context(batch, aot.HParams())
    np.testing.assert_array_equal(context['ref_margins'], [5, 0, 0, 1])
    per_row, _ = aot.loss(
        batch.replace(context=context), aot.HParams(beta=1.0, label_smoothing=0.1)
    )
    want = [0.9 * _nls(u) + 0.1 * _nls(-u) for u in (-2, -1, -9, 1)]
    np.testing.assert_allclose(per_row, want, rtol=1e-5)


# ----------------------------------------------------------------------------- goldens


@pytest.mark.parametrize(
    'golden, name, hp',
    [
        ('DPO b.1', 'dpo', {'beta': 0.1}),
        ('cDPO b.1 ls.1', 'dpo', {'beta': 0.1, 'label_smoothing': 0.1}),
        ('IPO b.1', 'ipo', {'beta': 0.1}),
        ('SimPO b2 g/b .25', 'simpo', {'beta': 2.0, 'gamma': 0.5}),
    ],
)
def test_against_the_numbers_of_others(golden, name, hp):
    path = GOLDENS / 'goldens.json'
    if not path.exists():
        pytest.skip(f'golden numbers are not at {path}')
    batch = _pairs()
    if name == 'simpo':
        logps = jnp.array([[-0.5, -0.7], [-0.6, -0.55]])
        batch = batch.replace(logps=logps, lengths=jnp.ones((2, 2)))
    per_row, _ = _run(name, batch, **hp)
    np.testing.assert_allclose(per_row, json.loads(path.read_text())[golden], rtol=1e-6)


# -------------------------------------------------------------------------- identities

# What a loss is where the policy is the reference, whatever both are.
AT_REFERENCE = {
    'aot': LOG2,
    'apo_down': 1.0,
    'apo_zero': 1.0,
    'discopop': (LOG2 + 1) / 2,
    'dpo': LOG2,
    'exo': math.log(0.5) - (math.log(0.999) + math.log(0.001)) / 2,
    'hinge': 1.0,
    'ipo': 25.0,
    'ld_dpo': LOG2,
    'nca': 2 * LOG2,
    'robust_dpo': LOG2,
    'sppo': 2 * 500.0**2,
    'tdpo': LOG2,
}


def test_the_identities_cover_every_loss_with_a_reference():
    assert {*AT_REFERENCE, 'r_dpo'} == {n for n in PAIRWISE if _load(n).REFERENCE}


@pytest.mark.parametrize('name', AT_REFERENCE)
def test_the_policy_that_is_the_reference(name):
    batch = _pairs()
    batch = batch.replace(
        ref_logps=batch.logps,
        ref_shared_logps=batch.shared_logps,
        tokens=batch.tokens.replace(kl=jnp.zeros_like(batch.tokens.kl)),
    )
    per_row, rewards = _run(name, batch)
    np.testing.assert_allclose(per_row, AT_REFERENCE[name], rtol=1e-6)
    np.testing.assert_array_equal(rewards, 0)


@pytest.mark.parametrize('divergence', ['forward_kl', 'js', 'alpha'])
def test_dpo_at_the_reference_is_log_two_for_every_divergence(divergence):
    batch = _pairs()
    batch = batch.replace(ref_logps=batch.logps)
    per_row, _ = _run('dpo', batch, divergence=divergence)
    np.testing.assert_allclose(per_row, LOG2, rtol=1e-6)


def test_what_reduces_to_dpo():
    dpo, _ = _run('dpo', _pairs())
    for name, hp in [
        ('dpo', {'divergence': 'alpha', 'alpha': 1e-5}),
        ('ld_dpo', {'alpha': 1.0}),
        ('r_dpo', {'alpha': 0.0}),
        ('robust_dpo', {'label_smoothing': 0.0}),
        ('tdpo', {'alpha': 0.0}),
    ]:
        np.testing.assert_allclose(_run(name, _pairs(), **hp)[0], dpo, rtol=1e-5)
    forward, _ = _run('dpo', _pairs(), divergence='forward_kl')
    alpha, _ = _run('dpo', _pairs(), divergence='alpha', alpha=1.0)
    np.testing.assert_array_equal(forward, alpha)


def test_the_robust_loss_undoes_flips_on_average():
    """(1 − ε)·L(pair) + ε·L(flipped pair) is the DPO loss without flips."""
    batch = _pairs()
    flipped = jax.tree.map(lambda x: x[:, ::-1] if x.ndim == 2 else x, batch)
    one, _ = _run('robust_dpo', batch, label_smoothing=0.2)
    other, _ = _run('robust_dpo', flipped, label_smoothing=0.2)
    dpo, _ = _run('dpo', batch)
    np.testing.assert_allclose(0.8 * one + 0.2 * other, dpo, rtol=1e-5)


def test_exo_is_zero_where_the_policy_says_what_the_labels_say():
    # σ(β·Δ) = 0.9 where Δ = log 9/β.
    zero = jnp.zeros(1)
    batch = _pairs().replace(
        logps=jnp.stack([zero + math.log(9) / 0.1, zero], 1),
        ref_logps=jnp.zeros((1, 2)),
    )
    per_row, _ = _run('exo', batch, label_smoothing=0.1)
    np.testing.assert_allclose(per_row, 0, atol=1e-6)


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    'name, hp',
    [(name, {}) for name in [*PAIRWISE, *SINGLE]]
    + [('dpo', {'divergence': d}) for d in ('forward_kl', 'js', 'alpha')]
    + [('dpo', {'label_smoothing': 0.1}), ('ipo', {'over': 'token'})],
)
def test_gradient_against_finite_differences(name, hp):
    """In double precision, on log-probabilities where no two terms cancel."""
    with jax.enable_x64(True):
        module = _load(name)
        hp = module.HParams(**hp)
        batch = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x), x.dtype if x.dtype == bool else float),
            _pairs() if module.DATA == 'pairs' else _unpaired(),
        )
        if hasattr(module, 'context'):
            batch = batch.replace(context=module.context(batch, hp))
        fields = ('logps', 'shared_logps') if name == 'ld_dpo' else ('logps',)

        def total(values):
            per_row, _ = module.loss(batch.replace(**values), hp)
            return jnp.sum(per_row * jnp.arange(1, len(per_row) + 1))

        at = {field: getattr(batch, field) for field in fields}
        gradient = jax.grad(total)(at)
        for field in fields:
            slopes = np.zeros(at[field].shape)
            for place in np.ndindex(slopes.shape):
                step = np.zeros(slopes.shape)
                step[place] = 1e-6
                up = total({**at, field: at[field] + step})
                down = total({**at, field: at[field] - step})
                slopes[place] = (up - down) / 2e-6
            assert np.any(slopes), f'{name} does not depend on {field}'
            np.testing.assert_allclose(gradient[field], slopes, rtol=1e-5, atol=1e-8)


def test_whose_kl_tdpo_trains():
    """∂L/∂K is β·α·σ(−margin) times 1 of the rejected response, and −1 of the chosen
    one, or 0 where its gradient is stopped; the same for each token.
    """
    batch, tdpo = _pairs(), _load('tdpo')

    def total(kl, hp):
        tokens = batch.tokens.replace(kl=kl)
        return jnp.sum(tdpo.loss(batch.replace(tokens=tokens), hp)[0])

    stopped = jax.grad(total)(batch.tokens.kl, tdpo.HParams())
    slope = 0.05 * np.array([_sigmoid(-0.3), _sigmoid(0.2)])
    np.testing.assert_array_equal(stopped[:, 0], 0)
    np.testing.assert_allclose(stopped[:, 1], np.stack([slope, slope], 1), rtol=1e-5)
    both = jax.grad(total)(batch.tokens.kl, tdpo.HParams(kl_gradient='both'))
    np.testing.assert_allclose(both[:, 1], stopped[:, 1], rtol=1e-6)
    np.testing.assert_allclose(both[:, 0], -stopped[:, 1], rtol=1e-6)


@pytest.mark.parametrize('name', [*PAIRWISE, *SINGLE])
def test_extreme_log_probabilities_stay_finite(name):
    """Responses that the policy has all but excluded, or holds to be certain."""
    far = jnp.array([-5000.0, 0.0])
    if name in SINGLE:
        batch = _unpaired()
        batch = batch.replace(logps=jnp.concatenate([far, far[::-1]]))
    else:
        logps = jnp.stack([far, far[::-1]], 1)
        batch = _pairs().replace(logps=logps, shared_logps=logps / 2)

    def total(logps):
        per_row, _ = _run(name, batch.replace(logps=logps))
        return jnp.sum(per_row)

    value, gradient = jax.value_and_grad(total)(batch.logps)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


@pytest.mark.parametrize('divergence', ['forward_kl', 'js', 'alpha'])
def test_divergences_stay_finite(divergence):
    dpo, far = _load('dpo'), jnp.array([[-5000.0, -1], [-1, -5000.0]])
    hp = dpo.HParams(divergence=divergence)

    def total(logps):
        return jnp.sum(dpo.loss(_pairs().replace(logps=logps), hp)[0])

    value, gradient = jax.value_and_grad(total)(far)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


# ------------------------------------------------------------------------------ loading


def test_a_loss_outside_the_package_is_found_by_its_dotted_name(tmp_path, monkeypatch):
    (tmp_path / 'my_pkg').mkdir()
    (tmp_path / 'my_pkg' / 'my_loss.py').write_text(
        'from rlhf_jax.preference.dpo import DATA, HParams, REFERENCE, loss\n'
    )
    (tmp_path / 'my_pkg' / 'half.py').write_text("DATA = 'pairs'\nREFERENCE = True\n")
    (tmp_path / 'my_pkg' / 'odd.py').write_text(
        "from rlhf_jax.preference.dpo import *\nDATA = 'triples'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert _load('my_pkg.my_loss').loss is _load('dpo').loss
    with pytest.raises(ValueError, match='no HParams, loss; a preference loss is'):
        _load('my_pkg.half')
    with pytest.raises(ValueError, match="DATA='triples'; use 'pairs' or 'unpaired'"):
        _load('my_pkg.odd')
    for name in [name for name in sys.modules if name.startswith('my_pkg')]:
        del sys.modules[name]


@pytest.mark.parametrize(
    'name, message',
    [
        ('sipo', "did you mean 'simpo'"),
        ('ppo_clip', r"use \['aot', "),
        ('bradley_terry', 'no preference loss'),
        ('no_such.loss', 'cannot be imported'),
    ],
)
def test_a_name_that_is_no_loss(name, message):
    with pytest.raises(ValueError, match=message):
        preference.load(name, 'config.preference.name')


@pytest.mark.parametrize(
    'name, hp',
    [
        ('dpo', {'label_smoothing': 0.5}),
        ('dpo', {'alpha': 0.0}),
        ('robust_dpo', {'label_smoothing': 0.5}),
        ('exo', {'label_smoothing': 0.0}),
        ('aot', {'label_smoothing': -0.1}),
        ('ld_dpo', {'alpha': 1.5}),
        ('discopop', {'tau': 1.0}),
        ('ipo', {'over': 'tokens'}),
        ('cpo', {'nll_over': 'tokens'}),
        ('tdpo', {'kl_gradient': 'chosen'}),
        ('tdpo', {'alpha': -0.5}),
    ],
)
def test_hyperparameters_out_of_range(name, hp):
    [key] = hp
    with pytest.raises(ValueError, match=f'{key}='):
        _load(name).HParams(**hp)


def test_an_unknown_divergence():
    with pytest.raises(ValueError, match="divergence='kl'; use 'reverse_kl'"):
        _run('dpo', _pairs(), divergence='kl')
