"""What a policy writes: samples, proxy and gold reward, win rate, KL, length,
diversity.

Read ``stages/evaluation.py`` next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algos.rollout import response_logprobs
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.ops.masked import masked_sum
from rlhf_jax.responses import GOLD, Decode, Responses, Scorer
from rlhf_jax.rewards import weighted_sum
from rlhf_jax.types import Array, Generation, Params, PromptBatch

KINDS = {'inputs': ('params', 'batch'), 'outputs': ('batch',), 'donate': ()}


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Responses of a policy to a set of prompts, in the order of the set."""

    responses: list[str]
    scores: dict[str, np.ndarray]  # [N] by scorer: the rewards, and ``GOLD``
    kl: np.ndarray  # [N] nats per sequence, Σ log π − log π_ref
    ref_logprobs: np.ndarray  # [N] nats per sequence, Σ log π_ref
    lengths: np.ndarray  # [N] tokens
    ended: np.ndarray  # [N] bool
    truncated: dict[str, int]  # by scorer: texts cut to fit its model
    base_logprobs: np.ndarray | None = None  # [N] nats per sequence, under the base

    def proxy(self, weights: Mapping[str, float]) -> np.ndarray:
        """[N] the reward that is optimised, unshaped."""
        return np.asarray(weighted_sum(self.scores, weights))


def row_statistics(
    ref_params: Params,
    generation: Generation,
    *,
    policy: CausalLM,
    temperature: float,
) -> dict[str, Array]:
    """KL to the reference, likelihood under it, length and end of every row; a pure
    function to compile.
    """
    ref_logprobs, _ = response_logprobs(
        ref_params, generation, model=policy, temperature=temperature
    )
    response = generation.response_mask
    return {
        'kl': masked_sum(generation.logprobs - ref_logprobs, response, -1),
        'ref_logprobs': masked_sum(ref_logprobs, response, -1),
        'lengths': jnp.sum(response, axis=-1),
        'ended': generation.ended,
    }


def base_likelihood(
    params: Params, generation: Generation, *, model: CausalLM
) -> dict[str, Array]:
    """Log-likelihood of every response under a language model, at temperature 1; a
    pure function to compile.
    """
    logprobs, _ = response_logprobs(params, generation, model=model, temperature=1.0)
    return {'base_logprobs': masked_sum(logprobs, generation.response_mask, -1)}


def sample_policy(
    sample: Callable[[PromptBatch], Generation],
    statistics: Callable[[Generation], dict[str, Array]],
    scorers: Mapping[str, Scorer],
    tokenizer: Any,
    records: Sequence[Any],
    batches: Iterable[PromptBatch],
    decode: Decode,
) -> Sampled:
    """Samples and scores one response per prompt; rows that fill a batch are left out.

    Args:
        sample: samples from the policy.
        statistics: :func:`row_statistics`, bound.
        scorers: by name.
        tokenizer: of the policy.
        records: of the data set that ``batches`` index.
        batches: every prompt once, in order.
        decode: makes texts of responses.
    """
    texts: list[str] = []
    columns: dict[str, list[np.ndarray]] = {}
    scores: dict[str, list[np.ndarray]] = {name: [] for name in scorers}
    truncated: dict[str, int] = {}
    for batch in batches:
        responses = Responses(tokenizer, records, batch, sample(batch), decode)
        texts += responses.texts
        for name, column in jax.device_get(statistics(responses.generation)).items():
            columns.setdefault(name, []).append(column[responses.real])
        for name, scorer in scorers.items():
            scored = scorer(responses)
            scores[name].append(np.asarray(scored.scores)[responses.real])
            if scored.truncated is not None:
                truncated[name] = truncated.get(name, 0) + scored.truncated
    return Sampled(
        responses=texts,
        scores={name: np.concatenate(parts) for name, parts in scores.items()},
        truncated=truncated,
        **{name: np.concatenate(parts) for name, parts in columns.items()},
    )


def distinct_bigrams(texts: Sequence[str]) -> float:
    """Distinct word bigrams over all word bigrams (distinct-2: Li et al. 2016,
    1510.03055).
    """
    bigrams = [pair for text in texts for pair in zip(text.split(), text.split()[1:])]
    return len(set(bigrams)) / max(len(bigrams), 1)


def mean_interval(values: np.ndarray) -> list[float]:
    """95% bootstrap interval (percentiles) of the mean of one number per prompt."""
    if np.all(values == values[0]):  # the bootstrap of a constant has no width
        return [float(values[0])] * 2
    from scipy import stats  # slow to import

    interval = stats.bootstrap(
        (values,), np.mean, method='percentile', n_resamples=2000, rng=0
    ).confidence_interval
    return [float(interval.low), float(interval.high)]


def outcomes(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """1 where ``after`` scores higher, ½ for a tie, else 0."""
    return np.where(after > before, 1.0, np.where(after == before, 0.5, 0.0))


def win_rate(after: np.ndarray, before: np.ndarray) -> tuple[float, list[float], float]:
    """Share of prompts on which ``after`` scores higher, ties counted as half.

    Returns:
        (win rate, 95% bootstrap interval over prompts, share of ties).
    """
    outcome = outcomes(after, before)
    ties = float((after == before).mean())
    return float(outcome.mean()), mean_interval(outcome), ties


def policy_report(
    before: Sampled, after: Sampled, weights: Mapping[str, float]
) -> dict[str, Any]:
    """The numbers of ``ppo/eval.json``, and of every stage with a policy to compare.

    Args:
        before: of the reference policy.
        after: of the trained policy, on the same prompts.
        weights: of the rewards, by name, maybe none; a scorer without one only judges.
    """
    report: dict[str, Any] = {
        'prompts': len(after.responses),
        'kl': float(after.kl.mean()),
    }
    for when, sampled in (('before', before), ('after', after)):
        numbers: dict[str, Any] = {
            'rewards': {name: float(sampled.scores[name].mean()) for name in weights},
            'rewards_truncated': sampled.truncated,
            'ref_logprob': float(sampled.ref_logprobs.sum() / sampled.lengths.sum()),
            'length': float(sampled.lengths.mean()),
            'ended': float(sampled.ended.mean()),
            'distinct': distinct_bigrams(sampled.responses),
        }
        others = sampled.scores.keys() - weights.keys() - {GOLD}
        numbers |= {name: float(sampled.scores[name].mean()) for name in others}
        if weights:
            proxy = sampled.proxy(weights)
            numbers['proxy_reward'] = float(proxy.mean())
            numbers['proxy_range'] = [float(proxy.min()), float(proxy.max())]
        if sampled.base_logprobs is not None:
            mean = sampled.base_logprobs.sum() / sampled.lengths.sum()
            numbers['base_logprob'] = float(mean)
        report |= {f'{name}_{when}': number for name, number in numbers.items()}
    if GOLD in after.scores:
        gold_before, gold_after = before.scores[GOLD], after.scores[GOLD]
        rate, interval, ties = win_rate(gold_after, gold_before)
        report |= {
            'win_rate': rate,
            'win_rate_interval': interval,
            'ties': ties,
            'gold_reward_before': float(gold_before.mean()),
            'gold_reward_after': float(gold_after.mean()),
        }
    return report
