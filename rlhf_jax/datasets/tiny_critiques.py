"""Critiques and revisions of ``tiny_tldr`` summaries: data by rule for small models.

    python:rlhf_jax.datasets.tiny_critiques:demonstrations?split=train
    python:rlhf_jax.datasets.tiny_critiques:comparisons?split=train

The one principle is that a summary states only what the article says
(``tiny_constitution.md``). A critique goes through what the summary states and calls
each fact right or wrong, and what the article says instead: `` Anna right, in Oslo
wrong, in Rome right.`` The revision is the same sentence with the wrong facts put
right. Every summary gives two demonstrations, of the critique and of the revision,
asked for as the kind ``revise`` asks, by ``tiny_critique.txt`` and
``tiny_revision.txt``. Of two summaries the one with fewer wrong facts is chosen, and
:func:`reason` is what a judge writes before it says so, by ``tiny_judge.txt`` or
``tiny_judge_principle.txt``. No article is in another data set of this world, or in
both splits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.datasets import tiny_world
from rlhf_jax.datasets.tiny_people import LABELLERS, state_facts, write
from rlhf_jax.datasets.tiny_tldr import SEED, make_prompt
from rlhf_jax.datasets.tiny_world import Article, words_of
from rlhf_jax.labels.constitution import read_constitution
from rlhf_jax.labels.critique import critique_prompt, fill, revision_prompt

CONSTITUTION = Path(__file__).with_name('tiny_constitution.md')
CRITIQUE = Path(__file__).with_name('tiny_critique.txt')
REVISION = Path(__file__).with_name('tiny_revision.txt')
JUDGE = Path(__file__).with_name('tiny_judge.txt')
JUDGE_BY_PRINCIPLE = Path(__file__).with_name('tiny_judge_principle.txt')
LABELS = (' wrong', ' right')  # the last summary is: of the first, of it better
NUMBER, COMPARED = (
    13,
    14,
)  # part of the seeds, so that no other data set has these articles
RIGHT = 0.25  # of the summaries, which invent nothing
SIZES = {'train': 8_000, 'test': 250}  # summaries


class Criticised(NamedTuple):
    """A summary, what is to be said of it, and what it should have been."""

    article: Article
    summary: str
    critique: str
    revision: str


def make_criticised(rng: np.random.Generator) -> Criticised:
    """Draws an article and a summary as labellers write them, but mostly wrong: where
    few facts are, a small model copies the article and does not read the summary.
    """
    article = tiny_world.make_article(rng)
    labeller = LABELLERS[int(rng.integers(len(LABELLERS)))]
    coverage, invention = 0.4 + 0.6 * rng.random(), 0.2 + 0.6 * rng.random()
    if rng.random() < RIGHT:
        invention = 0.0
    stated = state_facts(article, coverage, invention, rng)
    opening, tail = (rng.random(2) < labeller.filler).tolist()
    seed = int(rng.integers(2**32))
    # The same generator state gives both sets of values the same sentence.
    summary, revision = (
        write(
            values,
            article.main.verb,
            np.random.default_rng(seed),
            opening=opening,
            tails=int(tail),
        )
        for values in (stated, {slot: article.main.facts[slot] for slot in stated})
    )
    return Criticised(article, summary, make_critique(article, summary), revision)


def make_critique(article: Article, summary: str) -> str:
    """What is right and wrong in a summary, in the order in which it is stated; of what
    is wrong, what would have been right.
    """
    said = []
    for word in dict.fromkeys(words_of(summary)):
        slot = tiny_world.SLOT_OF.get(word)
        if slot is None:
            continue
        said.append(f'{_mention(article, slot, word)} ')
        truth = article.main.facts[slot]
        said[-1] += 'right' if word == truth else 'wrong'
        if word != truth:
            said.append(f'{_mention(article, slot, truth)} right')
    return ', '.join(said or ['something is wrong']) + '.'


def _mention(article: Article, slot: str, value: str) -> str:
    event = dataclasses.replace(article.main, facts={slot: value})
    return event.mention(slot, np.random.default_rng(0))  # there is one way to say it


def demonstrations(split: str = 'train') -> list[dict[str, Any]]:
    """Demonstrations for a critic: critiques and revisions by turns.

    Args:
        split: 'train' or 'test'.

    Raises:
        ValueError: no such split.
    """
    (principle,) = read_constitution(
        CONSTITUTION, ('critique_request', 'revision_request')
    )
    asked = critique_prompt(CRITIQUE), revision_prompt(REVISION)
    rows = []
    for rng in _examples(split, NUMBER):
        made = make_criticised(rng)
        values = {
            'prompt': make_prompt(made.article.text),
            'response': f' {made.summary}',
            'critique_request': str(principle.critique_request),
            'critique': f' {made.critique}',
            'revision_request': str(principle.revision_request),
        }
        for template, answer in zip(asked, (made.critique, made.revision)):
            prompt = fill(str(template.text), **values)
            rows.append({'prompt': prompt, 'completion': f' {answer}'})
    return rows


def comparisons(split: str = 'train') -> list[dict[str, Any]]:
    """Two summaries of an article as labellers write them, but half of their facts
    wrong; the one with fewer of them is ``chosen``. There is no pair of equals.

    Args:
        split: 'train' or 'test'.

    Raises:
        ValueError: no such split.
    """
    rows = []
    for rng in _examples(split, COMPARED):
        article, counts, texts = tiny_world.make_article(rng), [0, 0], ['', '']
        while counts[0] == counts[1]:
            invention = 0.5 * rng.random()
            for side in (0, 1):
                stated = state_facts(article, 0.4 + 0.6 * rng.random(), invention, rng)
                texts[side] = write(stated, article.main.verb, rng)
                truth = article.main.facts
                counts[side] = sum(truth[slot] != x for slot, x in stated.items())
        better = int(counts[1] < counts[0])
        rows.append(
            {
                'prompt': make_prompt(article.text),
                'chosen': f' {texts[better]}',
                'rejected': f' {texts[1 - better]}',
            }
        )
    return rows


def _examples(split: str, number: int) -> Iterator[np.random.Generator]:
    if split not in SIZES:
        raise ValueError(f'split={split!r}; use {" or ".join(map(repr, SIZES))}')
    first = 0 if split == 'train' else SIZES['train']
    for i in range(first, first + SIZES[split]):
        yield np.random.default_rng((SEED, number, i))


def reason(
    prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]
) -> list[str]:
    """What there is to say of two summaries each: `` Anna right, Oslo wrong. Anna
    right.`` It is shorter than a critique, and names every word of a fact once.

    Args:
        prompts: N texts as ``tiny_tldr.make_prompt`` writes them.
        firsts: N summaries.
        seconds: N summaries.
    """
    found = []
    for prompt, *pair in zip(prompts, firsts, seconds, strict=True):
        truth = set(tiny_world.facts(prompt).values())
        found.append('')
        for text in pair:
            stated = [w for w in words_of(text) if w in tiny_world.SLOT_OF]
            said = [
                f'{word} {"right" if word in truth else "wrong"}'
                for word in dict.fromkeys(stated)
            ]
            found[-1] += f' {", ".join(said or ["something"])}.'
    return found
