"""On-policy distillation: a teacher says what it thinks of the policy's own samples.

One iteration: ``generate`` → the log-probabilities of the teacher on the responses, and
a score per response if there are rewards → :func:`prepare_distillation` (an advantage
per token, once per rollout) → :func:`distillation_step`, the updates of
``algos/policy_gradient.py``. ``docs/algorithms/distillation.md`` has the equations.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp
import optax

from rlhf_jax.algos.estimators import rloo
from rlhf_jax.algos.policy_gradient import PolicyHParams, policy_step
from rlhf_jax.algos.rollout import (
    objective_metrics,
    per_row,
    response_logprobs,
    sampled_kl,
)
from rlhf_jax.algos.updates import RatioHParams
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.ops.advantages import token_rewards
from rlhf_jax.ops.masked import masked_sum
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
class DistillationHParams(RatioHParams):
    """Hyperparameters of ``distillation_step``."""

    # G, responses to a prompt; with rewards 2 or more, which are compared
    group_size: Annotated[int, at_least(1)] = 1
    # Bounds of the ratio to the sampling policy (PPO's; None is no bound)
    clip_eps_low: Annotated[float | None, above(0)] = 0.2
    clip_eps_high: Annotated[float | None, above(0)] = 0.2
    # 'sequence_mean' is the 1/|y| of Agarwal et al., 'sequence_sum' a sum over tokens
    aggregation: Literal['token_mean', 'sequence_mean', 'sequence_sum'] = 'token_mean'

    @property
    def updates(self) -> PolicyHParams:
        """Those of ``policy_step``, which have the same names."""
        same = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        return PolicyHParams(**same)


def prepare_distillation(
    state: OnlineState,
    ref_params: Params,
    generation: Generation,
    scores: Scores,
    teacher_params: Params,
    *,
    model: CausalLM,
    teacher: CausalLM,
    hp: DistillationHParams,
    axis_name: str | None = None,
) -> tuple[Rollout, Metrics]:
    """Turns responses into a rollout by what a teacher says of every token.

    A_t = log π_T(y_t | y_<t) − log π_old(y_t | y_<t) + G/(G − 1)·(s − mean s)

    The first part is minus the sampled KL(π ‖ π_T) of the token, with discount 0: a
    token answers for its own KL and not for that of the tokens after it, so that the
    expected gradient is that of the exact KL at every prefix, with the prefixes held as
    they were sampled. The second part, where G > 1, is that of RLOO for the scores; the
    weights of the rewards are those of the scores against the KL, in nats per reward
    unit. Responses that all have the same score leave the first part alone.

    Source: KL to a teacher on the policy's own samples, without a gradient through the
        sampling: Agarwal et al. 2024 (GKD), arXiv 2306.13649, also with a reward. Its
        reverse KL by a policy gradient: Gu et al. 2024 (MiniLLM), arXiv 2306.08543. The
        advantage as here, with discount 0: Lu et al. 2025, 'On-Policy Distillation',
        Thinking Machines, and ``tinker-cookbook``, which adds advantages of rewards.
    Deviations: GKD sums over the vocabulary, where here the KL is sampled; MiniLLM has
        a token answer for those after it, mixes the teacher into the sampler and
        divides by lengths.

    Args:
        state: not read.
        ref_params: of the policy that training started from, for ``objective/kl``.
        generation: responses with the log-probabilities they were sampled with; the
            ``hp.group_size`` responses to a prompt are adjacent rows.
        scores: of the responses, read where ``hp.group_size`` is above 1; zeros where
            there are no rewards.
        teacher_params: of ``teacher``.
        model: the policy, static.
        teacher: a language model that reads the policy's tokens, static.
        hp: hyperparameters, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (rollout, metrics; ``objective/teacher_kl`` is the KL to the teacher in nats per
        sequence, ``objective/rlhf_reward`` the score less it, and ``objective/kl`` the
        KL to the policy that training started from).

    Raises:
        ValueError: rows that do not divide into groups.
    """
    response = generation.response_mask
    how = {'temperature': hp.temperature}
    teacher_logprobs, _ = response_logprobs(
        teacher_params, generation, model=teacher, **how
    )
    ref_logprobs, _ = response_logprobs(ref_params, generation, model=model, **how)
    kl = sampled_kl(generation, teacher_logprobs, 'k1')
    advantages = -kl
    if hp.group_size > 1:
        advantages += _compared(scores, response, hp, axis_name)
    rewards = token_rewards(scores.total, kl, response, 1.0)
    metrics = objective_metrics(
        generation, ref_logprobs, scores.total, rewards, response
    )
    metrics['objective/teacher_kl'] = per_row(masked_sum(kl, response, -1))
    rollout = Rollout(
        tokens=generation.tokens,
        mask=generation.mask,
        response_mask=response,
        old_logprobs=generation.logprobs,
        ref_logprobs=ref_logprobs,
        advantages=advantages,
        response_length=generation.response_length,
        aggregation=hp.aggregation,
    )
    return rollout, reduce_metrics(metrics, axis_name)


def _compared(
    scores: Scores, response: Array, hp: DistillationHParams, axis_name: str | None
) -> Array:
    """RLOO's advantages [B, T] of the scores, 0 outside the response."""
    rewards = token_rewards(scores.total, jnp.zeros(response.shape), response, 0.0)
    outcomes = Outcomes(
        rewards=in_groups(rewards, hp.group_size),
        mask=in_groups(response, hp.group_size),
    )
    advantages = rloo.advantages(outcomes, rloo.HParams(), axis_name)
    return advantages.reshape(response.shape)


def distillation_step(
    state: OnlineState,
    batch: Rollout,
    *,
    model: CausalLM,
    tx: optax.GradientTransformation,
    hp: DistillationHParams,
    axis_name: str | None = None,
) -> tuple[OnlineState, Metrics]:
    """All epochs and minibatches over one rollout: ``policy_step`` with the clipped
    loss, L_t = max(−A·ρ_t, −A·clip(ρ_t, 1 ± ε)), ρ_t = π/π_old.

    Args:
        state: ``params`` is ``{'policy': …}``.
        batch: from :func:`prepare_distillation`.
        model: the policy, static.
        tx: the optimizer over ``{'policy': …}``, static.
        hp: hyperparameters, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (new state, metrics of ``policy_step``).

    Raises:
        ValueError: rows that do not divide into the minibatches.
    """
    return policy_step(
        state, batch, model=model, tx=tx, hp=hp.updates, axis_name=axis_name
    )
