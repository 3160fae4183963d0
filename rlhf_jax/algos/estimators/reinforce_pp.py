"""REINFORCE++: reward to go, normalised over the whole rollout instead of a group.

G_t = Σ_{s≥t} γ^(s−t)·r_s;   A_t = (G_t − mean G)/std G

r is the score at the last token minus β·KL at every token; mean and variance are those
of all response tokens of all devices. Groups are not needed.

Source: Hu et al. 2025, arXiv 2501.03262. The gradient is REINFORCE's, a sum over the
tokens of a response: aggregation ``'sequence_sum'``, or ``'token_mean'``, which is the
same but for one factor of the whole rollout. A mean over each response's own tokens
would weigh A_t by a length that is not known at t, and moves the optimum.
Deviations: population variance with 1e-8 inside the root, as in all our whitening.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from rlhf_jax.ops.advantages import rewards_to_go
from rlhf_jax.ops.masked import whiten
from rlhf_jax.ranges import between
from rlhf_jax.types import Array, Outcomes

AGGREGATION = 'sequence_sum'


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of REINFORCE++'s advantages."""

    gamma: Annotated[float, between(0, 1)] = 1.0


def advantages(outcomes: Outcomes, hp: HParams, axis_name: str | None = None) -> Array:
    """[P, G, T]; mean 0 and variance 1 over the response tokens of the rollout."""
    returns = rewards_to_go(outcomes.rewards, outcomes.mask, gamma=hp.gamma)
    return whiten(returns, outcomes.mask, axis_name=axis_name)
