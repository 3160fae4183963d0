"""Odds-ratio preference optimisation: fine-tuning and preference in one loss.

a = log π(y)/|y|;   odds = eᵃ/(1 − eᵃ);   L = −a_w − λ·log σ(log odds_w − log odds_l)

Source: Hong et al. 2024, arXiv 2403.07691, eqs. 4–7; a stands for the log P(y|x) of
eq. 1, which is a mean over tokens.
Deviations: a is kept below −1e-6, because a certain response has infinite odds. TRL's
likelihood term counts the prompt too and is divided by all tokens of the batch; here it
is that of the response, per row, as in the paper.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from rlhf_jax.ranges import above
from rlhf_jax.types import Array, PairLogps

DATA = 'pairs'
REFERENCE = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of ORPO."""

    beta: Annotated[float, above(0)] = 0.1  # λ


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards λ·a [P, 2]."""
    average = jnp.minimum(batch.average_logps, -1e-6)
    log_odds = average - jnp.log(-jnp.expm1(average))
    odds_ratio = jax.nn.log_sigmoid(log_odds[:, 0] - log_odds[:, 1])
    return -average[:, 0] - hp.beta * odds_ratio, hp.beta * average
