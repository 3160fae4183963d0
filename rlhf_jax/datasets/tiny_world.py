"""The world that ``tiny_tldr`` writes about: lexicons, articles, facts, gold reward.

An article is news of one *main* person, told among sentences about other people who do
similar things elsewhere. Six facts belong to the main event; a good summary states all
of them, none of the others' and nothing else. Because the text is made by rule, the
true quality of any summary is known (:func:`gold_reward`), which no data set of human
preferences can offer: it shows when a learned reward goes up while the truth goes down.

Pure Python and a NumPy ``Generator``; imports nothing of the package.
``tiny_people.py``, which holds the simulated writers and judges, stands on this file,
and ``tiny_tldr.py`` on both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

Facts = dict[str, str]  # slot -> value; each value is one word

# One word per value and no word in two slots, so that a word tells its slot. Jobs begin
# with a consonant because every article writes "a {job}".
LEXICON: dict[str, tuple[str, ...]] = {
    'who': tuple(
        'Anna Ben Carla David Elena Felix Greta Hugo Irene Jonas Karen Leo '
        'Maria Nina Oscar Paula Ralph Sara Tom Ursula Victor Wendy Yara Zoe'.split()
    ),
    'job': tuple(
        'baker doctor farmer teacher pilot singer painter lawyer '
        'sailor nurse gardener judge tailor writer miner chef'.split()
    ),
    'what': tuple(
        'lamps boats clocks books coins carpets drums maps rings chairs kites bells '
        'mirrors baskets hats swords candles bottles letters ladders shoes pianos '
        'flags tents'.split()
    ),
    'where': tuple(
        'Paris Rome Oslo Cairo Lima Tokyo Dublin Vienna Prague Athens Lisbon Madrid '
        'Berlin Geneva Quito Delhi Seoul Sydney Boston Havana Nairobi Milan Riga '
        'Tunis'.split()
    ),
    'when': tuple(
        'January February March April May June July August September October '
        'November December'.split()
    ),
    'why': tuple(
        'rain snow wind fire hunger love debt fear luck noise fog heat pride '
        'boredom illness war'.split()
    ),
}
SLOTS = tuple(LEXICON)
SLOT_OF = {word: slot for slot, words in LEXICON.items() for word in words}
# Verbs are no facts. Other people have other verbs and other phrases than the main one,
# so that the words beside a value tell whose it is.
VERBS = ('found', 'sold', 'bought', 'painted')
OTHER_VERBS = ('lost', 'carried', 'fixed', 'hid')

# How a circumstance is said; articles, summaries and restatements share these.
PHRASES = {
    'where': ('in {}',),
    'when': ('last {}',),
    'why': ('because of {}',),
}
OTHER_PHRASES = {
    'where': ('near {}',),
    'when': ('this {}',),
    'why': ('due to {}',),
}
SEPARATOR = '\n\n'  # behind the article, whatever follows
HEADLINES = ('News of {}.', 'Update on {}.', 'Report about {}.')
LEADS = ('Meanwhile, ', 'Elsewhere, ')  # before a sentence about somebody else
PRONOUN = 'They'
QUESTIONS = {
    'job': 'What was the job of {}? {}.',
    'what': 'What did {} have? {}.',
    'where': 'Where was {}? {}.',
    'when': 'When was the day of {}? {}.',
    'why': 'Why did {} act? {}.',
}

# The gold reward, in reward units.
COVERED_REWARD = 1.0  # per main fact that the summary states
INVENTED_COST = 1.0  # per stated lexicon value that is no fact of the main event
WORD_COST = 0.15  # per word beyond the budget
WORD_BUDGET = 14  # a plain sentence with all six facts has 12 to 14 words
FORM_REWARD = 1.0  # gained by a well-formed summary, lost by any other
PERFECT_GOLD = COVERED_REWARD * len(SLOTS) + FORM_REWARD


@dataclasses.dataclass(frozen=True)
class Event:
    """What one person did: ``facts`` holds ``who`` and some or all other slots."""

    facts: Facts
    verb: str
    main: bool

    def phrase(self, slot: str, rng: np.random.Generator) -> str:
        """Says the event's place, time or reason: 'in Rome', or 'near Rome'."""
        phrases = PHRASES if self.main else OTHER_PHRASES
        return pick(rng, phrases[slot]).format(self.facts[slot])

    def mention(self, slot: str, rng: np.random.Generator) -> str:
        """Says any fact of the event: 'Anna', 'the baker', 'found lamps', 'in Rome'."""
        if slot in PHRASES:
            return self.phrase(slot, rng)
        article = 'the' if self.main else 'some'
        before = {'who': '', 'job': f'{article} ', 'what': f'{self.verb} '}[slot]
        return before + self.facts[slot]


