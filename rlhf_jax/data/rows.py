"""Records as rows of tokens: a prompt, the answers to it, and who wrote what.

Between ``formats.py``, which says what a record means, and ``pipeline.py``, which cuts
rows to length and batches them. Read ``stages/offline.py`` next.

A sequence is tokens(prompt) + tokens(completion) + EOS, which is not written twice. A
prompt in text gets what the tokenizer puts before every text (BOS); what a chat
template has written gets nothing. The prompt is tokenised by itself, as it is for
sampling, and the completion as it stands behind the prompt (``joining.py``). A
conversation is tokenised whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_jax.data.formats import (
    BadRecord,
    Conversation,
    Demonstration,
    Judged,
    Prompt,
)
from rlhf_jax.data.joining import Encoder, find_joint, last_id, open_prompts
from rlhf_jax.data.stops import ends_of
from rlhf_jax.data.tokenizer import encode, encode_spans, frame

PIECE = 2**21  # characters, whose ids are lists of Python numbers for a while


class Row(NamedTuple):
    """A record in tokens."""

    prompt: list[int]
    answers: list[list[int]]  # each with what ends it
    written: list[bool]  # of the first answer's tokens, those of the assistant
    end: int | None  # ends every answer, cut or not; None in a conversation
    steps: tuple[int, ...] = ()  # places in the first answer where a step ends


def text_rows(
    records: list[Demonstration | Judged | Prompt],
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder = encode,
) -> list[Row | BadRecord]:
    """Rows of records of one kind, whose prompt and answers are texts; ``encoder``
    tokenises them.

    A row that cannot be used is the error that says so.
    """
    _, eos = frame(tokenizer)
    ends = {eos, *ends_of(tokenizer).ids}
    texts = [list(record.texts.values()) for record in records]
    prompts = open_prompts(
        tokenizer,
        [row[0] for row in texts],
        [record.templated for record in records],
        encoder,
    )
    encoded = iter(
        find_joint(tokenizer).encode(
            [last_id(ids) for ids, row in zip(prompts, texts) for _ in row[1:]],
            [text for row in texts for text in row[1:]],
            encoder,
        )
    )
    rows: list[Row | BadRecord] = []
    for record, row, prompt in zip(records, texts, prompts):
        ids = [next(encoded) for _ in row[1:]]
        answers = [a if a and a[-1] in ends else [*a, eos] for a in ids]
        if not prompt or not all(ids) or _has_equal(answers):
            rows.append(_unusable(record, prompt, ids, answers))
            continue
        first = answers[0] if answers else [eos]
        rows.append(Row(prompt, answers, [True] * len(first), first[-1]))
    return rows


def _has_equal(answers: list[list[int]]) -> bool:
    return any(a in answers[:i] for i, a in enumerate(answers))


def _unusable(
    record: Any, prompt: list[int], ids: list[list[int]], answers: list[list[int]]
) -> BadRecord:
    """What is wrong with a row, a text of which has no tokens or those of another."""
    names = list(record.texts)
    if not all([prompt, *ids]):
        empty = names[[prompt, *ids].index([])]
        return BadRecord(f'{record.where}: {empty!r} gives no tokens')
    same = next(b for b in answers if answers.count(b) > 1)
    alike = [name for name, a in zip(names[1:], answers) if a == same]
    return BadRecord(f'{record.where}: {" and ".join(alike)} give equal tokens')


def in_pieces(
    records: Iterable[Any], tokenise: Callable[[list[Any]], list[Any]]
) -> Iterator[tuple[Any, Any]]:
    """Every record with what ``tokenise`` makes of it.

    It gets some records at a time, about ``PIECE`` characters, in a thread: tokenizers
    leave Python to others, so that meanwhile the next records are read and those before
    are used.
    """
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        before: list[Any] = []  # the piece that is being tokenised
        future = None
        for piece in _pieces(records):
            upcoming = pool.submit(tokenise, piece)
            if future is not None:
                yield from zip(before, future.result())
            before, future = piece, upcoming
        if future is not None:
            yield from zip(before, future.result())
    finally:
        # Nobody waits for the thread: after an error the garbage collector may be the
        # one to end this, in the middle of anything, such as the start of a thread.
        pool.shutdown(wait=False)


def _pieces(records: Iterable[Any]) -> Iterator[list[Any]]:
    piece, size = [], 0
    for record in records:
        piece.append(record)
        size += sum(map(len, record.texts.values()))
        if size >= PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def step_rows(
    records: list[Judged],
    tokenizer: PreTrainedTokenizerBase,
    separator: str,
    encoder: Encoder = encode,
) -> list[Row | BadRecord]:
    """Rows of responses in steps: tokens(step) + tokens(separator), one after the
    other, and behind the last one EOS in the place of the separator. ``encoder``
    tokenises the steps.
    """
    _, eos = frame(tokenizer)
    joint = find_joint(tokenizer)
    templated = [record.templated for record in records]
    prompts = open_prompts(tokenizer, [r.prompt for r in records], templated)
    # Behind which id a step stands is known once the separator is: its own last one.
    (alone,) = joint.encode([None], [separator])
    before, texts = [], []
    for record, prompt in zip(records, prompts):
        for i, step in enumerate(record.completions.values()):
            before.append(last_id(alone if i else prompt))
            texts.append(step)
    encoded = iter(joint.encode(before, texts, encoder))
    found = [[next(encoded) for _ in record.completions] for record in records]
    before = [last_id(step) for steps in found for step in steps[:-1]]
    separators = iter(joint.encode(before, [separator] * len(before)))
    rows: list[Row | BadRecord] = []
    for record, prompt, steps in zip(records, prompts, found):
        between = [*(next(separators) for _ in steps[:-1]), [eos]]
        if not steps or not all((prompt, *steps)):
            rows.append(BadRecord(f'{record.where}: a text gives no tokens'))
            continue
        answer, ends = [], []
        for step, end in zip(steps, between):
            answer += step + end
            ends.append(len(answer) - 1)
        written = [True] * len(answer)
        rows.append(Row(prompt, [answer], written, eos, tuple(ends)))
    return rows


def conversation_rows(
    records: list[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder = encode,
) -> list[Row | BadRecord]:
    """Rows of conversations, tokenised whole: the prompt ends where the assistant first
    writes, and what follows its last token is left out. No ``encoder`` says which
    tokens are whose, so that none is used.
    """
    rows: list[Row | BadRecord] = []
    for record in records:
        ids, written = encode_spans(tokenizer, record.text, record.spans)
        places = [i for i in range(1, len(ids)) if written[i]]
        if places:
            first, behind = places[0], places[-1] + 1
            answer, by_whom = ids[first:behind], written[first:behind]
            rows.append(Row(ids[:first], [answer], by_whom, None))
        else:
            rows.append(BadRecord(f'{record.where}: the assistant gives no tokens'))
    return rows
