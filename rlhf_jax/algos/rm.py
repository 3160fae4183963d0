"""Reward modelling: ``rm_step``, on comparisons, rankings, ratings or steps.

A file of ``reward_losses`` says what a pair, a rating or a step costs, and by its
``DATA`` what the batch is; here is what they share: scores in one forward pass, masks,
weights, and the penalties that keep scores near zero.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.algos.gradients import apply_gradient, mean_gradient
from rlhf_jax.algos.soft_labels import expected_agreement, expected_reward_loss
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.ranges import at_least
from rlhf_jax.reward_losses import RewardLoss, bradley_terry
from rlhf_jax.rewards import reward_model_scores
from rlhf_jax.types import (
    Array,
    JudgedBatch,
    Last,
    Mean,
    Metrics,
    Params,
    TrainState,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMHParams:
    """Hyperparameters of ``rm_step``; those of its loss stand there."""

    # weight of the squared sum of a pair's scores; 0.01 is usual
    center_coef: Annotated[float, at_least(0)] = 0.0
    # weight of the mean squared score; 0.001 is usual
    l2_coef: Annotated[float, at_least(0)] = 0.0
    num_microbatches: Annotated[int, at_least(1)] = 1  # gradient accumulation


def text_scores(params: Params, batch: JudgedBatch, *, model: ScalarModel) -> Array:
    """Scores of all texts in one concatenated pass, [P, K, H] float32; 0 for a text
    without a token.
    """
    prompts, size, length = batch.tokens.shape
    scores = reward_model_scores(
        params,
        batch.tokens.reshape(prompts * size, length),
        batch.mask.reshape(prompts * size, length),
        model=model,
    )
    return jnp.where(_is_text(batch), scores.reshape(prompts, size, -1), 0)


def _is_text(batch: JudgedBatch) -> Array:
    """False for the virtual response, [P, K, 1] bool."""
    return jnp.any(batch.mask, axis=-1)[..., None]


def pair_scores(params: Params, batch: JudgedBatch, *, model: ScalarModel) -> Array:
    """Scores of both texts of every pair, of a model with one score, [P, 2] float32."""
    return text_scores(params, batch, model=model)[..., 0]


def step_scores(params: Params, batch: JudgedBatch, *, model: ScalarModel) -> Array:
    """Scores at every token of responses in steps, of which those at the end of a step
    count, [P, 1, T].
    """
    tokens, mask = batch.tokens[:, 0], batch.mask[:, 0]
    return model.apply({'params': params}, tokens, mask)[:, None]


def rm_loss(
    params: Params,
    batch: JudgedBatch,
    *,
    model: ScalarModel,
    hp: RMHParams,
    loss: RewardLoss = bradley_terry,
    loss_hp: Any = None,
) -> tuple[Array, Array, Metrics]:
    """Sum of a loss over what was judged, with the penalties on the scores.

    pairs    L = Σ_ph w_p/n_ph·Σ_{i<j} [ℓ(r_i − r_j − m_p, tied) + c·(r_i + r_j)²]
               + λ·Σ_ph w_p·mean_i r_i²,   n_ph pairs of prompt p that head h has ranked
    ratings  L = Σ_bh w_b·[ℓ(r, y) + λ·r²]    over the ratings that there are
    steps    L = Σ_bt w_b·[ℓ(r, right) + λ·r²]    over the last tokens of the steps

    The weight is the number of prompts (times heads that ranked them), ratings, steps.
    Where a comparison has a probability p that the chosen text is the better one, ℓ is
    expected: p·ℓ(x) + (1 − p)·ℓ(−x); a tie has none.

    All C(K, 2) pairs of a prompt are in one batch element and weigh as much together as
    a single pair. A ranking of ties alone has no accuracy and counts in the loss.

    A completion without a token is the virtual response: r = 0, so that a pair with it
    costs −log σ(±r) and says on which side of 0 a text lies. It is no text: both
    penalties leave it, and the pairs it is in, out. With two texts, ranked by their
    harm, and the virtual response, 3·L is the loss of a cost model:

    −log σ(c_w − c_l) − log σ(s_w·c_w) − log σ(s_l·c_l),   s = +1 harmful, −1 not

    Source: rankings: Ouyang et al. 2022, arXiv 2203.02155, eq. 1; centering c:
        Eisenstein et al. 2023, arXiv 2312.09244, eq. 2; L2 λ: safe-rlhf, whose mean
        over both texts of a pair this is; the virtual response: Dai et al. 2023 (Safe
        RLHF), arXiv 2310.12773, eq. 6. Accuracy is strict: equal scores are an error.
        In data with probabilities it is the expected agreement, where they count ½.

    Args:
        params: of the reward model.
        batch: of the kind that ``loss.DATA`` says.
        model: the reward model; for steps a decoder with one score.
        hp: hyperparameters.
        loss: a module of ``reward_losses``, or one like it.
        loss_hp: its ``HParams``; None for its own defaults.

    Returns:
        (sum [], weight [], metrics).
    """
    loss_hp = loss.HParams() if loss_hp is None else loss_hp
    terms = {'pairs': _ranked, 'ratings': _rated, 'steps': _stepped}[loss.DATA]
    return terms(params, batch, model, hp, loss, loss_hp)


def _ranked(
    params: Params,
    batch: JudgedBatch,
    model: ScalarModel,
    hp: RMHParams,
    loss: RewardLoss,
    loss_hp: Any,
) -> tuple[Array, Array, Metrics]:
    scores = text_scores(params, batch, model=model)
    if batch.labels is None:  # a comparison
        ranks = jnp.broadcast_to(jnp.array([[1], [2]]), (*scores.shape[:2], 1))
        there = ranks > 0
    else:
        ranks, there = jnp.asarray(batch.labels), batch.judged  # [P, K, H]
    scores = jnp.where(there, scores, 0)
    i, j = np.triu_indices(ranks.shape[1], 1)
    known = there[:, i] & there[:, j]  # [P, pairs, H]
    tied = known & (ranks[:, i] == ranks[:, j])
    if batch.tied is not None:
        tied = tied | (known & batch.tied[:, None, None])
    first = ranks[:, i] <= ranks[:, j]
    chosen = jnp.where(first, scores[:, i], scores[:, j])
    rejected = jnp.where(first, scores[:, j], scores[:, i])
    margin = jnp.where(tied, 0, batch.margin[:, None, None])

    pairs = jnp.sum(known, axis=1, keepdims=True)  # [P, 1, H]
    weight = batch.weight[:, None, None] * known / jnp.maximum(pairs, 1)
    gap = chosen - rejected - margin
    if batch.probability is None:
        losses, agrees = loss.loss(gap, tied, loss_hp), chosen > rejected
    else:
        p = batch.probability[:, None, None]
        losses = expected_reward_loss(gap, tied, p, loss, loss_hp)
        agrees = expected_agreement(chosen - rejected, p)
    text = there & _is_text(batch)
    texts = jnp.maximum(jnp.sum(text, axis=1, keepdims=True), 1)
    both = text[:, i] & text[:, j]
    penalty = hp.center_coef * jnp.where(both, jnp.square(chosen + rejected), 0)
    size = batch.weight[:, None, None] * (pairs > 0) * jnp.square(scores) / texts
    total = jnp.sum((losses + penalty) * weight) + hp.l2_coef * jnp.sum(size)
    decided = jnp.where(tied | ~both, 0, weight)

    def mean(x: Array, weight: Array) -> Mean:
        return Mean(jnp.sum(x * weight), jnp.sum(weight))

    metrics = {
        'loss': mean(losses, weight),
        'accuracy': mean(agrees, decided),
        'score_chosen': mean(chosen, decided),
        'score_rejected': mean(rejected, decided),
        'score_gap': mean(jnp.abs(chosen - rejected), decided),
    }
    return total, jnp.sum(batch.weight[:, None] * (pairs[:, 0] > 0)), metrics


def _rated(
    params: Params,
    batch: JudgedBatch,
    model: ScalarModel,
    hp: RMHParams,
    loss: RewardLoss,
    loss_hp: Any,
) -> tuple[Array, Array, Metrics]:
    scores = text_scores(params, batch, model=model)
    scores, ratings = (jnp.where(batch.judged, x, 0) for x in (scores, batch.labels))
    weight = batch.weight[:, None, None] * batch.judged
    losses = loss.loss(scores, ratings, loss_hp)
    more = {'error': jnp.abs(scores - ratings), 'score': scores}
    return _by_entry(scores, losses, weight, hp, more)


def _stepped(
    params: Params,
    batch: JudgedBatch,
    model: ScalarModel,
    hp: RMHParams,
    loss: RewardLoss,
    loss_hp: Any,
) -> tuple[Array, Array, Metrics]:
    scores = jnp.where(batch.judged, step_scores(params, batch, model=model), 0)
    weight, right = batch.weight[:, None, None] * batch.judged, batch.labels > 0
    losses = loss.loss(scores, right, loss_hp)
    more = {'accuracy': (scores > 0) == right, 'score': scores}
    return _by_entry(scores, losses, weight, hp, more)


def _by_entry(
    scores: Array, losses: Array, weight: Array, hp: RMHParams, more: dict[str, Array]
) -> tuple[Array, Array, Metrics]:
    """Sum, weight and metrics, where every entry of ``scores`` is judged by itself."""

    def total(x: Array) -> Array:
        return jnp.sum(x * weight)

    weights = jnp.sum(weight)
    metrics = {name: Mean(total(x), weights) for name, x in more.items()}
    metrics['loss'] = Mean(total(losses), weights)
    return total(losses + hp.l2_coef * jnp.square(scores)), weights, metrics


def rm_step(
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
    """One update of the reward model.

    Args:
        state: parameters and optimizer.
        batch: rows of this device, or of all devices under ``jit``, of the kind that
            ``loss.DATA`` says.
        model: the reward model, static.
        tx: the optimizer, static.
        hp: hyperparameters, static.
        loss: a module of ``reward_losses``, or one like it, static.
        loss_hp: its ``HParams``, static; None for its own defaults.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (new state, metrics: ``loss`` per pair, rating or step, ``accuracy`` or
        ``error``, scores, ``grad_norm``).
    """
    gradient, metrics = mean_gradient(
        lambda params, part: rm_loss(
            params, part, model=model, hp=hp, loss=loss, loss_hp=loss_hp
        ),
        state.params,
        batch,
        num_microbatches=hp.num_microbatches,
        axis_name=axis_name,
    )
    metrics['grad_norm'] = Last(optax.tree.norm(gradient))
    return apply_gradient(state, gradient, tx), metrics
