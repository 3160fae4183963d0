"""Self-play preference optimisation, with labels taken as certain.

L = (d_w − 1/(2β))² + (d_l + 1/(2β))²

d is log π − log π_ref: the log-ratio of each response is regressed on η·(P − ½), with
η = 1/β and P = 1 for the chosen, 0 for the rejected response.

Source: Wu et al. 2024, arXiv 2405.00675, eq. 4.7.
Deviations: the paper estimates P by a preference model over several samples per prompt.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax.numpy as jnp

from rlhf_jax.ranges import above
from rlhf_jax.types import Array, PairLogps

DATA = 'pairs'
REFERENCE = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of SPPO."""

    beta: Annotated[float, above(0)] = 1e-3  # 1/η; the paper's η is 1000


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards β·d [P, 2]."""
    target = 1 / (2 * hp.beta)
    chosen, rejected = batch.log_ratios[:, 0], batch.log_ratios[:, 1]
    per_row = jnp.square(chosen - target) + jnp.square(rejected + target)
    return per_row, hp.beta * batch.log_ratios
