"""What the loop does when numbers go bad, the disk is full, or a run is resumed."""

import errno
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from rlhf_jax import checkpoint
from rlhf_jax.stages import loop
from rlhf_jax.stages.settings import LoopSettings
from rlhf_jax.types import Mean


@struct.dataclass
class State:
    step: jnp.ndarray
    params: dict


def start():
    return State(jnp.int32(0), {'w': jnp.zeros(3)})


def run(folder, num_steps, *, after=None, losses=None, spent=None, watch=None, **how):
    """A stage whose step k leaves ``w = k``, or ``after[k]``, at a loss of w before it.

    ``losses`` replaces the loss of a step, counted from 1.
    """

    def one_step(state, done):
        step = done + 1
        loss = (losses or {}).get(step, state.params['w'].sum())
        state = State(
            state.step + 1, {'w': jnp.full(3, (after or {}).get(step, step), float)}
        )
        return state, {'loss': Mean(jnp.float32(loss), jnp.float32(1))}, {}

    return loop.run_loop(
        folder,
        start(),
        num_steps,
        one_step,
        settings=LoopSettings(log_every_steps=1, save_every_steps=1, **how),
        writers=(),
        shown={},
        spent=spent or (lambda: {'train': 1.0}),
        watch=watch,
    )


def saved(folder):
    with checkpoint.open_checkpoints(folder, 2) as manager:
        steps = sorted(manager.all_steps())
        state = checkpoint.restore_state(manager, start())
    return steps, None if state is None else np.asarray(state.params['w']).tolist()


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    with pytest.raises(ValueError, match='parameters not finite at step 4') as caught:
        run(tmp_path, 9, after={4: np.nan})
    assert 'checkpoint is that of step 3 in' in str(caught.value)
    assert str(tmp_path / 'checkpoints') in str(caught.value)
    assert saved(tmp_path) == ([2, 3], [3.0] * 3)


def test_a_state_that_ruins_the_next_step_is_deleted(tmp_path):
    # The parameters of step 4 are huge, yet finite: they are saved; step 5 shows it.
    with pytest.raises(ValueError, match='loss not finite at step 5') as caught:
        run(tmp_path, 9, after={4: 3e38})
    assert 'checkpoint is that of step 3 in' in str(caught.value)
    assert saved(tmp_path) == ([3], [3.0] * 3)


def test_metrics_are_waited_for_before_their_step_is_saved(tmp_path):
    with pytest.raises(ValueError, match='loss not finite at step 1; no checkpoint'):
        run(tmp_path, 9, losses={1: np.inf})
    assert saved(tmp_path) == ([], None)


def test_seconds_add_up_over_processes(tmp_path):
    class Killed(Exception):
        pass

    clock = iter(range(1, 9))

    def kill_in_third():
        seconds = next(clock)
        if seconds == 3:
            raise Killed  # the third save: the second is the last on the disk
        return {'setup': 0.5, 'train': float(seconds)}

    with pytest.raises(Killed):
        run(tmp_path, 9, spent=kill_in_third)
    _, seconds = run(tmp_path, 9, spent=lambda: {'train': 10.0, 'rest': 4.0})
    assert seconds == {'setup': 0.5, 'train': 12.0, 'rest': 4.0}
    # Begun again when all steps are done, it adds what that process takes.
    _, seconds = run(tmp_path, 9, spent=lambda: {'setup': 1.0})
    assert seconds == {'setup': 1.5, 'train': 12.0, 'rest': 4.0}


@pytest.mark.parametrize('writer', ['checkpoint', 'metrics'])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, writer):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device')

    run(tmp_path, 3)
    if writer == 'checkpoint':
        monkeypatch.setattr('orbax.checkpoint.CheckpointManager.save', full)
    else:
        monkeypatch.setattr('rlhf_jax.metrics.JsonlWriter.write', full)
    with pytest.raises(OSError, match='No space left'):
        run(tmp_path, 6)
    monkeypatch.undo()
    assert saved(tmp_path) == ([2, 3], [3.0] * 3)
    state, _ = run(tmp_path, 6)
    assert saved(tmp_path) == ([5, 6], [6.0] * 3) and int(state.step) == 6


@pytest.mark.parametrize('weight', [0.0, 1.0, np.nan])
def test_a_mean_over_nothing_is_left_out_and_one_that_is_no_number_stops(
    tmp_path, weight
):
    def one_step(state, done):
        mean = Mean(jnp.float32(np.nan if weight else 0), jnp.float32(weight))
        loss = Mean(jnp.float32(2), jnp.float32(1))
        state = State(state.step + 1, state.params)
        return state, {'loss': loss, 'rejected': mean}, {}

    def go():
        loop.run_loop(
            tmp_path,
            start(),
            1,
            one_step,
            settings=LoopSettings(log_every_steps=1),
            writers=('jsonl',),
            shown={},
            spent=lambda: {},
        )

    if weight == 0:
        go()
        [line] = (tmp_path / 'metrics.jsonl').read_text().splitlines()
        row = json.loads(line)
        assert row['loss'] == 2 and 'rejected' not in row
    else:
        with pytest.raises(ValueError, match='rejected not finite at step 1'):
            go()


def test_warnings_are_printed_with_their_step(tmp_path, capsys):
    run(tmp_path / 'ppo', 3, watch=lambda x: ['no end'] if x['loss'] == 3 else [])
    assert capsys.readouterr().out == 'warning: ppo, step 2: no end\n'
