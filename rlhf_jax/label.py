"""Serves the page on which people label the items of a stage; reads and writes labels.

    python -m rlhf_jax.label --workdir runs/people --stage compare
    python -m rlhf_jax.label --workdir runs/people --stage compare --export labels.jsonl
    python -m rlhf_jax.label --workdir runs/people --stage compare --import labels.jsonl

It prints a link for every labeller and serves until Ctrl-C; the same command goes on,
with the same links. Once enough is labelled, the command of the run goes on behind the
stage. ``docs/labelling.md`` describes the page; read ``labels/store.py`` next.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import app, flags

from rlhf_jax.files import named_path, write_rows
from rlhf_jax.labels.exchange import add_labels, comparisons, read_given
from rlhf_jax.labels.queue import book_of
from rlhf_jax.labels.records import Item, to_row
from rlhf_jax.labels.session import Session
from rlhf_jax.labels.store import (
    DATABASE,
    DONE,
    LabelPlan,
    Store,
    labels_of,
    open_store,
    progress,
    read_stage,
)

PORT = 8765
PAUSE = 5.0  # seconds between two lines of progress


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    values = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f'unknown arguments {argv[1:]}; flags start with --')
        folder = named_path(values.workdir) / values.stage
        items, plan = read_stage(folder)
        given = values['import'].value
        if given is not None and (values.export or values.comparisons):
            raise ValueError('--import and --export or --comparisons: give them apart')
        if values.export is not None or values.comparisons is not None:
            if values.comparisons is not None and plan.form == 'rating':
                raise ValueError(
                    f'--comparisons: {values.stage} asks for ratings, which are no '
                    'comparisons; use --export'
                )
            _export(folder, items, values.export, values.comparisons)
        elif given is not None:
            store = _opened(folder, items)
            labels = read_given(named_path(given), items, plan)
            added = add_labels(store, labels)
            print(f'added {added} labels; {len(labels) - added} were there already')
            print(progress(items, labels_of(folder / DATABASE), plan).line)
        else:
            serve(folder, values.host, values.port)
    except (ValueError, OSError) as error:
        if os.environ.get('RLHF_JAX_TRACEBACK'):
            raise
        print(f'error: {error}', file=sys.stderr)
        sys.exit(1)


def _export(
    folder: Path, items: list[Item], labels_to: str | None, pairs_to: str | None
) -> None:
    labels = labels_of(folder / DATABASE)
    if labels_to is not None:
        _write('export', labels_to, map(to_row, labels))
        print(f'wrote {len(labels)} labels to {labels_to}')
    if pairs_to is not None:
        rows = comparisons(items, labels)
        _write('comparisons', pairs_to, rows)
        print(f'wrote {len(rows)} comparisons to {pairs_to}')


def _write(flag: str, name: str, rows: Iterable[dict[str, Any]]) -> None:
    try:
        write_rows(named_path(name), rows)
    except OSError as error:
        raise ValueError(
            f'--{flag}={name} cannot be written ({error.strerror}); name a file in a '
            'folder that is there and may be written to'
        ) from error


def _opened(folder: Path, items: list[Item]) -> Store:
    if (folder / DONE).exists():
        raise ValueError(
            f'{folder} is finished: its labels have been used. Add a stage to the run '
            'to label more; --export writes those that are there'
        )
    store = open_store(folder / DATABASE)
    store.claim(items)
    return store


def serve(folder: Path, host: str = '127.0.0.1', port: int = PORT) -> None:
    """Serves the page of a stage until Ctrl-C.

    Args:
        folder: of the stage, with its items and its plan.
        host: address to listen on; that of the loopback is seen by this machine alone.
        port: 0 for any that is free.

    Raises:
        ValueError: the stage has not begun or is finished, the address is taken or not
            of this machine, or the extra ``label`` is not installed.
    """
    try:
        import uvicorn

        from rlhf_jax.labels.server import make_app
    except ImportError as error:
        raise ValueError(
            f"the page needs {error.name}; `pip install 'rlhf_jax[label]'` installs it"
        ) from error
    items, plan = read_stage(folder)
    store = _opened(folder, items)
    listening = _listen(host, port)
    _introduce(folder, items, plan, store, host, listening.getsockname()[1])
    changed = threading.Event()
    session = Session(store, book_of(items, plan))
    threading.Thread(target=_tell, args=(session, changed), daemon=True).start()
    config = uvicorn.Config(
        make_app(session, changed.set, _tell_refused),
        log_level='warning',
        access_log=False,
        server_header=False,
        lifespan='off',
        ws='none',
        timeout_graceful_shutdown=3,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    print('\nstopped; the same command goes on, with the same links', flush=True)


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, _, _, address = found[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        mend = {
            errno.EADDRINUSE: 'another program listens there; stop it, or give another '
            '--port (0 takes one that is free)',
            errno.EACCES: 'give a --port above 1023',
        }.get(error.errno, 'give an address of this machine as --host')
        raise ValueError(
            f'--host={host} --port={port}: {error.strerror}; {mend}'
        ) from error
    return listening


def _introduce(
    folder: Path, items: list[Item], plan: LabelPlan, store: Store, host: str, port: int
) -> None:
    labels = labels_of(store.path)
    state = progress(items, labels, plan)
    print(f'{folder}: {state.line}')
    if state.done:
        print('enough is labelled: the command of the run goes on')
    shown, local = _address(host)
    print('Links, one for each labeller (who has a link labels in that name):')
    width = max(map(len, plan.labellers))
    for name, token in store.tokens(plan.labellers).items():
        print(f'  {name:<{width}}  http://{shown}:{port}/#{token}')
    if local:
        tunnel = shlex.join(
            ['ssh', '-L', f'{port}:{shown}:{port}', socket.gethostname()]
        )
        print(f'They work on this machine; on another one behind `{tunnel}`.')
    else:
        print(
            'warning: texts and links go unencrypted over the network; outside a '
            'trusted one let a proxy with TLS stand before it'
        )
    if refused := store.refused():
        print(f'Requests with a wrong token so far: {refused}')
    print('Ctrl-C stops; the same command goes on.', flush=True)


def _address(host: str) -> tuple[str, bool]:
    """What stands in a link, and whether only this machine reaches it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host, host == 'localhost'
    if address.is_unspecified:
        return socket.gethostname(), False
    text = f'[{address}]' if address.version == 6 else str(address)
    return text, address.is_loopback


