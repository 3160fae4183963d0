"""Ensembles of reward models: all members in one step, ``ensemble_rm_step``.

The members' parameters are stacked on a leading axis ``[M, …]`` and each learns alone,
by ``rm_step`` under ``vmap``: they share nothing but the program. What the members say
of a response becomes one score in ``rewards.combine_members``. Read
``stages/reward_model.py`` next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.algos.rm import RMHParams, rm_step
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.reward_losses import RewardLoss, bradley_terry
from rlhf_jax.types import JudgedBatch, Metrics, Params, TrainState


def member_seed(seed: int, member: int) -> int:
    """The seed of a member, of its head and of the order of its data.

    A hash of both: with a sum, member 1 of seed 0 would be member 0 of seed 1.
    """
    return int(np.random.SeedSequence((seed, member)).generate_state(1)[0] >> 1)


def stack_members(trees: Sequence[Any]) -> Any:
    """The members' parameters as one tree, [M, …]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def over_members(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn(params, batch)`` with rows in front, for stacked parameters: [B, M, …]."""
    return jax.vmap(fn, in_axes=(0, None), out_axes=1)


def stack_batches(batches: Sequence[JudgedBatch]) -> JudgedBatch:
    """One batch of every member as one: [P, M, …], on the host.

    The rows stay in front, so that they are split over devices like those of any other
    batch. Shorter texts are padded to the longest, which changes no number.
    """

    def stack(*leaves: np.ndarray) -> np.ndarray:
        length = max(x.shape[-1] for x in leaves)
        around = [[(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])] for x in leaves]
        return np.stack([np.pad(x, p) for x, p in zip(leaves, around)], axis=1)

    # The longest response is a static number, which differs between buckets.
    rows = (batch.replace(response_length=None) for batch in batches)
    return jax.tree.map(stack, *rows)


def ensemble_rm_step(
    state: TrainState,
    batch: JudgedBatch,
    *,
    model: ScalarModel,
    tx: optax.GradientTransformation,
    hp: RMHParams,
    loss: RewardLoss = bradley_terry,
    loss_hp: Any = None,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of every member, each on its own batch: ``rm_step``, M times.

    Source: the members of Coste et al. 2023, arXiv 2310.02743, differ by seed alone,
        that is by their head and by the order of the data.

    Args:
        state: ``params`` [M, …] and ``opt_state`` from ``vmap(tx.init)``; the members
            share ``step`` and ``rng``.
        batch: [P, M, …], from :func:`stack_batches`; P rows of this device, or of all
            devices under ``jit``.
        model: the reward model that every member is, static.
        tx: the optimizer, static; clipping and moments are each member's own.
        hp: hyperparameters, static.
        loss: on comparisons, see ``rm_step``.
        loss_hp: its ``HParams``; None for its own defaults.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (new state, metrics of ``rm_step``, averaged over the members).
    """

    def one(params: Params, opt_state: Any, rows: JudgedBatch) -> tuple[Any, ...]:
        member = state.replace(params=params, opt_state=opt_state)
        member, metrics = rm_step(
            member,
            rows,
            model=model,
            tx=tx,
            hp=hp,
            loss=loss,
            loss_hp=loss_hp,
            axis_name=axis_name,
        )
        return member.params, member.opt_state, metrics

    params, opt_state, metrics = jax.vmap(one, in_axes=(0, 0, 1))(
        state.params, state.opt_state, batch
    )
    # The parts of a metric are averaged, so that its mean is weighted as rows are.
    metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state, metrics
