"""Several documents in one row: less padding, and every document as if it were alone.

``TokenBatch.segments`` keeps them apart; see ``models.transformer.visible``. Read
``sources.py`` next.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.columns import GrowingTable
from rlhf_jax.data.examples import Dataset, TokenExample


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts items into as few rows as best-fit-decreasing finds.

    The longest item goes first, and every item into the fullest row that has room for
    it; of equal ones the first.

    Source: Ding et al. 2024, arXiv 2404.10830, §3.2; within 11/9 of the optimum
        (Johnson 1973).

    Args:
        lengths: of the items, 1 to ``capacity``.
        capacity: of a row.

    Returns:
        The items of every row, each in ascending order; rows by their first item.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(room, (lengths[item], -1))
        if place == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(item)
        bisect.insort(room, (left - lengths[item], row))
    return sorted(map(sorted, rows))


def pack(data: Dataset, length: int) -> Dataset:
    """The documents of a data set in rows of up to ``length`` tokens.

    Args:
        data: of TokenExamples.
        length: tokens.
    """
    sizes = data.examples.columns['tokens'].lengths.tolist()
    rows = best_fit(sizes, length)
    examples = GrowingTable()
    for row in rows:
        parts = [data.examples[i] for i in row]
        counts = [len(part.tokens) for part in parts]
        examples.append(
            TokenExample(
                tokens=np.concatenate([part.tokens for part in parts]),
                loss=np.concatenate([part.loss for part in parts]),
                segments=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
            )
        )
    records = data.records.take(row[0] for row in rows)
    counts = dataclasses.replace(data.counts, rows=len(rows), row_length=length)
    return Dataset(examples.finish(), records, counts)
