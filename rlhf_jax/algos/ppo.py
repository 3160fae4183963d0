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
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algos.gradients import mean_gradient
from rlhf_jax.algos.sft import sft_loss
from rlhf_jax.models.heads import CausalLM, ScalarModel
from rlhf_jax.ops.advantages import gae, token_rewards
from rlhf_jax.ops.kl import KLEstimator, adapt_kl_coef, kl_estimate
from rlhf_jax.ops.layout import over_batch
from rlhf_jax.ops.logprobs import token_logprobs
from rlhf_jax.ops.masked import masked_mean, masked_sum, whiten
from rlhf_jax.ops.policy_loss import (
    Aggregation,
    aggregate,
    clipped_policy_loss,
    clipped_value_loss,
)
from rlhf_jax.types import (
    Array,
    Generation,
    Last,
    Max,
    Mean,
    Metrics,
    Params,
    PPOState,
    Rollout,
    TokenBatch,
    merge_metrics,
    reduce_metrics,
)

SHUFFLE = 1  # purpose folded into the key of the minibatch permutations


class ActorCritic(NamedTuple):
    """The two static models behind ``state.params['policy']`` and ``['critic']``."""

    policy: CausalLM
    critic: ScalarModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOHParams:
    """Hyperparameters of PPO. Where a default has an owner, it is named."""

    temperature: float = 1.0  # of rollout, reference and training passes alike
    # Rewards
    kl_coef: float = 0.05  # β, first value when adaptive (Huang et al. 2024: 0.05)
    kl_estimator: KLEstimator = 'k1'
    kl_target: float | None = None  # nats per sequence; None keeps β fixed (Ziegler: 6)
    kl_horizon: float = 10_000.0  # episodes (Ziegler)
    score_clip: float | None = None  # bound on |score| (OpenRLHF, MOSS: 10)
    missing_eos_score: float | None = None  # replaces it (Stiennon: -1)
    missing_eos_penalty: float | None = None  # is subtracted from it (TRL: 1)
    score_at: Literal['last', 'after_last'] = 'last'  # TRL: 'after_last'
    whiten_rewards: bool = False  # on in Ziegler et al., off in Huang et al.
    # Advantages
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    unbiased_variance: bool = False  # n − 1 in whitening, as TRL has it
    # Losses
    clip_eps: float = 0.2
    dual_clip: float | None = None
    value_clip_eps: float | None = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0  # weight of the language-model loss (InstructGPT: 27.8)
    aggregation: Aggregation = 'token_mean'
    # Optimisation of one rollout
    num_epochs: int = 4
    num_minibatches: int = 1
    num_microbatches: int = 1
    target_approxkl: float | None = None  # above it the rest of the rollout is skipped

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(
                f'temperature={self.temperature}: a policy needs one above 0'
            )
        if self.missing_eos_score is not None and self.missing_eos_penalty is not None:
            raise ValueError(
                'missing_eos_score and missing_eos_penalty are both set; '
                'a response without EOS is either rescored or marked down'
            )


# ----------------------------------------------------------------------------- prepare


def policy_logprobs(
    params: Params, tokens: Array, mask: Array, *, model: CausalLM, temperature: float
) -> tuple[Array, Array]:
    """Log-probabilities and entropies of a policy on whole sequences, each [B, T]
    nats.
    """
    hidden = model.apply({'params': params}, tokens, mask)
    how = {'temperature': temperature, 'softcap': model.config.logit_softcap}
    return token_logprobs(hidden, model.unembedding(params), tokens, **how)


def critic_values(
    params: Params, tokens: Array, mask: Array, *, model: ScalarModel
) -> Array:
    """Values *before* each token: ``values[:, t]`` is read at token t − 1. [B, T]
    float32.
    """
    values = model.apply({'params': params}, tokens, mask)
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))


def _after_last(mask: Array) -> Array:
    """The mask with one more place behind the last True of each row, where there is
    room.
    """
    return mask | jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))


