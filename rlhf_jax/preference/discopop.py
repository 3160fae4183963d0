"""DiscoPOP: the logistic and the exponential loss, blended by the margin itself.

L = (1 − s)·(−log σ(u)) + s·e⁻ᵘ,   u = β·(d_w − d_l),   s = σ(u/τ)

d is log π − log π_ref. The loss was found by a search over programs; it is not convex.

Source: Lu et al. 2024, arXiv 2406.08414, eq. 5.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from rlhf_jax.ranges import above
from rlhf_jax.types import Array, PairLogps

DATA = 'pairs'
REFERENCE = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of DiscoPOP."""

    beta: Annotated[float, above(0)] = 0.05
    tau: float = 0.05  # τ

    def __post_init__(self) -> None:
        if not 0 < self.tau < 1:
            raise ValueError(
                f'tau={self.tau} is not in (0, 1): above it the exponential wins where '
                'the pair is wrong, and overflows'
            )


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards β·d [P, 2]."""
    logits = hp.beta * (batch.log_ratios[:, 0] - batch.log_ratios[:, 1])
    logistic = jax.nn.sigmoid(-logits / hp.tau) * -jax.nn.log_sigmoid(logits)
    # One exponential: s·e⁻ᵘ as a product is 0·∞ where u is far below 0.
    exponential = jnp.exp(jax.nn.log_sigmoid(logits / hp.tau) - logits)
    return logistic + exponential, hp.beta * batch.log_ratios
