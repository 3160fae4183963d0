"""Lines for the person who watches a run; of several processes the first alone prints.

Read ``offline.py`` next.
"""

from __future__ import annotations

import jax

from rlhf_jax.data.examples import Dataset


def tell(line: str) -> None:
    """Prints a line."""
    if jax.process_index() == 0:
        print(line, flush=True)


def tell_left_out(data: Dataset) -> Dataset:
    """The same data; prints how many records were dropped, cut or skipped, if any.

    It is a warning where most of them were left out.
    """
    counts = data.counts
    is_cut = counts.truncated and counts.what != 'texts'  # of those nothing is lost
    if not (is_cut or counts.dropped_overlong or counts.skipped_bad):
        return data
    line = f'data: {counts.describe()}'
    if 2 * counts.kept < counts.read:
        line = f'warning: most of a file is left out: {counts.describe()}'
        if counts.dropped_overlong > counts.skipped_bad:
            line += "; raise the longest bucket, or set overlong='truncate'"
    tell(line)
    return data
