"""The policy's loss on a rollout: one function for PPO and for the critic-free methods.

What differs between methods comes in as arguments: the per-token objective (a function
of ``ops/policy_loss.py``), the level of the ratio, the aggregation, the coefficients.
Read ``algos/ppo.py`` next.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax.algos.rollout import response_logprobs
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.ops.kl import kl_estimate
from rlhf_jax.ops.masked import masked_sum
from rlhf_jax.ops.policy_loss import Aggregation, RatioLevel, aggregate, at_level
from rlhf_jax.types import Array, Max, Mean, Metrics, Params, Rollout

# (logprobs, old_logprobs, advantages) -> (loss, ratio, clipped), each [B, T]
Objective = Callable[[Array, Array, Array], tuple[Array, Array, Array]]


def surrogate_loss(
    params: Params,
    batch: Rollout,
    *,
    model: CausalLM,
    temperature: float,
    objective: Objective,
    ratio_level: RatioLevel,
    kl_coef: float,
    entropy_coef: float,
    aggregation: Aggregation,
    length: int | None,
) -> tuple[Array, Array, Metrics]:
    """Sum of objective + c_KL·k3(π ‖ π_ref) − c_H·H over the response tokens.

    Rows that ``batch.kept`` leaves out enter neither sum nor weight, but the metrics,
    where their loss counts as that of rows with advantage 0.

    Args:
        params: of the policy.
        batch: rollout rows.
        model: the policy, static.
        temperature: of the policy.
        objective: the loss of a token from its ratio and its advantage.
        ratio_level: whether every token has a ratio of its own.
        kl_coef: c_KL; k3 keeps the gradient of the KL estimate a pull to the
            reference policy.
        entropy_coef: c_H.
        aggregation: how tokens are summed up.
        length: tokens, for the aggregation ``'fixed_length'``.

    Returns:
        (sum [], weight [], metrics; ``loss/policy`` is the objective alone, and
        ``sampling/logprob_diff_…`` are |log π − log π_old| per token, in nats).
    """
    # Outside the response both sides are 0, and the ratio is 1.
    logprobs, entropy = response_logprobs(
        params, batch, model=model, temperature=temperature
    )
    mask = batch.response_mask
    loss, ratio, clipped = objective(
        at_level(logprobs, batch.old_logprobs, mask, ratio_level),
        batch.old_logprobs,
        batch.advantages,
    )
    tokens = jnp.sum(mask).astype(jnp.float32)
    apart = jnp.abs(logprobs - batch.old_logprobs)

    def mean(x: Array) -> Mean:
        return Mean(masked_sum(x, mask), tokens)

    metrics = {
        'loss/policy': Mean(*aggregate(loss, mask, aggregation, length)),
        'policy/approxkl': mean(jnp.square(logprobs - batch.old_logprobs) / 2),
        'policy/clipfrac': mean(clipped),
        'policy/entropy': mean(entropy),
        'policy/ratio': mean(ratio),
        'policy/ratio_max': Max(jnp.max(jnp.where(mask, ratio, 0))),
        'sampling/logprob_diff_mean': mean(apart),
        'sampling/logprob_diff_max': Max(jnp.max(jnp.where(mask, apart, 0))),
    }
    total = loss - entropy_coef * entropy
    if kl_coef:
        kl = kl_estimate(logprobs, jnp.where(mask, batch.ref_logprobs, 0), 'k3')
        metrics['policy/kl'] = mean(kl)
        total = total + kl_coef * kl
    if batch.kept is not None:
        mask = mask & batch.kept[:, None]
    return *aggregate(total, mask, aggregation, length), metrics
