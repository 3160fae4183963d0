"""What odd inputs have in common: the random changes, and how their outcome is judged.

An input is good: it is accepted, or refused by a ``ValueError`` that says its place, in
less than ten seconds. Everything else is a failure: another exception, which a user
would see as a traceback, an error without a place, a hang. The kinds of inputs stand in
the other files of this folder; ``__main__.py`` runs them.
"""

import contextlib
import copy
import io
import json
import math
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# A hang is more than this of the process's own time, so that a machine with other work
# to do makes none, or of the clock's, for what waits and does not work.
SECONDS, CLOCK_SECONDS = 10, 90
DEEP = b'[' * 3000 + b']' * 3000
LONGEST_MESSAGE = 6000  # characters


class Case(NamedTuple):
    """An odd input."""

    about: str  # what was made odd, to find it again
    call: Callable[[], Any]  # what reads it
    places: Sequence[str]  # one of them stands in its error
    allowed: tuple[type[BaseException], ...] = ()  # told by the command too


class Hang(BaseException):
    """The alarm; no handler takes it for an error of its own."""


def outcome(case: Case) -> str:
    """'told', 'accepted', or a line that says what went wrong."""

    def ring(*_: Any) -> None:
        raise Hang

    alarms = (signal.SIGPROF, signal.SIGALRM)
    previous = [signal.signal(number, ring) for number in alarms]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(CLOCK_SECONDS)
    start = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            case.call()
        result = 'accepted'
    except Hang:
        result = f'hang: {case.about}'
    except (ValueError, *case.allowed) as error:
        result = _judged(case, str(error))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        result = f'traceback: {case.about}: {type(error).__name__}: {error!s:.300}'
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in zip(alarms, previous):
            signal.signal(number, handler)
    if time.process_time() - start > SECONDS:
        result = f'hang: {case.about}'
    return result


def _judged(case: Case, message: str) -> str:
    if not any(place in message for place in case.places):
        return f'no place: {case.about}: {message:.300}'
    if len(message) > LONGEST_MESSAGE:
        return f'too long: {case.about}: {len(message)} characters: {message:.300}'
    return 'told'


# -------------------------------------------------------------------------- odd values


def nested(depth: int) -> Any:
    """A list in a list in a list …"""
    value: Any = 'x'
    for _ in range(depth):
        value = [value]
    return value


TEXTS = (
    '',
    ' ',
    '\n',
    '\0',
    '\ud800',
    'a\udfffb',
    '\u2028',
    '\u202eabc',
    'é',
    '👩‍👩‍👧',
    'None',
    'null',
    'true',
    '0',
    '-1',
    'nan',
    '1e999',
    '[]',
    '{}',
    '{{ x }}',
    '{% for %}',
    '%s%n',
    '../..',
    '/',
    '~nouser/x',
    '/dev/null',
    '/nowhere/at/all',
    '/' + 'x' * 300,
    'a:b',
    ':',
    'os:getcwd',
    'no.module:f',
    '</s>',
    '<|im_end|>',
    'user',
    'assistant',
    'x' * 5000,
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    10**6,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.0,
    -0.0,
    0.5,
    1.5,
    -1.5,
    1e-300,
    1e39,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
)
OTHERS = (None, True, False)


def odd_value(rng: random.Random) -> Any:
    """Something that JSON can say."""
    kind = rng.randrange(10)
    if kind < 3:
        return rng.choice(TEXTS)
    if kind < 6:
        return rng.choice(NUMBERS)
    if kind < 8:
        return rng.choice(OTHERS)
    if kind == 8:
        parts = [odd_value(rng) for _ in range(rng.randrange(3))]
        return parts if rng.random() < 0.5 else {str(x)[:9]: x for x in parts}
    return nested(rng.choice((2, 50, 99, 101, 250)))


def paths_in(value: Any, above: tuple = ()) -> list[tuple]:
    """Places of all parts of a JSON value."""
    found = [above] if above else []
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for name, part in items:
        found += paths_in(part, (*above, name))
    return found


def changed(rng: random.Random, value: Any) -> tuple[str, Any]:
    """A JSON value with one thing in it that is odd, and what that is."""
    value = copy.deepcopy(value)
    places = paths_in(value)
    if not places:
        return 'replaced', odd_value(rng)
    place = rng.choice(places)
    inside = value
    for name in place[:-1]:
        inside = inside[name]
    last, kind = place[-1], rng.randrange(8)
    if kind == 0:
        del inside[last]
        what = 'without'
    elif kind == 1 and isinstance(inside, dict):
        inside[f'{last}{rng.choice("sx_ ")}'] = inside.pop(last)
        what = 'renamed'
    elif kind == 2:
        inside[last] = [inside[last]]
        what = 'in a list:'
    elif kind == 3 and isinstance(inside, list):
        inside.append(copy.deepcopy(inside[last]))
        what = 'twice'
    else:
        inside[last] = odd_value(rng)
        what = f'{str(inside[last])[:40]!r} in'
    return f'{what} {".".join(map(str, place))}', value


def as_json(value: Any) -> str:
    """JSON of anything that :func:`odd_value` gives."""
    return json.dumps(value)


def damaged(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """Bytes of a file, as a disk, a network or an editor may leave them."""
    place = rng.randrange(len(data) + 1)
    some = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 64))))
    kinds: dict[str, Callable[[], bytes]] = {
        'cut': lambda: data[:place],
        'without its beginning': lambda: data[place:],
        'empty': lambda: b'',
        'overwritten': lambda: data[:place] + some + data[place + len(some) :],
        'with more in it': lambda: data[:place] + some + data[place:],
        'twice': lambda: data + data,
        'zeros': lambda: bytes(len(data)),
        'with a mark': lambda: b'\xef\xbb\xbf' + data,
        'in UTF-16': lambda: data.decode('latin1').encode('utf-16'),
        'with CRLF': lambda: data.replace(b'\n', b'\r\n'),
        'nested': lambda: data.replace(b':', b':' + DEEP + b',"x":', 1),
        'garbage': lambda: some * 20,
        'behind HTML': lambda: b'<!DOCTYPE html><html>' + data[:100],
    }
    name = rng.choice(list(kinds))
    return f'{name} (byte {place} of {len(data)})', kinds[name]()


def write(path: Path, text: str | bytes) -> Path:
    """Writes a file, in place of whatever was there."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path
