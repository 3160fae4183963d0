"""Copies of the policy that follow it: a moving reference policy, and an average.

Both live in the state beside the parameters (``OnlineState``), so that they are saved
with it. Start them as copies of the policy; ``move_anchors`` runs once after every
step of ``ppo_step``, ``policy_step`` or ``lagrangian_step``.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from rlhf_jax.ranges import Range, at_least, check_fields
from rlhf_jax.types import OnlineState


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorHParams:
    """Hyperparameters of ``move_anchors``; both anchors are off by default."""

    # the reference policy moves after every so many
    ref_sync_rollouts: Annotated[int | None, at_least(1)] = None
    # α; 1 is the policy itself (TRL: 0.6, every 512 steps)
    ref_mix: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    # of the average (OpenRLHF: 0.992)
    ema_decay: Annotated[float | None, Range(0, 1, open_high=True)] = None

    def __post_init__(self) -> None:
        check_fields(self)


def move_anchors(state: OnlineState, hp: AnchorHParams) -> OnlineState:
    """Moves the reference policy and the average after a step.

    π_ref ← α·π + (1 − α)·π_ref after every ``ref_sync_rollouts``-th rollout;
    π_avg ← d·π_avg + (1 − d)·π after each of them. All are parameters.

    Source: Gorbatovski et al. 2024 (TR-DPO), arXiv 2404.09656; ``sync_ref_model`` of
    TRL. Average: Polyak & Juditsky 1992.
    Deviations: none; the KL penalty is to the reference policy as it moves, so that
    ``objective/kl`` no longer says how far the policy is from where it began.

    Args:
        state: after the step, so that ``step`` counts its rollout.
        hp: hyperparameters, static.

    Returns:
        The state with its anchors moved.

    Raises:
        ValueError: an anchor that is on and not in the state.
    """
    policy = state.params['policy']
    if hp.ref_sync_rollouts is not None:
        if state.ref_params is None:
            raise ValueError(
                f'ref_sync_rollouts={hp.ref_sync_rollouts} moves a reference that the '
                'state does not have; start it with ref_params, a copy of the policy'
            )
        is_due = state.step % hp.ref_sync_rollouts == 0
        mixed = jax.tree.map(
            lambda new, old: jnp.where(
                is_due, hp.ref_mix * new + (1 - hp.ref_mix) * old, old
            ),
            policy,
            state.ref_params,
        )
        state = state.replace(ref_params=mixed)
    if hp.ema_decay is not None:
        if state.ema_params is None:
            raise ValueError(
                f'ema_decay={hp.ema_decay} moves an average that the state does not '
                'have; start it with ema_params, a copy of the policy'
            )
        average = jax.tree.map(
            lambda new, old: hp.ema_decay * old + (1 - hp.ema_decay) * new,
            policy,
            state.ema_params,
        )
        state = state.replace(ema_params=average)
    return state
