"""Anchored preference optimisation, for a policy better than the data.

L = σ(r_w) + 1 − σ(r_w − r_l),   r = β·(log π − log π_ref)

Both responses become less likely, the rejected one more so.

Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8.
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
    """Hyperparameters of APO-down."""

    beta: Annotated[float, above(0)] = 0.1


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards r [P, 2]."""
    rewards = hp.beta * batch.log_ratios
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen), rewards
