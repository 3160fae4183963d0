"""The loop that every stage runs: resume, step, log a step late, save, stop cleanly.

It knows nothing of what a step does. Resuming needs the saved state alone: the data order and the
random keys are functions of the step. Read ``stages/offline.py`` next.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from rlhf_jax import checkpoint
from rlhf_jax.metrics import open_writers, progress
from rlhf_jax.stages.settings import LoopSettings
from rlhf_jax.types import Metrics

# (state, step) -> (state, metrics still on the device, numbers known on the host)
OneStep = Callable[[Any, int], tuple[Any, Metrics, dict[str, float]]]


@jax.jit
def _values(metrics: Metrics) -> dict[str, jax.Array]:
    return {name: metric.value() for name, metric in metrics.items()}


def fetch(metrics: Metrics) -> dict[str, float]:
    """Metrics as Python floats, in one transfer."""
    return {
        name: float(value) for name, value in jax.device_get(_values(metrics)).items()
    }


def run_loop(
    stage_dir: Path,
    state: Any,
    num_steps: int,
    one_step: OneStep,
    *,
    settings: LoopSettings,
    writers: tuple[str, ...],
    shown: dict[str, str],
    evaluate: Callable[[Any], dict[str, float]] | None = None,
) -> Any:
    """Runs ``one_step`` from the last checkpoint, or from ``state``, to ``num_steps``.

    Args:
        stage_dir: where checkpoints and metrics go.
        state: the initial state; with a checkpoint only its shapes are used.
        num_steps: steps of the whole stage.
        one_step: see OneStep.
        settings: how often to log, save, evaluate.
        writers: names for ``metrics.open_writers``.
        shown: metric name -> name in the progress bar.
        evaluate: numbers to log every ``eval_every_steps``.

    Returns:
        The final state; it is saved as a checkpoint too.

    Raises:
        ValueError: a metric is not finite; nothing is saved after the last good checkpoint.
        SystemExit: SIGTERM came; the state was saved.
    """
    with (
        checkpoint.open_checkpoints(stage_dir, settings.keep_checkpoints) as manager,
        _sigterm() as terminated,
    ):
        restored = checkpoint.restore_state(manager, state)
        state = state if restored is None else restored
        start = int(state.step)
        began, last_logged = time.monotonic(), (time.monotonic(), start)
        pending: tuple[int, Metrics, dict[str, float]] | None = None
        with (
            open_writers(stage_dir, writers, start if start else None) as log,
            progress(stage_dir.name, num_steps, start) as show,
        ):

            def flush() -> None:
                nonlocal pending, last_logged
                if pending is None:
                    return
                step, metrics, known = pending
                pending = None
                values = fetch(metrics)
                _check_finite(values, step, stage_dir)
                if step % settings.log_every_steps == 0 or step in (1, num_steps):
                    now = time.monotonic()
                    pace = (step - last_logged[1]) / max(now - last_logged[0], 1e-9)
                    last_logged = (now, step)
                    values |= {k: v for k, v in known.items() if k != 'tokens'}
                    if 'tokens' in known:
                        values['train/tokens_per_second'] = known['tokens'] * pace
                    log.write(step, {'seconds': now - began, **values})
                    bar = {
                        label: values[name]
                        for name, label in shown.items()
                        if name in values
                    }
                    show(step, **bar)

            done = start
            while done < num_steps:
                state, metrics, known = one_step(state, done)
                flush()  # the step before: the device is already at work on this one
                done += 1
                pending = (done, metrics, known)
                every = settings.eval_every_steps
                if (
                    evaluate is not None
                    and every
                    and done % every == 0
                    and done < num_steps
                ):
                    flush()
                    log.write(
                        done, {'seconds': time.monotonic() - began, **evaluate(state)}
                    )
                stop = terminated()  # asked once: it may come between two lines
                if done % settings.save_every_steps == 0 or stop:
                    flush()
                    checkpoint.save_state(manager, done, state)
                if stop:
                    break
            flush()
            if manager.latest_step() != done:
                checkpoint.save_state(manager, done, state)
            manager.wait_until_finished()
        if terminated():
            raise SystemExit(128 + signal.SIGTERM)
    return state


def _check_finite(values: dict[str, float], step: int, stage_dir: Path) -> None:
    bad = sorted(
        name for name, value in values.items()
        if not math.isfinite(value) and not name.startswith(('eval/',))
    )  # fmt: skip
    if bad:
        raise ValueError(
            f'{stage_dir.name}: {", ".join(bad)} not finite at step {step}; the last good '
            f'checkpoint is in {stage_dir / "checkpoints"}. Lower the learning rate or look at '
            'the data around that step'
        )


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM into a question that the loop asks between steps."""
    received = []

    def note(*_: Any) -> None:
        received.append(os.getpid())

    try:
        previous = signal.signal(signal.SIGTERM, note)
    except ValueError:  # not the main thread: somebody else owns the signals
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)
