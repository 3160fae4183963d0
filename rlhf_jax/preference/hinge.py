"""The hinge loss on log-ratios: SLiC with a reference policy.

L = max(0, 1 − β·(d_w − d_l))

d is log π − log π_ref of the response.

Source: Liu et al. 2023 (RSO), arXiv 2309.06657; SLiC: Zhao et al. 2023, arXiv
2305.10425.
Deviations: SLiC itself puts the hinge on log π without a reference policy and adds a
likelihood term on the target; this is the normalised form of RSO, as in TRL.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax

from rlhf_jax.ranges import above
from rlhf_jax.types import Array, PairLogps

DATA = 'pairs'
REFERENCE = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of the hinge loss."""

    beta: Annotated[float, above(0)] = 0.1  # 1/β is the margin, in nats


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards β·d [P, 2]."""
    logits = hp.beta * (batch.log_ratios[:, 0] - batch.log_ratios[:, 1])
    return jax.nn.relu(1 - logits), hp.beta * batch.log_ratios
