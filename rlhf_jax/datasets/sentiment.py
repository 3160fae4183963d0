"""Positive continuations: the records and the judge of ``configs/sentiment.py``.

The task of Ziegler et al. 2019 (arXiv 1909.08593, §3.1) on data that anybody has:

* stories: texts of any kind; the first sentences of one and a line break are a prompt,
  the next ones a demonstration (without the break a small model cannot tell the end of
  a prompt, where it must go on, from the end of its response);
* labelled texts: half of them make comparisons, a positive text against a negative one
  behind the opening of a story; the other half trains the judge, which shares
  nothing else with the reward model either.

A text belongs to one part by its checksum, so that equal texts never stand in two, and
the records are the same on every machine. ``sources.py`` reads the functions here as
``python:rlhf_jax.datasets.sentiment:pairs?stories=…&labels=…&part=train``.
"""

from __future__ import annotations

import collections
import functools
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rlhf_jax.config import nearest
from rlhf_jax.data.sources import SourceRecord, read
from rlhf_jax.files import named_path

# Percent of the checksums, from and to. A story opens one kind of record only.
STORY_PARTS = {
    'demonstrations train': (0, 30),
    'demonstrations test': (30, 35),
    'pairs train': (35, 55),
    'pairs test': (55, 60),
    'prompts train': (60, 85),
    'prompts test': (85, 100),
}
LABEL_PARTS = {
    'train': (0, 40),
    'test': (40, 50),
    'judge train': (50, 90),
    'judge test': (90, 100),
}
# All lengths are in characters, and texts are cut between sentences alone.
OPENING = (40, 150)
CONTINUATION = (20, 80)
LABELLED = (12, 90)
SIMILAR = 6  # lengths of the two texts of a pair lie in the same bin of this width

SENTENCE = re.compile(r'.+?[.!?]+["\')”]*(?=\s|$)')
WORD = re.compile(r"[a-z']+|[.!?]")
# The groups of goemotions/labels_group.txt that are one clear sentiment.
GOEMOTIONS = {'1': False, '3': True}


# ----------------------------------------------------------------------------- records


def demonstrations(stories: str, part: str) -> Iterator[dict[str, str]]:
    """Openings and how they go on: ``prompt``, ``completion``.

    Args:
        stories: data spec of records with ``text``.
        part: 'train' or 'test'.
    """
    for opening, continuation in _stories(stories, f'demonstrations {part}'):
        yield {'prompt': opening, 'completion': continuation}


def prompts(stories: str, part: str) -> Iterator[dict[str, str]]:
    """Openings to continue: ``prompt``, ``reference``; arguments as in
    :func:`demonstrations`.
    """
    for opening, continuation in _stories(stories, f'prompts {part}'):
        yield {'prompt': opening, 'reference': continuation}


def pairs(stories: str, labels: str, part: str) -> Iterator[dict[str, str]]:
    """Comparisons: a positive and a negative text of one source and of similar length.

    Args:
        stories: data spec of records with ``text``; their openings are the prompts.
        labels: a directory with ``uci_sentiment`` and ``goemotions``, or a data spec of
            records with ``text`` and ``label``, 0 or 1.
        part: 'train' or 'test'.

    Returns:
        Records of ``prompt``, ``chosen``, ``rejected``, ``source``.
    """
    openings = [opening for opening, _ in _stories(stories, f'pairs {part}')]
    matched = _matched(labels, part)
    for opening, (source, positive, negative) in zip(
        itertools.cycle(openings), matched
    ):
        yield {
            'prompt': opening,
            'chosen': positive,
            'rejected': negative,
            'source': source,
        }


# ------------------------------------------------------------------------------- judge


def judge(
    prompts: Sequence[str], responses: Sequence[str], *, labels: str
) -> np.ndarray:
    """1 where a response, by itself, is positive to the judge, else 0.

    The judge is naive Bayes on the words and word pairs of its half of the labelled
    texts; :func:`judge_accuracy` says how good it is.

    Source: Wang & Manning 2012, "Baselines and Bigrams", who find it hard to beat on
        snippets.

    Args:
        prompts: not looked at.
        responses: N texts.
        labels: as in :func:`pairs`.

    Returns:
        [N] float64.
    """
    weights = _judge_weights(labels)
    return np.array([float(_evidence(weights, text) > 0) for text in responses])


