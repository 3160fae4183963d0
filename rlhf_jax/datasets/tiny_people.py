"""The people of ``tiny_world``: labellers write summaries, annotators compare them.

Labellers write the demonstrations: decent, never wilfully bad, and they leave things
out. :func:`make_pair` writes two summaries of very different quality, and annotators
choose between them, each with a temperature and a taste for length, so that a reward
model can only learn the truth with their errors on top. Read ``tiny_tldr.py`` next,
which turns all this into a data set.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from rlhf_jax.datasets import tiny_world
from rlhf_jax.datasets.tiny_world import PHRASES, SLOTS, Article, Facts, pick

OPENINGS = (
    'it was said that',
    'we heard that',
    'in short,',
    'as far as we know,',
)
TAILS = (
    'it seems',
    'and that is all',
    'as many people said',
    'once again',
    'and so on',
    'for the most part',
)
NOTHINGS = ('did something', 'was seen')
NOBODY = 'someone'
MAX_WORDS = 30  # of any summary; a longer one is cut


@dataclasses.dataclass(frozen=True)
class Labeller:
    """How one labeller writes; all are probabilities."""

    coverage: float  # of stating a fact, each of the six by itself
    filler: float  # of an opening, and again of a tail
    invention: float  # of getting a stated fact wrong


LABELLERS = (
    Labeller(coverage=0.80, filler=0.10, invention=0.02),
    Labeller(coverage=0.75, filler=0.50, invention=0.05),
    Labeller(coverage=0.70, filler=0.20, invention=0.08),
    Labeller(coverage=0.65, filler=0.05, invention=0.03),
    Labeller(coverage=0.60, filler=0.60, invention=0.04),
    Labeller(coverage=0.55, filler=0.30, invention=0.10),
    Labeller(coverage=0.50, filler=0.10, invention=0.05),
    Labeller(coverage=0.45, filler=0.40, invention=0.06),
)


@dataclasses.dataclass(frozen=True)
class Annotator:
    """How one annotator compares; :func:`preference` has the formula."""

    temperature: float  # reward units per nat
    length_bias: float  # nats per word


# One word of padding beyond the budget costs WORD_COST / temperature = 0.25 to 0.38
# nats of gold, and most annotators give more than that back for its length. So the
# preference that a reward model learns is, on the whole, slightly for padding: a policy
# that nothing anchors finds this out, while a fact (1 unit, about 2.2 nats) is worth
# far more to one that is anchored.
ANNOTATORS = (
    Annotator(temperature=0.4, length_bias=0.5),
    Annotator(temperature=0.5, length_bias=0.6),
    Annotator(temperature=0.4, length_bias=0.3),
    Annotator(temperature=0.5, length_bias=0.4),
    Annotator(temperature=0.6, length_bias=0.5),
    Annotator(temperature=0.4, length_bias=0.1),
)
FLIP_RATE = 0.02  # of a label being noted down wrongly


# ---------------------------------------------------------------------------- summaries


def _shortened(words: list[str]) -> str:
    return ' '.join(words[:MAX_WORDS]).rstrip('.,')


def write(
    stated: Facts,
    verb: str,
    rng: np.random.Generator,
    *,
    opening: bool = False,
    tails: int = 0,
) -> str:
    """Writes the stated facts as one sentence.

    The draws from ``rng`` depend on the slots stated, not on their values: the same
    generator state gives two sets of values the same sentence.

    Args:
        stated: slot → value, any subset of the slots, true or not.
        verb: used when ``what`` is stated.
        rng: draws the template.
        opening: puts an empty phrase ('We heard that') in front.
        tails: number of empty phrases at the end.

    Returns:
        A sentence with its full stop, without leading space.
    """
    subject = stated.get('who', NOBODY)
    if 'job' in stated:
        subject = f'{subject} the {stated["job"]}'
    act = f'{verb} {stated["what"]}' if 'what' in stated else pick(rng, NOTHINGS)
    slots = [slot for slot in PHRASES if slot in stated]
    said = [
        pick(rng, PHRASES[slots[i]]).format(stated[slots[i]])
        for i in rng.permutation(len(slots))
    ]
    parts = [subject, act, *said]
    if opening:
        parts.insert(0, pick(rng, OPENINGS))
    parts += [pick(rng, TAILS) for _ in range(tails)]
    return tiny_world.capitalise(_shortened(' '.join(parts).split())) + '.'


def perfect_summary(article: Article, rng: np.random.Generator) -> str:
    """A summary with all six facts and nothing else."""
    return write(article.main.facts, article.main.verb, rng)


def state_facts(
    article: Article, coverage: float, invention: float, rng: np.random.Generator
) -> Facts:
    """Keeps each fact with probability ``coverage``, one at least; gets some wrong."""
    kept = [slot for slot in SLOTS if rng.random() < coverage]
    kept = kept or [pick(rng, SLOTS)]
    return {
        slot: tiny_world.wrong_value(article.main, article, slot, rng)
        if rng.random() < invention
        else article.main.facts[slot]
        for slot in kept
    }


def make_demonstration(article: Article, rng: np.random.Generator) -> str:
    """A summary by one of the labellers, drawn uniformly."""
    labeller = LABELLERS[int(rng.integers(len(LABELLERS)))]
    stated = state_facts(article, labeller.coverage, labeller.invention, rng)
    opening, tail = rng.random(2) < labeller.filler
    return write(stated, article.main.verb, rng, opening=bool(opening), tails=int(tail))


# -------------------------------------------------------------------------- comparisons


def spoil(summary: str, rng: np.random.Generator) -> str:
    """Breaks a summary as a half-trained policy does: cut, stuttering, said twice."""
    words = summary.split()
    how = int(rng.integers(5))
    if how == 0:
        return summary.rstrip('.')
    if how == 1:
        cut = 1 + int(rng.integers(len(words)))
        return ' '.join(words[:cut]).rstrip('.,')
    if how == 2:
        at = int(rng.integers(len(words)))
        stutter = [words[at].rstrip('.,')] * int(rng.integers(3, 13))
        end = '.' if rng.random() < 0.5 else ''
        return _shortened([*words[:at], *stutter]) + end
    if how == 3:
        return _shortened([*words, *words]) + '.'
    return pick(rng, ('.', summary + '.', summary.rstrip('.') + ' and.'))


def any_summary(article: Article, rng: np.random.Generator) -> str:
    """A summary of any quality: few facts or all, true or not, with empty phrases."""
    stated = state_facts(article, rng.random(), 0.5 * rng.random() ** 2, rng)
    tails = int(rng.integers(1, 4)) if rng.random() < 0.3 else 0
    return write(
        stated, article.main.verb, rng, opening=bool(rng.random() < 0.2), tails=tails
    )


def _twins(article: Article, rng: np.random.Generator) -> tuple[str, str]:
    """A true sentence and the same with one or two facts wrong: equal in length."""
    stated = state_facts(article, 0.3 + 0.7 * rng.random(), 0.0, rng)
    slots = [slot for slot in SLOTS if slot in stated]
    wrong = dict(stated)
    for i in rng.permutation(len(slots))[: int(rng.integers(1, 3))]:
        wrong[slots[i]] = tiny_world.wrong_value(article.main, article, slots[i], rng)
    seed = int(rng.integers(2**32))
    tails = int(rng.integers(0, 3))
    first, second = (
        write(values, article.main.verb, np.random.default_rng(seed), tails=tails)
        for values in (stated, wrong)
    )
    return first, second


def _invented(article: Article, rng: np.random.Generator) -> tuple[str, str]:
    """A sentence of few facts, all true, and one of most facts, half of them wrong."""
    few = state_facts(article, 0.4, 0.0, rng)
    many = state_facts(article, 0.9, 0.5, rng)
    tails = int(rng.integers(0, 2))
    return (
        write(few, article.main.verb, rng),
        write(many, article.main.verb, rng, tails=tails),
    )


def _padded(article: Article, rng: np.random.Generator) -> tuple[str, str]:
    """A sentence, and the same with more empty phrases or with words said again."""
    stated = state_facts(article, 0.4 + 0.6 * rng.random(), 0.05, rng)
    seed = int(rng.integers(2**32))
    tails = int(rng.integers(0, 3))
    first, second = (
        write(stated, article.main.verb, np.random.default_rng(seed), tails=n)
        for n in (tails, tails + int(rng.integers(1, 3)))
    )
    if rng.random() < 0.3:
        words = first.rstrip('.').split()
        again = words[-int(rng.integers(2, 5)) :] * int(rng.integers(1, 3))
        second = _shortened([*words, *again]) + '.'
    return first, second


# Kinds of pairs and their shares; see make_pair. Where most pairs differ in length as
# well, a model of a million parameters learns length and not truth.
PAIRS = {'any': 0.35, 'twins': 0.25, 'invented': 0.15, 'padded': 0.1, 'spoilt': 0.15}


def make_pair(article: Article, rng: np.random.Generator) -> tuple[str, str, str]:
    """Two different summaries of one article, in random order.

    Returns:
        The two texts and the kind of pair: 'any' (independent of each other), 'twins'
        (the same sentence, with one or two facts wrong in one of them: they differ in
        truth alone), 'invented' (one states more facts, of which half are wrong),
        'padded' (equal in facts, one longer), 'spoilt' (one is broken).
    """
    kind = str(rng.choice(tuple(PAIRS), p=tuple(PAIRS.values())))
    first = second = ''
    while first == second:
        if kind == 'twins':
            first, second = _twins(article, rng)
        elif kind == 'invented':
            first, second = _invented(article, rng)
        elif kind == 'padded':
            first, second = _padded(article, rng)
        else:
            first, second = any_summary(article, rng), any_summary(article, rng)
            if kind == 'spoilt':
                second = spoil(first if rng.random() < 0.5 else second, rng)
    if rng.random() < 0.5:
        first, second = second, first
    return first, second, kind


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A comparison as an annotator left it."""

    chosen: str
    rejected: str
    annotator: int  # index into ANNOTATORS
    gold_chosen: float
    gold_rejected: float
    kind: str  # see make_pair


