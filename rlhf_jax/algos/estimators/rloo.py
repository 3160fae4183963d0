"""Leave-one-out baseline: a response against the mean of the others to its prompt.

A_i = R_i − mean_{j≠i} R_j = G/(G − 1)·(R_i − mean R)

R is the reward of the whole response, its KL penalty included; every token has the
advantage of its response.

Source: Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740. Theirs is one
action per response: aggregation ``'sequence_sum'``.
Deviations: none.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from rlhf_jax.ops.advantages import group_deviations
from rlhf_jax.types import Array, Outcomes

AGGREGATION = 'sequence_sum'


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """RLOO has no hyperparameters of its own."""


def advantages(outcomes: Outcomes, hp: HParams, axis_name: str | None = None) -> Array:
    """[P, G, T]; those of a prompt's responses sum to 0."""
    size = outcomes.mask.shape[1]
    advantage = group_deviations(outcomes.returns) * size / (size - 1)
    return jnp.where(outcomes.mask, advantage[..., None], 0)
