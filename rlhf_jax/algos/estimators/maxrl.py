"""MaxRL: the likelihood of success instead of its rate, for rewards of 0 and 1.

A_i = (r_i − r̄)/r̄,   r̄ the mean over the G responses to a prompt; 0 where it is 0

For one prompt, REINFORCE follows ∇p, where p is the probability of a right response;
the log-likelihood log p = −Σ_{k≥1} (1 − p)^k/k has the gradient ∇p/p. The expected
gradient of these advantages is that of the first G − 1 terms of the series: two
responses give that of REINFORCE, and G → ∞ is maximum likelihood.

Source: Tajwar et al. 2026, arXiv 2602.02710. The score of a response is that of the
whole: aggregation ``'sequence_sum'``.
Deviations: TRL adds ε to the denominator; here a prompt without a right response has
advantage 0. A mean below 0, which no reward of 0 and 1 has, is taken for 0.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from rlhf_jax.ops.advantages import group_deviations
from rlhf_jax.types import Array, Outcomes

AGGREGATION = 'sequence_sum'
WANTS_SUCCESS = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """MaxRL has no hyperparameters of its own."""


def advantages(outcomes: Outcomes, hp: HParams, axis_name: str | None = None) -> Array:
    """[P, G, T]; the same when rewards are scaled by a positive number."""
    returns = outcomes.returns
    rate = jnp.mean(returns, -1, keepdims=True)
    some = rate > 0
    advantage = group_deviations(returns) / jnp.where(some, rate, 1)
    return jnp.where(outcomes.mask, jnp.where(some, advantage, 0)[..., None], 0)
