"""The optimizer: one optax chain from a small dataclass.

Read ``sharding.py`` next.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import jax
import optax

from rlhf_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with global-norm clipping and a schedule."""

    learning_rate: float = 3e-4  # at the peak
    schedule: Literal['constant', 'linear', 'cosine'] = 'cosine'  # behind the warm-up
    warmup_percent: float = 0.0  # of all optimizer steps, linear from 0
    final_percent: float = 0.0  # of the peak, at the last step
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8  # outside the root, as in PyTorch; Huang et al. 2024 use 1e-5
    weight_decay: float = 0.0  # on matrices and embeddings, not on norms and biases
    max_grad_norm: float | None = 1.0
    trainable: str | None = None  # regex over parameter paths; None trains everything


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by optimizer step.

    Raises:
        ValueError: an unknown schedule, or percentages outside [0, 100].
    """
    for name in ('warmup_percent', 'final_percent'):
        if not 0 <= getattr(config, name) <= 100:
            raise ValueError(
                f'optim.{name}={getattr(config, name)} is outside [0, 100]'
            )
    peak, warmup = config.learning_rate, round(num_steps * config.warmup_percent / 100)
    rest, final = max(num_steps - warmup, 1), peak * config.final_percent / 100
    if config.schedule == 'constant':
        decay = optax.constant_schedule(peak)
    elif config.schedule == 'linear':
        decay = optax.linear_schedule(peak, final, rest)
    elif config.schedule == 'cosine':
        decay = optax.cosine_decay_schedule(peak, rest, config.final_percent / 100)
    else:
        raise ValueError(
            f"optim.schedule={config.schedule!r} is unknown; use 'constant', 'linear' or 'cosine'"
        )
    if not warmup:
        return decay
    # The first step would have rate 0 and be wasted, so the ramp starts one step in.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, decay], [warmup])


def path_of(path: tuple[Any, ...]) -> str:
    """A parameter's path as people write it: 'backbone/layers/mlp/up_kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip by the global norm, Adam, decoupled weight decay, schedule; frozen paths get 0.

    Source: Loshchilov & Hutter 2019, arXiv 1711.05101.

    Args:
        config: its settings.
        num_steps: optimizer steps of the whole stage.
    """

    def decayed(params: Params) -> Any:
        is_matrix = lambda path, _: not re.search(r'(norm|bias|scale)', path_of(path))  # noqa: E731
        return jax.tree_util.tree_map_with_path(is_matrix, params)

    parts = []
    if config.max_grad_norm is not None:
        parts.append(optax.clip_by_global_norm(config.max_grad_norm))
    parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    parts.append(optax.scale_by_learning_rate(make_schedule(config, num_steps)))
    chain = optax.chain(*parts)
    if config.trainable is None:
        return chain

    def labels(params: Params) -> Any:
        def label(path: tuple[Any, ...], _: Any) -> str:
            return 'train' if re.search(config.trainable, path_of(path)) else 'freeze'

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.partition({'train': chain, 'freeze': optax.set_to_zero()}, labels)


def actor_critic_optimizer(
    policy: OptimConfig, critic: OptimConfig, num_steps: int
) -> optax.GradientTransformation:
    """One transformation over ``{'policy': …, 'critic': …}``, clipped and scheduled apart."""
    return optax.partition(
        {
            'policy': make_optimizer(policy, num_steps),
            'critic': make_optimizer(critic, num_steps),
        },
        lambda params: {
            name: jax.tree.map(lambda _, name=name: name, tree)
            for name, tree in params.items()
        },
    )
