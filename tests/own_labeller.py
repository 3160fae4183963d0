"""A labeller of a user's own: the response with more words of the prompt is better."""

import dataclasses

from rlhf_jax.labels.records import Label
from rlhf_jax.stages.labellers import Answered, Asks


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    margin: int = 1  # words; a smaller difference is a tie


def asks(hp):
    return Asks('comparison', 2)  # form, responses of an item


def check(run, where, hp):
    if hp.margin < 1:
        raise ValueError(f'{where}.margin={hp.margin}; use 1 or more')


def label(asked):
    labels = []
    for item in asked.items:
        words = set(item.prompt.split())
        first, second = (len(words & set(text.split())) for text in item.completions)
        is_tie = abs(first - second) < asked.hp.margin
        probability = 0.5 if is_tie else float(first > second)
        labels.append(
            Label(item=item.item, labeller='overlap', probability=probability)
        )
    return Answered(asked.items, labels)
