"""What is said when memory runs out: what asked for how much, and which settings ask
for less.

XLA tells of a device's memory by an error that begins with RESOURCE_EXHAUSTED, Python
and NumPy of the host's by MemoryError. Used by ``main.py`` and ``stages/loop.py``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

ERRORS = (MemoryError, jax.errors.JaxRuntimeError)
# Settings of a stage, in the order of what they cost least.
RAISE = ('num_microbatches', 'num_minibatches')
LOWER = (
    'batch_size',
    'eval_batch_size',
    'decode_rows',
    'max_new_tokens',
    'buckets',
    'prompt_buckets',
    'ptx_buckets',
    'members',
)
AMOUNT = re.compile(
    r'(?:allocat\w+|reserve|Used|Reserving)\s+([\d.]+)\s*(bytes|[KMGTP]?i?B?)\b',
    re.IGNORECASE,
)
UNITS = 'BKMGTP'


@contextlib.contextmanager
def told(config: ConfigDict, stage: str, doing: str) -> Iterator[None]:
    """Turns what its body raises for want of memory into an error for the user.

    Args:
        config: of the run.
        stage: that is at work.
        doing: e.g. 'training'.

    Raises:
        ValueError: memory ran out.
    """
    try:
        yield
    except ERRORS as error:
        host = isinstance(error, MemoryError)
        if not host and 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        step = next((n for n in _notes(error) if n.startswith('step ')), None)
        place = f'{doing}, {step}' if step else doing
        advice = 'read less of the data, such as jsonl:PATH[:100000]'
        if doing != 'reading':
            advice = _advice(config, stage)
        raise ValueError(
            f'{stage}: out of {"host" if host else "device"} memory ({place}): '
            f'{_amount(error)}; {advice}'
        ) from error


def naming_step(one_step: Callable[..., Any]) -> Callable[..., Any]:
    """``one_step(state, done)``, whose errors of memory say in which step they came."""

    def step(state: Any, done: int) -> Any:
        try:
            return one_step(state, done)
        except ERRORS as error:
            error.add_note(f'step {done + 1}')
            raise

    return step


def _notes(error: BaseException) -> list[str]:
    return getattr(error, '__notes__', [])


def _amount(error: BaseException) -> str:
    """How much was asked for, in GiB, or else what the error says."""
    found = AMOUNT.search(str(error))
    if found is None:
        first = str(error).strip().splitlines()[:1]
        return first[0] if first else 'an allocation failed'
    unit = found[2].upper().removesuffix('BYTES') or 'B'
    number = float(found[1].rstrip('.')) * 1024 ** UNITS.index(unit[0])
    return f'{number / 2**30:,.2f} GiB were asked for'


def _advice(config: ConfigDict, stage: str) -> str:
    section = config[stage]
    there = [name for name in section if section[name] is not None]

    def named(names: tuple[str, ...]) -> str:
        found = [name for name in names if name in there]
        return ' or '.join(f'config.{stage}.{name}={section[name]}' for name in found)

    parts = [f'lower {named(LOWER)}']
    if raised := named(RAISE):
        parts.insert(0, f'raise {raised}')
    model = config.model
    if not model.remat:
        parts.append('set config.model.remat=True (and scan_unroll=1)')
    if model.dtype == 'float32':
        parts.append("set config.model.dtype='bfloat16'")
    parts.append('or split the model over more devices by config.parallel.fsdp')
    return ', '.join(parts)
