"""Expert iteration: sample, keep the best, imitate it.

One iteration: ``generate``, G responses to each prompt → a score per response →
:func:`prepare_best` (the best ones as demonstrations) → :func:`expert_iteration_step`
(SFT on them). Best-of-n sampling, distilled into the policy round by round; with
``min_score`` rejection sampling. Read ``algos/online_preference.py`` next.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algos.gradients import mean_gradient
from rlhf_jax.algos.rollout import per_row
from rlhf_jax.algos.selection import score_groups, take_rows, zero_if_empty
from rlhf_jax.algos.sft import sft_loss
from rlhf_jax.algos.updates import RolloutHParams, update_policy
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.ranges import at_least
from rlhf_jax.types import (
    Generation,
    Metrics,
    OnlineState,
    Params,
    Scores,
    TokenBatch,
    reduce_metrics,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertIterationHParams(RolloutHParams):
    """Hyperparameters of ``expert_iteration_step``; the defaults are ours. The
    imitation is at temperature 1, as SFT's.
    """

    group_size: Annotated[int, at_least(1)] = 8  # G, responses to a prompt
    keep: Annotated[int, at_least(1)] = 1  # the best ones of a prompt that are imitated
    min_score: float | None = None  # reward units; only what scores above it is

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep > self.group_size:
            raise ValueError(
                f'keep={self.keep} of group_size={self.group_size} responses; use 1 to '
                f'{self.group_size}'
            )
        if self.keep == self.group_size and self.min_score is None:
            raise ValueError(
                f'keep={self.keep} of group_size={self.group_size} responses selects '
                'nothing; lower keep, or set min_score'
            )


def prepare_best(
    state: OnlineState,
    ref_params: Params,
    generation: Generation,
    scores: Scores,
    *,
    model: CausalLM,
    hp: ExpertIterationHParams,
    axis_name: str | None = None,
) -> tuple[TokenBatch, Metrics]:
    """The best responses to every prompt as demonstrations.

    D = {(x, y_i): score_i among the ``keep`` highest of x, score_i > ``min_score``}

    Source: Anthony et al. 2017, arXiv 1705.08439; best of G: Dong et al. 2023 (RAFT),
        arXiv 2304.06767; threshold: Gulcehre et al. 2023 (ReST), arXiv 2308.08998.
    Deviations: of equal scores the responses sampled first are kept. RAFT collects the
        best of a round before it trains for epochs on them, and ReST samples the whole
        data set and raises the threshold between its Improve steps; here a round is a
        rollout.

    Args:
        state: not read.
        ref_params: of the frozen reference policy, for the KL that is reported.
        generation: responses; the ``hp.group_size`` ones to a prompt are adjacent rows.
        scores: of the responses, see ``types.Scores``.
        model: the policy, static.
        hp: hyperparameters, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (demonstrations, B/G·keep rows, of which those not above ``min_score`` have no
        True in ``loss_mask``; metrics: ``objective/best_scores`` is the highest score
        of a prompt, and with a ``min_score`` ``rollout/kept`` the share of prompts with
        something to imitate).

    Raises:
        ValueError: rows that do not divide into groups.
    """
    grouped, metrics = score_groups(
        ref_params,
        generation,
        scores.total,
        model=model,
        temperature=hp.temperature,
        group_size=hp.group_size,
    )
    best, chosen = jax.lax.top_k(grouped, hp.keep)
    batch = TokenBatch(
        tokens=generation.tokens,
        mask=generation.mask,
        loss_mask=generation.response_mask,
        response_length=generation.response_length,
    )
    batch = take_rows(batch, chosen, hp.group_size)
    if hp.min_score is not None:
        kept = best > hp.min_score
        metrics['rollout/kept'] = per_row(jnp.any(kept, axis=-1))
        batch = batch.replace(loss_mask=batch.loss_mask & kept[..., None])
    batch = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
    return batch, reduce_metrics(metrics, axis_name)


def expert_iteration_step(
    state: OnlineState,
    batch: TokenBatch,
    *,
    model: CausalLM,
    tx: optax.GradientTransformation,
    hp: ExpertIterationHParams,
    axis_name: str | None = None,
) -> tuple[OnlineState, Metrics]:
    """All epochs and minibatches of SFT on the best responses of one rollout.

    A minibatch without a kept response has gradient 0: parameters then move by the
    optimizer's momentum alone.

    Args:
        state: ``params`` is ``{'policy': …}``.
        batch: from :func:`prepare_best`, rows of this device, or of all devices under
            ``jit``.
        model: the policy, static.
        tx: the optimizer over ``{'policy': …}``, static.
        hp: hyperparameters, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (new state, metrics: ``loss/policy`` nats per token, ``policy/grad_norm``;
        ``policy/updates`` counts the updates).

    Raises:
        ValueError: rows that do not divide into the minibatches.
    """

    def gradient_of(params: Params, minibatch: TokenBatch) -> tuple[Params, Metrics]:
        gradient, metrics = mean_gradient(
            lambda p, part: sft_loss(p, part, model=model),
            params,
            minibatch,
            num_microbatches=hp.num_microbatches,
            axis_name=axis_name,
        )
        return gradient, {'loss/policy': metrics['loss']}

    how = {'tx': tx, 'hp': hp, 'axis_name': axis_name}
    state, metrics = update_policy(state, batch, gradient_of, **how)
    return state, zero_if_empty(metrics)
