"""Group-relative advantages: rewards normalised over the responses to a prompt.

A_i = (R_i − mean R)/(std R + ε)

Every token has the advantage of its response. A group of equal rewards gets 0.

Source: Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300. Their KL is in the
loss, their loss a mean over the tokens of each response: ``'sequence_mean'``.
Deviations: n − 1 in the variance and ε are those of verl and TRL (which has ε 1e-4);
the paper says neither.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax.numpy as jnp

from rlhf_jax.ops.advantages import group_deviations
from rlhf_jax.ranges import at_least
from rlhf_jax.types import Array, Outcomes

AGGREGATION = 'sequence_mean'


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of GRPO's advantages."""

    eps: Annotated[float, at_least(0)] = 1e-6  # ε, reward units (verl)


def advantages(outcomes: Outcomes, hp: HParams, axis_name: str | None = None) -> Array:
    """[P, G, T]; the same when rewards are shifted, or (up to ε) scaled."""
    deviation = group_deviations(outcomes.returns)
    variance = jnp.sum(jnp.square(deviation), -1, keepdims=True)
    std = jnp.sqrt(variance / (deviation.shape[-1] - 1))
    return jnp.where(outcomes.mask, (deviation / (std + hp.eps))[..., None], 0)
