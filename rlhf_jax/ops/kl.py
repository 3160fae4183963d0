"""KL of a policy from another: estimates from samples, the exact one of every next
token, and the controller of its coefficient.

Read ``ops/advantages.py`` next.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax.ops.logprobs import MAX_LOGITS, in_chunks, logits_of
from rlhf_jax.types import Array

KLEstimator = Literal['k1', 'k2', 'k3']


def kl_estimate(
    logprobs: Array, ref_logprobs: Array, kind: KLEstimator = 'k1'
) -> Array:
    """Per-token estimate of the KL from tokens that π sampled, with d = log π − log
    π_ref.

    k1 = d;   k2 = d²/2;   k3 = e^−d − 1 + d.

    Of the *value* k1 and k3 are unbiased, k2 is not; k3 is never negative. What the
    gradient of an objective with the estimate in it is, for one token, is another
    matter:

    | | in the reward, E[k·∇log π] | in the loss, E[∇k] |
    |---|---|---|
    | k1 | ∇KL(π ‖ π_ref) | 0 |
    | k2 | E[d²·∇log π]/2, of no KL | ∇KL(π ‖ π_ref) |
    | k3 | ∇KL(π ‖ π_ref) − ∇KL(π_ref ‖ π) | ∇KL(π_ref ‖ π) |

    Over a whole response k1 in the reward, summed over the tokens to come, has the
    gradient of the KL of responses. An estimate in the loss leaves out that a token
    decides which tokens come after it: its gradient is that of the KL at every prefix,
    with the prefixes held as they were sampled.

    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html; gradients: Tang &
    Munos 2025, arXiv 2506.09477.

    Args:
        logprobs: [B, T] log π, nats.
        ref_logprobs: [B, T] log π_ref, nats.
        kind: the estimator.

    Returns:
        [B, T] nats.

    Raises:
        ValueError: an unknown estimator.
    """
    difference = logprobs - ref_logprobs
    if kind == 'k1':
        return difference
    if kind == 'k2':
        return jnp.square(difference) / 2
    if kind == 'k3':
        return jnp.expm1(-difference) + difference
    raise ValueError(f"kl estimator {kind!r} is unknown; use 'k1', 'k2' or 'k3'")


def token_kl(
    hidden: tuple[Array, Array],
    unembedding: tuple[Array, Array],
    *,
    temperature: Array | float = 1.0,
    softcap: tuple[float | None, float | None] = (None, None),
    num_tokens: int | None = None,
    max_logits: int = MAX_LOGITS,
) -> Array:
    """KL(p ‖ q) between what two models say of every next token, exactly.

    kl[b, t] = Σ_v p(v | y_<t)·(log p(v | y_<t) − log q(v | y_<t)), 0 at position 0.

    With p the reference policy and q the policy this is the forward KL, the other way
    round the reverse one. Gradients go through both; stop that of a frozen model.

    Args:
        hidden: [B, T, D] final hidden states of p and of q, each of its own width.
        unembedding: [D, V] of p and of q.
        temperature: τ > 0 of both.
        softcap: of p and of q, see ``ops.logprobs.token_logprobs``.
        num_tokens: ids from here on have probability 0; None for no such id.
        max_logits: entries of the largest block of logits of both together on a device;
            above it tokens come in chunks, whose logits are recomputed in the backward
            pass.

    Returns:
        [B, T] float32, nats.
    """

    def divergence(states: Array, others: Array) -> Array:
        log_p, log_q = (
            jax.nn.log_softmax(logits_of(x, w, cap, num_tokens) / temperature)
            for x, w, cap in zip((states, others), unembedding, softcap)
        )
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    rows = tuple(states[:, :-1] for states in hidden)
    vocabulary = unembedding[0].shape[-1]
    kl = in_chunks(divergence, rows, vocabulary, max(max_logits // 2, 1))
    return jnp.pad(kl, ((0, 0), (1, 0)))


def check_reward_estimator(kind: KLEstimator) -> None:
    """Refuses an estimator whose penalty in the reward has not the gradient of the KL.

    Raises:
        ValueError: any but k1, see :func:`kl_estimate`.
    """
    if kind != 'k1':
        raise ValueError(
            f'kl_estimator={kind!r}: as a penalty in the reward this estimate does not '
            "have the gradient of the KL, and the policy leaves its optimum; use 'k1' "
            '(kl_coef), or k3 in the loss (kl_loss_coef, with kl_coef=0)'
        )


def adapt_kl_coef(
    kl_coef: Array, kl: Array, *, target: float, horizon: float, num_episodes: int
) -> Array:
    """Moves the KL coefficient towards a target KL.

    β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon)

    Source: Ziegler et al. 2019, arXiv 1909.08593, §2.2; ``AdaptiveKLController`` of
    openai/lm-human-preferences.

    Args:
        kl_coef: [] β.
        kl: [] mean KL of the sequences of this rollout, nats per sequence.
        target: nats per sequence.
        horizon: episodes over which an error of 1 changes β by a factor of about e.
        num_episodes: n, sequences in this rollout.
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return kl_coef * (1 + error * num_episodes / horizon)