@dataclasses.dataclass(frozen=True)
class Article:
    """An article with the truth about it."""

    text: str
    main: Event
    others: tuple[Event, ...]


# ----------------------------------------------------------------------------- articles


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Draws one of the options uniformly."""
    return options[int(rng.integers(len(options)))]


def capitalise(text: str) -> str:
    """The text with its first letter in upper case and the others as they are."""
    return text[:1].upper() + text[1:]


def _sentence(
    name: str,
    event: Event,
    slots: Sequence[str],
    rng: np.random.Generator,
    lead: str = '',
) -> str:
    """A sentence on some slots of an event; ``name`` is the person or the pronoun."""
    said = [event.phrase(slot, rng) for slot in slots if slot in PHRASES]
    article = 'a' if event.main else 'some'
    subject = name
    if 'job' in slots and 'what' not in slots:
        head = f'{subject} worked as {article} {event.facts["job"]}'
        return lead + ' '.join([head, *said]) + '.'
    if 'job' in slots:
        subject = f'{name}, {article} {event.facts["job"]},'
    act = f'{event.verb} {event.facts["what"]}' if 'what' in slots else 'did so'
    front = said and name != PRONOUN and rng.random() < 0.25
    opening = f'{said.pop(0)}, ' if front else ''
    return capitalise(lead + opening + ' '.join([subject, act, *said])) + '.'


def _shuffled(items: Sequence[str], rng: np.random.Generator) -> list[str]:
    return [items[i] for i in rng.permutation(len(items))]


def _main_groups(rng: np.random.Generator) -> list[list[str]]:
    """Deals the five slots besides ``who`` into the two or three main sentences."""
    circumstances = _shuffled(('where', 'when', 'why'), rng)
    cut = int(rng.integers(0, 3))
    first, second = ['what', *circumstances[:cut]], circumstances[cut:]
    if rng.random() < 0.5:
        return [['job', *first], second]  # 'Anna, a baker, found …'
    job = ['job']
    if 'where' in second and rng.random() < 0.5:
        second.remove('where')
        job.append('where')  # 'Anna worked as a baker in Rome.'
    groups = [first, second] if second else [first]
    groups.insert(int(rng.integers(0, len(groups) + 1)), job)
    return groups


def _draw_events(rng: np.random.Generator) -> list[Event]:
    """The main event and one or two others; no two of them share a value."""
    count = 1 + int(rng.choice((1, 2), p=(0.5, 0.5)))
    values = {
        slot: [words[i] for i in rng.choice(len(words), count, replace=False)]
        for slot, words in LEXICON.items()
    }
    events = [Event({s: values[s][0] for s in SLOTS}, pick(rng, VERBS), main=True)]
    for i in range(1, count):
        kept = _shuffled(SLOTS[1:], rng)[:2]
        if 'what' not in kept and 'job' not in kept:
            kept.append('what')  # a sentence needs something to say
        facts = {slot: values[slot][i] for slot in SLOTS if slot in ('who', *kept)}
        events.append(Event(facts, pick(rng, OTHER_VERBS), main=False))
    return events


def make_article(rng: np.random.Generator) -> Article:
    """Draws an article of three to six sentences, about 40 words.

    The headline names the main person. Every sentence opens with its person (perhaps
    after a fronted circumstance); 'They' continues the person of the sentence before
    it. Sentences about other people stand anywhere between the main ones; they begin
    with 'Meanwhile' or 'Elsewhere' and have phrases of their own. A model of a million
    parameters learns within minutes to tell them apart by these, but not to match names
    across sentences.
    """
    main, *others = _draw_events(rng)
    told: list[tuple[Event, list[str]]] = [(main, g) for g in _main_groups(rng)]
    for other in others:
        slots = [slot for slot in _shuffled(SLOTS[1:], rng) if slot in other.facts]
        told.insert(int(rng.integers(0, len(told) + 1)), (other, slots))
    lines = [pick(rng, HEADLINES).format(main.facts['who'])]
    previous = None
    for event, slots in told:
        name = event.facts['who']
        if event is previous and ('job' not in slots or 'what' not in slots):
            name = PRONOUN if rng.random() < 0.5 else name
        lead = '' if event is main else pick(rng, LEADS)
        lines.append(_sentence(name, event, slots, rng, lead))
        previous = event
    return Article(' '.join(lines), main, tuple(others))


def restate(event: Event, rng: np.random.Generator) -> str:
    """A question with its answer, or one to three facts retold, about one person."""
    slots = _shuffled([slot for slot in SLOTS[1:] if slot in event.facts], rng)
    if rng.random() < 0.2:
        question = QUESTIONS[slots[0]]
        return question.format(event.facts['who'], event.facts[slots[0]])
    return retell(event, slots[: int(rng.integers(1, 4))], rng)


def wrong_value(
    event: Event, article: Article, slot: str, rng: np.random.Generator
) -> str:
    """A value the event lacks; half of the time one of another event, if there is
    one.
    """
    truth = event.facts[slot]
    told = (article.main, *article.others)
    others = [e.facts[slot] for e in told if e is not event and slot in e.facts]
    if others and rng.random() < 0.5:
        return pick(rng, others)
    return pick(rng, [word for word in LEXICON[slot] if word != truth])


def make_checks(
    event: Event, article: Article, count: int, rng: np.random.Generator
) -> str:
    """Facts of an event as a summary states them, half of them wrong, each called right
    or wrong at once, for pretraining: 'Checks: in Oslo wrong, the baker right.'

    They teach to tell a fact from an invention, which the reward model has to do. At
    this size it is learned within minutes only where the verdict follows the fact, and
    from :func:`make_drill` first.
    """
    said = []
    for _ in range(count):
        slot, wrong = pick(rng, tuple(event.facts)), rng.random() < 0.5
        value = event.facts[slot]
        if wrong:
            value = wrong_value(event, article, slot, rng)
        stated = dataclasses.replace(event, facts={slot: value})
        said.append(f'{stated.mention(slot, rng)} {"wrong" if wrong else "right"}')
    return f'Checks: {", ".join(said)}.'


def make_drill(article: Article, count: int, rng: np.random.Generator) -> str:
    """The main event alone in one sentence, and checks of what it says: whatever was
    not said is wrong. A model learns from these to compare a word with those before it.
    """
    slots = _shuffled(SLOTS[1:], rng)[: int(rng.integers(2, 6))]
    facts = {slot: article.main.facts[slot] for slot in ('who', *slots)}
    event = dataclasses.replace(article.main, facts=facts)
    told = Article(_sentence(facts['who'], event, slots, rng), event, ())
    return f'{told.text} {make_checks(event, told, count, rng)}'


def make_restatements(article: Article, count: int, rng: np.random.Generator) -> str:
    """Restatements about anybody in the article, for pretraining.

    They teach what a summary needs (whose fact is it, copy its word) without being one:
    each speaks of one person and at most three facts; most are about the main one.
    """
    lines = []
    for _ in range(count):
        main = rng.random() < 0.85
        other = article.others[int(rng.integers(len(article.others)))]
        lines.append(restate(article.main if main else other, rng))
    return 'Facts: ' + ' '.join(lines)


def make_chatter(article: Article, count: int, rng: np.random.Generator) -> str:
    """The same people without the article: each event told, and at once restated or
    checked.

    Copying a word over a short distance is learned first and fast; a model that has
    learned it from these texts finds the facts in whole articles sooner.
    """
    lines = []
    for event in (article.main, *article.others):
        slots = _shuffled([slot for slot in SLOTS[1:] if slot in event.facts], rng)
        lines.append(_sentence(event.facts['who'], event, slots, rng))
        if rng.random() < 0.5:
            lines += [restate(event, rng) for _ in range(count)]
        else:
            lines.append(make_checks(event, article, 2 * count, rng))
    return ' '.join(lines)


def retell(event: Event, slots: Sequence[str], rng: np.random.Generator) -> str:
    """Some facts of an event as a sentence that opens with the person's name."""
    parts = [event.facts['who']]
    if 'job' in slots:
        parts.append(f'{"the" if event.main else "some"} {event.facts["job"]}')
    if 'what' in slots:
        parts.append(f'{event.verb} {event.facts["what"]}')
    elif set(slots) != {'job'}:
        parts.append('did so')
    parts += [event.phrase(slot, rng) for slot in slots if slot in PHRASES]
    return ' '.join(parts) + '.'


