"""What a model that judges is asked: prompt files, and demonstrations of answers.

A prompt file is text with ``{prompt}``, ``{first}`` and ``{second}`` in it (to rate one
response ``{prompt}`` and ``{response}``, and where wanted ``{lowest}`` and
``{highest}``, the ends of the scale), whatever stands around them: a preamble,
examples, the ending that the label follows. ``{principle}`` is a principle's question,
and ``{reasoning}`` the place where the judge first writes down its thoughts. Responses
are put in without the white space around them.

Source: Lee et al. 2023 (RLAIF), arXiv 2309.00267, §3.1 and tables 15 to 20; the
reasoning in two steps is theirs and that of Bai et al. 2022, arXiv 2212.08073, §4.1.
Read ``constitution.py`` next.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.config import load_dotted
from rlhf_jax.data import sources
from rlhf_jax.data.formats import how_sure
from rlhf_jax.files import named_path

COMPARE = Path(__file__).with_name('judge_compare.txt')
PRINCIPLE = Path(__file__).with_name('judge_principle.txt')
RATE = Path(__file__).with_name('judge_rate.txt')
PLACES = ('prompt', 'first', 'second', 'response', 'lowest', 'highest', 'principle')
_PLACE = re.compile('{(' + '|'.join(PLACES) + ')}')


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """A prompt file."""

    before: str  # up to {reasoning}, or all of it
    after: str | None  # behind {reasoning}; None where there is none
    where: str

    @property
    def asks_principle(self) -> bool:
        """Whether a principle's question belongs into it."""
        return '{principle}' in self.before + (self.after or '')

    def fill(self, **values: str) -> str:
        """The text up to the reasoning, with its places filled; no text that is filled
        in is searched for further places.
        """
        return _filled(self.before, values)

    def fill_after(self, **values: str) -> str:
        """The text behind the reasoning, likewise."""
        return _filled(self.after or '', values)


def read_prompt(path: str | Path, needed: tuple[str, ...]) -> JudgePrompt:
    """A prompt file.

    Args:
        path: of a text file in UTF-8; line breaks at its end do not count.
        needed: the places that it must have, e.g. ``('prompt', 'first', 'second')``.

    Raises:
        ValueError: it cannot be read, a place is missing, or reasoning is asked for
            twice.
    """
    file = named_path(path)
    try:
        text = file.read_text(encoding='utf-8').rstrip('\r\n')
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'{file} cannot be read ({error})') from error
    missing = [name for name in needed if f'{{{name}}}' not in text]
    if missing:
        raise ValueError(
            f'{file}: {{{missing[0]}}} stands nowhere; a prompt file for this has '
            + ', '.join(f'{{{name}}}' for name in needed)
        )
    before, *after = text.split('{reasoning}')
    if len(after) > 1:
        raise ValueError(f'{file}: {{reasoning}} stands there {len(after)} times')
    return JudgePrompt(before, after[0] if after else None, str(file))


def flat(prompt: Any) -> str:
    """A prompt as text: messages as lines ``role: content``, where there is no content
    its tool calls as JSON.
    """
    if isinstance(prompt, str):
        return prompt
    return '\n'.join(
        f'{turn["role"]}: {turn.get("content") or json.dumps(turn.get("tool_calls"))}'
        for turn in prompt
    )


def demonstrations(
    data: str,
    prompt: str = str(COMPARE),
    labels: str = '[" 1", " 2"]',
    reason: str | None = None,
    principle: str | None = None,
    seed: str = '0',
) -> list[dict[str, Any]]:
    """Comparisons as demonstrations for a model that shall judge, as a source:

        python:rlhf_jax.labels.judge:demonstrations?data=jsonl:pairs.jsonl

    A comparison gives one, which is answered by the label of the response that is more
    likely the better one, and where the judge reasons first one of that besides. Ties
    give none.

    Args:
        data: a data spec of comparisons of texts.
        prompt: a prompt file.
        labels: a JSON list of two texts, of the first and of the second response.
        reason: ``package.module:function`` of (prompts, firsts, seconds), which gives
            what stands at ``{reasoning}``.
        principle: what stands at ``{principle}``.
        seed: of which response stands first.

    Raises:
        ValueError: no such file or function, ``reason`` or ``principle`` without its
            place or the other way round, or records that are no comparisons of texts.
    """
    template = read_prompt(prompt, ('prompt', 'first', 'second'))
    for name, given, place in (
        ('reason', reason, template.after is not None),
        ('principle', principle, template.asks_principle),
    ):
        if place != (given is not None):
            raise ValueError(
                f'{name}={given!r}, and {template.where} has {"a" if place else "no"} '
                f'place {{{"reasoning" if name == "reason" else name}}}; use both or '
                'neither'
            )
    write = None if reason is None else load_dotted(reason, 'reason')
    answers = json.loads(labels)
    rng = np.random.default_rng(int(seed))
    rows = []
    for record in sources.read(data):
        pair = [record.fields.get(side) for side in ('chosen', 'rejected')]
        if not all(isinstance(text, str) for text in pair):
            raise ValueError(f'{record.where}: chosen or rejected is no text')
        probability, _ = how_sure(record)
        if probability == 0.5:
            continue
        if probability < 0.5:
            pair.reverse()
        is_first = bool(rng.random() < 0.5)
        one, other = pair if is_first else pair[::-1]
        asked = flat(record.fields.get('prompt', ''))
        values = {'prompt': asked, 'first': one, 'second': other}
        values |= {} if principle is None else {'principle': principle}
        text = template.fill(**values)
        if write is not None:
            (thought,) = write([asked], [one], [other])
            rows.append({'prompt': text, 'completion': thought})
            text += thought + template.fill_after(**values)
        rows.append({'prompt': text, 'completion': answers[0 if is_first else 1]})
    return rows


def _filled(text: str, values: dict[str, str]) -> str:
    def put(match: re.Match[str]) -> str:
        name = match[1]
        value = values.get(name, match[0])
        return value if name in ('prompt', 'principle') else value.strip()

    return _PLACE.sub(put, text)
