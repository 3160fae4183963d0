"""From scores to per-token rewards, advantages and returns.

Read ``ops/policy_loss.py`` next.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.ops.masked import last_index
from rlhf_jax.types import Array


def token_rewards(
    scores: Array, kl: Array, mask: Array, kl_coef: Array | float
) -> Array:
    """Per-token rewards: a KL penalty everywhere, the score at the last real token.

    r_t = −β·kl_t + [t = last]·score

    Source: Stiennon et al. 2020, arXiv 2009.01325, §3.4. OpenRLHF, trlx, AlpacaFarm and
    safe-rlhf place the score at the last real token as here.

    Args:
        scores: [B] reward units.
        kl: [B, T] per-token KL estimates, nats.
        mask: [B, T] bool, response tokens.
        kl_coef: β, reward units per nat.

    Returns:
        [B, T] float32, 0 outside the response. A row without a response token gets no
        score.
    """
    rewards = jnp.where(mask, -kl_coef * kl, 0.0)
    final = jax.nn.one_hot(last_index(mask), mask.shape[-1], dtype=bool) & mask
    return jnp.where(final, rewards + scores[:, None], rewards).astype(jnp.float32)


def group_deviations(returns: Array) -> Array:
    """Returns minus the mean of their group; exactly 0 in a group of equals.

    Args:
        returns: [P, G], G responses to each of P prompts.

    Raises:
        ValueError: groups of one, which are their own mean.
    """
    if returns.shape[-1] == 1:
        raise ValueError(
            'group_size=1: a response is compared with the others to its prompt, and '
            'has none; use a group_size of 2 or more, or an estimator without groups '
            '(reinforce_pp, remax)'
        )
    # Rounding in the mean of equal numbers would be blown up by their spread of 0.
    relative = returns - returns[:, :1]
    return relative - jnp.mean(relative, axis=-1, keepdims=True)


def rewards_to_go(rewards: Array, mask: Array, *, gamma: float) -> Array:
    """Discounted sum of the rewards from each token on: Σ_{s≥t} γ^(s−t)·r_s.

    Args:
        rewards: [..., T].
        mask: [..., T] bool, contiguous in each row.
        gamma: discount γ.

    Returns:
        [..., T] float32, 0 under the mask.
    """
    shape, rows = rewards.shape, (-1, rewards.shape[-1])
    rewards, mask = rewards.reshape(rows), mask.reshape(rows)
    nothing = jnp.zeros_like(rewards, jnp.float32)
    return gae(rewards, nothing, mask, gamma=gamma, lam=1.0)[0].reshape(shape)


def gae(
    rewards: Array, values: Array, mask: Array, *, gamma: float, lam: float
) -> tuple[Array, Array]:
    """Generalised advantage estimation over the response tokens.

    δ_t = r_t + γ·V_{t+1} − V_t;   A_t = δ_t + γλ·A_{t+1};   R_t = A_t + V_t;   V_{T} =
    0.

    Source: Schulman et al. 2016, arXiv 1506.02438, eq. 16.

    Args:
        rewards: [B, T].
        values: [B, T], the critic before each token.
        mask: [B, T] bool; the True entries of a row must be contiguous. The value after
            the last of them is 0: the episode is over, whether or not EOS was written.
        gamma: discount γ.
        lam: λ; 1 gives return minus value.

    Returns:
        (advantages, returns), both [B, T] float32, 0 under the mask.
    """
    rewards = jnp.where(mask, rewards, 0).astype(jnp.float32)
    values = jnp.where(mask, values, 0).astype(jnp.float32)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = jnp.where(mask, rewards + gamma * next_values - values, 0)

    def backward(advantage: Array, delta: Array) -> tuple[Array, Array]:
        advantage = delta + gamma * lam * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(
        backward, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True
    )
    # A token before the response would inherit the sum behind it; the mask takes it
    # away.
    advantages = jnp.where(mask, advantages.T, 0)
    return advantages, advantages + values
