"""DPO that discounts what a response is longer by (LD-DPO).

L = −log σ(β·(d_w − d_l)),   d = d_shared + α·(d_whole − d_shared)

d_whole is log π − log π_ref of a response, d_shared that of its first min(|y_w|, |y_l|)
tokens. α = 1 is DPO, α = 0 never reads beyond the end of the shorter response.

Source: Liu et al. 2024, arXiv 2409.06411.
Deviations: none. The rewards reported are β·d with the discount, as TRL's.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax

from rlhf_jax.ranges import above, between, check_fields
from rlhf_jax.types import Array, PairLogps

DATA = 'pairs'
REFERENCE = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of LD-DPO."""

    beta: Annotated[float, above(0)] = 0.1
    alpha: Annotated[float, between(0, 1)] = 0.5  # weight of the tail

    def __post_init__(self) -> None:
        check_fields(self)


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards β·d [P, 2]."""
    shared = batch.shared_logps - batch.ref_shared_logps
    rewards = hp.beta * (shared + hp.alpha * (batch.log_ratios - shared))
    return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1]), rewards
