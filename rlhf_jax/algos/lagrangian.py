"""PPO-Lagrangian: the most reward at a mean cost below a limit.

max_π E[r] − β·KL   subject to   E[c] ≤ limit

One iteration is that of ``algos/ppo.py`` with a cost beside the score and a critic of
its own for it: ``generate`` → a score and a cost per response →
:func:`prepare_lagrangian` → :func:`lagrangian_step`. A multiplier λ says what a unit of
cost is worth in reward; it rises while the constraint is violated.

Source: Dai et al. 2023 (Safe RLHF), arXiv 2310.12773, and its code, safe-rlhf.
Deviations: Safe RLHF has the KL penalty in both streams of rewards, −β·KL beside the
score and +β·KL beside the cost, and combines their advantages as is done here, by
(A_r − λ·A_c)/(1 + λ). A nat then costs β beside scores that are divided by 1 + λ, which
solves max E[r] − (1 + λ)·β·KL under the constraint. Here it stands beside the score
alone, so that the problem above is solved and λ is its price of a unit of cost.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algos.ppo import (
    PPOHParams,
    critic_gradient,
    critic_targets,
    is_warming_up,
    make_rollout,
    next_kl_coef,
    policy_gradient,
    value_metrics,
    weighted_advantages,
)
from rlhf_jax.algos.rollout import (
    objective_metrics,
    off_policy_weights,
    per_row,
    response_logprobs,
    sampled_kl,
)
from rlhf_jax.algos.updates import apply_update, update_epochs
from rlhf_jax.models.heads import CausalLM, ScalarModel
from rlhf_jax.ranges import above, at_least, check_fields
from rlhf_jax.types import (
    Array,
    Generation,
    LagrangianRollout,
    LagrangianState,
    Last,
    Metrics,
    Params,
    Scores,
    TokenBatch,
    reduce_metrics,
)


class ActorCritics(NamedTuple):
    """The models behind ``state.params['policy']``, ``['critic']``, ``['cost_critic']``
    (static).
    """

    policy: CausalLM
    critic: ScalarModel
    cost_critic: ScalarModel


COST = 'cost'  # the name of the cost in ``Scores.each``


@dataclasses.dataclass(frozen=True, kw_only=True)
class LagrangianHParams:
    """Hyperparameters of the constraint, beside PPO's; defaults are safe-rlhf's."""

    cost_limit: float = 0.0  # of the mean cost; −d of Dai et al.
    lambda_init: float = 1.0
    lambda_lr: Annotated[float, at_least(0)] = 0.1  # of log λ
    lambda_max: Annotated[float | None, above(0)] = 5.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.lambda_init <= 0:
            raise ValueError(
                f'lambda_init={self.lambda_init}: λ moves by factors and never leaves '
                '0; use a small number such as 0.01'
            )
        if self.lambda_max is not None and self.lambda_max < self.lambda_init:
            raise ValueError(
                f'lambda_max={self.lambda_max} is below lambda_init={self.lambda_init}'
            )


def initial_log_lambda(constraint: LagrangianHParams) -> Array:
    """The ``log_lambda`` of a first state, [] float32."""
    return jnp.float32(math.log(constraint.lambda_init))


def next_log_lambda(
    state: LagrangianState,
    costs: Array,
    hp: PPOHParams,
    constraint: LagrangianHParams,
    axis_name: str | None = None,
) -> Array:
    """Moves the multiplier by the constraint's violation in one rollout.

    log λ ← min(log λ + α·λ·(mean c − limit), log λ_max)

    Source: Dai et al. 2023, arXiv 2310.12773, eq. 31: a step of gradient ascent on
    λ·J_C in log λ, which keeps λ positive.
    Deviations: J_C is the mean of this rollout; safe-rlhf takes that of the last 128
    responses. λ is held while the critics warm up, since the policy cannot answer.

    Args:
        state: ``log_lambda`` before, and the step.
        costs: [B] of this device.
        hp: PPO's hyperparameters, static.
        constraint: limit and rate, static.
        axis_name: mapped device axis; the mean is global either way.

    Returns:
        [] float32.
    """
    total, rows = jnp.sum(costs.astype(jnp.float32)), jnp.float32(costs.shape[0])
    if axis_name is not None:
        total, rows = jax.lax.psum((total, rows), axis_name)
    violation = total / rows - constraint.cost_limit
    moved = state.log_lambda + constraint.lambda_lr * violation * jnp.exp(
        state.log_lambda
    )
    if constraint.lambda_max is not None:
        moved = jnp.minimum(moved, math.log(constraint.lambda_max))
    warming_up = is_warming_up(state, hp)
    return (
        moved if warming_up is None else jnp.where(warming_up, state.log_lambda, moved)
    )


def prepare_lagrangian(
    state: LagrangianState,
    ref_params: Params,
    generation: Generation,
    scores: Scores,
    *,
    model: ActorCritics,
    hp: PPOHParams,
    constraint: LagrangianHParams,
    axis_name: str | None = None,
) -> tuple[LagrangianRollout, Metrics]:
    """Turns scored responses into a rollout; runs once, before the epochs over it.

    A = (A_r − λ·A_c)/(1 + λ), λ already moved by this rollout's costs; the rewards of
    A_r are −β·KL and the score, that of A_c is the cost. It is the advantage of the
    Lagrangian E[r] − β·KL − λ·(E[c] − limit), at a size that λ does not change.

    Source: Dai et al. 2023, arXiv 2310.12773.
    Deviations: no penalty in A_c (see above); A is whitened where ``hp`` says so.

    Args:
        state: the critics, β and λ are read.
        ref_params: of the reference policy, frozen or ``state.ref_params``.
        generation: responses with the log-probabilities they were sampled with.
        scores: of the responses; ``each['cost']`` is above 0 where one does harm.
        model: policy and critics, static.
        hp: PPO's hyperparameters, static; ``whiten_rewards`` scales costs too.
        constraint: limit and rate of λ, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (rollout, metrics: PPO's, ``objective/cost``, ``objective/lambda`` and
        ``cost_val/…`` of the second critic).
    """
    generation, weights, metrics = off_policy_weights(
        state.params['policy'], generation, model=model.policy, hp=hp
    )
    ref_logprobs, _ = response_logprobs(
        ref_params, generation, model=model.policy, temperature=hp.temperature
    )
    kl, costs = sampled_kl(generation, ref_logprobs, hp.kl_estimator), scores.each[COST]
    how = {'hp': hp, 'axis_name': axis_name}
    params, beta = state.params, state.kl_coef
    reward = critic_targets(
        params['critic'], generation, scores.total, kl, beta, model=model.critic, **how
    )
    cost = critic_targets(
        params['cost_critic'],
        generation,
        costs,
        kl,
        0.0,
        model=model.cost_critic,
        **how,
    )
    weight = jnp.exp(next_log_lambda(state, costs, hp, constraint, axis_name))
    advantages = weighted_advantages(
        (reward.advantages - weight * cost.advantages) / (1 + weight),
        weights,
        generation.response_mask,
        **how,
    )
    rollout = LagrangianRollout(
        reward=make_rollout(generation, ref_logprobs, reward, advantages),
        cost=make_rollout(generation, ref_logprobs, cost, advantages),
        costs=costs,
    )
    metrics |= objective_metrics(
        generation, ref_logprobs, scores.total, reward.rewards, reward.mask
    )
    metrics |= {
        'objective/kl_coef': Last(beta),
        'objective/cost': per_row(costs),
        'objective/lambda': Last(weight),
    }
    metrics |= value_metrics(rollout.reward, axis_name)
    metrics |= _of_cost(value_metrics(rollout.cost, axis_name))
    return rollout, reduce_metrics(metrics, axis_name)


def _of_cost(metrics: Metrics) -> Metrics:
    """The metrics of a critic under the names of the cost's: ``loss/cost_value``, …"""
    return {name.replace('val', 'cost_val'): x for name, x in metrics.items()}


