"""DPO with a length penalty in the reward (R-DPO).

L = −log σ(β·(d_w − d_l) + α·(|y_w| − |y_l|))

d is log π − log π_ref, |y| the tokens of a response. Where the chosen response is the
longer one, its length explains part of the preference and the policy learns less.

Source: Park et al. 2024, arXiv 2403.19159.
Deviations: none. The rewards reported leave the length out.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax

from rlhf_jax.ranges import above, at_least
from rlhf_jax.types import Array, PairLogps

DATA = 'pairs'
REFERENCE = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of R-DPO."""

    beta: Annotated[float, above(0)] = 0.1
    alpha: Annotated[float, at_least(0)] = 0.01  # α, reward units per token


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards β·d [P, 2]."""
    rewards = hp.beta * batch.log_ratios
    explained = hp.alpha * (batch.lengths[:, 0] - batch.lengths[:, 1])
    return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1] + explained), rewards
