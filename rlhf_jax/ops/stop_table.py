"""Stop strings as a table over tokens, for a loop that sees tokens alone.

A string that ends a response may end inside a longer token, and may be written in many
ways. The table is an automaton that reads the text of a response, one token at a time;
``generate.py`` looks its next state up. Read ``generate.py`` next.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Rows are filled up to a multiple, so that other strings have tables of the same shape.
STATES = 16
LARGEST = 1000  # bytes of all strings: the table takes 2 kB for each token of them


def stop_table(pieces: Sequence[bytes], stops: Sequence[bytes]) -> np.ndarray:
    """Which state follows a state and a token, and whether a stop string has ended.

    A state is what of the text so far can still become a stop string: the longest end
    of the text that is the beginning of one. State 0 is none of it, where every
    response begins: a stop string that begins in the prompt ends nothing.

    Source: Aho and Corasick 1975, "Efficient string matching".

    Args:
        pieces: what every token adds to the text, by id; V of them.
        stops: the strings. That of the response ends with the token in which one of
            them is completed, whatever stands before or behind it in the token.

    Returns:
        [S, V] int16, S a multiple of ``STATES``: the next state s, or −1 − s where a
        stop string ends in this token.

    Raises:
        ValueError: no string or an empty one, or more than ``LARGEST`` bytes.
    """
    if not stops or not all(stops):
        raise ValueError('an empty stop sequence would stop every response at once')
    if (size := sum(map(len, stops))) > LARGEST:
        raise ValueError(
            f'the stop sequences have {size} bytes; use at most {LARGEST}, such as '
            'only their beginnings'
        )
    begun = dict.fromkeys(stop[:n] for stop in stops for n in range(len(stop)))
    states = {text: i for i, text in enumerate(begun)}
    follow, ends = _by_bytes(states, stops)
    lengths = np.asarray([len(piece) for piece in pieces])
    order = np.argsort(-lengths, kind='stable')
    width = lengths.max(initial=0)
    text = np.zeros((len(pieces), width), np.uint8)
    for row, i in zip(text, order):
        row[: lengths[i]] = np.frombuffer(pieces[i], np.uint8)
    state = np.repeat(np.arange(len(states))[:, None], len(pieces), axis=1)
    ended = np.zeros(state.shape, bool)
    for place in range(width):
        count = np.sum(lengths > place)  # the longest stand first
        before, byte = state[:, :count], text[:count, place]
        ended[:, :count] |= ends[before, byte]
        state[:, :count] = follow[before, byte]
    table = np.zeros((-(-len(states) // STATES) * STATES, len(pieces)), np.int16)
    table[: len(states), order] = np.where(ended, -1 - state, state)
    return table


def _by_bytes(
    states: dict[bytes, int], stops: Sequence[bytes]
) -> tuple[np.ndarray, np.ndarray]:
    """The next state, and whether a string has ended, by state and byte: [S, 256]."""
    follow = np.zeros((len(states), 256), np.int64)
    ends = np.zeros(follow.shape, bool)
    for begun, i in states.items():
        for byte in set(b''.join(stops)):
            text = begun + bytes([byte])
            ends[i, byte] = text.endswith(tuple(stops))
            tails = (text[start:] for start in range(len(text) + 1))
            follow[i, byte] = next(states[tail] for tail in tails if tail in states)
    return follow, ends
