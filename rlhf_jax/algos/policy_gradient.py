"""Policy gradients without a critic on the rollout and the updates of PPO.

One iteration: ``generate``, G responses to each prompt → a score per response →
:func:`prepare_policy` (advantages by a module of ``algos/estimators/``, once per
rollout) → :func:`policy_step`. What makes RLOO, GRPO, Dr. GRPO, DAPO, REINFORCE++,
ReMax, GDPO, MaxRL, GSPO or CISPO is the estimator and the settings;
``docs/algorithms`` has the table.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algos.estimators import Estimator
from rlhf_jax.algos.gradients import mean_gradient
from rlhf_jax.algos.rollout import (
    WeightLevel,
    check_plan,
    objective_metrics,
    off_policy_weights,
    per_row,
    response_cuts,
    response_logprobs,
    sampled_kl,
)
from rlhf_jax.algos.surrogate import surrogate_loss
from rlhf_jax.algos.updates import RatioHParams, update_policy
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.ops import policy_loss
from rlhf_jax.ops.advantages import token_rewards
from rlhf_jax.ops.kl import KLEstimator
from rlhf_jax.ops.policy_loss import Aggregation, RatioLevel
from rlhf_jax.ops.rows import in_groups
from rlhf_jax.ranges import above, at_least
from rlhf_jax.types import (
    Array,
    Generation,
    Metrics,
    OnlineState,
    Outcomes,
    Params,
    Rollout,
    Scores,
    reduce_metrics,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyHParams(RatioHParams):
    """Hyperparameters of ``policy_step``, beside the estimator's own.

    The defaults are GRPO's where the paper has one, but for the aggregation, which is
    that of the estimator's paper; other methods set what they need.
    """

    # G, responses to a prompt (Shao et al.: 64)
    group_size: Annotated[int, at_least(1)] = 8
    # KL in the reward: β of the per-token penalty
    kl_coef: Annotated[float, at_least(0)] = 0.0
    kl_estimator: KLEstimator = 'k1'  # the others are refused in the reward
    # c of the weights min(π/μ, c), where responses are not the policy's own
    off_policy_clip: float | None = None
    off_policy_level: WeightLevel = 'token'  # 'response': unbiased, of more variance
    # Loss
    objective: Literal['clipped', 'cispo'] = 'clipped'  # X_policy_loss of ops
    ratio_level: RatioLevel = 'token'  # GSPO: 'sequence'
    clip_eps_low: Annotated[float | None, above(0)] = 0.2  # None is no bound
    clip_eps_high: Annotated[float | None, above(0)] = 0.2  # DAPO: 0.28
    # of k3 in the loss (Shao et al.: 0.04)
    kl_loss_coef: Annotated[float, at_least(0)] = 0.0
    entropy_coef: Annotated[float, at_least(0)] = 0.0
    aggregation: Aggregation | None = None  # None: the estimator's AGGREGATION
    # tokens; of the aggregation of that name alone
    fixed_length: Annotated[int | None, at_least(1)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_plan(self)
        if self.objective not in ('clipped', 'cispo'):
            raise ValueError(
                f"objective={self.objective!r} is unknown; use 'clipped' or 'cispo'"
            )
        if self.aggregation is not None:
            self.aggregated_by(None)

    def aggregated_by(self, default: Aggregation | None) -> Aggregation:
        """How tokens are summed up, where ``default`` is the estimator's way.

        Raises:
            ValueError: neither says how, or ``fixed_length`` does not go with it.
        """
        how = default if self.aggregation is None else self.aggregation
        if how is None:
            raise ValueError(
                'aggregation=None is that of an estimator, and this rollout does not '
                "name one; set aggregation ('sequence_sum', 'token_mean', …), or make "
                'the rollout with prepare_policy'
            )
        if (how == 'fixed_length') != (self.fixed_length is not None):
            raise ValueError(
                f'aggregation={how!r} and fixed_length={self.fixed_length} disagree; '
                "'fixed_length' needs a number of tokens (that of the longest response "
                'allowed), the others None'
            )
        return how


def check_estimator(estimator: Estimator, hp: PolicyHParams) -> None:
    """Refuses hyperparameters that do not go with an estimator.

    Raises:
        ValueError: a KL penalty in a reward that has to be 0 or 1.
    """
    if hp.kl_coef > 0 and getattr(estimator, 'WANTS_SUCCESS', False):
        raise ValueError(
            f'kl_coef={hp.kl_coef} puts a KL penalty into the reward, and this '
            'estimator takes the mean reward of a prompt for the rate of success; use '
            'kl_coef=0, and kl_loss_coef for a KL in the loss'
        )


def prepare_policy(
    state: OnlineState,
    ref_params: Params,
    generation: Generation,
    scores: Scores,
    *,
    model: CausalLM,
    hp: PolicyHParams,
    estimator: Estimator,
    estimator_hp: Any,
    axis_name: str | None = None,
) -> tuple[Rollout, Metrics]:
    """Turns scored responses into a rollout; runs once, before the epochs over it.

    Args:
        state: read with ``hp.off_policy_clip`` alone, for the current policy.
        ref_params: of the reference policy, frozen or ``state.ref_params``.
        generation: responses with the log-probabilities they were sampled with; the
            ``hp.group_size`` responses to a prompt are adjacent rows.
        scores: of the responses; some estimators want the ``baseline`` (``remax``), or
            the single rewards and their ``weights`` (``gdpo``).
        model: the policy, static.
        hp: hyperparameters, static.
        estimator: a module of ``algos.estimators``, or one like it; static.
        estimator_hp: ``estimator.HParams(…)``, static.
        axis_name: mapped device axis under ``pmap``; statistics are global either way.

    Returns:
        (rollout, metrics; ``rollout/equal_groups`` is the share of prompts whose
        responses have all the same reward, and ``rollout/kept`` that of prompts that
        enter the loss).

    Raises:
        ValueError: rows that do not divide into groups, groups of one where others are
            needed, no baseline or no named scores where they are, or what
            :func:`check_estimator` refuses.
    """
    check_estimator(estimator, hp)
    generation, importance, metrics = off_policy_weights(
        state.params['policy'], generation, model=model, hp=hp
    )
    ref_logprobs, _ = response_logprobs(
        ref_params, generation, model=model, temperature=hp.temperature
    )
    response = generation.response_mask
    kl = sampled_kl(generation, ref_logprobs, hp.kl_estimator)
    rewards = token_rewards(scores.total, kl, response, hp.kl_coef)
    by_response = {'rewards': rewards, 'mask': response, 'baseline': scores.baseline}
    if scores.weights is not None:
        by_response['scores'] = {name: scores.each[name] for name in scores.weights}
    grouped = jax.tree.map(lambda x: in_groups(x, hp.group_size), by_response)
    outcomes = Outcomes(**grouped, weights=scores.weights)
    advantages = estimator.advantages(outcomes, estimator_hp, axis_name)
    metrics |= objective_metrics(
        generation, ref_logprobs, scores.total, rewards, response
    )
    if hp.group_size > 1:
        metrics['rollout/equal_groups'] = per_row(outcomes.equal)
    kept = None
    if hasattr(estimator, 'kept'):
        prompts = estimator.kept(outcomes)
        metrics['rollout/kept'] = per_row(prompts)
        kept = jnp.repeat(prompts, hp.group_size)
    rollout = Rollout(
        tokens=generation.tokens,
        mask=generation.mask,
        response_mask=response,
        old_logprobs=generation.logprobs,
        ref_logprobs=ref_logprobs,
        advantages=advantages.reshape(response.shape) * importance,
        kept=kept,
        response_length=generation.response_length,
        aggregation=estimator.AGGREGATION,
    )
    return rollout, reduce_metrics(metrics, axis_name)


def policy_gradient_loss(
    params: Params, batch: Rollout, *, model: CausalLM, hp: PolicyHParams
) -> tuple[Array, Array, Metrics]:
    """Sum of the policy's loss on rollout rows, its weight and metrics; see
    ``surrogate_loss``.
    """
    return surrogate_loss(
        params,
        batch,
        model=model,
        temperature=hp.temperature,
        objective=functools.partial(
            getattr(policy_loss, f'{hp.objective}_policy_loss'),
            clip_eps=(hp.clip_eps_low, hp.clip_eps_high),
        ),
        ratio_level=hp.ratio_level,
        kl_coef=hp.kl_loss_coef,
        entropy_coef=hp.entropy_coef,
        aggregation=hp.aggregated_by(batch.aggregation),
        length=hp.fixed_length,
    )


def policy_step(
    state: OnlineState,
    batch: Rollout,
    *,
    model: CausalLM,
    tx: optax.GradientTransformation,
    hp: PolicyHParams,
    axis_name: str | None = None,
) -> tuple[OnlineState, Metrics]:
    """All epochs and minibatches over one rollout.

    The first minibatch sees ratio 1 and approxkl 0, up to rounding:
    ``sampling/logprob_diff_…``, see ``ppo_step``. A minibatch of which no row is kept
    has gradient 0: parameters then move by the optimizer's momentum alone.

    Args:
        state: ``params`` is ``{'policy': …}``.
        batch: the rollout rows of this device, or of all devices under ``jit``.
        model: the policy, static.
        tx: the optimizer over ``{'policy': …}``, static.
        hp: hyperparameters, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (new state, metrics: means over the updates done; ``policy/updates`` counts
        them).

    Raises:
        ValueError: rows that do not divide into the minibatches.
    """

    def gradient_of(params: Params, minibatch: Rollout) -> tuple[Params, Metrics]:
        return mean_gradient(
            lambda p, part: policy_gradient_loss(p, part, model=model, hp=hp),
            params,
            minibatch,
            num_microbatches=hp.num_microbatches,
            axis_name=axis_name,
            cuts=response_cuts(minibatch, hp.num_length_buckets),
        )

    return update_policy(state, batch, gradient_of, tx=tx, hp=hp, axis_name=axis_name)
