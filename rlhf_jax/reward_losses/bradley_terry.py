"""The Bradley–Terry loss, with margins, smoothed labels and ties.

L = −(1 − ε)·log σ(x) − ε·log σ(−x),   x = r_w − r_l − m;   a tie has ε = ½

Source: Bradley & Terry 1952; Stiennon et al. 2020, arXiv 2009.01325, §3.4; margin m:
Touvron et al. 2023, arXiv 2307.09288, eq. 2; ties as labels of one half: Nakano et al.
2021, arXiv 2112.09332; ε is the "conservative" loss of Mitchell 2023,
https://ericmitchell.ai/cdpo.pdf, without a reference.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.types import Array

DATA = 'pairs'


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of the Bradley–Terry loss."""

    label_smoothing: float = 0.0  # ε: the share of labels that is wrong

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f'label_smoothing={self.label_smoothing} is not in [0, 0.5): with half '
                'of the labels wrong there is nothing to learn'
            )


def loss(gap: Array, tied: Array, hp: HParams) -> Array:
    """The loss of every pair, nats.

    Args:
        gap: x, any shape, reward units.
        tied: bool, likewise.
        hp: hyperparameters.
    """
    smoothing = jnp.where(tied, 0.5, hp.label_smoothing)
    right, wrong = jax.nn.log_sigmoid(gap), jax.nn.log_sigmoid(-gap)
    return -(1 - smoothing) * right - smoothing * wrong
