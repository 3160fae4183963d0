"""The Bradley–Terry loss of a reward model."""

from __future__ import annotations

import jax

from rlhf_jax.types import Array


def bradley_terry_loss(
    chosen_scores: Array, rejected_scores: Array, margin: Array | float = 0.0
) -> Array:
    """Negative log-likelihood that the chosen text is preferred.

    L = −log σ(r_w − r_l − m)

    Source: Bradley & Terry 1952; Stiennon et al. 2020, arXiv 2009.01325, §3.4; margin
        m: Touvron
    et al. 2023, arXiv 2307.09288, eq. 2.

    Args:
        chosen_scores: [P] r_w, reward units.
        rejected_scores: [P] r_l.
        margin: [P] or scalar m ≥ 0, the difference the labels demand.

    Returns:
        [P] nats, by a log-sigmoid that is stable for any difference.
    """
    return -jax.nn.log_sigmoid(chosen_scores - rejected_scores - margin)
