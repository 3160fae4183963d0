"""Killed at any moment, a resumed run ends as if nothing had happened, bit for bit.

The runs are processes of their own, on one device. Compiled programs are kept between
them, so that six launches compile once.
"""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.small_config import ROOT

STAGES = ('sft', 'rm', 'ppo')
STEPS = {'sft': 40, 'rm': 40, 'ppo': 24}


class Launcher:
    """Starts the command on many short steps; waits for it, or kills it midway."""

    def __init__(self, cache):
        self.env = {
            **os.environ,
            'PYTHONPATH': str(ROOT),
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': '--xla_backend_optimization_level=1',
            'JAX_COMPILATION_CACHE_DIR': str(cache),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
            'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
        }

    def start(self, workdir):
        command = [sys.executable, '-m', 'rlhf_jax.main', '--workdir', str(workdir)]
        command += ['--config', 'tests/small_config.py:40']
        command += [f'--config.stages={STAGES}', '--config.sft.init=scratch']
        command += [f'--config.ppo.num_rollouts={STEPS["ppo"]}']
        command += ['--config.ppo.batch_size=8', '--config.ppo.kl_target=0.5']
        command += [f'--config.{stage}.loop.save_every_steps=3' for stage in STAGES]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, workdir):
        process = self.start(workdir)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output

    def interrupt(self, workdir, stage, num_rows, how):
        """Sends a signal once ``stage`` has written ``num_rows`` metrics rows."""
        path = workdir / stage / 'metrics.jsonl'
        process = self.start(workdir)
        while not path.exists() or path.read_bytes().count(b'\n') < num_rows:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        process.send_signal(how)
        output, _ = process.communicate(timeout=120)
        assert not (workdir / stage / 'done.json').exists(), 'the signal came too late'
        return process.returncode, output


def steps_saved(workdir, stage):
    names = (path.name for path in (workdir / stage / 'checkpoints').iterdir())
    return [int(name) for name in names if name.isdigit()]


def rows(workdir, stage):
    lines = (workdir / stage / 'metrics.jsonl').read_text().splitlines()
    table = [json.loads(line) for line in lines]
    times = ('seconds', 'train/tokens_per_second')
    return [{k: v for k, v in row.items() if k not in times} for row in table]


def results(workdir, stage):
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(workdir / stage / 'params')


@pytest.fixture(scope='module')
def launcher(tmp_path_factory):
    return Launcher(tmp_path_factory.mktemp('compiled'))


@pytest.fixture(scope='module')
def undisturbed(launcher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('runs') / 'undisturbed'
    launcher.finish(workdir)
    return workdir


@pytest.fixture(scope='module')
def disturbed(launcher, undisturbed, tmp_path_factory):
    """Killed in each stage; in ppo asked to stop, too, by SIGTERM and by Ctrl-C.
    (Work directory, notes.)
    """
    workdir, notes = tmp_path_factory.mktemp('runs') / 'disturbed', {}
    for stage in STAGES:
        code, _ = launcher.interrupt(workdir, stage, 8, signal.SIGKILL)
        assert code == -signal.SIGKILL
        notes[stage] = steps_saved(workdir, stage)
    for how, num_rows in ((signal.SIGTERM, 12), (signal.SIGINT, 15)):
        code, output = launcher.interrupt(workdir, 'ppo', num_rows, how)
        saved = max(steps_saved(workdir, 'ppo'))
        notes[how] = code, output, saved, rows(workdir, 'ppo')[-1]['step']
    launcher.finish(workdir)
    return workdir, notes


def test_the_kills_came_midway(disturbed):
    _, notes = disturbed
    for stage in STAGES:
        assert 0 < max(notes[stage]) < STEPS[stage]
        assert len(notes[stage]) <= 3  # two are kept, a third may be on its way


@pytest.mark.parametrize('stage', STAGES)
def test_parameters_are_bit_identical(undisturbed, disturbed, stage):
    workdir, _ = disturbed
    expected = results(undisturbed, stage)
    assert jax.tree.leaves(expected)
    jax.tree.map(np.testing.assert_array_equal, results(workdir, stage), expected)


@pytest.mark.parametrize('stage', STAGES)
def test_metrics_are_the_same_rows(undisturbed, disturbed, stage):
    workdir, _ = disturbed
    table = rows(workdir, stage)
    assert [row['step'] for row in table] == list(range(1, STEPS[stage] + 1))
    assert table == rows(undisturbed, stage)


@pytest.mark.parametrize('stage', STAGES)
def test_evaluations_are_the_same(undisturbed, disturbed, stage):
    for name in ('eval.json', 'model.json'):
        ours = (disturbed[0] / stage / name).read_text()
        assert ours == (undisturbed / stage / name).read_text()


@pytest.mark.parametrize('how', [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_saves_the_step_it_came_in_and_leaves(disturbed, how):
    code, output, saved, logged = disturbed[1][how]
    assert code == 128 + how
    assert saved == logged >= 12
    end = f'ppo: stopped by {how.name}; step {saved} of 24 is saved, the same command'
    assert end in output and 'Traceback' not in output


def test_the_same_command_on_a_finished_run_returns_at_once(launcher, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob('*.json*')}
    assert 'is finished' in launcher.finish(undisturbed)
    after = {path: path.stat().st_mtime_ns for path in undisturbed.rglob('*.json*')}
    assert after == before
