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


def tell_shared(trained_on: Dataset, held_out: Dataset) -> None:
    """Prints a warning where prompts that a stage trains on are among its held-out
    ones.
    """
    seen = {record.prompt for record in trained_on.records}
    shared = sum(record.prompt in seen for record in held_out.records)
    if shared:
        tell(
            f'warning: {shared} of the {len(held_out.records)} prompts of '
            f'{held_out.counts.spec} are among those of {trained_on.counts.spec}, '
            'which are trained on: what is measured on them says less'
        )


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
