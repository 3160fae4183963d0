"""What every online algorithm does with the responses of a policy before it learns.

Log-probabilities of policy and reference policy, their KL, and the ``objective/…``
metrics. Read ``algos/updates.py`` next.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from rlhf_jax.algos.gradients import Cuts
from rlhf_jax.models.heads import CausalLM, apply_to_last
from rlhf_jax.ops.kl import KLEstimator, check_reward_estimator, kl_estimate
from rlhf_jax.ops.logprobs import token_logprobs
from rlhf_jax.ops.masked import masked_sum
from rlhf_jax.ops.policy_loss import importance_ratio
from rlhf_jax.types import Array, Generation, Mean, Metrics, Params, Rollout

WeightLevel = Literal['token', 'response']


class RolloutPlan(Protocol):
    """What hyperparameters say of the responses; see :func:`off_policy_weights`."""

    temperature: float
    kl_estimator: KLEstimator
    off_policy_clip: float | None
    off_policy_level: WeightLevel


def check_plan(hp: RolloutPlan) -> None:
    """Refuses hyperparameters of a rollout that cannot be.

    Raises:
        ValueError: which one, and what to use.
    """
    check_reward_estimator(hp.kl_estimator)
    if hp.off_policy_clip is not None and hp.off_policy_clip <= 0:
        raise ValueError(
            f'off_policy_clip={hp.off_policy_clip} leaves no weight; use one '
            'above 0 (1 or 2), or None for responses of the policy itself'
        )
    if hp.off_policy_level not in ('token', 'response'):
        raise ValueError(
            f"off_policy_level={hp.off_policy_level!r}; use 'token' or 'response'"
        )


def policy_logprobs(
    params: Params,
    tokens: Array,
    mask: Array,
    *,
    model: CausalLM,
    temperature: float,
    response_length: int | None = None,
    segments: Array | None = None,
) -> tuple[Array, Array]:
    """Log-probabilities and entropies of a policy on sequences, each [B, T] nats.

    Args:
        params: of ``model``.
        tokens: [B, T] int32.
        mask: [B, T] bool.
        model: the policy, static.
        temperature: of the policy.
        response_length: last places that are wanted, static; the others are then 0.
            None for all.
        segments: [B, T] of packed rows, see ``TokenBatch``; all places are wanted.
    """
    hidden, unembedding = policy_states(
        params,
        tokens,
        mask,
        model=model,
        response_length=response_length,
        segments=segments,
    )
    first = tokens.shape[1] - hidden.shape[1]
    how = {
        'temperature': temperature,
        'softcap': model.config.logit_softcap,
        'num_tokens': model.config.num_tokens,
    }
    scored = token_logprobs(hidden, unembedding, tokens[:, first:], **how)
    before = ((0, 0), (first, 0))
    return jnp.pad(scored[0], before), jnp.pad(scored[1], before)


def policy_states(
    params: Params,
    tokens: Array,
    mask: Array,
    *,
    model: CausalLM,
    response_length: int | None,
    segments: Array | None,
) -> tuple[Array, Array]:
    """Final hidden states [B, N, D] of the last N places, and what gives their logits,
    [D, V]; see :func:`policy_logprobs`. N = ``response_length`` + 1, since the token
    before a response predicts its first one, and T for None.
    """
    last = None if response_length is None else response_length + 1
    if segments is None:
        hidden = apply_to_last(model, params, tokens, mask, last)
    else:
        hidden = model.apply({'params': params}, tokens, mask, segments)
    return hidden, model.unembedding(params)


def response_logprobs(
    params: Params, rows: Generation | Rollout, *, model: CausalLM, temperature: float
) -> tuple[Array, Array]:
    """Log-probabilities and entropies of a policy on responses, each [B, T] nats; 0
    outside the response.
    """
    scored = policy_logprobs(
        params,
        rows.tokens,
        rows.mask,
        model=model,
        temperature=temperature,
        response_length=rows.response_length,
    )
    logprobs, entropy = (jnp.where(rows.response_mask, x, 0) for x in scored)
    return logprobs, entropy


def off_policy_weights(
    params: Params,
    generation: Generation,
    *,
    model: CausalLM,
    hp: RolloutPlan,
) -> tuple[Generation, Array, Metrics]:
    """Takes responses of an older policy μ for those of the current one, with weights.

    token     w_t = min(π(y_t)/μ(y_t), c)
    response  w_t = min(π(y)/μ(y), c) = min(Π_s π(y_s)/μ(y_s), c), the same for every t

    The weights multiply the advantages. The log-probabilities of the responses become
    those of π, so that the ratio of the loss starts at 1 and its clip bounds the
    distance from π, and not from μ.

    Weights of tokens have little variance and are biased however large c is: they
    correct which token was drawn behind a prefix, and neither how often μ comes to the
    prefix nor what it writes after the token; the error of the gradient is of the first
    order in π − μ. With weights of whole responses it is exactly that of π as c grows
    (where advantages are sums of rewards less a baseline), at a variance that grows
    with the length.

    Source: truncated importance weights of tokens: Espeholt et al. 2018 (V-trace),
    arXiv 1802.01561; two old policies, one to correct for and one to stay near: Hilton
    et al. 2021, arXiv 2110.00641. Weights of responses: importance sampling.
    Deviations: V-trace also weighs the targets of the critic; here they are as sampled.

    Args:
        params: of the current policy π.
        generation: responses with the log-probabilities they were sampled with.
        model: the policy, static.
        hp: temperature of the policy, c > 0 (``off_policy_clip``; None for responses
            that are the policy's own) and the level of the weights.

    Returns:
        (generation with the log-probabilities of π, weights [B, T], 0 outside the
        response, metrics not yet reduced over devices: ``off_policy_ratio`` before the
        bound and ``off_policy_clipfrac``). Without ``clip`` the generation as it is,
        weights of 1 and no metrics.
    """
    response, clip = generation.response_mask, hp.off_policy_clip
    if clip is None:
        return generation, response.astype(jnp.float32), {}
    logprobs, _ = response_logprobs(
        params, generation, model=model, temperature=hp.temperature
    )
    before = jnp.where(response, generation.logprobs, 0)
    if hp.off_policy_level == 'token':
        ratio = importance_ratio(logprobs, before)
    else:
        whole = jnp.sum(logprobs, -1, keepdims=True), jnp.sum(before, -1, keepdims=True)
        ratio = jnp.broadcast_to(importance_ratio(*whole), response.shape)
    tokens = jnp.sum(response).astype(jnp.float32)
    metrics = {
        'rollout/off_policy_ratio': Mean(masked_sum(ratio, response), tokens),
        'rollout/off_policy_clipfrac': Mean(masked_sum(ratio > clip, response), tokens),
    }
    weights = jnp.where(response, jnp.minimum(ratio, clip), 0)
    return generation.replace(logprobs=logprobs), weights, metrics


def response_cuts(rollout: Rollout, count: int) -> Cuts | None:
    """Cuts of the rows of a rollout at ``count`` parts of the longest response there
    can be, behind what policy and critic are trained at; None for one part.

    Raises:
        ValueError: fewer parts than one, or several of an unknown length.
    """
    longest = rollout.response_length
    if count < 1 or (count > 1 and longest is None):
        raise ValueError(
            f'num_length_buckets={count} with response_length={longest}: use 1 or, '
            'where the length of the responses is known, more'
        )
    if count == 1:
        return None
    needed = rollout.mask
    if rollout.value_mask is not None:
        needed = needed | rollout.value_mask
    places = jnp.arange(1, longest + 1)
    lengths = jnp.max(jnp.where(needed[:, -longest:], places, 0), axis=1)
    sizes = sorted({math.ceil(longest * i / count) for i in range(1, count + 1)})

    def cut(rows: Rollout, size: int) -> Rollout:
        end = rows.tokens.shape[1] - longest + size
        kept = jax.tree.map(lambda x: x if x.ndim == 1 else x[:, :end], rows)
        return kept.replace(response_length=size)

    return Cuts(lengths.astype(jnp.int32), tuple(sizes), cut)


def sampled_kl(generation: Generation, ref_logprobs: Array, kind: KLEstimator) -> Array:
    """KL of the sampling policy from the reference policy, [B, T] nats; 0 outside the
    response.
    """
    kl = kl_estimate(generation.logprobs, ref_logprobs, kind)
    return jnp.where(generation.response_mask, kl, 0)


def per_row(x: Array) -> Mean:
    """The mean over rows of one number per row, [B]."""
    return Mean(jnp.sum(x.astype(jnp.float32)), jnp.float32(x.shape[0]))


def objective_metrics(
    generation: Generation,
    ref_logprobs: Array,
    scores: Array,
    rewards: Array,
    places: Array,
) -> Metrics:
    """What a rollout is worth, per response, not yet reduced over devices.

    Args:
        generation: the responses.
        ref_logprobs: [B, T] of the reference policy, 0 outside the response.
        scores: [B] reward units, shaped.
        rewards: [B, T] score and KL penalty.
        places: [B, T] bool, where rewards stand.
    """
    response = generation.response_mask
    k1, k3 = (
        kl_estimate(generation.logprobs, ref_logprobs, kind) for kind in ('k1', 'k3')
    )
    return {
        'objective/scores': per_row(scores),
        'objective/kl': per_row(masked_sum(k1, response, -1)),
        'objective/kl_k3': per_row(masked_sum(k3, response, -1)),
        'objective/entropy': per_row(masked_sum(-generation.logprobs, response, -1)),
        'objective/rlhf_reward': per_row(masked_sum(rewards, places, -1)),
        'rollout/response_length': per_row(jnp.sum(response, axis=-1)),
        'rollout/ended': per_row(generation.ended),
    }