def judge_accuracy(labels: str) -> tuple[float, int]:
    """Accuracy of :func:`judge` on texts kept from it, and their number, half
    positive.
    """
    texts = [text for _, *pair in _matched(labels, 'judge test') for text in pair]
    said = judge([''] * len(texts), texts, labels=labels)
    return float(np.mean(said == np.tile([1.0, 0.0], len(texts) // 2))), len(texts)


@functools.cache
def _judge_weights(labels: str) -> dict[str, float]:
    """log p(feature | positive) − log p(feature | negative), each count plus one."""
    counts = (collections.Counter(), collections.Counter())
    for _, *pair in _matched(labels, 'judge train'):
        for count, text in zip(counts, pair):
            count.update(_features(text))
    features = counts[0].keys() | counts[1].keys()
    totals = [count.total() + len(features) for count in counts]
    return {
        feature: np.log((counts[0][feature] + 1) / totals[0])
        - np.log((counts[1][feature] + 1) / totals[1])
        for feature in features
    }


def _evidence(weights: dict[str, float], text: str) -> float:
    return sum(weights.get(feature, 0.0) for feature in _features(text))


def _features(text: str) -> set[str]:
    words = WORD.findall(text.lower())
    return {*words, *map(' '.join, zip(words, words[1:]))}


# ------------------------------------------------------------------------------ reading


def _stories(stories: str, part: str) -> Iterator[tuple[str, str]]:
    """Openings and continuations of the stories of a part that have both."""
    low, high = _range(part, STORY_PARTS)
    for record in read(stories):
        text = _plain(_text_of(record))
        if not low <= _checksum(f'story {text}') < high:
            continue
        sentences = SENTENCE.findall(text)
        opening, rest = _whole_sentences(sentences, *OPENING)
        continuation, _ = _whole_sentences(rest, *CONTINUATION)
        if opening and continuation:
            yield f'{opening}\n', continuation


def _whole_sentences(
    sentences: list[str], least: int, most: int
) -> tuple[str, list[str]]:
    """The first sentences with ``least`` characters ('' if above ``most``), the
    rest.
    """
    for count in range(1, len(sentences) + 1):
        text = ' '.join(sentence.strip() for sentence in sentences[:count])
        if len(text) >= least:
            return (text if len(text) <= most else ''), sentences[count:]
    return '', []


def _matched(labels: str, part: str) -> Iterator[tuple[str, str, str]]:
    """(source, positive text, negative text) of a part, matched by their lengths."""
    low, high = _range(part, LABEL_PARTS)
    bins: dict[tuple[str, int], tuple[list[str], list[str]]] = {}
    for source, text, positive in _labelled(labels):
        text = _ending(_plain(text))
        if text and low <= _checksum(text) < high:
            sides = bins.setdefault((source, len(text) // SIMILAR), ([], []))
            sides[0 if positive else 1].append(text)
    for (source, _), sides in bins.items():
        for positive, negative in zip(*sides):
            yield source, positive, negative


def _labelled(labels: str) -> Iterator[tuple[str, str, bool]]:
    """(source, text, whether it is positive)."""
    folder = named_path(labels)
    if not folder.is_dir():
        for record in read(labels):
            label = record.fields.get('label')
            if label not in (0, 1):
                raise ValueError(f'{record.where}: label is {label!r}, not 0 or 1')
            yield 'labels', _text_of(record), label == 1
        return
    reviews = sorted(folder.glob('uci_sentiment/*_labelled.txt'))
    comments = sorted(folder.glob('goemotions/*.tsv'))
    if not reviews + comments:
        raise ValueError(
            f'{folder} holds neither uci_sentiment/*_labelled.txt nor goemotions/*.tsv'
        )
    for file in reviews:
        for text, label in _lines(file, '[01]'):
            yield file.stem, text, label == '1'
    for file in comments:
        for text, label in _lines(file, r'\d(,\d)*'):
            if label in GOEMOTIONS:
                yield 'goemotions', text, GOEMOTIONS[label]


def _lines(file: Path, label: str) -> Iterator[tuple[str, str]]:
    """Text and label of the lines ``text TAB label[ TAB anything]`` of a file."""
    lines = file.read_text(encoding='utf-8').rstrip('\n').split('\n')
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(rf'([^\t]*)\t({label})(\t.*)?', line)
        if match is None:
            raise ValueError(f'{file}:{number}: not text, tab and label ({label})')
        yield match[1], match[2]


def _text_of(record: SourceRecord) -> str:
    text = record.fields.get('text')
    if not isinstance(text, str):
        raise ValueError(f"{record.where}: the field 'text' is missing or no text")
    return text


def _plain(text: str) -> str:
    """One line, without the markup of the IMDb reviews."""
    return ' '.join(text.replace('<br />', ' ').split())


def _ending(text: str) -> str:
    """A text if it is short, else its last sentences, '' if they do not fit either.

    A review says at its end what its author thinks.
    """
    least, most = LABELLED
    if len(text) > most:
        sentences = [sentence.strip() for sentence in SENTENCE.findall(text)]
        tails = (' '.join(sentences[i:]) for i in range(len(sentences)))
        text = next((tail for tail in tails if len(tail) <= most), '')
    return text if len(text) >= least else ''


def _checksum(text: str) -> int:
    """0 to 99."""
    return zlib.crc32(text.lower().encode('utf-8')) % 100


def _range(part: str, known: dict[str, tuple[int, int]]) -> tuple[int, int]:
    if part not in known:
        raise ValueError(f'there is no part {part!r}{nearest(part, known)}')
    return known[part]
