"""A language model criticises responses and writes them again; texts are scored.

A prompt is asked further: in text by a filled prompt file (``labels/critique.py``), in
messages by further turns, so that the chat template writes them. Every request is
tokenised as the prompts of a stage are. Read ``stages/revise.py`` next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.data import pipeline
from rlhf_jax.data.columns import Table
from rlhf_jax.data.control import ControlTokens, check_control_tokens, spelling
from rlhf_jax.data.examples import Counts, Dataset, PromptExample
from rlhf_jax.data.formats import TOLD, BadRecord, Prompt, to_prompt, to_turns
from rlhf_jax.data.joining import decode_behind
from rlhf_jax.data.rows import text_rows
from rlhf_jax.data.sources import SourceRecord
from rlhf_jax.labels.constitution import Principle
from rlhf_jax.labels.critique import RequestPrompt, fill
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.responses import Responses, Scorer
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.sampler import make_sampler
from rlhf_jax.stages.scoring import text_batch
from rlhf_jax.stages.settings import SamplerSettings
from rlhf_jax.types import Generation, Params, PRNGKey, PromptBatch


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt as it was found, and as its policy reads it."""

    source: SourceRecord
    prompt: Prompt

    @property
    def has_messages(self) -> bool:
        """Whether a chat template writes it."""
        return to_turns(self.source).messages is not None


class Written(NamedTuple):
    """What a model has written."""

    text: str
    tokens: int
    logprob: float | None  # of the whole, nats; None of a record's response
    ended: bool


# (requests or None, key) -> of each what was written, or None where nothing was asked,
# or the word for why it could not be: 'too_long' or 'refused'
Write = Callable[[Sequence[SourceRecord | None], PRNGKey], list[Written | str | None]]


# ---------------------------------------------------------------------------- requests


def ask_critique(
    template: RequestPrompt, asked: Asked, response: str, principle: Principle
) -> SourceRecord:
    """The prompt for a critique of a response."""
    values = {'response': response, 'critique_request': principle.critique_request}
    if not asked.has_messages:
        text = fill(template.text, prompt=asked.prompt.prompt, **values)
        return SourceRecord({'prompt': text}, asked.source.where)
    return _told(asked, _criticised(template, asked, values))


def ask_revision(
    templates: tuple[RequestPrompt, RequestPrompt],
    asked: Asked,
    response: str,
    critique: str,
    principle: Principle,
) -> SourceRecord:
    """The prompt for a revision, by the templates of critique and revision."""
    first, second = templates
    values = {'response': response, 'critique_request': principle.critique_request}
    more = {'critique': critique, 'revision_request': principle.revision_request}
    if not asked.has_messages:
        text = fill(second.text, prompt=asked.prompt.prompt, **values, **more)
        return SourceRecord({'prompt': text}, asked.source.where)
    turns = [
        *_criticised(first, asked, values),
        {'role': 'assistant', 'content': critique},
        {'role': 'user', 'content': fill(second.turn, **values, **more)},
    ]
    return _told(asked, turns)