def preference(annotator: Annotator, gold_gap: float, word_gap: float) -> float:
    """How likely an annotator is to prefer a, before labels are flipped.

    P(a ≻ b) = σ((gold_a − gold_b) / temperature + length_bias · (words_a − words_b))
    """
    logit = gold_gap / annotator.temperature + annotator.length_bias * word_gap
    return float(1 / (1 + np.exp(-logit)))


def annotate(
    a: tiny_world.GoldParts,
    b: tiny_world.GoldParts,
    rng: np.random.Generator,
    length_taste: float = 1.0,
) -> tuple[int, bool]:
    """One annotator, drawn uniformly, and whether they note down a as the better."""
    index = int(rng.integers(len(ANNOTATORS)))
    return index, answer(index, a, b, rng, length_taste)


def answer(
    index: int,
    a: tiny_world.GoldParts,
    b: tiny_world.GoldParts,
    rng: np.random.Generator,
    length_taste: float = 1.0,
) -> bool:
    """Whether an annotator, by number, notes down a as the better one."""
    annotator = ANNOTATORS[index % len(ANNOTATORS)]
    annotator = dataclasses.replace(
        annotator, length_bias=length_taste * annotator.length_bias
    )
    p = preference(annotator, a.reward - b.reward, a.words - b.words)
    return bool((rng.random() < p) != (rng.random() < FLIP_RATE))


