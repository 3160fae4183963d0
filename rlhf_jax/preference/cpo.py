"""Contrastive preference optimisation: DPO without a reference policy, plus likelihood.

L = −log σ(β·(log π(y_w) − log π(y_l))) − c·log π(y_w)

Source: Xu et al. 2024, arXiv 2401.08417, eq. 3.
Deviations: none with ``nll_over='response'``. The authors' code and TRL divide the
likelihood term by the tokens of all chosen responses of the batch; ``'token'`` divides
each by its own, so that a row counts the same in every batch.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax

from rlhf_jax.ranges import above, at_least
from rlhf_jax.types import Array, PairLogps

DATA = 'pairs'
REFERENCE = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of CPO."""

    beta: Annotated[float, above(0)] = 0.1
    nll_coef: Annotated[float, at_least(0)] = 1.0  # c
    nll_over: Literal['response', 'token'] = 'response'

    def __post_init__(self) -> None:
        if self.nll_over not in ('response', 'token'):
            raise ValueError(f"nll_over={self.nll_over!r}; use 'response' or 'token'")


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards β·log π [P, 2]."""
    rewards = hp.beta * batch.logps
    nll = batch.logps if hp.nll_over == 'response' else batch.average_logps
    prefer = -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1])
    return prefer - hp.nll_coef * nll[:, 0], rewards
