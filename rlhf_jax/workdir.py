"""The work directory of a run: can it be written, is it of this config, is it free.

``main.py`` asks before anything is read or compiled; what lies in the directory is
described in ``docs/design.md``. Read ``stages/run.py`` next.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_jax import files

LOCK = 'lock'  # the file that a running process holds locked
# Settings that may differ when a work directory is used again: which stages to run, and
# where numbers are written to. Neither changes what a stage computes.
FREE = ('stages', 'metrics')


def claim(workdir: Path, resolved: Mapping[str, Any]) -> None:
    """Makes sure that the directory can be written and belongs to this config.

    Args:
        workdir: created when missing.
        resolved: the config as JSON holds it.

    Raises:
        ValueError: it cannot be written, holds a run of another config, or its
            config.json is damaged or missing.
    """
    path = workdir / 'config.json'
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / '.writable'
        probe.write_bytes(b'\0' * 4096)
        probe.unlink(missing_ok=True)  # another process may have made the same
    except OSError as error:
        raise ValueError(
            f'--workdir {workdir} cannot be written ({error.strerror}); make room, '
            'change its rights, or use another directory'
        ) from error
    mend = files.remake_config(path)
    if not path.exists():
        begun = (workdir / 'tokenizer').exists()
        if begun and any(workdir.glob('*/checkpoints')):
            raise ValueError(f'{path} is missing; {mend}')
        return
    old = files.read_json(path, mend)
    if 'config' not in old or not isinstance(old['config'], dict | type(None)):
        raise ValueError(f'{path} holds no config; {mend}')
    if (old := old['config']) is None:
        print(f'{path} has no config: that of this command is taken for it')
        return
    differing = [
        f'{key}: {before!r} there, {after!r} now'
        for key, before, after in _differences(old, resolved)
        if key.split('.')[0] not in FREE
    ]
    if differing:
        raise ValueError(
            f'{workdir} holds a run of another config; use another --workdir, or go '
            'back to its values:\n  ' + '\n  '.join(differing)
        )


def _differences(old: Any, new: Any, key: str = '') -> list[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted({*old, *new})
        return [
            difference
            for name in names
            for difference in _differences(
                old.get(name), new.get(name), f'{key}.{name}' if key else name
            )
        ]
    return [] if old == new else [(key, old, new)]


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other processes out of a work directory.

    The lock is the operating system's, on the file ``lock``, which says who holds it:
    it is free as soon as that process has ended, however it ended.

    Args:
        workdir: exists.

    Raises:
        ValueError: another process holds it, with its host and process id.
    """
    path = workdir / LOCK
    with path.open('a+', encoding='utf-8') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or 'another process'
            raise ValueError(
                f'--workdir {workdir} is in use by {holder}; wait until that run has '
                'ended, stop it, or use another directory'
            ) from error
        except OSError as error:  # a file system without locks
            print(
                f'warning: {path} cannot be locked ({error.strerror}); make sure that '
                'no other run uses this directory',
                flush=True,
            )
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