# What annotators look at when they go by one guideline alone, in units of the gold
# reward. 'wordy' asks for the opposite of 'brief', as a cost does.
GUIDELINES = {
    'helpful': lambda parts: parts.covered - parts.invented + 2 * parts.well_formed,
    'brief': lambda parts: -0.5 * parts.words + 2 * parts.well_formed,
    'wordy': lambda parts: 0.5 * parts.words,
}


def answer_by(
    guideline: str,
    index: int,
    a: tiny_world.GoldParts,
    b: tiny_world.GoldParts,
    rng: np.random.Generator,
) -> bool:
    """Whether an annotator who goes by a guideline notes down a as the better one.

    Args:
        guideline: a key of ``GUIDELINES``.
        index: of the annotator, whose temperature counts, and taste for length not.
        a: of the one summary.
        b: of the other.
        rng: draws the label.
    """
    value = GUIDELINES[guideline]
    temperature = ANNOTATORS[index % len(ANNOTATORS)].temperature
    p = 1 / (1 + np.exp(-(value(a) - value(b)) / temperature))
    return bool((rng.random() < p) != (rng.random() < FLIP_RATE))


def make_judgement(
    article: Article, rng: np.random.Generator, length_taste: float = 1.0
) -> Judgement:
    """Two summaries compared by one annotator, drawn uniformly.

    Args:
        article: that they are about.
        rng: draws the summaries, the annotator and the label.
        length_taste: multiplies every annotator's ``length_bias``; the summaries do not
            depend on it.
    """
    first, second, kind = make_pair(article, rng)
    a = tiny_world.gold_parts(article.text, first)
    b = tiny_world.gold_parts(article.text, second)
    index, likes_first = annotate(a, b, rng, length_taste)
    if likes_first:
        return Judgement(first, second, index, a.reward, b.reward, kind)
    return Judgement(second, first, index, b.reward, a.reward, kind)
