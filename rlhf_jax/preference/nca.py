"""Noise contrastive alignment on pairs: rewards against 0 rather than each other.

L = −log σ(r_w) − ½·log σ(−r_w) − ½·log σ(−r_l),   r = β·(log π − log π_ref)

The chosen response must not become less likely, which DPO does not prevent.

Source: Chen et al. 2024, arXiv 2402.05369, the pairwise case of NCA.
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
    """Hyperparameters of NCA."""

    beta: Annotated[float, above(0)] = 0.1


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards r [P, 2]."""
    rewards = hp.beta * batch.log_ratios
    up, down = jax.nn.log_sigmoid(rewards), jax.nn.log_sigmoid(-rewards)
    return -up[:, 0] - 0.5 * down[:, 0] - 0.5 * down[:, 1], rewards
