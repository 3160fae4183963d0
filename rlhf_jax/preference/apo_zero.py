"""Anchored preference optimisation, for data better than the policy.

L = 1 − σ(r_w) + σ(r_l),   r = β·(log π − log π_ref)

Chosen responses become more likely, and rejected ones less, than under the reference
policy.

Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax

from rlhf_jax.ranges import above
from rlhf_jax.types import Array, PairLogps

DATA = 'pairs'
REFERENCE = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of APO-zero."""

    beta: Annotated[float, above(0)] = 0.1


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards r [P, 2]."""
    rewards = hp.beta * batch.log_ratios
    return jax.nn.sigmoid(-rewards[:, 0]) + jax.nn.sigmoid(rewards[:, 1]), rewards
