"""What ``--profile`` leaves behind: a trace of a few steps, and the time per phase.

``profile/`` in a stage's folder holds the trace, for xprof (``xprof --logdir``) and,
as ``perfetto_trace.json.gz``, for https://ui.perfetto.dev, and ``phases.md``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

# Steps of a process before the trace, in which programs are compiled, and in it.
WARM_UP, TRACED = 2, 3


@contextlib.contextmanager
def tracing(folder: Path | None, start: int) -> Iterator[Callable[[int, Any], None]]:
    """Gives a function to call before every step with its number and the state.

    It traces steps ``start + WARM_UP`` to ``start + WARM_UP + TRACED``, once the device
    has done what came before.

    Args:
        folder: where the trace goes; None for no trace.
        start: the first step of this process.
    """
    running = False

    def before(step: int, state: Any) -> None:
        nonlocal running
        if folder is None or step not in (start + WARM_UP, start + WARM_UP + TRACED):
            return
        jax.block_until_ready(state)
        if running:
            jax.profiler.stop_trace()
        else:
            jax.profiler.start_trace(folder, create_perfetto_trace=True)
        running = not running

    try:
        yield before
    finally:
        if running:  # the stage was shorter, or an error came
            jax.profiler.stop_trace()


def write_phases(folder: Path, seconds: dict[str, float]) -> None:
    """Writes and prints the seconds of a stage by phase, and their shares."""
    total = sum(seconds.values())
    lines = ['| phase | seconds | share |', '|---|---|---|']
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        lines.append(f'| {name} | {spent:.1f} | {spent / total:.0%} |')
    text = '\n'.join(lines) + '\n'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'phases.md').write_text(text, encoding='utf-8')
    print(text, end='', flush=True)
