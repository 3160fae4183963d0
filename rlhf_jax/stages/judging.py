"""A language model judges: how likely it is to say each of some labels.

The label that follows a filled prompt file (``labels/judge.py``) is not sampled: the
log-probabilities of all labels are compared, so that what comes out is soft. Read
``stages/labellers/model.py`` next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.algos.preference import reference_logps
from rlhf_jax.data import chat
from rlhf_jax.data.joining import decode_behind, find_joint, last_id, open_prompts
from rlhf_jax.data.tokenizer import check_vocabulary, special_tokens
from rlhf_jax.labels.judge import JudgePrompt
from rlhf_jax.ops.rows import pad_left, pad_right
from rlhf_jax.sharding import check_batch_size
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.sampler import make_sampler
from rlhf_jax.stages.settings import QuestionSettings, SamplerSettings
from rlhf_jax.stages.sources import check_policy, frozen, load_policy
from rlhf_jax.types import JudgedBatch, PRNGKey, PromptBatch


@dataclasses.dataclass(frozen=True)
class Judge:
    """A checked judge; its model is not loaded yet."""

    where: str
    model: str
    hp: QuestionSettings
    prompt: JudgePrompt
    tokenizer: Any
    labels: tuple[str, ...]


def check_judge(
    run: Run,
    where: str,
    model: str,
    hp: QuestionSettings,
    prompt: JudgePrompt,
    labels: Sequence[str],
) -> Judge:
    """Checks a judge before anything compiles.

    Args:
        run: the run.
        where: the place of its settings in the config.
        model: a ``ModelName``.
        hp: how it is asked.
        prompt: what it is asked.
        labels: what it may say, which are different texts.

    Raises:
        ValueError: no language model, labels that its tokenizer does not tell apart, or
            buckets beyond its positions.
    """
    source = check_policy(run, where, model)
    tokenizer, config = source.tokenizer or run.tokenizer, source.config()
    check_vocabulary(tokenizer, config.vocab_size)
    if jax.process_count() > 1:
        raise ValueError(
            f'{where} reads texts, which one process alone can do, and this run '
            f'has {jax.process_count()}'
        )
    check_batch_size(hp.judge_batch_size, run.mesh, where)
    ids = find_joint(tokenizer).encode([None] * len(labels), list(labels))
    unknown = tokenizer.unk_token_id
    if not all(ids) or len(set(map(tuple, ids))) < len(ids) or unknown in sum(ids, []):
        shown = ', '.join(f'{text!r}: {row}' for text, row in zip(labels, ids))
        raise ValueError(
            f'{where}: the tokenizer of {model!r} does not tell the labels apart '
            f'(ids {shown}); use other labels'
        )
    if hp.prompt_format == 'chat' and tokenizer.chat_template is None:
        raise ValueError(
            f"{where}.prompt_format='chat', but the tokenizer of {model!r} has no "
            "chat template; use 'text'"
        )
    longest = hp.judge_buckets[-1]
    if prompt.after is not None:
        longest += hp.max_reasoning_tokens
    if longest > config.max_positions:
        raise ValueError(
            f'{where}: {longest} tokens of a filled prompt exceed the '
            f'{config.max_positions} positions of {model!r}; shorten judge_buckets'
        )
    return Judge(where, model, hp, prompt, tokenizer, tuple(labels))


def tokens_of(judge: Judge, questions: Sequence[dict[str, str]]) -> list[int]:
    """Tokens of every filled prompt with its longest label, but without what the judge
    writes at ``{reasoning}``, for which there is room beside the buckets.
    """
    rows = _opened(judge, [judge.prompt.fill(**question) for question in questions])
    joint = find_joint(judge.tokenizer)
    labels = joint.encode([None] * len(judge.labels), list(judge.labels))
    ends = joint.encode(
        [None] * len(rows), [judge.prompt.fill_after(**q) for q in questions]
    )
    longest = max(map(len, labels))
    return [len(row) + len(end) + longest for row, end in zip(rows, ends)]


# (values of the places of each filled prompt, key of the reasoning) -> probabilities
# [N, K], texts of the reasoning or None
Ask = Callable[[Sequence[dict[str, str]], PRNGKey], tuple[np.ndarray, Any]]


def load_judge(run: Run, judge: Judge, key: PRNGKey) -> Ask:
    """Loads the model and compiles.

    Returns:
        A function of the values of the places, one dict per question, and of a key; it
        gives the probability of every label, normalised over the labels, [N, K]
        float64, and what was written at ``{reasoning}``, None where the prompt file has
        none.
    """
    model, params = load_policy(run, judge.model, key)
    params = frozen(run, model, params)
    sums = run.compile(
        lambda params, batch: reference_logps(params, batch, model=model)['ref_logps'],
        inputs=('params', 'batch'),
        outputs=('batch',),
        donate=(),
    )
    reason = None
    if judge.prompt.after is not None:
        reason = _reasoner(run, judge, model, params)

    def ask(
        questions: Sequence[dict[str, str]], key: PRNGKey
    ) -> tuple[np.ndarray, Any]:
        rows = _opened(judge, [judge.prompt.fill(**q) for q in questions])
        if reason is None:
            return _likelihoods(judge, sums, params, rows), None
        # What the judge has written stands behind the prompt as an answer does.
        rows, thoughts = reason(rows, key)
        ends = find_joint(judge.tokenizer).encode(
            [last_id(row) for row in rows],
            [judge.prompt.fill_after(**q) for q in questions],
        )
        rows = [row + end for row, end in zip(rows, ends)]
        return _likelihoods(judge, sums, params, rows), thoughts

    return ask


def _opened(judge: Judge, texts: list[str]) -> list[list[int]]:
    """Tokens of filled prompts."""
    whole = judge.hp.prompt_format == 'chat'
    if whole:
        texts = [
            chat.open_prompt([{'role': 'user', 'content': text}], judge.tokenizer)
            for text in texts
        ]
    return open_prompts(judge.tokenizer, texts, [whole] * len(texts))


def _fitting(judge: Judge, lengths: Sequence[int], extra: int = 0) -> int:
    """The shortest bucket that takes these lengths."""
    longest = max(lengths)
    for bucket in judge.hp.judge_buckets:
        if longest <= bucket + extra:
            return bucket + extra
    raise ValueError(
        f'{judge.where}: a filled prompt of {judge.prompt.where} has {longest} tokens, '
        f'label included, and judge_buckets end at {judge.hp.judge_buckets[-1]}; raise '
        'them'
    )


def _likelihoods(
    judge: Judge, sums: Any, params: Any, rows: list[list[int]]
) -> np.ndarray:
    joint, size = find_joint(judge.tokenizer), judge.hp.judge_batch_size
    extra = 0 if judge.prompt.after is None else judge.hp.max_reasoning_tokens
    found = []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        before = [last_id(row) for row in part for _ in judge.labels]
        labels = joint.encode(before, list(judge.labels) * len(part))
        texts = [row for row in part for _ in judge.labels]
        whole = [text + label for text, label in zip(texts, labels)]
        # Rows that only fill up the batch repeat the last one.
        fill = (size - len(part)) * len(judge.labels)
        whole += whole[-1:] * fill
        length = _fitting(judge, list(map(len, whole)), extra)
        tokens, mask = pad_right(whole, length)
        starts = [len(text) for text in texts] + [len(texts[-1])] * fill
        counted = mask & (np.arange(length) >= np.asarray(starts)[:, None])
        shape = (size, len(judge.labels), length)
        batch = JudgedBatch(
            tokens=tokens.reshape(shape),
            mask=mask.reshape(shape),
            response_mask=counted.reshape(shape),
            weight=np.ones(size, np.float32),
        )
        logps = np.asarray(sums(params, batch), np.float64)[: len(part)]
        found.append(_shares(logps, labels[: len(judge.labels)]))
    return np.concatenate(found) if found else np.zeros((0, len(judge.labels)))


def _shares(logps: np.ndarray, labels: list[list[int]]) -> np.ndarray:
    """Probabilities [N, K] of labels, of which one may begin with another: what is said
    of ' 1' does not include ' 10'.
    """
    said = np.exp(logps - logps.max(1, keepdims=True))
    only = said.copy()
    for i, short in enumerate(labels):
        for j, long in enumerate(labels):
            if len(long) > len(short) and long[: len(short)] == short:
                only[:, i] -= said[:, j]
    only = only.clip(min=0)
    return only / only.sum(1, keepdims=True)


def _reasoner(
    run: Run, judge: Judge, model: Any, params: Any
) -> Callable[[list[list[int]], PRNGKey], tuple[list[list[int]], list[str]]]:
    """A function that samples what the judge writes behind some tokens: (both, without
    EOS and other special tokens; what was written, as texts).
    """
    hp = judge.hp
    settings = SamplerSettings(
        prompt_buckets=hp.judge_buckets, max_new_tokens=hp.max_reasoning_tokens
    )
    own = dataclasses.replace(run, tokenizer=judge.tokenizer)
    sampler = make_sampler(own, settings, hp.reasoning_temperature, model)
    special = set(special_tokens(judge.tokenizer).values())

    def reason(
        rows: list[list[int]], key: PRNGKey
    ) -> tuple[list[list[int]], list[str]]:
        whole: list[list[int]] = []
        thoughts: list[str] = []
        size = hp.judge_batch_size
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            filled = part + part[-1:] * (size - len(part))
            tokens, mask = pad_left(filled, _fitting(judge, list(map(len, filled))))
            index = np.arange(first, first + size, dtype=np.int32)
            batch = PromptBatch(tokens=tokens, mask=mask, index=index)
            drawn = sampler(params, batch, jax.random.fold_in(key, first))
            ids, said = jax.device_get((drawn.tokens, drawn.response_mask))
            written = [
                [x for x in ids[i, said[i]].tolist() if x not in special]
                for i in range(len(part))
            ]
            whole += [row + more for row, more in zip(part, written)]
            before = [row[-1] for row in part]
            thoughts += decode_behind(judge.tokenizer, before, written)
        return whole, thoughts

    return reason
