"""DPO whose expected loss does not move when a known share of labels is flipped.

L = [−(1 − ε)·log σ(u) + ε·log σ(−u)] / (1 − 2ε),   u = β·(d_w − d_l)

ε is the share of flipped labels, d is log π − log π_ref. Smoothed labels (cDPO) are a
setting of ``dpo.py`` instead: those bias the loss towards 0, this does not, and it can
become negative.

Source: Chowdhury et al. 2024, arXiv 2403.00409.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax

from rlhf_jax.ranges import Range, above, check_fields
from rlhf_jax.types import Array, PairLogps

DATA = 'pairs'
REFERENCE = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of robust DPO."""

    beta: Annotated[float, above(0)] = 0.1
    label_smoothing: Annotated[float, Range(0, 0.5, open_high=True)] = 0.1  # ε

    def __post_init__(self) -> None:
        check_fields(self)


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards β·d [P, 2]."""
    logits = hp.beta * (batch.log_ratios[:, 0] - batch.log_ratios[:, 1])
    right, wrong = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    flips = hp.label_smoothing
    per_row = (flips * wrong - (1 - flips) * right) / (1 - 2 * flips)
    return per_row, hp.beta * batch.log_ratios
