"""Stop strings over tokens: against a search in the text itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.generate import sampling, stopped
from rlhf_jax.ops.stop_table import STATES, stop_table

PIECES = [b'', b'a', b'b', b'ab', b'ba', b'aab', b'bbb', 'é'.encode(), b'\xc3', b'\xa9']


def slow_end(tokens, stops, stop_after):
    """Tokens up to and with the first in which a stop string ends; None for none."""
    text, before = b''.join(PIECES[token] for token in tokens), 0
    for count, token in enumerate(tokens, start=1):
        behind = before + len(PIECES[token])
        ends = range(before + 1, behind + 1)
        found = any(text[:end].endswith(tuple(stops)) for end in ends)
        if found and count >= stop_after:
            return count
        before = behind
    return None


@pytest.mark.parametrize('stop_after', [0, 4])
@pytest.mark.parametrize(
    'stops',
    [
        [b'a'],
        [b'aba'],
        [b'bb', b'abab'],
        [b'ab', b'abba', b'bba'],  # the beginning and the end of others
        [b'aabaab'],
        ['é'.encode()],
        [b'b' * 20],
    ],
)
def test_a_response_ends_where_a_search_in_its_text_finds_a_string(stops, stop_after):
    how = sampling(
        eos_ids=[], stop_table=stop_table(PIECES, stops), stop_after=stop_after
    )
    rows = np.random.default_rng(0).integers(0, len(PIECES), (200, 12))
    state, ended = jnp.zeros(200, jnp.int16), np.zeros((200, 12), bool)
    for place in range(12):
        ended[:, place], state = stopped(
            state, jnp.asarray(rows[:, place]), jnp.int32(place + 1), how
        )
        assert state.dtype == jnp.int16
    ours = [int(row.argmax()) + 1 if row.any() else None for row in ended]
    expected = [slow_end(row, stops, stop_after) for row in rows.tolist()]
    assert ours == expected
    assert stops == [b'b' * 20] or len(set(expected)) > 3


def test_tables_of_other_strings_have_the_same_shape():
    for stops in ([b'a'], [b'abab', b'bb'], [b'b' * STATES]):
        table = stop_table(PIECES, stops)
        assert table.shape == (STATES, len(PIECES)) and table.dtype == np.int16
    assert stop_table(PIECES, [b'b' * (STATES + 1)]).shape[0] == 2 * STATES


def test_an_id_that_the_table_lacks_is_no_text():
    how = sampling(eos_ids=[], stop_table=stop_table(PIECES, [b'a']))
    state, tokens = jnp.zeros(2, jnp.int16), jnp.array([len(PIECES), 1])
    assert stopped(state, tokens, jnp.int32(1), how)[0].tolist() == [False, True]


@pytest.mark.parametrize('stops', [[], [b''], [b'a', b'']])
def test_an_empty_string_is_refused(stops):
    with pytest.raises(ValueError, match='empty stop sequence'):
        stop_table(PIECES, stops)
