"""Rankings and ratings of ``tiny_tldr`` summaries, and sums in steps: data by rule.

Sources for reward models that learn from more than pairs, each the same at every call:

    python:rlhf_jax.datasets.tiny_judgements:rankings?split=train
    python:rlhf_jax.datasets.tiny_judgements:ratings?split=train
    python:rlhf_jax.datasets.tiny_judgements:steps?split=train

The annotators of rankings are those of the comparisons, and a ranking of two has their
odds. The records are those of ``judgements.py``; no example is in both splits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_jax.datasets import tiny_world
from rlhf_jax.datasets.tiny_people import ANNOTATORS, any_summary, spoil
from rlhf_jax.datasets.tiny_tldr import SEED, make_prompt

SIZES = {'train': 4_000, 'test': 500}
SPOILT = 0.2  # of the summaries
TIE = 0.3  # nats: an annotator who is less sure than this calls a tie
RATING_NOISE = 0.4  # standard deviation, of ratings from 0 to 4
SLIP = 0.15  # of getting a sum wrong


def rankings(split: str = 'train') -> list[dict[str, Any]]:
    """Three to five summaries of an article, ranked by one annotator, with ties.

    Utilities are gold / temperature + length_bias · words + Gumbel noise, so that two
    summaries are ordered with the odds of ``tiny_people.preference``.

    Args:
        split: 'train' or 'test'.

    Raises:
        ValueError: no such split.
    """
    return _examples(split, 10, _ranking)


def ratings(split: str = 'train') -> list[dict[str, Any]]:
    """Summaries rated from 0 to 4: ``ratings`` by dimension, and overall ``rating``.

    coverage is the share of the facts, faithfulness falls with every invention,
    brevity with every word beyond the budget; all with noise.

    Args:
        split: 'train' or 'test'.

    Raises:
        ValueError: no such split.
    """
    return _examples(split, 11, _rating)


def steps(split: str = 'train') -> list[dict[str, Any]]:
    """Running sums in steps, some with a slip: right up to the first slip, then wrong.

    Args:
        split: 'train' or 'test'.

    Raises:
        ValueError: no such split.
    """
    return _examples(split, 12, _sum)


def _examples(
    split: str, number: int, make: Callable[[np.random.Generator], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Example i draws from (SEED, number, i); the test split follows the other."""
    if split not in SIZES:
        raise ValueError(f'split={split!r}; use {" or ".join(map(repr, SIZES))}')
    start = 0 if split == 'train' else SIZES['train']
    return [
        make(np.random.default_rng((SEED, number, start + i)))
        for i in range(SIZES[split])
    ]


def _summary(article: tiny_world.Article, rng: np.random.Generator) -> str:
    summary = any_summary(article, rng)
    return spoil(summary, rng) if rng.random() < SPOILT else summary


def _ranking(rng: np.random.Generator) -> dict[str, Any]:
    article = tiny_world.make_article(rng)
    size, texts = int(rng.integers(3, 6)), []
    while len(texts) < size:
        text = _summary(article, rng)
        if text not in texts:
            texts.append(text)
    index = int(rng.integers(len(ANNOTATORS)))
    annotator = ANNOTATORS[index]
    parts = [tiny_world.gold_parts(article.text, text) for text in texts]
    utility = np.asarray(
        [
            p.reward / annotator.temperature + annotator.length_bias * p.words
            for p in parts
        ]
    )
    utility = utility + rng.gumbel(size=size)
    order = np.argsort(-utility)
    worse = -np.diff(utility[order]) >= TIE
    ranks = np.empty(size, int)
    ranks[order] = 1 + np.concatenate([[0], np.cumsum(worse)])
    return {
        'prompt': make_prompt(article.text),
        'completions': [f' {text}' for text in texts],
        'ranks': ranks.tolist(),
        'gold': [p.reward for p in parts],
        'annotator': index,
    }


def _rating(rng: np.random.Generator) -> dict[str, Any]:
    article = tiny_world.make_article(rng)
    text = _summary(article, rng)
    parts = tiny_world.gold_parts(article.text, text)
    beyond = max(0, parts.words - tiny_world.WORD_BUDGET)
    quality = {
        'coverage': 4 * parts.covered / 6,
        'faithfulness': 4 - 2 * parts.invented,
        'brevity': 4 - 0.4 * beyond,
    }
    quality['overall'] = (parts.reward + 3) * 0.4

    def noted(value: float) -> int:
        return int(np.clip(round(value + RATING_NOISE * rng.normal()), 0, 4))

    marks = {name: noted(value) for name, value in quality.items()}
    return {
        'prompt': make_prompt(article.text),
        'completion': f' {text}',
        'rating': marks.pop('overall'),
        'ratings': marks,
        'gold': parts.reward,
    }


def _sum(rng: np.random.Generator) -> dict[str, Any]:
    value = total = int(rng.integers(0, 10))
    terms, lines, labels = [], [], []
    for _ in range(int(rng.integers(2, 5))):
        term = int(rng.integers(1, 6))
        slip = rng.random() < SLIP
        wrong = int(rng.choice((-2, -1, 1, 2))) if slip else 0
        lines.append(f'{value} + {term} = {value + term + wrong}')
        value, total = value + term + wrong, total + term
        terms.append(term)
        labels.append(bool(labels[-1] if labels else True) and not slip)
    first = total - sum(terms)
    question = ' + '.join(map(str, (first, *terms)))
    return {'prompt': f'What is {question}?\n', 'completions': lines, 'labels': labels}