def prepare(
    state: PPOState,
    ref_params: Params,
    generation: Generation,
    scores: Array,
    *,
    model: ActorCritic,
    hp: PPOHParams,
    axis_name: str | None = None,
) -> tuple[Rollout, Metrics]:
    """Turns scored responses into a rollout; runs once, before the epochs over it.

    Args:
        state: critic parameters and the KL coefficient are read.
        ref_params: of the frozen reference policy (the architecture of
            ``model.policy``).
        generation: responses with the log-probabilities they were sampled with.
        scores: [B] float32 reward units, already shaped (``rewards.shape_scores``).
        model: policy and critic, static.
        hp: hyperparameters, static.
        axis_name: mapped device axis under ``pmap``; statistics are global either way.

    Returns:
        (rollout, metrics of the rollout; ``objective/kl`` in nats per sequence).
    """
    tokens, mask, response = (
        generation.tokens,
        generation.mask,
        generation.response_mask,
    )
    ref_logprobs, _ = policy_logprobs(
        ref_params, tokens, mask, model=model.policy, temperature=hp.temperature
    )
    ref_logprobs = jnp.where(response, ref_logprobs, 0)
    value_mask = response if hp.score_at == 'last' else _after_last(response)
    values = critic_values(state.params['critic'], tokens, mask, model=model.critic)
    values = jnp.where(value_mask, values, 0)

    kl = jnp.where(
        response, kl_estimate(generation.logprobs, ref_logprobs, hp.kl_estimator), 0
    )
    rewards = token_rewards(scores, kl, value_mask, state.kl_coef)
    unwhitened = rewards
    if hp.whiten_rewards:
        rewards = whiten(
            rewards,
            value_mask,
            shift_mean=False,
            unbiased=hp.unbiased_variance,
            axis_name=axis_name,
        )
    advantages, returns = gae(rewards, values, value_mask, gamma=hp.gamma, lam=hp.lam)
    if hp.whiten_advantages:
        advantages = whiten(
            advantages, response, unbiased=hp.unbiased_variance, axis_name=axis_name
        )
    rollout = Rollout(
        tokens=tokens,
        mask=mask,
        response_mask=response,
        value_mask=value_mask,
        old_logprobs=generation.logprobs,
        ref_logprobs=ref_logprobs,
        old_values=values,
        advantages=jnp.where(response, advantages, 0),
        returns=returns,
    )

    metrics = _rollout_metrics(
        rollout, generation.ended, scores, unwhitened, state.kl_coef, axis_name
    )
    return rollout, metrics


def _rollout_metrics(
    rollout: Rollout,
    ended: Array,
    scores: Array,
    rewards: Array,
    kl_coef: Array,
    axis_name: str | None,
) -> Metrics:
    response, values, places = (
        rollout.response_mask,
        rollout.old_values,
        rollout.value_mask,
    )

    def per_row(x: Array) -> Mean:
        return Mean(jnp.sum(x.astype(jnp.float32)), jnp.float32(x.shape[0]))

    def mean(x: Array) -> Array:
        return masked_mean(x, places, axis_name=axis_name)

    k1, k3 = (
        kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, kind)
        for kind in ('k1', 'k3')
    )
    residual = mean(jnp.square(rollout.returns - values))
    spread = mean(jnp.square(rollout.returns - mean(rollout.returns)))
    metrics: Metrics = {
        'objective/scores': per_row(scores),
        'objective/kl': per_row(masked_sum(k1, response, -1)),
        'objective/kl_k3': per_row(masked_sum(k3, response, -1)),
        'objective/entropy': per_row(masked_sum(-rollout.old_logprobs, response, -1)),
        'objective/rlhf_reward': per_row(masked_sum(rewards, places, -1)),
        'objective/kl_coef': Last(kl_coef),
        'rollout/response_length': per_row(jnp.sum(response, axis=-1)),
        'rollout/ended': per_row(ended),
        'val/mean': Mean(
            masked_sum(values, places), masked_sum(jnp.ones_like(values), places)
        ),
        'val/explained_variance': Last(1 - residual / jnp.maximum(spread, 1e-8)),
    }
    return reduce_metrics(metrics, axis_name)


# --------------------------------------------------------------------------------
# update


