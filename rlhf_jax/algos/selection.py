"""Learning from responses that were selected by their scores, and not weighted by them.

What expert iteration and online preference optimisation share: the responses to a
prompt are adjacent rows, as in ``algos/policy_gradient.py``, and only the best (and the
worst) are trained on. Read ``algos/expert_iteration.py`` next.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.algos.rollout import objective_metrics, per_row, response_logprobs
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.ops.advantages import token_rewards
from rlhf_jax.ops.layout import over_batch
from rlhf_jax.ops.rows import in_groups
from rlhf_jax.types import Array, Generation, Mean, Metrics, Params


def score_groups(
    ref_params: Params,
    generation: Generation,
    scores: Array,
    *,
    model: CausalLM,
    temperature: float,
    group_size: int,
) -> tuple[Array, Metrics]:
    """Scores by prompt, and what the rollout is worth, not yet reduced over devices.

    Args:
        ref_params: of the frozen reference policy; only the KL that is reported needs
            it.
        generation: responses; the ``group_size`` ones to a prompt are adjacent rows.
        scores: [B] float32 reward units, already shaped.
        model: the policy, static.
        temperature: of the rollout.
        group_size: G, responses to a prompt.

    Returns:
        (scores [P, G], metrics: ``objective/…``, where ``rlhf_reward`` is the score
        because no KL is part of it, and ``rollout/equal_groups``, the share of prompts
        whose responses all have the same score).

    Raises:
        ValueError: rows that do not divide into groups.
    """
    grouped = in_groups(scores, group_size)
    ref, _ = response_logprobs(
        ref_params, generation, model=model, temperature=temperature
    )
    response = generation.response_mask
    rewards = token_rewards(scores, jnp.zeros_like(ref), response, 0.0)
    metrics = objective_metrics(generation, ref, scores, rewards, response)
    metrics['objective/best_scores'] = per_row(jnp.max(grouped, axis=-1))
    if group_size > 1:
        equal = jnp.all(grouped == grouped[:, :1], axis=-1)
        metrics['rollout/equal_groups'] = per_row(equal)
    return grouped, metrics


def take_rows(tree: Any, chosen: Array, group_size: int) -> Any:
    """Some of the rows of every group: leaves [P·G, …] → [P, K, …].

    Args:
        tree: of arrays with the rows of all groups in front.
        chosen: [P, K] int32, places within the group.
        group_size: G.
    """

    def take(x: Array) -> Array:
        groups = in_groups(x, group_size)
        index = chosen.reshape(*chosen.shape, *(1,) * (x.ndim - 1))
        return over_batch(jnp.take_along_axis(groups, index, axis=1))

    return jax.tree.map(take, tree)


def zero_if_empty(metrics: Metrics) -> Metrics:
    """Reduced metrics with 0 in place of the means of nothing.

    A rollout without a row to learn from is no reason to stop a run, as a metric that
    is not finite would; ``rollout/kept`` and ``rollout/equal_groups`` tell of it.
    """
    return {
        name: Mean(x.sum, jnp.where(x.weight > 0, x.weight, 1))
        if isinstance(x, Mean)
        else x
        for name, x in metrics.items()
    }
