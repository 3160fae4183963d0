"""Runs that are killed between two steps; not a test."""

import contextlib

import pytest

from rlhf_jax import checkpoint


class Killed(Exception):
    """In the place of a signal."""


@contextlib.contextmanager
def killed_behind(step):
    """What is launched inside is killed when a step has its checkpoint on the disk."""
    save = checkpoint.save_state

    def save_and_die(manager, number, state, seconds):
        save(manager, number, state, seconds)
        if number == step:
            manager.wait_until_finished()
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, 'save_state', save_and_die)
        yield
