"""A language model labels: RLAIF.

Both responses stand in a filled prompt file; how likely the model is to go on with the
label of the first or of the second becomes a soft label. Every pair is judged in both
orders, and the two are averaged, because models prefer a place:

    p = ½ · (p(first | first, second) + 1 − p(first | second, first))

Source: Lee et al. 2023, arXiv 2309.00267, §3.1 and §3.2; Bai et al. 2022, arXiv
2212.08073, §4.1: principles drawn for every pair, and probabilities clamped to 40–60%
where the judge reasons first. Read ``stages/judging.py`` next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.labels.constitution import Principle, draw, read_constitution
from rlhf_jax.labels.judge import COMPARE, PRINCIPLE, flat, read_prompt
from rlhf_jax.labels.records import Item, Label
from rlhf_jax.ranges import Range
from rlhf_jax.stages.batches import Batch, write_batches
from rlhf_jax.stages.console import tell
from rlhf_jax.stages.judging import Judge, check_judge, load_judge, tokens_of
from rlhf_jax.stages.labellers import Answered, Asked, Asks
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import ModelName, QuestionSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams(QuestionSettings):
    """A judge of pairs."""

    judge: ModelName  # a language model
    labels: tuple[str, ...] = (' 1', ' 2')  # what follows for the first, the second
    # A file of principles (labels/constitution.py): one is drawn for every pair, and
    # its preference question stands at {principle}
    constitution: str | None = None
    # lowest and highest probability that a label gets
    clamp: Annotated[tuple[float, ...] | None, Range(0, 1, ascending=True)] = None


def asks(hp: HParams) -> Asks:
    """Comparisons alone."""
    return Asks('comparison', 2)


class Checked(NamedTuple):
    """What ``check`` finds."""

    judge: Judge
    principles: list[Principle]  # none without a constitution


def check(run: Run, where: str, hp: HParams) -> Checked:
    """The judge and its principles.

    Raises:
        ValueError: a prompt file that lacks a place, a constitution that cannot be
            read or that nobody asks for, or a judge that cannot judge.
    """
    if len(hp.labels) != 2:
        raise ValueError(
            f'{where}.labels={hp.labels}: two are needed, of the first and the second '
            'response'
        )
    if hp.clamp is not None and len(hp.clamp) != 2:
        raise ValueError(f'{where}.clamp={hp.clamp}: use (lowest, highest), or None')
    file = hp.prompt_file or (COMPARE if hp.constitution is None else PRINCIPLE)
    prompt = read_prompt(file, ('prompt', 'first', 'second'))
    if prompt.asks_principle != (hp.constitution is not None):
        raise ValueError(
            f'{where}.constitution={hp.constitution!r}, and {prompt.where} has '
            f'{"a" if prompt.asks_principle else "no"} place {{principle}}; use both '
            'or neither'
        )
    principles = []
    if hp.constitution is not None:
        principles = read_constitution(hp.constitution, ('preference_question',))
    judge = check_judge(run, f'{where}.judge', hp.judge, hp, prompt, hp.labels)
    return Checked(judge, principles)


def label(asked: Asked) -> Answered:
    """A soft label per item, and how much the place of a response counted.

    A killed stage goes on behind the last whole batch (``stages/batches.py``).

    Raises:
        ValueError: the constitution or the prompt file has changed since.
    """
    hp, items = asked.hp, asked.items
    judge, principles = asked.checked
    if principles:  # by which each is judged
        drawn = [draw(principles, asked.rng) for _ in items]
        items = [
            dataclasses.replace(item, why=one.id) for item, one in zip(items, drawn)
        ]
    by_id = {one.id: one.preference_question for one in principles}
    questions = [_both_orders(item, by_id) for item in items]
    sizes = tokens_of(judge, [question for both in questions for question in both])
    pairs = list(zip(sizes[::2], sizes[1::2]))
    short = [max(pair) <= hp.judge_buckets[-1] for pair in pairs]
    about = {
        f'the prompt file {judge.prompt.where}': [
            judge.prompt.before,
            judge.prompt.after,
        ],
        f'the constitution {hp.constitution}': by_id,
        f'what {asked.where}.responses gives': questions,
    }
    read = [both for both, ok in zip(questions, short) if ok]
    said, _ = write_batches(
        asked.folder, lambda start: _batches(asked, read, start), about
    )
    answers = iter(said)
    labels = []
    for item, ok in zip(items, short):
        who = {'item': item.item, 'labeller': hp.judge}
        if not ok:
            labels.append(Label(**who, verdict='skipped', note='too long to be judged'))
            continue
        answer = next(answers)
        thoughts = answer['thoughts']
        note = None if thoughts is None else '\n---\n'.join(thoughts)
        labels.append(Label(**who, probability=answer['probability'], note=note))
    tokens = sum(sum(pair) for pair, ok in zip(pairs, short) if ok)
    facts = _facts(said) | {'judge_tokens': tokens}
    if left_out := short.count(False):
        facts['judge_too_long'] = left_out
        tell(
            f'{"warning: " if 2 * left_out > len(items) else ""}{asked.folder.name}: '
            f'{left_out} of {len(items)} items are longer than {asked.where}.'
            f'judge_buckets={hp.judge_buckets} with {judge.prompt.where}, and are left '
            'out'
        )
    return Answered(items, labels, facts)


def _batches(
    asked: Asked, questions: list[list[dict[str, str]]], start: int
) -> Iterator[Batch]:
    """What the judge says of pairs, ``judge_batch_size`` of them at a time."""
    hp, size = asked.hp, asked.hp.judge_batch_size
    key = asked.run.key(asked.where)
    ask = load_judge(asked.run, asked.checked.judge, key)
    for number in range(start, -(-len(questions) // size)):
        part = questions[number * size : (number + 1) * size]
        both = [question for pair in part for question in pair]
        said, thoughts = ask(both, jax.random.fold_in(key, number))
        rows = []
        for i, shown_first in enumerate(said[:, 0].reshape(-1, 2).tolist()):
            probability = (shown_first[0] + 1 - shown_first[1]) / 2
            if hp.clamp is not None:
                probability = float(np.clip(probability, *hp.clamp))
            row = {'probability': probability, 'shown_first': shown_first}
            row['thoughts'] = None if thoughts is None else thoughts[2 * i : 2 * i + 2]
            rows.append(row)
        yield Batch(rows)


def _both_orders(item: Item, questions: dict[str, str | None]) -> list[dict[str, str]]:
    """What stands in the places of the prompt file, in the one order and the other."""
    principle = {} if item.why is None else {'principle': questions[item.why]}
    first, second = item.completions
    prompt = flat(item.prompt) if item.readable is None else item.readable
    asked = {'prompt': prompt, **principle}
    return [
        asked | {'first': first, 'second': second},
        asked | {'first': second, 'second': first},
    ]


def _facts(said: list[dict[str, Any]]) -> dict[str, Any]:
    if not said:
        return {}
    shown_first = np.asarray([row['shown_first'] for row in said])  # [N, order]
    wins = shown_first > 0.5
    facts = {
        # Without a preference for a place both are one half.
        'judge_first_probability': float(shown_first.mean()),
        'judge_first_chosen': float(wins.mean()),
        # Both orders name the same response.
        'judge_consistent': float((wins[:, 0] != wins[:, 1]).mean()),
        'judge_calls': int(shown_first.size),
    }
    thoughts = [text for row in said for text in row['thoughts'] or ()]
    if thoughts:
        facts['judge_reasoning_characters'] = sum(map(len, thoughts))
    return facts
