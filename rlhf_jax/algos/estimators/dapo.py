"""DAPO: the advantages of GRPO, on the prompts that teach something.

A prompt whose responses have all the same reward is left out of the loss and its
weight (dynamic sampling; drawing other prompts instead is the caller's).

Source: Yu et al. 2025, arXiv 2503.14476. To it belong the aggregation
``'token_mean'``, clip_eps (0.2, 0.28), no KL, and ``rewards.overlong_penalty``.
Deviations: they leave out what is all right or all wrong, which is the same where a
reward is one of two; the paper has no ε.
"""

from __future__ import annotations

from rlhf_jax.algos.estimators.grpo import HParams, advantages
from rlhf_jax.types import Array, Outcomes

__all__ = ['AGGREGATION', 'HParams', 'advantages', 'kept']

AGGREGATION = 'token_mean'


def kept(outcomes: Outcomes) -> Array:
    """[P] bool, prompts whose responses differ in reward."""
    return ~outcomes.equal
