"""What scores a response, and what is done to a score before PPO sees it.

Read ``algos/ppo.py`` next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal, get_args

import jax
import jax.numpy as jnp

from rlhf_jax.models.heads import ScalarModel, apply_to_last
from rlhf_jax.ops.masked import at_last, masked_mean, right_align
from rlhf_jax.ranges import above, at_least, check_fields
from rlhf_jax.types import Array, Params, RunningMoments


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreHParams:
    """What is done to the sum of the rewards; everything is off by default."""

    # 'running': (s − mean)/std, 'running_std': s/std (MOSS), over all scores so far
    score_scaling: Literal['running', 'running_std'] | None = None
    # bound on |score| (OpenRLHF, MOSS: 10)
    score_clip: Annotated[float | None, above(0)] = None
    # tokens (DAPO: a fifth of the longest)
    overlong_buffer: Annotated[int | None, at_least(1)] = None
    # is subtracted from it (TRL: 1)
    missing_eos_penalty: Annotated[float | None, at_least(0)] = None
    missing_eos_score: float | None = None  # replaces it (Stiennon: -1)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.score_scaling not in (None, 'running', 'running_std'):
            raise ValueError(
                f'score_scaling={self.score_scaling!r} is unknown; use '
                "'running', 'running_std' or None"
            )
        if self.missing_eos_score is not None and self.missing_eos_penalty is not None:
            raise ValueError(
                'missing_eos_score and missing_eos_penalty are both set; '
                'a response without EOS is either rescored or marked down'
            )

    @property
    def needs_end(self) -> bool:
        """Whether a response that does not end is scored otherwise."""
        settings = (self.missing_eos_penalty, self.missing_eos_score)
        return any(setting is not None for setting in settings)


# How the scores of an ensemble's members become one.
Combine = Literal['mean', 'worst', 'uncertainty']
# How the scores of the steps of a response become one.
StepCombine = Literal['min', 'product', 'mean', 'last']


def reward_model_scores(
    params: Params, tokens: Array, mask: Array, *, model: ScalarModel
) -> Array:
    """Scores whole texts: a decoder is read at its last real token, an encoder at its
    first.

    The texts of a decoder are right-aligned, so that its last layer runs for one token
    of each.

    Args:
        params: of the reward model.
        tokens: [B, T] int32; a response ends with its EOS, or with its last token.
        mask: [B, T] bool.
        model: the reward model.

    Returns:
        [B] float32, or [B, H] of a model with named heads, reward units; the same
        whichever side is padded.
    """
    if model.config.attention == 'bidirectional':
        values = model.apply({'params': params}, tokens, mask)
        return values[jnp.arange(len(values)), jnp.argmax(mask, -1)]
    tokens, mask = (right_align(x, mask) for x in (tokens, mask))
    return apply_to_last(model, params, tokens, mask, 1)[:, 0]


def combine_steps(values: Array, step_mask: Array, combine: StepCombine) -> Array:
    """The reward of a response from the scores of its steps.

    p_k = σ(v_k), the probability that step k is right; min, product or mean of all p_k,
    or the last one.

    Source: product and minimum: Lightman et al. 2023, arXiv 2305.20050; mean and last
        are ours.

    Args:
        values: [B, T] log-odds.
        step_mask: [B, T] bool, the last token of every step; one at least.
        combine: how.

    Returns:
        [B] float32 in (0, 1).
    """
    if combine == 'last':
        return jax.nn.sigmoid(at_last(values, step_mask))
    logs = jax.nn.log_sigmoid(jnp.where(step_mask, values, jnp.inf))
    if combine == 'min':
        return jnp.exp(logs.min(-1))
    if combine == 'product':
        return jnp.exp(logs.sum(-1))
    if combine == 'mean':
        return masked_mean(jnp.exp(logs), step_mask, axis=-1)
    raise ValueError(f'combine={combine!r}; use {", ".join(get_args(StepCombine))}')


def ensemble_scores(
    params: Params, tokens: Array, mask: Array, *, model: ScalarModel
) -> Array:
    """Scores whole texts by every member of an ensemble.

    Args:
        params: of the members, stacked: [M, …].
        tokens: [B, T] int32.
        mask: [B, T] bool.
        model: the reward model that every member is.

    Returns:
        [B, M] float32, reward units.
    """

    def one(member: Params) -> Array:
        return reward_model_scores(member, tokens, mask, model=model)

    return jax.vmap(one, out_axes=1)(params)


def combine_members(
    scores: Array, combine: Combine, uncertainty_coef: float
) -> tuple[Array, Array]:
    """One score from those of an ensemble, and how far the members differ.

    mean: r̄ = (1/M) Σ_m r_m      worst: min_m r_m
    uncertainty: r̄ − λ·(1/M) Σ_m (r_m − r̄)²

    A member that is not finite makes the result so: nothing is left out.

    Source: Coste et al. 2023, arXiv 2310.02743, §3, who call them mean, worst-case
        (WCO) and uncertainty-weighted optimization (UWO).
    Deviations: the variance divides by M; that of their code by M − 1.

    Args:
        scores: [B, M] reward units.
        combine: how; see above.
        uncertainty_coef: λ, per reward unit; used by 'uncertainty' alone.

    Returns:
        (score [B], standard deviation over the members [B]), float32, reward units.

    Raises:
        ValueError: an unknown way, or 'uncertainty' of a single member.
    """
    scores = scores.astype(jnp.float32)
    mean, variance = jnp.mean(scores, axis=-1), jnp.var(scores, axis=-1)
    deviation = jnp.sqrt(variance)
    if combine == 'mean':
        return mean, deviation
    if combine == 'worst':
        return jnp.min(scores, axis=-1), deviation
    if combine != 'uncertainty':
        raise ValueError(
            f"combine={combine!r} is unknown; use 'mean', 'worst' or 'uncertainty'"
        )
    if scores.shape[-1] < 2:
        raise ValueError(
            "combine='uncertainty' needs members that can differ, and there is 1; use "
            "'mean', or an ensemble of at least 2"
        )
    return mean - uncertainty_coef * variance, deviation


def weighted_sum(scores: Mapping[str, Array], weights: Mapping[str, float]) -> Array:
    """The proxy reward: Σ weight · score.

    Args:
        scores: [B] by name, reward units; those without a weight are left out.
        weights: by name, at least one.

    Returns:
        [B] float32.
    """
    return sum(
        weight * jnp.asarray(scores[name], jnp.float32)
        for name, weight in weights.items()
    )


def initial_moments(hp: ScoreHParams) -> RunningMoments | None:
    """The ``score_moments`` of a first state: of no score; None where none are kept."""
    if hp.score_scaling is None:
        return None
    return RunningMoments(count=jnp.float32(0), mean=jnp.float32(0), m2=jnp.float32(0))


def scale_scores(
    scores: Array,
    moments: RunningMoments | None,
    *,
    hp: ScoreHParams,
    axis_name: str | None = None,
) -> tuple[Array, RunningMoments | None]:
    """Scales scores by the moments of all scores so far, these included.

    n ← n + n_B;   δ = mean_B − mean;   mean ← mean + δ·n_B/n;
    M ← M + M_B + δ²·n_A·n_B/n, n_A those before;   std = √(M/n).
    ``running``: (s − mean)/std.   ``running_std``: s/std.

    Source: Zheng et al. 2023 (MOSS-RLHF), arXiv 2307.04964, and its code, which scales
    before it clips and by default leaves the mean, since advantages are whitened;
    merging moments: Chan et al. 1983.
    Deviations: population variance; while all scores are equal they are not divided.

    Args:
        scores: [B] reward units, of this device.
        moments: of the scores before, from the state; None when nothing is scaled.
        hp: hyperparameters, static.
        axis_name: mapped device axis; moments are global either way.

    Returns:
        (scores [B] float32, moments to keep in the state).

    Raises:
        ValueError: ``hp.score_scaling`` without moments.
    """
    if hp.score_scaling is None:
        return scores, moments
    if moments is None:
        raise ValueError(
            f'score_scaling={hp.score_scaling!r} needs the moments of the scores so '
            'far; start the state with score_moments=initial_moments(hp)'
        )

    def everywhere(x: Array) -> Array:
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    scores = scores.astype(jnp.float32)
    rows = everywhere(jnp.float32(scores.shape[0]))
    mean = everywhere(jnp.sum(scores)) / rows
    m2 = everywhere(jnp.sum(jnp.square(scores - mean)))
    count, shift = moments.count + rows, mean - moments.mean
    moments = RunningMoments(
        count=count,
        mean=moments.mean + shift * rows / count,
        m2=moments.m2 + m2 + jnp.square(shift) * moments.count * rows / count,
    )
    variance = moments.m2 / count
    # Rounding in the moments of equal scores is no scale.
    std = jnp.where(variance > 1e-8, jnp.sqrt(variance), 1)
    center = moments.mean if hp.score_scaling == 'running' else 0
    return (scores - center) / std, moments


def shape_scores(
    scores: Array,
    ended: Array,
    lengths: Array,
    *,
    hp: ScoreHParams,
    max_length: int,
) -> Array:
    """Clips scores, then marks long responses and those that never ended down.

    1. |s| ≤ score_clip, which bounds the learned score alone;
    2. s + overlong_penalty(length);
    3. without EOS, s − missing_eos_penalty, or missing_eos_score whatever s was.

    Scaling comes before (:func:`scale_scores`), so that the bound and the penalties are
    in the units that PPO sees.

    Source: a fixed score without EOS: openai/lm-human-preferences and Huang et al.
    2024, arXiv 2403.17031; a penalty instead: TRL; length: Yu et al. 2025 (DAPO).

    Args:
        scores: [B] reward units.
        ended: [B] bool, the response ended by EOS or a stop sequence.
        lengths: [B] tokens of the responses.
        hp: hyperparameters, static.
        max_length: tokens of the longest response allowed.

    Returns:
        [B] float32.

    Raises:
        ValueError: an ``overlong_buffer`` that is not in 1 to ``max_length``.
    """
    if hp.score_clip is not None:
        scores = jnp.clip(scores, -hp.score_clip, hp.score_clip)
    if hp.overlong_buffer is not None:
        scores = scores + overlong_penalty(
            lengths, max_length=max_length, buffer=hp.overlong_buffer
        )
    if hp.missing_eos_penalty is not None:
        scores = jnp.where(ended, scores, scores - hp.missing_eos_penalty)
    if hp.missing_eos_score is not None:
        scores = jnp.where(ended, scores, hp.missing_eos_score)
    return scores


def overlong_penalty(lengths: Array, *, max_length: int, buffer: int) -> Array:
    """Marks long responses down, the more the nearer they come to the longest allowed.

    0 up to L_max − L_buffer, then linearly down to −1 at L_max, −1 beyond.

    Source: Yu et al. 2025 (DAPO), arXiv 2503.14476, eq. 13, who add it to a score of
    ±1, with a buffer of a fifth of L_max.

    Args:
        lengths: [B] tokens of the responses.
        max_length: L_max, tokens.
        buffer: L_buffer, tokens; 1 to ``max_length``.

    Returns:
        [B] float32 ≤ 0, to be added to the scores.

    Raises:
        ValueError: a buffer out of range.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(
            f'buffer={buffer} tokens of max_length={max_length}; use 1 to {max_length}'
        )
    beyond = lengths - (max_length - buffer)
    return -jnp.clip(beyond / buffer, 0, 1).astype(jnp.float32)
