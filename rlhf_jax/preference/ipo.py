"""Identity preference optimisation: the log-ratio is regressed on 1/(2β).

L = (d_w − d_l − 1/(2β))²

d is log π − log π_ref of the response; ``over='token'`` divides each by its length.

Source: Azar et al. 2023, arXiv 2310.12036, eq. 17, where β is τ.
Deviations: none with ``over='response'``. TRL divides by the lengths (``'token'``),
which its authors report to be what the paper ran; the margin 1/(2β) is then one of
nats per token. The rewards reported are β·d of whole responses either way, as TRL's.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp

from rlhf_jax.ranges import above
from rlhf_jax.types import Array, PairLogps

DATA = 'pairs'
REFERENCE = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of IPO."""

    beta: Annotated[float, above(0)] = 0.1  # τ
    over: Literal['response', 'token'] = 'response'

    def __post_init__(self) -> None:
        if self.over not in ('response', 'token'):
            raise ValueError(f"over={self.over!r}; use 'response' or 'token'")


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards β·d [P, 2]."""
    d = batch.log_ratios
    if hp.over == 'token':
        d = d / batch.lengths
    per_row = jnp.square(d[:, 0] - d[:, 1] - 1 / (2 * hp.beta))
    return per_row, hp.beta * batch.log_ratios
