"""The optimizer: one optax chain from a small dataclass.

Read ``sharding.py`` next.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Literal

import jax
import optax
import optax.contrib

from rlhf_jax.ranges import Range, above, at_least, between, check_fields
from rlhf_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW or Muon, with global-norm clipping and a schedule."""

    name: Literal['adamw', 'muon'] = 'adamw'
    learning_rate: Annotated[float, at_least(0)] = 3e-4  # at the peak
    # muon: of all but the layers' matrices
    adam_learning_rate: Annotated[float | None, at_least(0)] = None
    schedule: Literal['constant', 'linear', 'cosine'] = 'cosine'  # behind the warm-up
    # of all optimizer steps, linear from 0
    warmup_percent: Annotated[float, between(0, 100)] = 0.0
    # of the peak, at the last step
    final_percent: Annotated[float, between(0, 100)] = 0.0
    b1: Annotated[float, Range(0, 1, open_high=True)] = 0.9
    b2: Annotated[float, Range(0, 1, open_high=True)] = 0.999
    # outside the root, as in PyTorch; Huang et al. 2024 use 1e-5
    eps: Annotated[float, above(0)] = 1e-8
    # adamw: on matrices and embeddings, not on norms and biases; muon: on the matrices
    # that it orthogonalises (the layers'), on nothing that its Adam trains
    weight_decay: Annotated[float, at_least(0)] = 0.0
    max_grad_norm: Annotated[float | None, above(0)] = 1.0
    trainable: str | None = None  # regex over parameter paths; None trains everything

    def __post_init__(self) -> None:
        check_fields(self)


# Muon: which axes of a stacked matrix are its inputs, which its outputs.
MUON_AXES: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    (r'attention/(query|key|value)_kernel', (1,), (2, 3)),
    (r'attention/out_kernel', (1, 2), (3,)),
    (r'mlp/(up|gate|down)_kernel', (1,), (2,)),
)


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by optimizer step.

    Raises:
        ValueError: an unknown schedule.
    """
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
            f"optim.schedule={config.schedule!r} is unknown; use 'constant', 'linear' "
            "or 'cosine'"
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
    """Clip by the global norm, AdamW or Muon, schedule; frozen paths get 0.

    Source: AdamW: Loshchilov & Hutter 2019, arXiv 1711.05101. Muon: Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon, by ``optax.contrib.muon``.

    Args:
        config: its settings.
        num_steps: optimizer steps of the whole stage.
    """

    parts = []
    if config.max_grad_norm is not None:
        parts.append(optax.clip_by_global_norm(config.max_grad_norm))
    if config.name == 'muon':
        parts.append(_muon(config, num_steps))
    elif config.name == 'adamw':
        parts += _adamw(config, num_steps)
    else:
        raise ValueError(
            f"optim.name={config.name!r} is unknown; use 'adamw' or 'muon'"
        )
    chain = optax.chain(*parts)
    if config.trainable is None:
        return chain

    def labels(params: Params) -> Any:
        def label(path: tuple[Any, ...], _: Any) -> str:
            return 'train' if re.search(config.trainable, path_of(path)) else 'freeze'

        tree = jax.tree_util.tree_map_with_path(label, params)
        if 'train' not in jax.tree.leaves(tree):
            raise ValueError(
                f'optim.trainable={config.trainable!r} matches no parameter'
            )
        return tree

    return optax.partition({'train': chain, 'freeze': optax.set_to_zero()}, labels)


def _adamw(config: OptimConfig, num_steps: int) -> list[optax.GradientTransformation]:
    def decayed(params: Params) -> Any:
        def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
            return not re.search(r'(norm|bias|scale)', path_of(path))

        return jax.tree_util.tree_map_with_path(is_matrix, params)

    parts = [optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)]
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    return [*parts, optax.scale_by_learning_rate(make_schedule(config, num_steps))]


def _muon(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Orthogonalised momentum on the layers' matrices, Adam on everything else."""

    def axes(params: Params) -> Any:
        def of(path: tuple[Any, ...], _: Any) -> Any:
            for pattern, inputs, outputs in MUON_AXES:
                if re.search(pattern, path_of(path)):
                    return optax.contrib.MuonDimensionNumbers(inputs, outputs)
            return None

        return jax.tree_util.tree_map_with_path(of, params)

    rate = config.adam_learning_rate
    rest = dataclasses.replace(config, learning_rate=rate or config.learning_rate)
    return optax.contrib.muon(
        make_schedule(config, num_steps),
        muon_weight_dimension_numbers=axes,
        weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_learning_rate=make_schedule(rest, num_steps),
    )


def actor_critic_optimizer(
    policy: OptimConfig,
    critic: OptimConfig,
    num_steps: int,
    critics: tuple[str, ...] = ('critic',),
) -> optax.GradientTransformation:
    """One transformation over ``{'policy': …, 'critic': …}``, every part clipped and
    scheduled by itself; ``critics`` names the parts beside the policy.
    """
    parts = {name: make_optimizer(critic, num_steps) for name in critics}
    return optax.partition(
        {'policy': make_optimizer(policy, num_steps), **parts},
        lambda params: {
            name: jax.tree.map(lambda _, name=name: name, tree)
            for name, tree in params.items()
        },
    )
