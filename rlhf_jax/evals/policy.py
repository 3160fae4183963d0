"""What a policy writes: samples, proxy and gold reward, win rate, KL, length,
diversity.

Read ``stages/online.py`` next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from rlhf_jax.algos.ppo import policy_logprobs
from rlhf_jax.models.heads import CausalLM, ScalarModel
from rlhf_jax.ops.masked import masked_sum
from rlhf_jax.rewards import reward_model_scores
from rlhf_jax.types import Array, Generation, Params, PromptBatch

# Reward function by text: fn(prompts, responses) -> scores [N].
TextReward = Callable[[list[str], list[str]], np.ndarray]

KINDS = {'inputs': ('params', 'params', 'batch'), 'outputs': ('batch',), 'donate': ()}


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Responses of a policy to a set of prompts, in the order of the set."""

    responses: list[str]
    scores: np.ndarray  # [N] proxy reward, unshaped
    kl: np.ndarray  # [N] nats per sequence, Σ log π − log π_ref
    lengths: np.ndarray  # [N] tokens
    ended: np.ndarray  # [N] bool


def row_statistics(
    ref_params: Params,
    reward_params: Params,
    generation: Generation,
    *,
    policy: CausalLM,
    reward: ScalarModel,
    temperature: float,
) -> dict[str, Array]:
    """Score, KL to the reference, length and end of every row; a pure function to
    compile.
    """
    ref_logprobs, _ = policy_logprobs(
        ref_params,
        generation.tokens,
        generation.mask,
        model=policy,
        temperature=temperature,
    )
    response = generation.response_mask
    return {
        'scores': reward_model_scores(
            reward_params, generation.tokens, generation.mask, model=reward
        ),
        'kl': masked_sum(generation.logprobs - ref_logprobs, response, -1),
        'lengths': jnp.sum(response, axis=-1),
        'ended': generation.ended,
    }


def decode_responses(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Response texts without special tokens, from [B, T] tokens and response mask."""
    rows = [row[keep] for row, keep in zip(np.asarray(tokens), np.asarray(mask))]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def sample_policy(
    write: Callable[[PromptBatch], Generation],
    judge: Callable[[Generation], dict[str, Array]],
    tokenizer: Any,
    batches: Iterable[PromptBatch],
) -> Sampled:
    """Writes and judges one response per prompt; rows that fill a batch are left
    out.
    """
    texts: list[str] = []
    columns: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        real = np.asarray(batch.index) >= 0
        generation = write(batch)
        rows = jax.device_get(judge(generation))
        host = jax.device_get((generation.tokens, generation.response_mask))
        texts += decode_responses(tokenizer, host[0][real], host[1][real])
        for name, column in rows.items():
            columns.setdefault(name, []).append(column[real])
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Sampled(responses=texts, **joined)


def distinct_bigrams(texts: Sequence[str]) -> float:
    """Distinct word bigrams over all word bigrams (distinct-2: Li et al. 2016,
    1510.03055).
    """
    bigrams = [pair for text in texts for pair in zip(text.split(), text.split()[1:])]
    return len(set(bigrams)) / max(len(bigrams), 1)


def win_rate(after: np.ndarray, before: np.ndarray) -> tuple[float, list[float], float]:
    """Share of prompts on which ``after`` scores higher, ties counted as half.

    Returns:
        (win rate, 95% bootstrap interval over prompts, share of ties).
    """
    outcome = np.where(after > before, 1.0, np.where(after == before, 0.5, 0.0))
    ties = float((after == before).mean())
    if np.all(outcome == outcome[0]):  # the bootstrap of a constant has no width
        return float(outcome.mean()), [float(outcome[0])] * 2, ties
    interval = stats.bootstrap(
        (outcome,), np.mean, method='percentile', n_resamples=2000, rng=0
    ).confidence_interval
    return float(outcome.mean()), [float(interval.low), float(interval.high)], ties


def policy_report(
    before: Sampled,
    after: Sampled,
    gold: tuple[np.ndarray, np.ndarray] | None,
) -> dict[str, Any]:
    """The numbers of ``ppo/eval.json``.

    Args:
        before: of the reference policy.
        after: of the trained policy, on the same prompts.
        gold: true rewards [N] of before and after, or None where there is no judge.
    """
    report: dict[str, Any] = {
        'prompts': len(after.responses),
        'kl': float(after.kl.mean()),
        'proxy_reward_before': float(before.scores.mean()),
        'proxy_reward_after': float(after.scores.mean()),
        'length_before': float(before.lengths.mean()),
        'length_after': float(after.lengths.mean()),
        'ended_before': float(before.ended.mean()),
        'ended_after': float(after.ended.mean()),
        'distinct_before': distinct_bigrams(before.responses),
        'distinct_after': distinct_bigrams(after.responses),
    }
    if gold is not None:
        rate, interval, ties = win_rate(gold[1], gold[0])
        report |= {
            'win_rate': rate,
            'win_rate_interval': interval,
            'ties': ties,
            'gold_reward_before': float(gold[0].mean()),
            'gold_reward_after': float(gold[1].mean()),
        }
    return report