def _criticised(
    template: RequestPrompt, asked: Asked, values: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The conversation up to the turn that asks for a critique."""
    messages, goes_on, _ = to_turns(asked.source)
    turn = {'role': 'assistant', 'content': values['response']}
    if goes_on:
        *messages, begun = messages
        turn = {**begun, 'content': begun['content'] + values['response']}
    return [*messages, turn, {'role': 'user', 'content': fill(template.turn, **values)}]


def _told(asked: Asked, turns: list[dict[str, Any]]) -> SourceRecord:
    fields = asked.source.present
    told = {name: fields[name] for name in TOLD if name in fields}
    return SourceRecord({'prompt': turns, **told}, asked.source.where)


# ------------------------------------------------------------------------------ writing


def make_writer(
    run: Run,
    how: SamplerSettings,
    temperature: float,
    model: CausalLM,
    params: Params,
    *,
    batch_size: int,
    control_tokens: ControlTokens | None,
) -> Write:
    """Compiles what writes behind requests.

    Args:
        run: the run.
        how: it samples; ``prompt_buckets`` are the lengths of requests.
        temperature: of the samples.
        model: that writes.
        params: its parameters.
        batch_size: requests at a time, at most.
        control_tokens: what becomes of requests that spell one, see
            ``data/control.py``.
    """
    buckets = how.prompt_buckets
    sampler = make_sampler(run, how, temperature, model)
    pattern = spelling(run.tokenizer)

    def write(
        asked: Sequence[SourceRecord | None], key: PRNGKey
    ) -> list[Written | str | None]:
        found: list[Written | str | None] = [None] * len(asked)
        read: list[tuple[int, Prompt]] = []
        for i, record in enumerate(asked):
            if record is None:
                continue
            try:
                record, _ = check_control_tokens(
                    record, run.tokenizer, pattern, control_tokens
                )
                read.append((i, to_prompt(record, run.tokenizer)))
            except BadRecord:
                found[i] = 'refused'
        rows = text_rows([prompt for _, prompt in read], run.tokenizer)
        kept = []
        for (i, prompt), row in zip(read, rows):
            if isinstance(row, BadRecord):
                found[i] = 'refused'
            elif len(row.prompt) > buckets[-1]:
                found[i] = 'too_long'
            else:
                kept.append((i, prompt, row.prompt))
        if kept:
            for (i, *_), written in zip(kept, answers(kept, key)):
                found[i] = written
        return found

    def answers(kept: list[tuple[int, Prompt, list[int]]], key: PRNGKey) -> list[Any]:
        table = Table.of(PromptExample(np.asarray(ids, np.int32)) for *_, ids in kept)
        counts = Counts('requests', 'prompts', buckets[-1], len(kept), len(kept))
        data = Dataset(table, [prompt for _, prompt, _ in kept], counts)
        (batch,) = pipeline.eval_batches(data, batch_size, buckets)
        return written_behind(run, data.records, batch, sampler(params, batch, key))

    return write


def written_behind(
    run: Run, records: Sequence[Prompt], batch: PromptBatch, generation: Generation
) -> list[Written]:
    """What a generation says, of the rows that stand for a prompt."""
    responses = Responses(run.tokenizer, records, batch, generation, decode_behind)
    logprobs, mask, ended = jax.device_get(
        (generation.logprobs, generation.response_mask, generation.ended)
    )
    columns = (logprobs.sum(-1), mask.sum(-1), ended)
    logprobs, sizes, ended = (column[responses.real].tolist() for column in columns)
    return list(map(Written, responses.texts, sizes, logprobs, ended))


def score_texts(
    run: Run,
    scorers: Mapping[str, Scorer],
    records: Sequence[Prompt],
    batch: PromptBatch,
    texts: Sequence[str],
    ended: Sequence[bool],
    limit: int,
) -> tuple[dict[str, np.ndarray], int]:
    """Scores of texts that stand behind other prompts than those of ``batch``.

    Args:
        run: the run.
        scorers: by name.
        records: of the prompts' data set.
        batch: prompts, R of whose rows are real.
        texts: R responses to them.
        ended: R, whether they came to their end.
        limit: tokens of prompt and response.

    Returns:
        (scores [R] float64 by name, how many texts were cut to ``limit``).
    """
    if not scorers:
        return {}, 0

    def given(*_: Any) -> list[str]:
        return list(texts)

    responses = Responses(run.tokenizer, records, batch, None, given)
    tokens, mask, truncated = text_batch(
        run.tokenizer, responses.prompts, texts, ended, limit, responses.templated
    )
    tokens, mask, ends = map(responses.spread, (tokens, mask, np.asarray(ended)))
    # The places of the response are asked for by nobody: its text is given.
    generation = Generation(
        tokens=tokens,
        mask=mask,
        response_mask=mask,
        logprobs=np.zeros(tokens.shape, np.float32),
        ended=ends,
    )
    responses = dataclasses.replace(responses, generation=generation)
    scores = {
        name: np.asarray(scorer(responses).scores, np.float64)[responses.real]
        for name, scorer in scorers.items()
    }
    return scores, truncated
