"""The loop that every stage runs: resume, step, log a step late, save, stop cleanly.

It knows nothing of what a step does. Resuming needs the saved state alone: the data
order and the random keys are functions of the step. Read ``stages/offline.py`` next.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import checkpoint
from rlhf_jax.metrics import Writers, open_writers, progress
from rlhf_jax.stages.console import tell
from rlhf_jax.stages.out_of_memory import naming_step
from rlhf_jax.stages.profiling import tracing, write_phases
from rlhf_jax.stages.settings import LoopSettings
from rlhf_jax.stages.watching import why_not_finite
from rlhf_jax.types import Mean, Metrics

# (state, step) -> (state, metrics still on the device, numbers known on the host)
OneStep = Callable[[Any, int], tuple[Any, Metrics, dict[str, float]]]


@jax.jit
def _values(metrics: Metrics) -> dict[str, tuple[jax.Array, Any]]:
    """The values, and whether there is one: a mean over nothing is no number."""
    return {
        name: (metric.value(), metric.weight != 0 if isinstance(metric, Mean) else True)
        for name, metric in metrics.items()
    }


def fetch(metrics: Metrics) -> dict[str, float]:
    """Metrics as Python floats, in one transfer; means over nothing are left out."""
    fetched = jax.device_get(_values(metrics)).items()
    return {name: float(value) for name, (value, is_one) in fetched if is_one}


def run_loop(
    stage_dir: Path,
    state: Any,
    num_steps: int,
    one_step: OneStep,
    *,
    settings: LoopSettings,
    writers: tuple[str, ...],
    shown: dict[str, str],
    spent: Callable[[], dict[str, float]],
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    eval_every_steps: int | None = None,
    watch: Callable[[dict[str, float]], list[str]] | None = None,
    profile: bool = False,
) -> tuple[Any, dict[str, float]]:
    """Runs ``one_step`` from the last checkpoint, or from ``state``, to ``num_steps``.

    Args:
        stage_dir: where checkpoints and metrics go.
        state: the initial state, with ``step`` and ``params``; with a checkpoint only
            its shapes are used.
        num_steps: steps of the whole stage.
        one_step: see OneStep.
        settings: how often to log and save.
        writers: names for ``metrics.open_writers``.
        shown: metric name -> name in the progress bar.
        spent: seconds that this process has taken for the stage so far, by phase.
        evaluate: numbers to log now and then.
        eval_every_steps: how often; None for never.
        watch: the metrics of a step -> warnings to print.
        profile: leave a trace and the time per phase in ``stage_dir/profile``.

    Returns:
        The final state, which is saved as a checkpoint too, and the seconds of all
        processes that worked on it, up to their last checkpoints.

    Raises:
        ValueError: a metric or a parameter is not finite. The latest checkpoint is one
            from which a step with finite metrics was made.
        SystemExit: SIGTERM or SIGINT (Ctrl-C) came; the state was saved.
    """
    with (
        checkpoint.open_checkpoints(stage_dir, settings.keep_checkpoints) as manager,
        _signals() as received,
    ):
        restored = checkpoint.restore_state(manager, state)
        state = state if restored is None else restored
        done = int(state.step)
        earlier = checkpoint.saved_seconds(manager)
        with (
            open_writers(stage_dir, writers, done if done else None) as log,
            progress(stage_dir.name, num_steps, done) as show,
            tracing(stage_dir / 'profile' if profile else None, done) as trace,
        ):
            journal = _Journal(stage_dir, manager, log, show, shown, done, watch)
            while done < num_steps:
                trace(done, state)
                state, metrics, known = naming_step(one_step)(state, done)
                journal.flush()  # the step before: the device is at work on this one
                done += 1
                logged = done % settings.log_every_steps == 0 or done in (1, num_steps)
                journal.pending = _Pending(done, metrics, known, logged)
                if eval_every_steps and done % eval_every_steps == 0:
                    journal.flush()
                    journal.write(done, evaluate(state))
                stop = received()  # asked once: it may come between two lines
                if done % settings.save_every_steps == 0 or stop is not None:
                    journal.save(done, state, _total(earlier, spent()))
                if stop is not None:
                    break
            journal.flush()
            if manager.latest_step() != done:
                journal.save(done, state, _total(earlier, spent()))
            manager.wait_until_finished()
        if (number := received()) is not None:
            raise _stopped(stage_dir.name, number, f'step {done} of {num_steps}')
    seconds = _total(earlier, spent())
    if profile:
        write_phases(stage_dir / 'profile', seconds)
    return state, seconds


def _stopped(stage: str, number: int, saved: str) -> SystemExit:
    name = signal.Signals(number).name
    tell(f'{stage}: stopped by {name}; {saved} is saved, the same command goes on')
    return SystemExit(128 + number)


def _total(*parts: dict[str, float]) -> dict[str, float]:
    phases = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in phases}


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in leaves]))


class _Pending(NamedTuple):
    """The metrics of a step that the device may still be working on."""

    step: int
    metrics: Metrics
    known: dict[str, float]
    logged: bool


class _Journal:
    """Fetches, checks and writes down the metrics of a step once the next one runs, or
    before its state is saved.
    """

    def __init__(
        self,
        stage_dir: Path,
        manager: Any,
        log: Writers,
        show: Callable[..., None],
        shown: dict[str, str],
        step: int,
        watch: Callable[[dict[str, float]], list[str]] | None,
    ):
        self.stage_dir, self.manager = stage_dir, manager
        self.log, self.show, self.shown = log, show, shown
        self.watch = watch
        self.began = time.monotonic()
        self.last = (self.began, step)  # time and step of the last row
        self.pending: _Pending | None = None

    def write(self, step: int, values: dict[str, float]) -> None:
        self.log.write(step, {'seconds': time.monotonic() - self.began, **values})

    def flush(self) -> None:
        if self.pending is None:
            return
        (step, metrics, known, logged), self.pending = self.pending, None
        values = fetch(metrics)
        bad = sorted(name for name, value in values.items() if not math.isfinite(value))
        if bad:
            # A step shows what the one before has made of the parameters.
            good = checkpoint.drop_state(self.manager, step - 1)
            raise self.diverged(', '.join(bad), step, good, why_not_finite(values))
        for warning in self.watch(values) if self.watch else ():
            tell(f'warning: {self.stage_dir.name}, step {step}: {warning}')
        if not logged:
            return
        now = time.monotonic()
        pace = (step - self.last[1]) / max(now - self.last[0], 1e-9)
        self.last = (now, step)
        values |= {name: value for name, value in known.items() if name != 'tokens'}
        if 'tokens' in known:
            values['train/tokens_per_second'] = known['tokens'] * pace
        self.write(step, values)
        bar = {self.shown[name]: values[name] for name in self.shown if name in values}
        self.show(step, **bar)

    def save(self, step: int, state: Any, seconds: dict[str, float]) -> None:
        """Saves a state once the metrics of its step, and what the step has made of the
        parameters, are known to be finite.
        """
        self.flush()
        if not _all_finite(state.params):
            last = self.manager.latest_step()
            raise self.diverged('parameters', step, last, why_not_finite({}))
        checkpoint.save_state(self.manager, step, state, seconds)

    def diverged(self, what: str, step: int, good: int | None, why: str) -> ValueError:
        kept = 'no checkpoint is kept'
        if good is not None:
            folder = self.stage_dir / 'checkpoints'
            kept = f'the last good checkpoint is that of step {good} in {folder}'
        return ValueError(
            f'{self.stage_dir.name}: {what} not finite at step {step}; {kept}. {why}'
        )


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], int | None]]:
    """Turns SIGTERM and SIGINT into a question that the loop asks between steps: which
    has come? A second SIGINT does not wait for the step to end.
    """
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if number == signal.SIGINT:
            if received:
                raise KeyboardInterrupt
            # Not by print: the signal may have come in the middle of one.
            os.write(2, b'\nsaving after this step; Ctrl-C again stops at once\n')
        received.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    try:
        previous = [signal.signal(number, note) for number in numbers]
    except ValueError:  # not the main thread: somebody else owns the signals
        yield lambda: None
        return
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in zip(numbers, previous):
            signal.signal(number, handler)
