"""Several labellers, and how their items are spread over them.

Read ``stages/labellers/people.py`` next.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from rlhf_jax.data import sources
from rlhf_jax.data.chat import readable
from rlhf_jax.data.formats import how_sure
from rlhf_jax.labels.records import Item, Purpose
from rlhf_jax.ranges import at_least, between
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import DataSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrowdHParams:
    """Labellers whose agreement can be measured."""

    labellers: tuple[str, ...]  # their names
    overlap: Annotated[int, at_least(1)] = 1  # labellers per item
    # of the items, those that a labeller gets a second time
    repeats: Annotated[float, between(0, 1)] = 0.0
    gold: DataSpec | None = None  # comparisons whose answer is known, for everybody


def check_crowd(where: str, hp: CrowdHParams) -> None:
    """Refuses a crowd that cannot label.

    Raises:
        ValueError: no labellers, two of one name, or fewer than an item needs.
    """
    if len(set(hp.labellers)) != len(hp.labellers) or not all(hp.labellers):
        raise ValueError(
            f'{where}.labellers={hp.labellers}: every labeller needs a name of its own'
        )
    if len(hp.labellers) < hp.overlap:
        raise ValueError(
            f'{where}.overlap={hp.overlap} labellers per item, and there are '
            f'{len(hp.labellers)}: name more in {where}.labellers'
        )


def known_items(run: Run, spec: str | None, where: str, purpose: Purpose) -> list[Item]:
    """Items whose answer is known, of comparisons, in their ``dimension`` if they have
    one; every second is turned round.

    Raises:
        ValueError: a record that is no comparison.
    """
    items = []
    for number, record in enumerate(sources.read(spec) if spec else ()):
        fields = record.fields
        pair = [fields.get(side) for side in ('chosen', 'rejected')]
        if 'prompt' not in fields or not all(isinstance(x, str) for x in pair):
            raise ValueError(
                f'{record.where}: {where}={spec!r} takes comparisons of texts: prompt, '
                'chosen, rejected'
            )
        probability, _ = how_sure(record)
        if number % 2:
            pair, probability = pair[::-1], 1 - probability
        known = {'probability': probability}
        if fields.get('dimension') is not None:
            known['dimension'] = fields['dimension']
        templated = fields.get('templated', False) is True
        prompt = fields['prompt']
        items.append(
            Item(
                item=f'{purpose}-{number}',
                prompt=prompt,
                completions=tuple(pair),
                purpose=purpose,
                known=known,
                why=fields.get('why'),
                templated=templated,
                readable=readable(run.tokenizer, prompt) if templated else None,
            )
        )
    return items


def spread(
    items: int, hp: CrowdHParams, rng: np.random.Generator
) -> list[tuple[int, int, int]]:
    """(item, labeller, repeat) of every label that is wanted: each labeller gets as
    many items as the others, give or take one.
    """
    given, wanted = np.zeros(len(hp.labellers)), []
    for item in rng.permutation(items).tolist():
        # Those with the fewest items so far, in an order that is drawn: all meet all.
        first = np.lexsort((rng.random(len(given)), given))[: hp.overlap]
        given[first] += 1
        wanted += [(item, labeller, 0) for labeller in first.tolist()]
    again = [wanted[i] for i in rng.permutation(len(wanted)).tolist()]
    again = again[: round(hp.repeats * len(wanted))]
    return wanted + [(item, labeller, 1) for item, labeller, _ in again]