def policy_loss(
    params: Params, batch: Rollout, *, model: CausalLM, hp: PPOHParams
) -> tuple[Array, Array, Metrics]:
    """Sum of the clipped surrogate (minus the entropy bonus) with its weight and
    metrics.
    """
    logprobs, entropy = policy_logprobs(
        params, batch.tokens, batch.mask, model=model, temperature=hp.temperature
    )
    mask = batch.response_mask
    # Masked before exp: outside the response both sides are 0 and the ratio is 1.
    logprobs = jnp.where(mask, logprobs, 0)
    loss, ratio, clipped = clipped_policy_loss(
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        clip_eps=hp.clip_eps,
        dual_clip=hp.dual_clip,
    )
    total, weight = aggregate(loss - hp.entropy_coef * entropy, mask, hp.aggregation)
    tokens = jnp.sum(mask).astype(jnp.float32)

    def mean(x: Array) -> Mean:
        return Mean(masked_sum(x, mask), tokens)

    return (
        total,
        weight,
        {
            'loss/policy': Mean(aggregate(loss, mask, hp.aggregation)[0], weight),
            'policy/approxkl': mean(jnp.square(logprobs - batch.old_logprobs) / 2),
            'policy/clipfrac': mean(clipped),
            'policy/entropy': mean(entropy),
            'policy/ratio': mean(ratio),
            'policy/ratio_max': Max(jnp.max(jnp.where(mask, ratio, 0))),
        },
    )


def value_loss(
    params: Params, batch: Rollout, *, model: ScalarModel, hp: PPOHParams
) -> tuple[Array, Array, Metrics]:
    """Sum of the clipped value loss over the places the critic is trained at."""
    values = critic_values(params, batch.tokens, batch.mask, model=model)
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


def _minibatch_update(
    params: Params,
    opt_state: Any,
    batch: tuple[Rollout, TokenBatch | None],
    *,
    model: ActorCritic,
    tx: optax.GradientTransformation,
    hp: PPOHParams,
    axis_name: str | None,
) -> tuple[Params, Any, Metrics]:
    rollout, ptx = batch
    accumulate = {'num_microbatches': hp.num_microbatches, 'axis_name': axis_name}
    policy_gradient, metrics = mean_gradient(
        lambda p, part: policy_loss(p, part, model=model.policy, hp=hp),
        params['policy'],
        rollout,
        **accumulate,
    )
    critic_gradient, critic_metrics = mean_gradient(
        lambda p, part: value_loss(p, part, model=model.critic, hp=hp),
        params['critic'],
        rollout,
        **accumulate,
    )
    metrics = {**metrics, **critic_metrics}
    if ptx is not None:
        ptx_gradient, ptx_metrics = mean_gradient(
            lambda p, part: sft_loss(p, part, model=model.policy),
            params['policy'],
            ptx,
            **accumulate,
        )
        metrics['loss/ptx'] = ptx_metrics['loss']
        policy_gradient = jax.tree.map(
            lambda g, more: g + hp.ptx_coef * more, policy_gradient, ptx_gradient
        )
    critic_gradient = jax.tree.map(lambda g: g * hp.value_coef, critic_gradient)
    gradient = {'policy': policy_gradient, 'critic': critic_gradient}
    one = jnp.float32(1)
    metrics['policy/grad_norm'] = Mean(optax.tree.norm(policy_gradient), one)
    metrics['val/grad_norm'] = Mean(optax.tree.norm(critic_gradient), one)
    updates, opt_state = tx.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, metrics


