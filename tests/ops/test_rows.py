"""Texts of any lengths as arrays, and the rows of a group."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.rows import in_groups, pad_left, pad_right, repeat_prompts

ROWS = [[5, 6], [7], [8, 9, 2]]


def test_padding_by_hand():
    tokens, mask = pad_right(ROWS)
    assert tokens.tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 2]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    tokens, mask = pad_left(ROWS, 4)
    assert tokens.tolist() == [[0, 0, 5, 6], [0, 0, 0, 7], [0, 8, 9, 2]]
    assert mask.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]]
    assert tokens.dtype == np.int32 and mask.dtype == bool


def test_a_row_that_does_not_fit():
    for pad in (pad_left, pad_right):
        with pytest.raises(ValueError, match='a row of 3 tokens .* length=2'):
            pad(ROWS, 2)


def test_responses_to_a_prompt_are_adjacent():
    tokens, mask = repeat_prompts(pad_left(ROWS), 2)
    assert tokens[:, -1].tolist() == [6, 6, 7, 7, 2, 2]
    groups = in_groups(jnp.asarray(tokens), 2)
    assert groups.shape == (3, 2, 3)
    assert (groups == groups[:, :1]).all()
    with pytest.raises(ValueError, match='6 rollout rows .* group_size=4'):
        in_groups(jnp.asarray(mask), 4)
