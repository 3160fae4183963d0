"""DPO with the KL of every token in its margin (TDPO).

L = −log σ(β·(d_w − d_l) − β·α·(K_l − sg(K_w)))
K = Σ_t KL(π_ref(· | y_<t) ‖ π(· | y_<t)), the sequential forward KL of a response

d is log π − log π_ref of a response, sg stops the gradient. The KL of the rejected
response, which DPO lets grow fastest, is held down. TDPO1 has no sg and α = 1:
``kl_gradient='both'``, ``alpha=1``.

Source: Zeng et al. 2024, arXiv 2404.11999 (TDPO2; β and α are their code's).
Deviations: none in the loss. The rewards reported are β·(d + α·K), whose difference is
the margin; their code's have α = 1.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from rlhf_jax.ranges import above, at_least, check_fields
from rlhf_jax.types import Array, PairLogps

DATA = 'pairs'
REFERENCE = True
TOKENS = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of TDPO."""

    beta: Annotated[float, above(0)] = 0.1
    alpha: Annotated[float, at_least(0)] = 0.5  # weight of the KL; 0 is DPO
    kl_gradient: Literal['rejected', 'both'] = 'rejected'  # of whose KL; TDPO1: 'both'

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kl_gradient not in ('rejected', 'both'):
            raise ValueError(
                f"kl_gradient={self.kl_gradient!r}; use 'rejected' or 'both'"
            )


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards β·(d + α·K) [P, 2]."""
    kl = jnp.sum(batch.tokens.kl, axis=-1)
    if hp.kl_gradient == 'rejected':
        kl = jnp.stack([jax.lax.stop_gradient(kl[:, 0]), kl[:, 1]], axis=-1)
    rewards = hp.beta * (batch.log_ratios + hp.alpha * kl)
    return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1]), rewards
