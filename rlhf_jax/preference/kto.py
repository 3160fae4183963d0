"""Kahneman–Tversky optimisation: unpaired responses, each good or bad.

L = λ_D·(1 − σ(β·(d − z)))  for a desirable response
L = λ_U·(1 − σ(β·(z − d)))  for an undesirable one
z = max(0, mean of log π(y′) − log π_ref(y′))

d is log π − log π_ref of the response; y′ is the response of another row to the same
prompt, which makes z an estimate of KL(π ‖ π_ref). No gradient goes through z.

Source: Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7. Choose the weights such that
λ_D·(desirable rows) / (λ_U·(undesirable rows)) lies in [1, 4/3].
Deviations: z is the mean over the whole batch, all devices and microbatches; TRL
averages the means of devices.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from rlhf_jax.ranges import above, at_least
from rlhf_jax.types import Array, UnpairedLogps

DATA = 'unpaired'
REFERENCE = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of KTO."""

    beta: Annotated[float, above(0)] = 0.1
    desirable_weight: Annotated[float, at_least(0)] = 1.0  # λ_D
    undesirable_weight: Annotated[float, at_least(0)] = 1.0  # λ_U


def context(batch: UnpairedLogps, hp: HParams) -> dict[str, Array]:
    """``kl`` [P]: z, the same for all rows, nats.

    Raises:
        ValueError: the batch has no mismatched responses.
    """
    if batch.mismatched_logps is None:
        raise ValueError(
            'kto needs mismatched responses for its KL, and the batch has none; fill '
            'in JudgedBatch.mismatched'
        )
    ratios = batch.mismatched_logps - batch.ref_mismatched_logps
    mean = jnp.sum(ratios * batch.weight) / jnp.maximum(jnp.sum(batch.weight), 1e-6)
    return {'kl': jnp.full_like(ratios, jnp.maximum(mean, 0))}


def loss(batch: UnpairedLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every response [P] and its implicit reward β·d [P]."""
    above = hp.beta * (batch.log_ratios - batch.context['kl'])
    good = hp.desirable_weight * jax.nn.sigmoid(-above)
    bad = hp.undesirable_weight * jax.nn.sigmoid(above)
    return jnp.where(batch.desirable, good, bad), hp.beta * batch.log_ratios