# ----------------------------------------------------------------------- facts and gold


def words_of(text: str) -> list[str]:
    """The words of a text without punctuation, which is no word by itself either."""
    return [word for word in (raw.strip('.,:;?!') for raw in text.split()) if word]


def facts(article: str) -> Facts:
    """Reads the six main facts back from the text of an article.

    Args:
        article: the text, with or without what a prompt adds after it.

    Returns:
        Slot → value, in the order of ``SLOTS``.

    Raises:
        ValueError: the text is no article of this world; names what is missing.
    """
    body = article.split(SEPARATOR)[0]
    found: Facts = {}
    person = None
    for sentence in body.split('.'):
        words = words_of(sentence)
        names = [word for word in words if SLOT_OF.get(word) == 'who']
        if names:
            person = names[0]
        if 'who' not in found and person is not None:
            found['who'] = person  # the headline
        if person == found.get('who'):
            found.update({SLOT_OF[w]: w for w in words if w in SLOT_OF})
    missing = [slot for slot in SLOTS if slot not in found]
    if missing:
        raise ValueError(
            f'no {", ".join(missing)} in the article {body[:60]!r}…; '
            'pass the text of a tiny_tldr article or prompt'
        )
    return {slot: found[slot] for slot in SLOTS}


@dataclasses.dataclass(frozen=True)
class GoldParts:
    """What the gold reward of a summary is made of."""

    covered: int  # main facts stated, 0 … 6
    invented: int  # other lexicon values stated
    words: int
    well_formed: bool  # one sentence: not empty, one '.', at the end

    @property
    def reward(self) -> float:
        """The gold reward; see :func:`gold_reward`."""
        return (
            COVERED_REWARD * self.covered
            - INVENTED_COST * self.invented
            - WORD_COST * max(0, self.words - WORD_BUDGET)
            + (FORM_REWARD if self.well_formed else -FORM_REWARD)
        )


def gold_parts(article: str, summary: str) -> GoldParts:
    """Counts what :func:`gold_reward` is made of; a value said twice counts once."""
    truth = set(facts(article).values())
    words = words_of(summary)
    stated = {word for word in words if word in SLOT_OF}
    text = summary.strip()
    well_formed = bool(words) and text.endswith('.') and text.count('.') == 1
    return GoldParts(len(stated & truth), len(stated - truth), len(words), well_formed)


def gold_reward(article: str, summary: str) -> float:
    """The true quality of a summary, in reward units.

    gold = covered − invented − 0.15 · max(0, words − 14) ± 1

    where ``covered`` counts the main facts stated (0 … 6), ``invented`` the other
    lexicon values stated (made up, or a stranger's), and the last term is + for one
    well-formed sentence (not empty, exactly one '.', at the end), − for anything else.
    The best is 7. Grammar and the verb are not looked at.

    Raises:
        ValueError: ``article`` is no article of this world.
    """
    return gold_parts(article, summary).reward
