"""GRPO done right: group-relative advantages without the division by their spread.

A_i = R_i − mean R

Dividing by the standard deviation gives easy and hard prompts more weight; dividing by
a response's length makes long wrong answers cheap. The second is undone by the
aggregation ``'fixed_length'``.

Source: Liu et al. 2025, arXiv 2503.20783.
Deviations: none. It is ``rloo`` times (G − 1)/G.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from rlhf_jax.ops.advantages import group_deviations
from rlhf_jax.types import Array, Outcomes

AGGREGATION = 'fixed_length'


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Dr. GRPO has no hyperparameters of its own."""


def advantages(outcomes: Outcomes, hp: HParams, axis_name: str | None = None) -> Array:
    """[P, G, T], reward units."""
    return jnp.where(outcomes.mask, group_deviations(outcomes.returns)[..., None], 0)
