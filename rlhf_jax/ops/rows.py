"""Rows of a batch: texts of any lengths as arrays, and the responses to a prompt as a
group.

Read ``ops/masked.py`` next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.types import Array


def pad_right(
    rows: Sequence[Sequence[int]], length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Texts with padding behind them, as losses and reward models read them.

    Args:
        rows: B lists of ids.
        length: T; None for the longest row.

    Returns:
        (tokens [B, T] int32, 0 where there is none, mask [B, T] bool).

    Raises:
        ValueError: a row that is longer.
    """
    lengths = np.asarray([len(row) for row in rows])
    longest = int(lengths.max(initial=0))
    if length is None:
        length = longest
    if longest > length:
        raise ValueError(f'a row of {longest} tokens does not fit length={length}')
    mask = np.arange(length) < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return tokens, mask


def pad_left(
    rows: Sequence[Sequence[int]], length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with padding in front of them, as ``generate`` reads them; see
    :func:`pad_right`.
    """
    tokens, mask = pad_right([row[::-1] for row in rows], length)
    return tokens[:, ::-1].copy(), mask[:, ::-1].copy()


def repeat_prompts(tree: Any, count: int) -> Any:
    """Every prompt ``count`` times in adjacent rows: its responses are then a group.

    Args:
        tree: arrays [B, …] on the host.
        count: G.

    Returns:
        NumPy arrays [B·G, …].
    """
    return jax.tree.map(lambda x: np.repeat(x, count, axis=0), tree)


def in_groups(x: Array, size: int) -> Array:
    """[B, …] → [B/size, size, …]: the responses to a prompt stand next to each other.

    Raises:
        ValueError: rows that do not divide into groups.
    """
    if x.shape[0] % size:
        raise ValueError(
            f'{x.shape[0]} rollout rows on a device do not divide into groups of '
            f'group_size={size}; use a multiple of {size}'
        )
    return x.reshape(-1, size, *x.shape[1:])