def _minibatches(
    state: PPOState, batch: Any, hp: PPOHParams, axis_name: str | None
) -> Any:
    """All minibatches of all epochs, [epochs·minibatches, rows, …], freshly shuffled.

    Under ``pmap`` the permutation is that of the *global* batch too, of which each
    device then takes its share, so that both backends train on the same minibatches.
    """
    if axis_name is not None:
        batch = jax.tree.map(
            lambda x: jax.lax.all_gather(x, axis_name, tiled=True), batch
        )
    rows = jax.tree.leaves(batch)[0].shape[0]
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    if rows % (hp.num_minibatches * devices):
        raise ValueError(
            f'{rows} rollout rows do not divide into '
            f'num_minibatches={hp.num_minibatches} '
            f'on {devices} devices; use a multiple of {hp.num_minibatches * devices}'
        )
    key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), SHUFFLE)
    orders = jax.vmap(lambda k: jax.random.permutation(k, rows))(
        jax.random.split(key, hp.num_epochs)
    )
    orders = orders.reshape(
        hp.num_epochs * hp.num_minibatches, rows // hp.num_minibatches
    )
    if axis_name is not None:
        share = orders.shape[1] // devices
        first = jax.lax.axis_index(axis_name) * share
        orders = jax.lax.dynamic_slice_in_dim(orders, first, share, axis=1)
    return jax.tree.map(lambda x: over_batch(x[orders], axis=1), batch)


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
    the rollout are fixed before the first update. With ``hp.target_approxkl`` the
    updates after the first minibatch that exceeds it are skipped, that one included.

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
        ValueError: rows that do not divide into the minibatches.
    """
    if (ptx is None) != (hp.ptx_coef == 0):
        raise ValueError(f'ptx_coef={hp.ptx_coef} and ptx={ptx is not None} disagree')
    minibatches = _minibatches(state, (batch, ptx), hp, axis_name)

    def update(
        params: Params, opt_state: Any, minibatch: Any
    ) -> tuple[Any, Any, Metrics]:
        return _minibatch_update(
            params, opt_state, minibatch, model=model, tx=tx, hp=hp, axis_name=axis_name
        )

    def one(carry: Any, minibatch: Any) -> tuple[Any, tuple[Metrics, Array]]:
        params, opt_state, stopped = carry
        if hp.target_approxkl is None:
            params, opt_state, metrics = update(params, opt_state, minibatch)
            return (params, opt_state, stopped), (metrics, ~stopped)
        new_params, new_opt_state, metrics = update(params, opt_state, minibatch)
        stopped = stopped | (metrics['policy/approxkl'].value() > hp.target_approxkl)
        keep = lambda new, old: jnp.where(stopped, old, new)  # noqa: E731
        params = jax.tree.map(keep, new_params, params)
        opt_state = jax.tree.map(keep, new_opt_state, opt_state)
        return (params, opt_state, stopped), (metrics, ~stopped)

    start = (state.params, state.opt_state, jnp.zeros((), bool))
    (params, opt_state, _), (stacked, done) = jax.lax.scan(one, start, minibatches)
    metrics = _over_updates(stacked, done)
    kl_coef = state.kl_coef
    if hp.kl_target is not None:
        kl_coef = _next_kl_coef(kl_coef, batch, hp, axis_name)
    state = state.replace(
        step=state.step + 1, params=params, opt_state=opt_state, kl_coef=kl_coef
    )
    return state, metrics


def _over_updates(stacked: Metrics, done: Array) -> Metrics:
    """Merges the metrics of the updates that were done; the first always counts."""
    first = jax.tree.map(lambda x: x[0], stacked)
    count = jnp.sum(done).astype(jnp.float32)
    rest = jax.tree.map(lambda x: x[1:], stacked)
    done = done[1:]

    def merge(carry: Metrics, item: tuple[Metrics, Array]) -> tuple[Metrics, None]:
        more, did = item
        merged = merge_metrics(carry, more)
        return jax.tree.map(
            lambda new, old: jnp.where(did, new, old), merged, carry
        ), None

    metrics, _ = jax.lax.scan(merge, first, (rest, done))
    metrics['policy/updates'] = Last(count)
    return metrics


def _next_kl_coef(
    kl_coef: Array, batch: Rollout, hp: PPOHParams, axis_name: str | None
) -> Array:
    kl = masked_sum(batch.old_logprobs - batch.ref_logprobs, batch.response_mask)
    rows = jnp.float32(batch.tokens.shape[0])
    if axis_name is not None:
        kl, rows = jax.lax.psum((kl, rows), axis_name)
    return adapt_kl_coef(
        kl_coef,
        kl / rows,
        target=hp.kl_target,
        horizon=hp.kl_horizon,
        num_episodes=rows,
    )