def _tell(session: Session, changed: threading.Event) -> None:
    """Prints how far the labelling is, while it changes, and that it has ended."""
    items, last = [*session.book.items.values()], ''
    while True:
        time.sleep(PAUSE)
        try:
            if why := session.why_closed():
                line = f'no more answers are taken: {why}; Ctrl-C stops'
            elif changed.is_set():
                changed.clear()
                labels = labels_of(session.store.path)
                state = progress(items, labels, session.book.plan)
                end = '; enough: the command of the run goes on' if state.done else ''
                line = f'{state.line}{end}'
            else:
                continue
        except ValueError as error:
            line = f'error: {error}'
        if line != last:
            print(line, flush=True)
        last = line


def _tell_refused(host: str, count: int) -> None:
    if count < 10 or count % 100 == 0:
        print(f'refused a wrong token from {host} ({count} so far)', flush=True)


def run() -> None:
    """Entry point; defines the flags, so that an import of this file defines none."""
    # A console without UTF-8 shows other characters by their code.
    sys.stdout.reconfigure(errors='backslashreplace')
    flags.DEFINE_string('workdir', None, 'Work directory of the run.', required=True)
    flags.DEFINE_string('stage', None, 'Stage whose items to label.', required=True)
    text = 'Address to listen on; by default only this machine can reach it.'
    flags.DEFINE_string('host', '127.0.0.1', text)
    text = 'Port to listen on; 0 takes one that is free.'
    flags.DEFINE_integer('port', PORT, text, lower_bound=0, upper_bound=65535)
    text = 'JSON lines to write every label to, instead of serving.'
    flags.DEFINE_string('export', None, text)
    text = 'JSON lines to write comparisons to, one for each label: chosen, rejected.'
    flags.DEFINE_string('comparisons', None, text)
    text = 'JSON lines of labels or comparisons to add, instead of serving.'
    flags.DEFINE_string('import', None, text)
    app.run(main)


if __name__ == '__main__':
    run()
