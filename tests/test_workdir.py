"""One run at a time in a work directory, whatever became of the one before."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from rlhf_jax.main import launch
from rlhf_jax.workdir import LOCK, locked
from tests.small_config import ROOT, get_config

HOLD = """
import sys, time
from pathlib import Path
from rlhf_jax.workdir import locked
with locked(Path(sys.argv[1])):
    print('held', flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the directory."""
    command = [sys.executable, '-c', HOLD, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'held\n'
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_told_who_holds_the_directory(holder, tmp_path):
    with pytest.raises(ValueError) as caught:
        launch(get_config(), tmp_path)
    who = f'in use by process {holder.pid} on {socket.gethostname()}; '
    assert who in str(caught.value) and str(tmp_path) in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == [LOCK]


def test_a_lock_that_a_kill_has_left_is_not_in_the_way(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert f'process {holder.pid} on' in (tmp_path / LOCK).read_text()
    with locked(tmp_path):
        assert f'process {os.getpid()} on' in (tmp_path / LOCK).read_text()
    assert (tmp_path / LOCK).read_text() == ''
    with locked(tmp_path):  # and again
        pass


def test_a_run_that_failed_leaves_the_directory_free(tmp_path):
    config = get_config()
    config.sft.train = 'jsonl:/nowhere/a.jsonl'
    for _ in range(2):
        with pytest.raises(ValueError, match='nowhere'):
            launch(config, tmp_path)
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr('fcntl.flock', refuse)
    with locked(tmp_path):
        pass
    said = capsys.readouterr().out
    assert 'cannot be locked (Operation not supported)' in said
