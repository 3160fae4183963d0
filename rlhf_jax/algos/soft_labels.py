"""Comparisons that are less than certain: the expected loss and the expected agreement.

A label says that the chosen one of two responses is the better one with probability p.
Every loss on comparisons is then its expectation over which of both is better, whatever
the loss: the cross-entropy for Bradley–Terry and DPO, of which label smoothing is the
case p = 1 − ε. ``rm.py`` and ``preference.py`` call what is here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.preference import PreferenceLoss
from rlhf_jax.reward_losses import RewardLoss
from rlhf_jax.types import Array, PairLogps


def expected_agreement(gap: Array, probability: Array) -> Array:
    """How often a label agrees with the order that a model gives.

    Args:
        gap: what the model says of the chosen less the rejected response, any shape.
        probability: p, which broadcasts with ``gap``.

    Returns:
        p where the gap is above 0, 1 − p where it is below, ½ where it is 0.
    """
    return jnp.where(gap > 0, probability, jnp.where(gap < 0, 1 - probability, 0.5))


def expected_reward_loss(
    gap: Array, tied: Array, probability: Array, loss: RewardLoss, loss_hp: Any
) -> Array:
    """The loss of every pair of a reward model.

    L = p·ℓ(x) + (1 − p)·ℓ(−x)

    Where p is 1 or 0, the other term has no part in value and gradient.

    Args:
        gap: x = r_w − r_l − m, any shape, reward units.
        tied: bool, likewise; ℓ of a tie does not change with the sign of x.
        probability: p, which broadcasts with ``gap``.
        loss: a module of ``reward_losses`` whose ``DATA`` is 'pairs', or one like it.
        loss_hp: its ``HParams``.
    """
    right = loss.loss(jnp.where(probability == 0, -gap, gap), tied, loss_hp)
    wrong = loss.loss(jnp.where(probability == 1, gap, -gap), tied, loss_hp)
    return probability * right + (1 - probability) * wrong


def expected_preference_loss(
    pairs: PairLogps, probability: Array, loss: PreferenceLoss, loss_hp: Any
) -> tuple[Array, Array]:
    """The loss of every pair of a policy, and its implicit rewards.

    L = p·ℓ(y_w, y_l) + (1 − p)·ℓ(y_l, y_w)

    Where p is 1 or 0, the other term has no part in value and gradient.

    Args:
        pairs: what the loss sees.
        probability: [P] p.
        loss: a module of ``preference`` on pairs, whose rows do not depend on each
            other.
        loss_hp: its ``HParams``.

    Returns:
        ([P] loss, [P, 2] rewards of the chosen and the rejected response).
    """
    first, rewards = loss.loss(_swapped(pairs, probability == 0), loss_hp)
    second, _ = loss.loss(_swapped(pairs, probability < 1), loss_hp)
    rewards = _by_row(probability == 0, rewards[:, ::-1], rewards)
    return probability * first + (1 - probability) * second, rewards


def _swapped(pairs: PairLogps, rows: Array) -> PairLogps:
    """The pairs with chosen and rejected in each other's place in some rows."""
    sides = {
        field.name: getattr(pairs, field.name)
        for field in dataclasses.fields(pairs)
        if field.name not in ('weight', 'context')
    }
    return pairs.replace(**jax.tree.map(lambda x: _by_row(rows, x[:, ::-1], x), sides))


def _by_row(rows: Array, one: Array, other: Array) -> Array:
    return jnp.where(rows.reshape(-1, *(1,) * (one.ndim - 1)), one, other)
