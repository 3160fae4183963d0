"""Efficient exact optimisation on pairs: the reverse KL to the labels.

L = q·(log q − log(1 − ε)) + (1 − q)·(log(1 − q) − log ε),   q = σ(β·(d_w − d_l))

d is log π − log π_ref; the labels are held to be right with probability 1 − ε. DPO with
smoothed labels is the KL in the other direction.

Source: Ji et al. 2024, arXiv 2402.00856, eq. 16.
Deviations: none; ε = 0 would be infinite and is refused.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from rlhf_jax.ranges import Range, above, check_fields
from rlhf_jax.types import Array, PairLogps

DATA = 'pairs'
REFERENCE = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of EXO."""

    beta: Annotated[float, above(0)] = 0.1
    # ε
    label_smoothing: Annotated[float, Range(0, 0.5, open_low=True, open_high=True)] = (
        1e-3
    )

    def __post_init__(self) -> None:
        check_fields(self)


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards β·d [P, 2]."""
    logits = hp.beta * (batch.log_ratios[:, 0] - batch.log_ratios[:, 1])
    right, wrong = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    per_row = jnp.exp(right) * (right - jnp.log1p(-hp.label_smoothing))
    per_row += jnp.exp(wrong) * (wrong - jnp.log(hp.label_smoothing))
    return per_row, hp.beta * batch.log_ratios
