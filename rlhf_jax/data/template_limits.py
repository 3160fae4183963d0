"""Bounds for chat templates: seconds and memory that one conversation may take.

A template is a program that comes with a model, and one that does not end must not hang
the run. A thread looks ten times a second at what is being rendered, and raises an
exception in the thread that takes too long or too much. A single call that does all the
work, such as ``10 ** 10 ** 9``, cannot be interrupted: such ones are refused before.
Read ``chat.py`` next.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import re
import resource
import sys
import threading
import time
from collections.abc import Iterator

import jinja2
from jinja2 import nodes

# What transformers adds to Jinja.
MARKS = re.compile(r'\{%-?\s*(?:end)?generation\s*-?%\}')
SECONDS = 5.0
MEMORY = 2**30  # bytes, beyond the largest that the process has had
TICK = 0.1  # seconds between two looks
LARGEST_FACTOR = 10**6  # of a product that is written in a template

_UNIT = 1 if sys.platform == 'darwin' else 1024  # of ru_maxrss, in bytes


class TemplateStuck(ValueError):
    """The template takes too long or too much memory, or would."""


class _Stop(BaseException):
    """Ends a rendering from outside; no handler of Jinja's takes it for its own."""


@dataclasses.dataclass
class _Rendering:
    """What a thread is rendering, as the watching thread has seen it."""

    ticks: int = 0  # looks, not seconds: a process that was stopped is not late
    peak: int = 0  # bytes at the first look
    reason: str | None = None  # why it was ended

    def look(self) -> str | None:
        """Why it should be ended, if it should."""
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
        self.peak = self.peak or used
        self.ticks += 1
        if self.ticks * TICK > SECONDS:
            return f'it has not come to its end in {SECONDS:g} seconds'
        if used - self.peak > MEMORY:
            return f'it takes more than {MEMORY / 2**30:g} GiB of memory'
        return None


class _Watch:
    """The thread that looks at what others render."""

    def __init__(self) -> None:
        self.renderings: dict[int, _Rendering] = {}  # by thread
        self.lock = threading.Lock()
        self.begun = threading.Event()
        self.thread: threading.Thread | None = None

    def begin(self) -> _Rendering:
        with self.lock:
            # Not begun yet, or in a process that was forked.
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._look, daemon=True)
                self.thread.start()
            rendering = self.renderings[threading.get_ident()] = _Rendering()
        self.begun.set()
        return rendering

    def end(self) -> None:
        with self.lock:
            self.renderings.pop(threading.get_ident(), None)

    def _look(self) -> None:
        while True:
            self.begun.wait()
            time.sleep(TICK)
            with self.lock:
                if not self.renderings:
                    self.begun.clear()
                for thread, rendering in self.renderings.items():
                    if rendering.reason is None and (reason := rendering.look()):
                        rendering.reason = reason
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(thread), ctypes.py_object(_Stop)
                        )


WATCH = _Watch()


@contextlib.contextmanager
def limited(template: str) -> Iterator[None]:
    """Ends what is rendered in its body when it takes too long or too much memory.

    Args:
        template: what is rendered there.

    Raises:
        TemplateStuck: it was ended, or the template has a power or a product that could
            not be.
    """
    check_arithmetic(template)
    rendering = WATCH.begin()
    try:
        try:
            yield
        finally:
            WATCH.end()
    except _Stop as error:
        WATCH.end()
        raise TemplateStuck(
            f'the chat template was stopped: {rendering.reason}; mend its loops, or '
            'use another template'
        ) from error


@functools.lru_cache(maxsize=16)
def parse(template: str) -> nodes.Template:
    """The syntax tree of a template.

    Raises:
        ValueError: it is no Jinja.
    """
    environment = jinja2.Environment(extensions=['jinja2.ext.loopcontrols'])
    try:
        tree = environment.parse(MARKS.sub('', template))
        list(tree.find_all(nodes.Node))  # as deep as a reader will go
        return tree
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f'the chat template is no Jinja: line {error.lineno}: {error}'
        ) from error
    except RecursionError as error:
        raise ValueError('the chat template is no Jinja: it is nested too deep') from (
            error
        )


@functools.lru_cache(maxsize=16)
def check_arithmetic(template: str) -> None:
    """Refuses powers, and products with a factor above a million: what such a call
    takes has no bound. A template that is no Jinja passes.

    Raises:
        TemplateStuck: there is one, with its line.
    """
    try:
        tree = parse(template)
    except ValueError:
        return
    for node in tree.find_all((nodes.Pow, nodes.Mul)):
        factors = [
            part.value
            for part in (node.left, node.right)
            if isinstance(part, nodes.Const) and isinstance(part.value, int)
        ]
        if isinstance(node, nodes.Pow) or any(f > LARGEST_FACTOR for f in factors):
            what = 'a power' if isinstance(node, nodes.Pow) else f'× {max(factors)}'
            raise TemplateStuck(
                f'the chat template has {what} in line {node.lineno}, whose result '
                'may take any time and memory; write the number out'
            )
