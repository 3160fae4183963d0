"""Proximal policy optimisation against a frozen reward, anchored to a reference policy.

One iteration is four pure functions: ``generate`` → a score per response →
:func:`prepare` (reference log-probabilities, values, rewards, advantages: once per
rollout) → :func:`ppo_step` (all epochs and minibatches of the rollout in one compiled
call).

Source: Ziegler et al. 2019, arXiv 1909.08593; Stiennon et al. 2020, arXiv 2009.01325;
Ouyang et al. 2022, arXiv 2203.02155; details: Huang et al. 2024, arXiv 2403.17031.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algos.gradients import mean_gradient
from rlhf_jax.algos.rollout import (
    WeightLevel,
    check_plan,
    objective_metrics,
    off_policy_weights,
    response_cuts,
    response_logprobs,
    sampled_kl,
)
from rlhf_jax.algos.sft import sft_loss
from rlhf_jax.algos.surrogate import surrogate_loss
from rlhf_jax.algos.updates import RatioHParams, apply_update, update_epochs
from rlhf_jax.models.heads import CausalLM, ScalarModel, apply_to_last
from rlhf_jax.ops.advantages import gae, token_rewards
from rlhf_jax.ops.kl import KLEstimator, adapt_kl_coef
from rlhf_jax.ops.masked import masked_mean, masked_sum, whiten
from rlhf_jax.ops.policy_loss import (
    Aggregation,
    aggregate,
    clipped_policy_loss,
    clipped_value_loss,
)
from rlhf_jax.ranges import above, at_least, between
from rlhf_jax.types import (
    Array,
    Generation,
    Last,
    Mean,
    Metrics,
    Params,
    PPOState,
    Rollout,
    Scores,
    TokenBatch,
    reduce_metrics,
)


class ActorCritic(NamedTuple):
    """The two static models behind ``state.params['policy']`` and ``['critic']``."""

    policy: CausalLM
    critic: ScalarModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOHParams(RatioHParams):
    """Hyperparameters of PPO. Where a default has an owner, it is named."""

    # Rewards
    kl_coef: Annotated[float, at_least(0)] = 0.05  # β, at first (Huang et al.: 0.05)
    kl_estimator: KLEstimator = 'k1'  # the others are refused in the reward
    # nats per sequence; None keeps β fixed (Ziegler: 6)
    kl_target: Annotated[float | None, above(0)] = None
    kl_horizon: Annotated[float, above(0)] = 10_000.0  # episodes (Ziegler)
    score_at: Literal['last', 'after_last'] = 'last'  # TRL: 'after_last'
    whiten_rewards: bool = False  # on in Ziegler et al., off in Huang et al.
    # Advantages
    gamma: Annotated[float, between(0, 1)] = 1.0
    lam: Annotated[float, between(0, 1)] = 0.95
    whiten_advantages: bool = True
    unbiased_variance: bool = False  # n − 1 in whitening, as TRL has it
    # c of the weights min(π/μ, c), where responses are not the policy's own
    off_policy_clip: float | None = None
    off_policy_level: WeightLevel = 'token'  # 'response': unbiased, of more variance
    # Losses
    clip_eps: Annotated[float | None, above(0)] = 0.2
    dual_clip: float | None = None
    value_clip_eps: Annotated[float | None, above(0)] = 0.2
    value_coef: Annotated[float, at_least(0)] = 0.1
    entropy_coef: Annotated[float, at_least(0)] = 0.0
    kl_loss_coef: Annotated[float, at_least(0)] = 0.0  # of k3, beside the reward's β
    ptx_coef: Annotated[float, at_least(0)] = 0.0  # of SFT's loss (InstructGPT: 27.8)
    aggregation: Aggregation = 'token_mean'
    # Optimisation of one rollout
    num_epochs: Annotated[int, at_least(1)] = 4
    critic_warmup_rollouts: Annotated[int, at_least(0)] = 0  # the critic learns alone

    def __post_init__(self) -> None:
        super().__post_init__()
        check_plan(self)
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(
                f'dual_clip={self.dual_clip} bounds ratios of 1, where nothing has '
                'moved yet; use one above 1 (Ye et al.: 3), or None'
            )


# ----------------------------------------------------------------------------- prepare


class CriticTargets(NamedTuple):
    """What a critic says of responses, and what they are worth; each [B, T]."""

    values: Array  # float32, before each token
    mask: Array  # bool, places the critic is trained at
    rewards: Array  # float32, before whitening
    advantages: Array  # float32, before whitening
    returns: Array  # float32


def critic_values(
    params: Params, batch: Generation | Rollout, *, model: ScalarModel
) -> Array:
    """Values *before* each token: ``values[:, t]`` is read at token t − 1. [B, T]
    float32; 0 in front of the responses where their length is known.
    """
    length = batch.response_length
    last = None if length is None else length + 1
    values = apply_to_last(model, params, batch.tokens, batch.mask, last)
    before = batch.tokens.shape[1] - values.shape[1]
    return jnp.pad(values[:, :-1], ((0, 0), (before + 1, 0)))


def _after_last(mask: Array) -> Array:
    """The mask with one more place behind the last True of each row, where there is
    room.
    """
    return mask | jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))


def critic_targets(
    params: Params,
    generation: Generation,
    scores: Array,
    kl: Array,
    kl_coef: Array,
    *,
    model: ScalarModel,
    hp: PPOHParams,
    axis_name: str | None,
) -> CriticTargets:
    """Rewards of all tokens, and their advantages over a critic.

    Args:
        params: of the critic.
        generation: the responses.
        scores: [B] reward units.
        kl: [B, T] nats.
        kl_coef: [] β.
        model: the critic, static.
        hp: hyperparameters, static.
        axis_name: mapped device axis; rewards are whitened globally either way.
    """
    mask = generation.response_mask
    if hp.score_at == 'after_last':
        mask = _after_last(mask)
    values = critic_values(params, generation, model=model)
    values = jnp.where(mask, values, 0)
    rewards = whitened = token_rewards(scores, kl, mask, kl_coef)
    if hp.whiten_rewards:
        whitened = whiten(
            rewards,
            mask,
            shift_mean=False,
            unbiased=hp.unbiased_variance,
            axis_name=axis_name,
        )
    advantages, returns = gae(whitened, values, mask, gamma=hp.gamma, lam=hp.lam)
    return CriticTargets(values, mask, rewards, advantages, returns)


def weighted_advantages(
    advantages: Array, weights: Array, response: Array, hp: PPOHParams, axis_name: Any
) -> Array:
    """Advantages as the policy sees them: whitened over the response tokens of the
    whole rollout, then weighted; 0 elsewhere. All [B, T].
    """
    if hp.whiten_advantages:
        advantages = whiten(
            advantages, response, unbiased=hp.unbiased_variance, axis_name=axis_name
        )
    return advantages * weights


def prepare(
    state: PPOState,
    ref_params: Params,
    generation: Generation,
    scores: Scores,
    *,
    model: ActorCritic,
    hp: PPOHParams,
    axis_name: str | None = None,
) -> tuple[Rollout, Metrics]:
    """Turns scored responses into a rollout; runs once, before the epochs over it.

    Args:
        state: critic parameters and the KL coefficient are read; with
            ``hp.off_policy_clip`` those of the policy too.
        ref_params: of the reference policy (the architecture of ``model.policy``): a
            frozen one, or ``state.ref_params`` where it moves (``algos/anchors.py``).
        generation: responses with the log-probabilities they were sampled with.
        scores: of the responses, see ``types.Scores``.
        model: policy and critic, static.
        hp: hyperparameters, static.
        axis_name: mapped device axis under ``pmap``; statistics are global either way.

    Returns:
        (rollout, metrics of the rollout; ``objective/kl`` in nats per sequence).
    """
    generation, weights, metrics = off_policy_weights(
        state.params['policy'], generation, model=model.policy, hp=hp
    )
    ref_logprobs, _ = response_logprobs(
        ref_params, generation, model=model.policy, temperature=hp.temperature
    )
    targets = critic_targets(
        state.params['critic'],
        generation,
        scores.total,
        sampled_kl(generation, ref_logprobs, hp.kl_estimator),
        state.kl_coef,
        model=model.critic,
        hp=hp,
        axis_name=axis_name,
    )
    response = generation.response_mask
    rollout = make_rollout(
        generation,
        ref_logprobs,
        targets,
        weighted_advantages(targets.advantages, weights, response, hp, axis_name),
    )
    metrics |= objective_metrics(
        generation, ref_logprobs, scores.total, targets.rewards, targets.mask
    )
    metrics['objective/kl_coef'] = Last(state.kl_coef)
    metrics |= value_metrics(rollout, axis_name)
    return rollout, reduce_metrics(metrics, axis_name)


def make_rollout(
    generation: Generation,
    ref_logprobs: Array,
    targets: CriticTargets,
    advantages: Array,
) -> Rollout:
    """Puts together what the updates need, with the advantages as the policy sees
    them.
    """
    return Rollout(
        tokens=generation.tokens,
        mask=generation.mask,
        response_mask=generation.response_mask,
        value_mask=targets.mask,
        old_logprobs=generation.logprobs,
        ref_logprobs=ref_logprobs,
        old_values=targets.values,
        advantages=advantages,
        returns=targets.returns,
        response_length=generation.response_length,
    )


def value_metrics(rollout: Rollout, axis_name: str | None) -> Metrics:
    """How well the critic foretells the returns; not yet reduced over devices."""
    values, places = rollout.old_values, rollout.value_mask

    def mean(x: Array) -> Array:
        return masked_mean(x, places, axis_name=axis_name)

    residual = mean(jnp.square(rollout.returns - values))
    spread = mean(jnp.square(rollout.returns - mean(rollout.returns)))
    return {
        'val/mean': Mean(
            masked_sum(values, places), masked_sum(jnp.ones_like(values), places)
        ),
        'val/explained_variance': Last(1 - residual / jnp.maximum(spread, 1e-8)),
    }


# ----------------------------------------------------------------------------- update


def policy_loss(
    params: Params, batch: Rollout, *, model: CausalLM, hp: PPOHParams
) -> tuple[Array, Array, Metrics]:
    """Sum of the clipped surrogate (minus the entropy bonus) with its weight and
    metrics.
    """
    return surrogate_loss(
        params,
        batch,
        model=model,
        temperature=hp.temperature,
        objective=functools.partial(
            clipped_policy_loss, clip_eps=hp.clip_eps, dual_clip=hp.dual_clip
        ),
        ratio_level='token',
        kl_coef=hp.kl_loss_coef,
        entropy_coef=hp.entropy_coef,
        aggregation=hp.aggregation,
        length=None,
    )


def value_loss(
    params: Params, batch: Rollout, *, model: ScalarModel, hp: PPOHParams
) -> tuple[Array, Array, Metrics]:
    """Sum of the clipped value loss over the places the critic is trained at."""
    values = critic_values(params, batch, model=model)
    # Masked before the loss, so that no gradient of what lies in padding exists.
    values = jnp.where(batch.value_mask, values, 0)
    loss, clipped = clipped_value_loss(
        values, batch.old_values, batch.returns, clip_eps=hp.value_clip_eps
    )
    total, weight = aggregate(loss, batch.value_mask, hp.aggregation)
    tokens = jnp.sum(batch.value_mask).astype(jnp.float32)
    return (
        total,
        weight,
        {
            'loss/value': Mean(total, weight),
            'val/clipfrac': Mean(masked_sum(clipped, batch.value_mask), tokens),
        },
    )


def policy_gradient(
    params: Params,
    rollout: Rollout,
    ptx: TokenBatch | None,
    *,
    model: CausalLM,
    hp: PPOHParams,
    axis_name: str | None,
) -> tuple[Params, Metrics]:
    """Gradient of the policy's loss on a minibatch, with that of the ptx loss added.

    Raises:
        ValueError: text without ``hp.ptx_coef``, or the other way round.
    """
    if (ptx is None) != (hp.ptx_coef == 0):
        raise ValueError(f'ptx_coef={hp.ptx_coef} and ptx={ptx is not None} disagree')
    how = {'num_microbatches': hp.num_microbatches, 'axis_name': axis_name}
    gradient, metrics = mean_gradient(
        lambda p, part: policy_loss(p, part, model=model, hp=hp),
        params,
        rollout,
        cuts=response_cuts(rollout, hp.num_length_buckets),
        **how,
    )
    if ptx is not None:
        more, ptx_metrics = mean_gradient(
            lambda p, part: sft_loss(p, part, model=model), params, ptx, **how
        )
        metrics['loss/ptx'] = ptx_metrics['loss']
        gradient = jax.tree.map(lambda g, x: g + hp.ptx_coef * x, gradient, more)
    metrics['policy/grad_norm'] = Mean(optax.tree.norm(gradient), jnp.float32(1))
    return gradient, metrics


def critic_gradient(
    params: Params,
    rollout: Rollout,
    *,
    model: ScalarModel,
    hp: PPOHParams,
    axis_name: str | None,
) -> tuple[Params, Metrics]:
    """Gradient of ``value_coef`` times the critic's loss on a minibatch."""
    gradient, metrics = mean_gradient(
        lambda p, part: value_loss(p, part, model=model, hp=hp),
        params,
        rollout,
        num_microbatches=hp.num_microbatches,
        axis_name=axis_name,
        cuts=response_cuts(rollout, hp.num_length_buckets),
    )
    gradient = jax.tree.map(lambda g: g * hp.value_coef, gradient)
    metrics['val/grad_norm'] = Mean(optax.tree.norm(gradient), jnp.float32(1))
    return gradient, metrics


