"""ReMax: REINFORCE against the score of the policy's own greedy response.

A_t = Σ_{s≥t} r_s − b,   b = score(x, greedy y)

r is the score at the last token minus β·KL at every token. One more generation per
prompt instead of a critic; groups are not needed.

Source: Li et al. 2023, arXiv 2310.10505, whose loss sums over tokens: aggregation
``'sequence_sum'``. With a KL penalty on every token: the reward to go, as in verl.
Deviations: none.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from rlhf_jax.ops.advantages import rewards_to_go
from rlhf_jax.types import Array, Outcomes

AGGREGATION = 'sequence_sum'
WANTS_BASELINE = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """ReMax has no hyperparameters of its own."""


def advantages(outcomes: Outcomes, hp: HParams, axis_name: str | None = None) -> Array:
    """[P, G, T], reward units.

    Raises:
        ValueError: outcomes without a baseline.
    """
    if outcomes.baseline is None:
        raise ValueError(
            'remax needs baseline [B], the scores of the greedy responses to the same '
            'prompts (temperature 0, or top_k 1)'
        )
    returns = rewards_to_go(outcomes.rewards, outcomes.mask, gamma=1.0)
    return jnp.where(outcomes.mask, returns - outcomes.baseline[..., None], 0)
