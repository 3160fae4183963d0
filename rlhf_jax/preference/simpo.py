"""SimPO: mean log-probabilities against a margin, without a reference policy.

L = −log σ(β·(log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ)

Source: Meng et al. 2024, arXiv 2405.14734, eq. 6.
Deviations: none. Some codes set γ/β instead of γ. TRL adds a likelihood term of the
chosen response to this loss unless ``cpo_alpha`` is 0; the paper has none.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax

from rlhf_jax.ranges import above
from rlhf_jax.types import Array, PairLogps

DATA = 'pairs'
REFERENCE = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of SimPO."""

    beta: Annotated[float, above(0)] = 2.0
    gamma: float = 0.5  # γ, reward units


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards [P, 2]
    β·log π/|y|."""
    rewards = hp.beta * batch.average_logps
    return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1] - hp.gamma), rewards
