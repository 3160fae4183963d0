"""Preference optimisation on the policy's own samples: online DPO, and by any pairwise
loss.

One iteration: ``generate``, G responses to each prompt → a score per response →
:func:`prepare_pairs` (the best against the worst) → :func:`online_preference_step`.
The losses are those of ``preference/``, on data that follow the policy; read
``algos/preference.py`` next.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from rlhf_jax.algos.gradients import mean_gradient
from rlhf_jax.algos.preference import (
    batch_context,
    check_batch,
    preference_loss,
    reference_logps,
)
from rlhf_jax.algos.rollout import per_row
from rlhf_jax.algos.selection import score_groups, take_rows, zero_if_empty
from rlhf_jax.algos.updates import RolloutHParams, update_policy
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.preference import PreferenceLoss
from rlhf_jax.types import (
    Generation,
    JudgedBatch,
    Metrics,
    OnlineState,
    Params,
    Scores,
    reduce_metrics,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlinePreferenceHParams(RolloutHParams):
    """Hyperparameters of ``online_preference_step``, beside the loss module's own. The
    temperature is that of the rollout (TRL: 0.9); the loss is at 1, as offline.
    """

    group_size: int = 2  # G, responses to a prompt (Guo et al., TRL: 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError(
                f'group_size={self.group_size} leaves nothing to compare; use 2 or more'
            )


def prepare_pairs(
    state: OnlineState,
    ref_params: Params,
    generation: Generation,
    scores: Scores,
    *,
    model: CausalLM,
    hp: OnlinePreferenceHParams,
    loss: PreferenceLoss,
    axis_name: str | None = None,
) -> tuple[JudgedBatch, Metrics]:
    """The best and the worst response to every prompt as a comparison.

    y_w = y_argmax score, y_l = y_argmin score; weight 0 where both scores are equal

    Source: two responses: Guo et al. 2024 (OAIF), arXiv 2402.04792, labelled by a
        language model; best against worst by a reward model: Xiong et al. 2023, arXiv
        2312.11456, Dong et al. 2024, arXiv 2405.07863.
    Deviations: pairs of equal scores are left out, where TRL prefers the first one;
        of several best (or worst) the one sampled first is taken.

    Args:
        state: not read.
        ref_params: of the frozen reference policy.
        generation: responses; the ``hp.group_size`` ones to a prompt are adjacent rows.
        scores: of the responses, see ``types.Scores``.
        model: the policy, static.
        hp: hyperparameters, static.
        loss: a module of ``rlhf_jax.preference`` on pairs, or one like it; static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (B/G pairs with the reference fields that the loss needs; metrics:
        ``objective/scores_margin`` between best and worst, and
        ``rollout/equal_groups``, the share of prompts without a pair).

    Raises:
        ValueError: rows that do not divide into groups, or a loss on unpaired
            responses.
    """
    grouped, metrics = score_groups(
        ref_params,
        generation,
        scores.total,
        model=model,
        temperature=hp.temperature,
        group_size=hp.group_size,
    )
    ends = jnp.argmax(grouped, axis=-1), jnp.argmin(grouped, axis=-1)
    margin = jnp.max(grouped, axis=-1) - jnp.min(grouped, axis=-1)
    metrics['objective/scores_margin'] = per_row(margin)
    tokens, mask, response_mask = take_rows(
        (generation.tokens, generation.mask, generation.response_mask),
        jnp.stack(ends, axis=-1),
        hp.group_size,
    )
    pairs = JudgedBatch(
        tokens=tokens,
        mask=mask,
        response_mask=response_mask,
        weight=(margin > 0).astype(jnp.float32),
        response_length=generation.response_length,
    )
    if loss.REFERENCE:
        pairs = pairs.replace(**reference_logps(ref_params, pairs, model=model))
    check_batch(loss, pairs)
    return pairs, reduce_metrics(metrics, axis_name)


def online_preference_step(
    state: OnlineState,
    batch: JudgedBatch,
    *,
    model: CausalLM,
    tx: optax.GradientTransformation,
    hp: OnlinePreferenceHParams,
    loss: PreferenceLoss,
    loss_hp: Any,
    axis_name: str | None = None,
) -> tuple[OnlineState, Metrics]:
    """All epochs and minibatches over the pairs of one rollout.

    A minibatch without a pair has gradient 0: parameters then move by the optimizer's
    momentum alone.

    Args:
        state: ``params`` is ``{'policy': …}``.
        batch: from :func:`prepare_pairs`, rows of this device, or of all devices under
            ``jit``.
        model: the policy, static.
        tx: the optimizer over ``{'policy': …}``, static.
        hp: hyperparameters, static.
        loss: a module of ``rlhf_jax.preference`` on pairs, or one like it; static.
        loss_hp: ``loss.HParams(…)``, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (new state, metrics of ``preference_loss``, its ``loss`` as ``loss/policy``,
        and ``policy/grad_norm``; ``policy/updates`` counts the updates).

    Raises:
        ValueError: rows that do not divide into the minibatches, a loss on unpaired
            responses, or no reference fields where the loss needs them.
    """
    how = {'model': model, 'loss': loss, 'loss_hp': loss_hp}

    def gradient_of(params: Params, minibatch: JudgedBatch) -> tuple[Params, Metrics]:
        parts = {'num_microbatches': hp.num_microbatches, 'axis_name': axis_name}
        context = batch_context(params, minibatch, **how, **parts)
        gradient, metrics = mean_gradient(
            lambda p, part: preference_loss(p, *part, **how),
            params,
            (minibatch, context),
            **parts,
        )
        metrics['loss/policy'] = metrics.pop('loss')
        return gradient, metrics

    state, metrics = update_policy(
        state, batch, gradient_of, tx=tx, hp=hp, axis_name=axis_name
    )
    return state, zero_if_empty(metrics)
