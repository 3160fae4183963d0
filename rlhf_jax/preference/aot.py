"""Alignment by optimal transport: margins are compared sorted, not pair by pair.

L_i = −(1 − ε)·log σ(u) − ε·log σ(−u),   u = β·(m_(i) − m_ref(i))

m = log π(y_w) − log π(y_l), m_ref is the reference policy's, (i) the i-th smallest of
the batch. The policy's margins are to be larger than the reference's as a distribution
(first-order stochastic dominance), not each than its own.

Source: Melnyk et al. 2024, arXiv 2406.05882, the paired variant.
Deviations: the sort is over the whole batch, all devices and microbatches, at the cost
of one more forward pass; TRL sorts what lies on one device. The unpaired variant is not
here. Rows of weight 0 stand outside the sort; other weights do not bend it.
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
    """Hyperparameters of AOT."""

    beta: Annotated[float, above(0)] = 0.1
    label_smoothing: Annotated[float, Range(0, 0.5, open_high=True)] = 0.0  # ε

    def __post_init__(self) -> None:
        check_fields(self)


def context(batch: PairLogps, hp: HParams) -> dict[str, Array]:
    """``ref_margins`` [P]: the reference's margin of each pair's rank, nats."""
    real = batch.weight > 0

    def margins(logps: Array) -> Array:
        # Filling rows are the largest on both sides and meet each other.
        return jnp.where(real, logps[:, 0] - logps[:, 1], jnp.inf)

    rank = jnp.argsort(jnp.argsort(margins(batch.logps)))
    matched = jnp.sort(margins(batch.ref_logps))[rank]
    return {'ref_margins': jnp.where(real, matched, 0)}


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards β·(log π − log π_ref)."""
    margins = batch.logps[:, 0] - batch.logps[:, 1]
    logits = hp.beta * (margins - batch.context['ref_margins'])
    right, wrong = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    per_row = -(1 - hp.label_smoothing) * right - hp.label_smoothing * wrong
    return per_row, hp.beta * batch.log_ratios
