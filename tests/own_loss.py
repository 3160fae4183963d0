"""A preference loss of a user's own: the margin per token is drawn to a target."""

import dataclasses

DATA = 'pairs'
REFERENCE = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Unlike those of any loss of the package."""

    beta: float = 7.0
    target: float = 0.5


def loss(batch, hp):
    """Squares, and log-probabilities per token as rewards."""
    rewards = batch.average_logps
    gap = rewards[:, 0] - rewards[:, 1] - hp.target
    return hp.beta * gap**2, rewards
