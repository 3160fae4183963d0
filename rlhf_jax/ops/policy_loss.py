"""The clipped policy and value losses, per token, and how tokens are summed up.

Everything here returns unreduced arrays or (sum, weight); the step divides once by the
global weight. Read ``algos/ppo.py`` next.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from rlhf_jax.ops.masked import masked_sum
from rlhf_jax.types import Array

Aggregation = Literal['token_mean', 'sequence_mean', 'sequence_sum']


def clipped_policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    *,
    clip_eps: float,
    dual_clip: float | None = None,
) -> tuple[Array, Array, Array]:
    """PPO's clipped surrogate, negated, for every token.

    ρ = exp(clip(log π − log π_old, ±20));   L = max(−A·ρ, −A·clip(ρ, 1 ± ε)).
    With ``dual_clip`` c: for A < 0, L = min(L, −A·c).

    Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7; dual clip: Ye et al. 2020,
    arXiv 1912.09729, eq. 5.

    Args:
        logprobs: [B, T] under the current policy.
        old_logprobs: [B, T] under the policy that sampled.
        advantages: [B, T].
        clip_eps: ε.
        dual_clip: c > 1, or None for off.

    Returns:
        (loss [B, T], ratio ρ [B, T], clipped [B, T] bool: where the clipped term was
        larger).
    """
    # ±20 keeps exp finite in float32; a ratio that large is clipped in the loss anyway.
    ratio = jnp.exp(jnp.clip(logprobs - old_logprobs, -20.0, 20.0))
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps)
    loss = jnp.maximum(unclipped, clipped)
    if dual_clip is not None:
        loss = jnp.where(
            advantages < 0, jnp.minimum(loss, -advantages * dual_clip), loss
        )
    return loss, ratio, clipped > unclipped


def clipped_value_loss(
    values: Array, old_values: Array, returns: Array, *, clip_eps: float | None
) -> tuple[Array, Array]:
    """Half the squared error of the critic, not rewarded for large moves.

    L = ½·max((V − R)², (clip(V, V_old ± ε) − R)²)

    Source: ``value_loss`` of OpenAI baselines' PPO2 and openai/lm-human-preferences.

    Args:
        values: [B, T] of the current critic.
        old_values: [B, T] at rollout time.
        returns: [B, T] targets.
        clip_eps: ε, or None for the plain squared error.

    Returns:
        (loss [B, T], clipped [B, T] bool).
    """
    plain = jnp.square(values - returns)
    if clip_eps is None:
        return plain / 2, jnp.zeros_like(plain, bool)
    # Not old + clip(V − old, ±ε): in float32 that moves values inside the range too.
    near = jnp.clip(values, old_values - clip_eps, old_values + clip_eps)
    clipped = jnp.square(near - returns)
    return jnp.maximum(plain, clipped) / 2, clipped > plain


def aggregate(loss: Array, mask: Array, how: Aggregation) -> tuple[Array, Array]:
    """Sums a per-token loss up, with the weight to divide by.

    ``token_mean``: Σ_bt L / number of tokens. ``sequence_mean``: Σ_b mean_t L / B.
    ``sequence_sum``: Σ_b Σ_t L / B. Rows without a token count in neither sum nor
    weight.

    Args:
        loss: [B, T].
        mask: [B, T] bool.
        how: the aggregation.

    Returns:
        (sum [], weight []), to be added over microbatches and devices before dividing.

    Raises:
        ValueError: an unknown aggregation.
    """
    counts = jnp.sum(mask, axis=-1).astype(jnp.float32)
    rows = jnp.sum(counts > 0).astype(jnp.float32)
    if how == 'token_mean':
        return masked_sum(loss, mask), jnp.sum(counts)
    if how == 'sequence_mean':
        return jnp.sum(masked_sum(loss, mask, -1) / jnp.maximum(counts, 1)), rows
    if how == 'sequence_sum':
        return masked_sum(loss, mask), rows
    raise ValueError(
        f"aggregation {how!r} is unknown; use 'token_mean', 'sequence_mean' or "
        "'sequence_sum'"
    )
