"""GDPO: several rewards, each normalised by itself over the responses to a prompt.

a_ik = (s_ik − mean s_k)/(std s_k + ε),   S_i = Σ_k w_k·a_ik + (p_i − mean p)
A_i  = S_i/√(mean S² + 1e-8)

s_k is the score of reward k and w_k its weight; mean s_k, std s_k and mean p are those
of the responses to one prompt, mean S² that of all responses of the rollout on all
devices. p is what is in the reward of a response beside Σ_k w_k·s_k: penalties for a
length or a missing EOS, and −β·KL.

Where rewards are summed up first, as for ``grpo``, different combinations of them
become the same advantage, and the one with the largest spread counts most.

Source: Liu et al. 2026, arXiv 2601.05242. The loss is GRPO's: ``'sequence_mean'``.
Deviations: they have no penalties; here these stand beside rewards of unit spread.
S has mean 0 in every group, so that no mean is subtracted and a group of equal rewards
has advantage 0. n − 1 in std and ε are as in ``grpo``; ε is 1e-4 in TRL.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from rlhf_jax.ops.advantages import group_deviations
from rlhf_jax.ops.masked import masked_mean
from rlhf_jax.ranges import at_least
from rlhf_jax.types import Array, Outcomes

AGGREGATION = 'sequence_mean'
WANTS_SCORES = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of GDPO's advantages."""

    eps: Annotated[float, at_least(0)] = 1e-6  # ε, reward units (verl)


def advantages(outcomes: Outcomes, hp: HParams, axis_name: str | None = None) -> Array:
    """[P, G, T]; the same when a reward is shifted, or (up to ε) scaled.

    Raises:
        ValueError: outcomes without the single rewards.
    """
    if not outcomes.scores:
        raise ValueError(
            'gdpo needs the single rewards and their weights: Scores(each=…, weights=…)'
        )
    whole = outcomes.returns
    total, rest = jnp.zeros_like(whole), whole
    for name, scores in outcomes.scores.items():
        weight = outcomes.weights[name]
        deviation = group_deviations(scores.astype(jnp.float32))
        variance = jnp.sum(jnp.square(deviation), -1, keepdims=True)
        std = jnp.sqrt(variance / (deviation.shape[-1] - 1))
        total += weight * deviation / (std + hp.eps)
        rest -= weight * scores
    total += group_deviations(rest)
    every = jnp.ones_like(total, bool)
    scale = masked_mean(jnp.square(total), every, axis_name=axis_name)
    advantage = total * jax.lax.rsqrt(scale + 1e-8)
    return jnp.where(outcomes.mask, advantage[..., None], 0)
