"""Records as rows of tokens: a prompt, the answers to it, and who wrote what.

Between ``formats.py``, which says what a record means, and ``pipeline.py``, which cuts
rows to length and batches them. Read ``stages/offline.py`` next.

A sequence is tokens(prompt) + tokens(completion) + EOS, which is not written twice. A
prompt in text gets what the tokenizer puts before every text (BOS); what a chat
template has written gets nothing. The completion is tokenised by itself. Tokenizers
that put a space of their own before every text (SentencePiece style) put one before the
completion too. A conversation is tokenised whole.
"""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_jax.data.formats import (
    BadRecord,
    Comparison,
    Conversation,
    Demonstration,
    Prompt,
    Verdict,
)
from rlhf_jax.data.tokenizer import encode, encode_spans, frame, listed_eos, opened


class Row(NamedTuple):
    """A record in tokens."""

    prompt: list[int]
    answers: list[list[int]]  # each with what ends it
    written: list[bool]  # of the first answer's tokens, those of the assistant
    end: int | None  # ends every answer, cut or not; None in a conversation


def text_rows(
    records: list[Demonstration | Comparison | Verdict | Prompt],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Row | BadRecord]:
    """Rows of records of one kind, whose prompt and answers are texts.

    A row that cannot be used is the error that says so.
    """
    bos, eos = frame(tokenizer)
    ends = {eos, *listed_eos(tokenizer)}
    parts = records[0].PARTS if records else ()
    columns = [encode(tokenizer, [getattr(r, p) for r in records]) for p in parts]
    rows: list[Row | BadRecord] = []
    for record, ids in zip(records, zip(*columns)):
        answers = [a if a[-1:] and a[-1] in ends else [*a, eos] for a in ids[1:]]
        if not all(ids):
            empty = parts[ids.index([])]
            row = BadRecord(f'{record.where}: {empty!r} gives no tokens')
        elif len(answers) == 2 and answers[0] == answers[1]:
            row = BadRecord(f'{record.where}: chosen and rejected give equal tokens')
        else:
            prompt = ids[0] if record.templated else opened(ids[0], bos)
            first = answers[0] if answers else [eos]
            row = Row(prompt, answers, [True] * len(first), first[-1])
        rows.append(row)
    return rows


def conversation_rows(
    records: list[Conversation], tokenizer: PreTrainedTokenizerBase
) -> list[Row | BadRecord]:
    """Rows of conversations, tokenised whole: the prompt ends where the assistant first
    writes, and what follows its last token is left out.
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
