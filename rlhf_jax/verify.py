r"""Rewards that a program can check: right answers, passed tests, kept formats.

Every function here is a reward function, ``fn(prompts, responses, …) -> [N]``, to be
named in a config, where the records' reference answers and other fields reach it by
the names of its parameters (``stages/scoring.py``):

    rewards={'correct': dict(fn='rlhf_jax.verify:numeric_answer',
                             args={'where': ('####',)})}

Text is read by regular expressions and never executed. Where an answer stands is told
by names of places, and the first that a text has decides:

    '####'       behind the last #### (GSM8K), to the end of the line
    'boxed'      in the last \boxed{…} (MATH)
    '<answer>'   in the last <answer>…</answer> (DeepSeek-R1)
    'answer is'  behind the last "answer is", "answer:" or "answer =", in its line
    'text'       everything
    'last'       everything; of several numbers the last, elsewhere the first counts

It stands beside the ladder and imports nothing of the package. Read
``stages/scoring.py`` next, or ``docs/algorithms/verifiable_rewards.md``.
"""

from __future__ import annotations

import importlib
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

PLACES = ('####', 'boxed', '<answer>', 'answer is', 'text', 'last')
NUMBER_PLACES = ('####', 'boxed', '<answer>', 'answer is', 'last')
IGNORED = ('case', 'space', 'punctuation')

