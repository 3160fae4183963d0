"""Schedules, clipping, decay and freezing: by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.optim import (
    OptimConfig,
    actor_critic_optimizer,
    make_optimizer,
    make_schedule,
    path_of,
)

PLAIN = OptimConfig(learning_rate=0.1, schedule='constant', max_grad_norm=None)


def _replace(**values):
    return OptimConfig(**{**vars(PLAIN), **values})


def _after(tx, params, *gradients):
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def _rates(config, num_steps, steps):
    return [float(make_schedule(config, num_steps)(step)) for step in steps]


def test_adam_by_hand():
    # One step: m̂ = g, v̂ = g², so that Δ = −lr·g/(|g| + ε) = −10⁻³·10⁻⁴/(1.1·10⁻⁴).
    config = _replace(learning_rate=1e-3, eps=1e-5)
    one = _after(
        make_optimizer(config, 1), {'w': jnp.float32(0)}, {'w': jnp.float32(1e-4)}
    )
    assert float(one['w']) == pytest.approx(-9.090909e-4, rel=1e-5)


def test_schedules_by_hand():
    assert _rates(PLAIN, 10, [0, 5, 9]) == pytest.approx([0.1, 0.1, 0.1])
    assert _rates(_replace(schedule='linear'), 10, [0, 5, 10]) == pytest.approx(
        [0.1, 0.05, 0]
    )
    # Cosine: ½·(1 + cos(π·t/T)); at T/4 that is (1 + √½)/2.
    cosine = _replace(schedule='cosine')
    assert _rates(cosine, 8, [0, 2, 4, 8]) == pytest.approx(
        [0.1, 0.0853553, 0.05, 0], abs=1e-7
    )
    ending = _replace(schedule='linear', final_percent=10)
    assert _rates(ending, 10, [0, 5, 10]) == pytest.approx([0.1, 0.055, 0.01])


def test_warm_up_reaches_the_peak_and_wastes_no_step():
    config = _replace(schedule='linear', warmup_percent=40)  # 4 of 10 steps
    rates = _rates(config, 10, range(10))
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    # Six steps are left, each a sixth of the peak lower.
    assert rates[5:] == pytest.approx([0.1 * k / 6 for k in (5, 4, 3, 2, 1)])


def test_gradients_are_clipped_by_their_global_norm():
    # Norm √(3² + 4²) = 5, scaled to 1: 0.6 and 0.8. A huge ε makes Adam linear: g/ε.
    config = _replace(max_grad_norm=1.0, eps=1e6, learning_rate=1e6)
    params = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
    after = _after(
        make_optimizer(config, 1),
        params,
        {'a': jnp.array([3.0]), 'b': jnp.array([4.0])},
    )
    np.testing.assert_allclose([after['a'][0], after['b'][0]], [-0.6, -0.8], rtol=1e-5)
    small = _after(
        make_optimizer(config, 1),
        params,
        {'a': jnp.array([0.3]), 'b': jnp.array([0.4])},
    )
    np.testing.assert_allclose([small['a'][0], small['b'][0]], [-0.3, -0.4], rtol=1e-5)


def test_weight_decay_spares_norms_and_biases():
    params = {
        'layers': {'norm': {'scale': jnp.ones(2)}, 'up_kernel': jnp.ones(2)},
        'head': {'kernel': jnp.ones(2), 'bias': jnp.ones(2)},
    }
    config = _replace(weight_decay=0.5)
    after = _after(
        make_optimizer(config, 1), params, jax.tree.map(jnp.zeros_like, params)
    )
    # Without a gradient only the decay acts: 1 − 0.1·0.5·1.
    np.testing.assert_allclose(after['layers']['up_kernel'], 0.95, rtol=1e-6)
    np.testing.assert_allclose(after['head']['kernel'], 0.95, rtol=1e-6)
    assert after['layers']['norm']['scale'].tolist() == [1, 1]
    assert after['head']['bias'].tolist() == [1, 1]


def test_muon_decays_what_it_orthogonalises_alone():
    params = {
        'embed': {'tokens': jnp.ones((2, 2))},
        'layers': {'norm': {'scale': jnp.ones((1, 2))}},
        'mlp': {'up_kernel': jnp.ones((1, 2, 2))},
        'lm_head': jnp.ones((2, 2)),
    }
    config = _replace(name='muon', weight_decay=0.5)
    after = _after(
        make_optimizer(config, 1), params, jax.tree.map(jnp.zeros_like, params)
    )
    np.testing.assert_allclose(after['mlp']['up_kernel'], 0.95, rtol=1e-6)
    others = {name: after[name] for name in ('embed', 'layers', 'lm_head')}
    assert all((x == 1).all() for x in jax.tree.leaves(others))


def test_what_is_not_trainable_does_not_move():
    params = {'backbone': {'w': jnp.ones(2)}, 'head': {'kernel': jnp.ones(2)}}
    gradient = jax.tree.map(jnp.ones_like, params)
    config = _replace(trainable='^head/', weight_decay=0.1)
    after = _after(make_optimizer(config, 2), params, gradient, gradient)
    assert after['backbone']['w'].tolist() == [1, 1]
    assert float(after['head']['kernel'][0]) < 0.9


def test_actor_and_critic_are_clipped_and_scheduled_apart():
    linear = {'eps': 1e6, 'max_grad_norm': 1.0}
    tx = actor_critic_optimizer(
        _replace(learning_rate=1e6, **linear), _replace(learning_rate=2e6, **linear), 1
    )
    params = {'policy': {'w': jnp.zeros(1)}, 'critic': {'w': jnp.zeros(1)}}
    gradient = {'policy': {'w': jnp.array([0.5])}, 'critic': {'w': jnp.array([100.0])}}
    after = _after(tx, params, gradient)
    # The critic's 100 is clipped to 1 and does not shrink the policy's 0.5.
    assert float(after['policy']['w'][0]) == pytest.approx(-0.5, rel=1e-5)
    assert float(after['critic']['w'][0]) == pytest.approx(-2.0, rel=1e-5)


def test_paths_read_as_people_write_them():
    tree = {'backbone': {'layers': {'mlp': {'up_kernel': 0}}}}
    ((path, _),) = jax.tree_util.tree_leaves_with_path(tree)
    assert path_of(path) == 'backbone/layers/mlp/up_kernel'


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match=r'warmup_percent=101: use a number in \[0, 1'):
        _replace(warmup_percent=101)
    with pytest.raises(ValueError, match="schedule='cosin' is unknown"):
        make_schedule(_replace(schedule='cosin'), 10)
