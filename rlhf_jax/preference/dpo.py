"""Direct preference optimisation, with f-divergences and smoothed labels.

u = β·(f′(d_w) − f′(d_l));   L = −(1 − ε)·log σ(u) − ε·log σ(−u)

d is log π − log π_ref of the chosen (w) and the rejected (l) response, summed over its
tokens, and f′ the derivative of the divergence from the reference policy, up to a
constant that cancels:

    reverse_kl  d        js     log 2 + log σ(d)
    forward_kl  1 − e⁻ᵈ  alpha  (1 − e⁻ᵅᵈ)/α, between the two KLs for 0 < α < 1

Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7; ε (cDPO): Mitchell 2023,
https://ericmitchell.ai/cdpo.pdf; divergences: Wang et al. 2023, arXiv 2309.16240,
table 1.
Deviations: the exponent of forward_kl and alpha is cut at 80, where float32 ends. TRL's
coefficient of the α-divergence is 1 − α. The rewards reported are β·d for every
divergence, as TRL's, so that runs compare.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from rlhf_jax.ranges import above
from rlhf_jax.types import Array, PairLogps

DATA = 'pairs'
REFERENCE = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams:
    """Hyperparameters of DPO."""

    beta: Annotated[float, above(0)] = 0.1
    label_smoothing: float = 0.0  # ε: the share of labels that is wrong
    divergence: Literal['reverse_kl', 'forward_kl', 'js', 'alpha'] = 'reverse_kl'
    alpha: float = 0.5  # of the α-divergence

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f'label_smoothing={self.label_smoothing} is not in [0, 0.5): with half '
                'of the labels wrong there is nothing to learn'
            )
        if self.alpha <= 0:
            raise ValueError(
                f"alpha={self.alpha} is not above 0; its limit 0 is 'reverse_kl'"
            )


def loss(batch: PairLogps, hp: HParams) -> tuple[Array, Array]:
    """The loss of every pair [P] and its implicit rewards β·d [P, 2]."""
    score = _derivative(batch.log_ratios, hp)
    logits = hp.beta * (score[:, 0] - score[:, 1])
    right, wrong = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    per_row = -(1 - hp.label_smoothing) * right - hp.label_smoothing * wrong
    return per_row, hp.beta * batch.log_ratios


def _derivative(d: Array, hp: HParams) -> Array:
    """f′ at e^d."""
    if hp.divergence == 'reverse_kl':
        return d
    if hp.divergence == 'js':
        return jnp.log(2.0) + jax.nn.log_sigmoid(d)
    if hp.divergence in ('forward_kl', 'alpha'):
        alpha = 1.0 if hp.divergence == 'forward_kl' else hp.alpha
        return -jnp.expm1(jnp.minimum(-alpha * d, 80.0)) / alpha
    raise ValueError(
        f"divergence={hp.divergence!r}; use 'reverse_kl', 'forward_kl', 'js' or 'alpha'"
    )