ANSWER_IS = re.compile(r'answer\s*(?:is|:|=)\s*:?', re.IGNORECASE)
FRACTION = re.compile(r'([0-9]?)\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}')
SPELLINGS = {'−': '-', '{,}': ',', r'\%': '%', r'\$': '$', r'\!': '', r'\,': ''}
NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w)\]}%])[-+])?          # 5-3 has no −3
    [$€£]?
    (?<![A-Za-z0-9_])(?<![0-9]\.)          # nor has x2 a 2
    (?:
        (?P<whole>[0-9]+)[ ]+(?P<part>[0-9]+/[0-9]+)            # 1 1/2
      | (?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?
          |\.[0-9]+)
        (?:[eE](?P<e>[-+]?[0-9]+)(?!\w)
          |\s*(?:×|\*|x|\\times|\\cdot)\s*10\s*\^\s*\{?(?P<ten>[-+]?[0-9]+)\}?)?
        (?:\s?/\s?(?P<below>[0-9]+(?:\.[0-9]+)?))?
    )
    (?P<percent>\s?(?:%|percent\b))?
    """,
    re.VERBOSE,
)


# ----------------------------------------------------------------------------- answers


def exact_match(
    prompts: Sequence[str],
    responses: Sequence[str],
    references: Sequence[str],
    *,
    where: Sequence[str] = ('text',),
    ignore: Sequence[str] = ('case', 'space'),
    separator: str | None = None,
) -> np.ndarray:
    """1 where the answer of a response is its reference answer, else 0.

    Args:
        prompts: N texts, not looked at.
        responses: N texts.
        references: N texts.
        where: the answer stands, places of the module docstring.
        ignore: differences that do not count, of ``IGNORED``; 'space' makes runs of
            white space one space and strips the ends.
        separator: stands between several accepted answers in a reference, such as '|';
            None: a reference is one answer.

    Returns:
        [N] float64.

    Raises:
        ValueError: unequal numbers, an unknown name, or a reference in which nothing
            is left to compare.
    """
    _check_names('where', where, PLACES)
    _check_names('ignore', ignore, IGNORED)
    scores = []
    for _, response, reference in zip(prompts, responses, references, strict=True):
        several = reference.split(separator) if separator else [reference]
        accepted = {_normal(one, ignore) for one in several} - {''}
        if not accepted:
            raise ValueError(
                f'the reference {reference!r} is empty without {", ".join(ignore)}; '
                'ignore less, or give another reference'
            )
        found, _ = find_answer(response, where)
        scores.append(found is not None and _normal(found, ignore) in accepted)
    return np.asarray(scores, np.float64)


def numeric_answer(
    prompts: Sequence[str],
    responses: Sequence[str],
    references: Sequence[str],
    *,
    where: Sequence[str] = NUMBER_PLACES,
    tolerance: float = 1e-6,
    percent: float = 0.01,
    unreadable: float = 0.0,
) -> np.ndarray:
    r"""1 where a response gives the number of its reference, 0 where another.

    Right is |x − x_ref| ≤ tolerance·max(1, |x_ref|). :func:`read_number` says what a
    number is. A place that is there without a number is unreadable, not passed over.

    Source: Cobbe et al. 2021, arXiv 2110.14168 (GSM8K), whose answers stand behind
        '####'; as a reward: Lambert et al. 2024 (RLVR), arXiv 2411.15124.

    Deviations: the last '####' counts, where GSM8K's grader takes the first.

    Args:
        prompts: N texts, not looked at but for errors.
        responses: N texts.
        references: N texts, numbers or worked answers, read at ``NUMBER_PLACES``.
        where: the number stands in a response, places of the module docstring.
        tolerance: relative, and absolute below 1.
        percent: what a percent sign multiplies by; 1 ignores the sign.
        unreadable: score of a response without a number in its place.

    Returns:
        [N] float64.

    Raises:
        ValueError: unequal numbers, an unknown place, a negative tolerance, or a
            reference without a number.
    """
    _check_names('where', where, PLACES)
    if not tolerance >= 0:
        raise ValueError(f'tolerance={tolerance}; use 0 or more')
    scores = []
    for prompt, response, reference in zip(prompts, responses, references, strict=True):
        right = _number_at(reference, NUMBER_PLACES, percent)
        if right is None:
            raise ValueError(
                f'the reference {reference!r} of prompt {prompt!r} has no number'
            )
        said = _number_at(response, where, percent)
        close = said is not None and abs(said - right) <= tolerance * max(1, abs(right))
        scores.append(unreadable if said is None else float(close))
    return np.asarray(scores, np.float64)


def check_numeric_answer(references: str) -> None:
    """Refuses a reference without a number: ``scoring`` asks for every record.

    Raises:
        ValueError: it has none.
    """
    if _number_at(references, NUMBER_PLACES, 1.0) is None:
        raise ValueError(f'the reference {references!r} has no number')


def find_answer(text: str, where: Sequence[str]) -> tuple[str | None, str | None]:
    """What stands in the first place that a text has, and that place's name; None
    where it has none. The module docstring lists the places; an unclosed one is none.
    """
    for place in where:
        if place in ('text', 'last'):
            return text, place
        if place == 'boxed':
            found = _in_braces(text, r'\boxed{')
        elif place == '<answer>':
            start, end = text.rfind('<answer>'), text.rfind('</answer>')
            found = text[start + len(place) : end] if 0 <= start < end else None
        else:
            marks = [m.end() for m in ANSWER_IS.finditer(text)]
            if place == '####':
                marks = [m.end() for m in re.finditer(place, text)]
            found = text[marks[-1] :].lstrip().partition('\n')[0] if marks else None
        if found is not None:
            return found, place
    return None, None


def read_number(
    text: str, *, last: bool = False, percent: float = 0.01
) -> float | None:
    r"""The first (or last) number of a text, None where there is none.

    Numbers have a sign, a currency sign in front, commas between groups of three, a
    decimal point, an exponent (``1.5e3``, ``1.5 × 10^3``), or are fractions (``3/4``,
    ``1 1/2``, ``\frac{3}{4}``) or percentages. A digit inside a word (``x2``) is none,
    and neither is what is no finite float (``1/0``, ``1e999``).

    Args:
        text: anything.
        last: the last number instead of the first.
        percent: what a percent sign multiplies by.
    """
    for spelling, plain in SPELLINGS.items():
        text = text.replace(spelling, plain)
    text = FRACTION.sub(lambda m: f'{m[1] and m[1] + " "}{m[2]}/{m[3]}', text)
    matches = list(NUMBER.finditer(text))
    return _value(matches[-1 if last else 0], percent) if matches else None


def _value(match: re.Match[str], percent: float) -> float | None:
    """As floats: an exponent of a million digits must not become an integer."""
    if match['whole']:
        above, below = (float(part) for part in match['part'].split('/'))
        value = float(match['whole']) + above / below if below else math.nan
    else:
        exponent = match['e'] or match['ten']
        digits = match['digits'].replace(',', '')
        value = float(f'{digits}e{exponent}' if exponent else digits)
        below = float(match['below'] or 1)
        value = value / below if below else math.nan
    value *= percent if match['percent'] else 1
    value *= -1 if match['sign'] == '-' else 1
    return value if math.isfinite(value) else None


def _number_at(text: str, where: Sequence[str], percent: float) -> float | None:
    found, place = find_answer(text, where)
    last = place == 'last'
    return None if found is None else read_number(found, last=last, percent=percent)


def _in_braces(text: str, opening: str) -> str | None:
    """What stands between the last ``opening`` and the brace that closes it."""
    start = text.rfind(opening)
    if start < 0:
        return None
    depth = 1
    for i in range(start + len(opening), len(text)):
        depth += {'{': 1, '}': -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len(opening) : i]
    return None


def _normal(text: str, ignore: Sequence[str]) -> str:
    if 'case' in ignore:
        text = text.casefold()
    if 'punctuation' in ignore:
        text = text.translate(str.maketrans('', '', string.punctuation))
    return ' '.join(text.split()) if 'space' in ignore else text


def _check_names(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    if isinstance(given, str) or not given and name == 'where':
        raise ValueError(
            f'{name}={given!r}; use a list with some of {", ".join(known)}'
        )
    for one in given:
        if one not in known:
            raise ValueError(f'{name} has {one!r}; known are {", ".join(known)}')


# ----------------------------------------------------------------------------- formats


def regex(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    pattern: str,
    match: Literal['search', 'full'] = 'search',
) -> np.ndarray:
    r"""1 where a regular expression matches a response, else 0.

    Args:
        prompts: N texts, not looked at.
        responses: N texts.
        pattern: of Python's ``re``; flags stand in it: ``(?i)``, ``(?s)``.
        match: anywhere, or the whole response.

    Returns:
        [N] float64.

    Raises:
        ValueError: no regular expression, or another ``match``.
    """
    _check_names('match', (match,), ('search', 'full'))
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f'pattern={pattern!r} is no regular expression: {error}'
        ) from error
    matches = compiled.fullmatch if match == 'full' else compiled.search
    return np.asarray([matches(text) is not None for text in responses], np.float64)


def tagged(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    tags: Sequence[str] = ('think', 'answer'),
) -> np.ndarray:
    """1 where a response is these parts in this order and nothing else, else 0.

    ``<think>…</think> <answer>…</answer>``: every tag once, white space between the
    parts and around them. A prompt that ends in the first tag, as chat templates write
    it for models that think, has opened the first part: the response goes on inside it.

    Source: the format reward of DeepSeek-AI 2025 (DeepSeek-R1), arXiv 2501.12948,
        §2.2.2, which says what is rewarded and not how it is matched.

    Args:
        prompts: N texts, of which the first tag at the end is looked at.
        responses: N texts.
        tags: their names, in order.

    Returns:
        [N] float64.
    """
    if isinstance(tags, str) or not tags:
        raise ValueError(f'tags={tags!r}; use a list of names, such as {["think"]}')
    names = [re.escape(tag) for tag in tags]
    inside = rf'(?:(?!</?(?:{"|".join(names)})>).)*'
    parts = [rf'<{name}>{inside}</{name}>' for name in names]
    pattern = r'\s*'.join(['(?s)', *parts, ''])
    first = f'<{tags[0]}>'
    whole = [
        first + response if prompt.rstrip().endswith(first) else response
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return regex(prompts, whole, pattern=pattern, match='full')


# ------------------------------------------------------------------------------- tests


def unit_tests(
    prompts: Sequence[str],
    responses: Sequence[str],
    tests: Sequence[Any],
    *,
    run: str,
    reward: Literal['all', 'share'] = 'all',
) -> np.ndarray:
    """What your own test runner says of every response: all passed, or which share.

    Nothing is executed here: ``run(prompt, response, tests) -> (passed, total)`` is
    yours, and so are its sandbox and its **timeout**: a runner that hangs hangs the
    run. A test that times out counts in ``total`` and not in ``passed``.

    Source: Le et al. 2022 (CodeRL), arXiv 2207.01780, reward programs by what becomes
        of them in unit tests.

    Deviations: they tell programs that do not compile or crash from those that fail a
        test; a runner can only count.

    Args:
        prompts: N texts.
        responses: N texts.
        tests: N, the field ``tests`` of the records, whatever the runner reads.
        run: 'package.module:function'.
        reward: 'all' is 1 where every test passes, else 0; 'share' is passed/total.

    Returns:
        [N] float64.

    Raises:
        ValueError: no such function, another ``reward``, a runner that fails, or one
            that returns no two counts 0 ≤ passed ≤ total, total ≥ 1.
    """
    _check_names('reward', (reward,), ('all', 'share'))
    runner = _load(run)
    scores = []
    for prompt, response, test in zip(prompts, responses, tests, strict=True):
        asked = f'prompt {prompt!r}, response {response!r}'
        try:
            counts = runner(prompt, response, test)
        except Exception as error:
            raise ValueError(
                f'run={run!r} failed with {type(error).__name__}: {error} ({asked})'
            ) from error
        if not _are_counts(counts):
            raise ValueError(
                f'run={run!r} returned {counts!r}; return two integers, passed and '
                f'total, 0 ≤ passed ≤ total and at least one test ({asked})'
            )
        passed, total = counts
        scores.append(passed == total if reward == 'all' else passed / total)
    return np.asarray(scores, np.float64)


def _are_counts(counts: Any) -> bool:
    if not isinstance(counts, (tuple, list)) or len(counts) != 2:
        return False
    whole = all(isinstance(n, (int, np.integer)) for n in counts)
    return whole and 0 <= counts[0] <= counts[1] and counts[1] >= 1


def _load(name: str) -> Callable[[str, str, Any], tuple[int, int]]:
    module, _, attribute = name.partition(':')
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f'run={name!r} cannot be imported ({error}); write package.module:function'
        ) from error
