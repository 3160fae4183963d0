"""Binary classifier optimisation: unpaired responses, told apart by their reward.

L = −log σ(r − δ)  for a desirable response,  −log σ(δ − r)  for an undesirable one
r = β·(log π − log π_ref),   δ = mean of r

No gradient goes through δ.

Source: Jung et al. 2024, arXiv 2404.04656.
Deviations: δ is the mean over the whole batch of one update, all devices and
microbatches, so that a state holds no statistics, at the cost of one more forward pass;
TRL takes the mean over all batches since the start, which agrees at the first. The
density ratios for prompts of different origin are not here.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from rlhf_jax.ranges import above
from rlhf_jax.types import Array, UnpairedLogps

DATA = 'unpaired'
REFERENCE = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of BCO."""

    beta: Annotated[float, above(0)] = 0.1


def context(batch: UnpairedLogps, hp: HParams) -> dict[str, Array]:
    """``delta`` [P]: δ, the same for all rows, reward units."""
    rewards = hp.beta * batch.log_ratios
    mean = jnp.sum(rewards * batch.weight) / jnp.maximum(jnp.sum(batch.weight), 1e-6)
    return {'delta': jnp.full_like(rewards, mean)}


def loss(batch: UnpairedLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every response [P] and its implicit reward r [P]."""
    rewards = hp.beta * batch.log_ratios
    above = rewards - batch.context['delta']
    return -jax.nn.log_sigmoid(jnp.where(batch.desirable, above, -above)), rewards
