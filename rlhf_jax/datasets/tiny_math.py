r"""``tiny_math``: embedded word problems in GSM8K's shape, for RLVR on a laptop.

    Mia has 12 pens. Mia finds 7 more. Mia sells 4. How many pens does Mia have now?
    Answer: 12 + 7 = 19. 19 - 4 = 15. #### 15

One or two steps, sums and differences of small numbers, every digit a token. Nothing is
downloaded and nothing is stored: record ``i`` is drawn from a fixed seed. Three kinds,
each for the splits ``train`` and ``test``:

* ``texts``: ``text``, correct sums, to learn arithmetic from;
* ``demonstrations``: ``prompt``, ``completion``, ``kind``; ``WRONG`` of them are wrong
  on purpose, so that imitation is not enough: a slip in a step, a step the wrong way,
  or an answer before the last step;
* ``prompts``: ``prompt``, ``reference`` (the number), ``steps``.

A problem belongs to one split by the checksum of its text, so that no problem of a test
split stands in any train split; the sums in them are the same few thousand. Specs read
``python:rlhf_jax.datasets.tiny_math:prompts?split=train``; ``sources.py`` reads them.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from rlhf_jax.config import nearest
from rlhf_jax.data.tokenizer import learn_words, word_tokenizer

SEED = 20240  # record i of a kind draws from (SEED, kind, split, i)
SIZES = {
    'texts': {'train': 12_000, 'test': 300},
    'demonstrations': {'train': 6_000, 'test': 500},
    'prompts': {'train': 6_000, 'test': 500},
}
SPLITS = ('train', 'test')
WRONG = 0.3  # of the demonstrations
TEST_PERCENT = 10  # of the problems

NAMES = ('Ada', 'Ben', 'Eva', 'Ken', 'Liz', 'Mia', 'Sam', 'Tom')
THINGS = ('apples', 'books', 'coins', 'eggs', 'keys', 'maps', 'pens', 'toys')
GAINS = ('buys {} more', 'finds {} more', 'wins {} more', 'gets {} as a gift')
LOSSES = ('sells {}', 'loses {}', 'gives {} away', 'breaks {}')
START, CHANGE = (3, 40), (2, 20)  # numbers of a problem, both ends included
SUMS = 6  # in a text


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem and its numbers."""

    prompt: str
    start: int
    changes: tuple[int, ...]  # one or two, negative for a loss


def make_problem(rng: np.random.Generator, split: str) -> Problem:
    """Draws problems until one belongs to the split; no amount is ever negative."""
    while True:
        name, things = rng.choice(NAMES), rng.choice(THINGS)
        start, *changes = _numbers(rng, int(rng.integers(1, 3)))
        told = [f'{name} has {start} {things}.']
        for change in changes:
            phrase = rng.choice(GAINS if change > 0 else LOSSES)
            told.append(f'{name} {phrase.format(abs(change))}.')
        told.append(f'How many {things} does {name} have now?\nAnswer:')
        prompt = ' '.join(told)
        is_test = zlib.crc32(prompt.encode()) % 100 < TEST_PERCENT
        if is_test == (split == 'test'):
            return Problem(prompt, start, tuple(changes))


def _numbers(rng: np.random.Generator, num_changes: int) -> list[int]:
    numbers = [int(rng.integers(START[0], START[1] + 1))]
    for _ in range(num_changes):
        change = int(rng.integers(CHANGE[0], CHANGE[1] + 1))
        is_loss = rng.random() < 0.5 and change <= sum(numbers)
        numbers.append(-change if is_loss else change)
    return numbers


def work(start: int, changes: tuple[int, ...], slips: tuple[int, ...]) -> str:
    """A worked answer, ending in '#### n'.

    Args:
        start: the amount at the beginning.
        changes: what is added in every step.
        slips: what every step's result is off by.
    """
    steps, amount = [], start
    for change, slip in zip(changes, slips):
        result = amount + change + slip
        steps.append(f'{amount} {"+" if change > 0 else "-"} {abs(change)} = {result}.')
        amount = result
    return f' {" ".join(steps)} #### {amount}'


def _text(rng: np.random.Generator, split: str) -> dict[str, Any]:
    sums = (_numbers(rng, 2) for _ in range(SUMS // 2))
    worked = (work(first, tuple(rest), (0, 0)) for first, *rest in sums)
    return {'text': ' '.join(one.partition(' ####')[0].strip() for one in worked)}


def _demonstration(rng: np.random.Generator, split: str) -> dict[str, Any]:
    problem = make_problem(rng, split)
    changes = problem.changes
    slips, kind = [0] * len(changes), 'right'
    if rng.random() < WRONG:
        kind = str(rng.choice(('slip', 'wrong way', 'early')[: 1 + len(changes)]))
        step = int(rng.integers(len(changes)))
        if kind == 'slip':
            slips[step] = int(rng.choice((1, 2, 10)))
        elif kind == 'early':
            changes = changes[:1]
        else:
            turned = tuple(-c if i == step else c for i, c in enumerate(changes))
            lowest = min(np.cumsum((problem.start, *turned)))
            changes, slips[step] = (turned, 0) if lowest >= 0 else (changes, 1)
            kind = kind if lowest >= 0 else 'slip'
    completion = work(problem.start, changes, tuple(slips))
    return {'prompt': problem.prompt, 'completion': completion, 'kind': kind}


def _prompt(rng: np.random.Generator, split: str) -> dict[str, Any]:
    problem = make_problem(rng, split)
    answer = str(problem.start + sum(problem.changes))
    return {
        'prompt': problem.prompt,
        'reference': answer,
        'steps': len(problem.changes),
    }


def _records(
    kind: str, make: Callable[[np.random.Generator, str], dict[str, Any]], split: str
) -> Iterator[dict[str, Any]]:
    if split not in SPLITS:
        raise ValueError(f'tiny_math has no split {split!r}{nearest(split, SPLITS)}')
    number = list(SIZES).index(kind), SPLITS.index(split)
    for i in range(SIZES[kind][split]):
        yield make(np.random.default_rng((SEED, *number, i)), split)


def texts(split: str) -> Iterator[dict[str, Any]]:
    """Records of ``text``; ``split`` is 'train' or 'test'."""
    return _records('texts', _text, split)


def demonstrations(split: str) -> Iterator[dict[str, Any]]:
    """Records of ``prompt``, ``completion``, ``kind``; ``split`` as in :func:`texts`.

    ``kind`` is 'right', or what is wrong: 'slip', 'wrong way', 'early'.
    """
    return _records('demonstrations', _demonstration, split)


def prompts(split: str) -> Iterator[dict[str, Any]]:
    """Records of ``prompt``, ``reference``, ``steps``; split as in :func:`texts`."""
    return _records('prompts', _prompt, split)


def tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the problems is a token, and so is every digit.

    Returns:
        As :func:`rlhf_jax.data.tokenizer.word_tokenizer`.
    """
    records = [*demonstrations('test'), *texts('test')]
    corpus = (
        record[name]
        for record in records
        for name in ('prompt', 'completion', 'text')
        if name in record
    )
    words = learn_words(corpus, split_digits=True)
    return word_tokenizer(words, split_digits=True)