def is_warming_up(state: PPOState, hp: PPOHParams) -> Array | None:
    """[] bool, the critic still learns alone; None where it never does."""
    if hp.critic_warmup_rollouts == 0:
        return None
    return state.step < hp.critic_warmup_rollouts


def ppo_step(
    state: PPOState,
    batch: Rollout,
    ptx: TokenBatch | None = None,
    *,
    model: ActorCritic,
    tx: optax.GradientTransformation,
    hp: PPOHParams,
    axis_name: str | None = None,
) -> tuple[PPOState, Metrics]:
    """All epochs and minibatches over one rollout, then the KL coefficient.

    The first minibatch sees ratio 1 and approxkl 0, because the log-probabilities of
    the rollout are fixed before the first update: to about 1e-5 nats in float32. In
    bfloat16 the sampler, which sees a token at a time, rounds other sums;
    ``sampling/logprob_diff_mean`` and ``…_max`` say how far the two are apart. With
    ``hp.target_approxkl`` the updates after the first minibatch that exceeds it are
    skipped, that one included. In the first ``hp.critic_warmup_rollouts`` rollouts the
    policy, its optimizer and β stay as they are.

    Args:
        state: parameters of policy and critic, their optimizer, β.
        batch: the rollout rows of this device, or of all devices under ``jit``.
        ptx: as many rows of pretraining or demonstration text, or None.
        model: policy and critic, static.
        tx: the optimizer over ``{'policy', 'critic'}``, static.
        hp: hyperparameters, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (new state, metrics: means over the updates done; ``policy/updates`` counts
        them).

    Raises:
        ValueError: rows that do not divide into the minibatches, or text without
            ``hp.ptx_coef``, or the other way round.
    """
    how = {'hp': hp, 'axis_name': axis_name}
    warming_up = is_warming_up(state, hp)

    def update(
        params: Params, opt_state: Any, minibatch: Any
    ) -> tuple[Params, Any, Metrics]:
        policy, metrics = policy_gradient(
            params['policy'], *minibatch, model=model.policy, **how
        )
        critic, more = critic_gradient(
            params['critic'], minibatch[0], model=model.critic, **how
        )
        gradient = {'policy': policy, 'critic': critic}
        params, opt_state = apply_update(params, opt_state, gradient, tx, warming_up)
        return params, opt_state, metrics | more

    params, opt_state, metrics = update_epochs(state, (batch, ptx), update, **how)
    state = state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        kl_coef=next_kl_coef(state, batch, hp, axis_name),
    )
    return state, metrics


def next_kl_coef(
    state: PPOState, batch: Rollout, hp: PPOHParams, axis_name: str | None
) -> Array:
    """β after a rollout, [] float32; as it was without a target, or while the policy
    is held.
    """
    if hp.kl_target is None:
        return state.kl_coef
    kl = masked_sum(batch.old_logprobs - batch.ref_logprobs, batch.response_mask)
    rows = jnp.float32(batch.tokens.shape[0])
    if axis_name is not None:
        kl, rows = jax.lax.psum((kl, rows), axis_name)
    kl_coef = adapt_kl_coef(
        state.kl_coef,
        kl / rows,
        target=hp.kl_target,
        horizon=hp.kl_horizon,
        num_episodes=rows,
    )
    warming_up = is_warming_up(state, hp)
    return (
        kl_coef if warming_up is None else jnp.where(warming_up, state.kl_coef, kl_coef)
    )