def lagrangian_step(
    state: LagrangianState,
    batch: LagrangianRollout,
    ptx: TokenBatch | None = None,
    *,
    model: ActorCritics,
    tx: optax.GradientTransformation,
    hp: PPOHParams,
    constraint: LagrangianHParams,
    axis_name: str | None = None,
) -> tuple[LagrangianState, Metrics]:
    """All epochs and minibatches over one rollout, then β and λ; see ``ppo_step``.

    Args:
        state: parameters of policy and critics, their optimizer, β, λ.
        batch: the rollout rows of this device, or of all devices under ``jit``.
        ptx: as many rows of pretraining or demonstration text, or None.
        model: policy and critics, static.
        tx: the optimizer over ``{'policy', 'critic', 'cost_critic'}``, static.
        hp: PPO's hyperparameters, static.
        constraint: limit and rate of λ, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (new state, metrics of ``ppo_step`` and of the second critic).

    Raises:
        ValueError: rows that do not divide into the minibatches, or text without
            ``hp.ptx_coef``, or the other way round.
    """
    how = {'hp': hp, 'axis_name': axis_name}
    warming_up = is_warming_up(state, hp)

    def update(
        params: Params, opt_state: Any, minibatch: tuple[LagrangianRollout, Any]
    ) -> tuple[Params, Any, Metrics]:
        rollout, text = minibatch
        policy, metrics = policy_gradient(
            params['policy'], rollout.reward, text, model=model.policy, **how
        )
        critic, more = critic_gradient(
            params['critic'], rollout.reward, model=model.critic, **how
        )
        cost_critic, of_cost = critic_gradient(
            params['cost_critic'], rollout.cost, model=model.cost_critic, **how
        )
        gradient = {'policy': policy, 'critic': critic, 'cost_critic': cost_critic}
        params, opt_state = apply_update(params, opt_state, gradient, tx, warming_up)
        return params, opt_state, metrics | more | _of_cost(of_cost)

    params, opt_state, metrics = update_epochs(state, (batch, ptx), update, **how)
    state = state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        kl_coef=next_kl_coef(state, batch.reward, hp, axis_name),
        log_lambda=next_log_lambda(state, batch.costs, hp, constraint, axis_name),
    )
    return state, metrics
