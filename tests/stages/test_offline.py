"""What a step of an offline stage waits for: nothing that the device still works on.
And what it holds: no parameters but those it trains.
"""

import types

import jax
import numpy as np
import pytest

from rlhf_jax.sharding import ParallelConfig, make_mesh
from rlhf_jax.stages import offline
from rlhf_jax.stages.settings import OfflineSettings


@pytest.fixture
def run():
    """Of a mesh of one device and steps that change nothing."""
    return types.SimpleNamespace(
        mesh=make_mesh(ParallelConfig(), jax.devices()[:1]),
        config=types.SimpleNamespace(metrics=()),
        compile=lambda step, **_: lambda state, batch: (state, {}),
        stage_dir=lambda stage: stage,
        profile=False,
    )


@pytest.fixture
def job():
    settings = OfflineSettings(
        init='scratch', train='none', eval='none', batch_size=16, buckets=(12,)
    )
    return types.SimpleNamespace(
        stage='sft', settings=settings, num_steps=3, hp=None, members=1
    )


def test_rates_are_worked_out_before_the_first_step(run, job, token_batch, monkeypatch):
    """Asked in a step, a rate would be computed behind the step before and fetched."""
    asked, steps = [], []

    def schedule(count):
        asked.append(isinstance(count, jax.core.Tracer))
        return 0.5 * count

    def run_loop(folder, state, num_steps, one_step, **_):
        steps.extend(one_step(state, done) for done in range(num_steps))
        return state, {}

    monkeypatch.setattr(offline, 'make_schedule', lambda *_: schedule)
    monkeypatch.setattr(offline, 'run_loop', run_loop)
    monkeypatch.setattr(offline, '_stream', lambda *_: iter([token_batch] * 3))
    key = jax.random.PRNGKey(0)
    offline.fit(run, job, max, None, {'w': key * 0.0}, key, None, {})
    assert [known['train/lr'] for _, _, known in steps] == [0, 0.5, 1]
    assert asked == [True]


def test_the_state_takes_over_the_memory_of_the_parameters(run, job, monkeypatch):
    monkeypatch.setattr(offline, 'run_loop', lambda _, state, *rest, **how: (state, {}))
    key = jax.random.PRNGKey(0)
    params = {'kernel': jax.random.normal(key, (64, 32))}
    place = params['kernel'].unsafe_buffer_pointer()
    state, _ = offline.fit(run, job, max, None, params, key, None, {})
    kernel = state.params['kernel']
    assert params['kernel'].is_deleted() and kernel.unsafe_buffer_pointer() == place
    np.testing.assert_array_equal(kernel, jax.random.normal(key, (64, 32)))
