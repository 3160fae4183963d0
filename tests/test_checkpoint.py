"""Saving, resuming and handing over, by themselves."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoint, files
from rlhf_jax.sharding import ParallelConfig, make_mesh, place


def state(step, width=4096):
    return {
        'step': jnp.int32(step),
        'params': {'kernel': jnp.full((width,), step, float)},
    }


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / 'a.json'
    files.write_json(path, {'a': 1})

    class Unprintable:
        def __str__(self):
            raise RuntimeError('in the middle of writing')

    with pytest.raises(RuntimeError):
        files.write_json(path, {'a': 2, 'b': Unprintable()})
    assert json.loads(path.read_text()) == {'a': 1}


def test_the_last_few_are_kept_and_the_latest_is_restored(tmp_path):
    with checkpoint.open_checkpoints(tmp_path, 2) as manager:
        assert checkpoint.restore_state(manager, state(0)) is None
        assert checkpoint.saved_seconds(manager) == {}
        for step in (1, 2, 3, 4):
            checkpoint.save_state(manager, step, state(step), {'train': 0.5 * step})
    with checkpoint.open_checkpoints(tmp_path, 2) as manager:
        assert sorted(manager.all_steps()) == [3, 4]
        first = state(0)
        restored = checkpoint.restore_state(manager, first)
        assert first['params']['kernel'].is_deleted()  # not two states at a time
        assert checkpoint.saved_seconds(manager) == {'train': 2.0}
        assert checkpoint.drop_state(manager, 2) == 4  # gone already
        assert checkpoint.drop_state(manager, 4) == 3
        assert checkpoint.saved_seconds(manager) == {'train': 1.5}
        assert checkpoint.drop_state(manager, 3) is None
    np.testing.assert_array_equal(restored['params']['kernel'], np.full(4096, 4.0))


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    """The state is donated while its checkpoint is still being written."""
    move = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
    now = state(0, width=2_000_000)
    with checkpoint.open_checkpoints(tmp_path, 8) as manager:
        for step in range(3):
            checkpoint.save_state(manager, step, now, {})
            for _ in range(5):
                now = move(now)
    with checkpoint.open_checkpoints(tmp_path, 8) as manager:
        for step in range(3):
            kernel = manager.restore(step)['params']['kernel']
            np.testing.assert_array_equal(kernel, np.full(2_000_000, 5.0 * step))


@pytest.mark.parametrize(
    'other',
    [
        {'step': jnp.int32(0), 'params': {'kernel': jnp.zeros(8)}},
        {'step': jnp.int32(0), 'params': {'bias': jnp.zeros(4096)}},
    ],
)
def test_a_state_of_another_shape_is_refused(tmp_path, other):
    with checkpoint.open_checkpoints(tmp_path, 2) as manager:
        checkpoint.save_state(manager, 7, state(7), {})
    with checkpoint.open_checkpoints(tmp_path, 2) as manager:
        with pytest.raises(ValueError, match='another model or optimizer') as caught:
            checkpoint.restore_state(manager, other)
    assert str(tmp_path) in str(caught.value) and '7' in str(caught.value)


def test_parameters_arrive_in_their_sharding(tmp_path, config, policy_params):
    checkpoint.save_params(tmp_path, {'policy': policy_params}, {'policy': config})
    assert checkpoint.load_model_configs(tmp_path) == {'policy': config}
    mesh = make_mesh(ParallelConfig(fsdp=2, tensor=2))
    like = place(jax.tree.map(jnp.zeros_like, policy_params), mesh, 'params')
    loaded = checkpoint.load_params(tmp_path, 'policy', like)
    jax.tree.map(np.testing.assert_array_equal, loaded, policy_params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(
        lambda x: x.sharding, like
    )


def test_errors_of_handing_over(tmp_path, config, policy_params):
    read = functools.partial(checkpoint.load_params, tmp_path)
    with pytest.raises(ValueError, match='holds no finished stage'):
        read('policy', policy_params)
    checkpoint.save_params(tmp_path, {'policy': policy_params}, {'policy': config})
    with pytest.raises(ValueError, match="no 'reward'; it holds policy"):
        read('reward', policy_params)
    narrow = jax.tree.map(lambda x: x[..., :1], policy_params)
    with pytest.raises(ValueError, match='another model'):
        read('policy', narrow)
