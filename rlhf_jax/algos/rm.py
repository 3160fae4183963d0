"""Reward modelling on pairwise comparisons: ``rm_step``."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax

from rlhf_jax.algos.gradients import apply_gradient, mean_gradient
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.preference.bradley_terry import bradley_terry_loss
from rlhf_jax.rewards import reward_model_scores
from rlhf_jax.types import Array, Last, Mean, Metrics, PairBatch, Params, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMHParams:
    """Hyperparameters of ``rm_step``."""

    center_coef: float = (
        0.0  # weight of the squared sum of a pair's scores; 0.01 is usual
    )
    num_microbatches: int = 1  # gradient accumulation


def pair_scores(params: Params, batch: PairBatch, *, model: ScalarModel) -> Array:
    """Scores of both texts of every pair in one concatenated pass, [P, 2] float32."""
    pairs, _, length = batch.tokens.shape
    scores = reward_model_scores(
        params,
        batch.tokens.reshape(2 * pairs, length),
        batch.mask.reshape(2 * pairs, length),
        model=model,
    )
    return scores.reshape(pairs, 2)


def rm_loss(
    params: Params, batch: PairBatch, *, model: ScalarModel, hp: RMHParams
) -> tuple[Array, Array, Metrics]:
    """Sum of the Bradley–Terry loss over the pairs, with the optional centering term.

    L = Σ_p w_p·(−log σ(r_w − r_l − m) + c·(r_w + r_l)²)

    Source: Stiennon et al. 2020, arXiv 2009.01325, §3.4; centering: Eisenstein et al.
        2023,
    arXiv 2312.09244, eq. 2. Accuracy is strict: a tie is an error.

    Returns:
        (sum [] nats, weight [] pairs, metrics).
    """
    scores = pair_scores(params, batch, model=model)
    chosen, rejected = scores[:, 0], scores[:, 1]
    loss = bradley_terry_loss(chosen, rejected, batch.margin)
    total = jnp.sum(
        (loss + hp.center_coef * jnp.square(chosen + rejected)) * batch.weight
    )
    weight = jnp.sum(batch.weight)

    def mean(x: Array) -> Mean:
        return Mean(jnp.sum(x * batch.weight), weight)

    return (
        total,
        weight,
        {
            'loss': mean(loss),
            'accuracy': mean(chosen > rejected),
            'score_chosen': mean(chosen),
            'score_rejected': mean(rejected),
            'score_gap': mean(jnp.abs(chosen - rejected)),
        },
    )


def rm_step(
    state: TrainState,
    batch: PairBatch,
    *,
    model: ScalarModel,
    tx: optax.GradientTransformation,
    hp: RMHParams,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of the reward model.

    Args:
        state: parameters and optimizer.
        batch: pairs of this device, or of all devices under ``jit``.
        model: the reward model, static.
        tx: the optimizer, static.
        hp: hyperparameters, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (new state, metrics: ``loss`` nats per pair, ``accuracy``, scores,
        ``grad_norm``).
    """
    gradient, metrics = mean_gradient(
        lambda params, part: rm_loss(params, part, model=model, hp=hp),
        state.params,
        batch,
        num_microbatches=hp.num_microbatches,
        axis_name=axis_name,
    )
    metrics['grad_norm'] = Last(optax.tree.norm(gradient))
    return apply_gradient(state, gradient, tx), metrics
