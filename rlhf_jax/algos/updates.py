"""The updates over one rollout: epochs × minibatches in one scan, for any loss.

The rollout is fixed before the first update, so that every minibatch is compared with
the policy that sampled it. Read ``algos/surrogate.py`` next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.ops.layout import over_batch
from rlhf_jax.ranges import above, at_least, check_fields
from rlhf_jax.types import (
    Array,
    Last,
    Mean,
    Metrics,
    OnlineState,
    Params,
    TrainState,
    merge_metrics,
)

# How far the passes that train are from the sampler, in |log π − log π_old|: numerics
# alone before the first update, and therefore of that minibatch alone.
OF_FIRST = 'sampling/logprob_diff_mean', 'sampling/logprob_diff_max'
SHUFFLE = 1  # purpose folded into the key of the minibatch permutations

# (params, optimizer state, minibatch) -> the same two after an update, and metrics,
# 'policy/approxkl' among them
Update = Callable[[Params, Any, Any], tuple[Params, Any, Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutHParams:
    """Hyperparameters of every step that learns from rollouts."""

    # of the policy, in the rollout and where the rollout is scored
    temperature: Annotated[float, above(0)] = 1.0
    # Optimisation of one rollout
    num_epochs: Annotated[int, at_least(1)] = 1
    num_minibatches: Annotated[int, at_least(1)] = 1
    num_microbatches: Annotated[int, at_least(1)] = 1
    # Without a ratio of the policy to the sampler nothing says when to stop.
    target_approxkl: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatioHParams(RolloutHParams):
    """Those of a step whose loss has the ratio of the policy to the sampler."""

    # parts of the response that microbatches are cut at
    num_length_buckets: Annotated[int, at_least(1)] = 1
    # above it the rest of the rollout is skipped
    target_approxkl: Annotated[float | None, above(0)] = None


def minibatches(
    state: TrainState, batch: Any, hp: RolloutHParams, axis_name: str | None
) -> Any:
    """All minibatches of all epochs, [epochs·minibatches, rows, …], freshly shuffled.

    Under ``pmap`` the permutation is that of the *global* batch too, of which each
    device then takes its share, so that both backends train on the same minibatches.

    Raises:
        ValueError: rows that do not divide into the minibatches.
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


def apply_update(
    params: Params,
    opt_state: Any,
    gradient: Params,
    tx: optax.GradientTransformation,
    hold_policy: Array | None = None,
) -> tuple[Params, Any]:
    """One optimizer update of all parts of ``params``, or of all but the policy.

    Args:
        params: ``{'policy': …, …}``.
        opt_state: of ``tx``. What of it belongs to the policy lies under the key
            ``'policy'``, as moments do, and steps too where the parts have optimizers
            of their own (``optax.partition`` by part).
        gradient: like ``params``.
        tx: the optimizer over ``params``, static.
        hold_policy: [] bool, the policy and its optimizer stay as they are, bit by bit;
            None for never.

    Returns:
        (params, optimizer state).
    """
    updates, new_opt_state = tx.update(gradient, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    if hold_policy is None:
        return new_params, new_opt_state

    def choose(path: tuple[Any, ...], new: Array, old: Array) -> Array:
        is_policy = any(getattr(key, 'key', None) == 'policy' for key in path)
        return jnp.where(hold_policy, old, new) if is_policy else new

    return (
        jax.tree_util.tree_map_with_path(choose, new_params, params),
        jax.tree_util.tree_map_with_path(choose, new_opt_state, opt_state),
    )


def update_epochs(
    state: TrainState,
    batch: Any,
    update: Update,
    *,
    hp: RolloutHParams,
    axis_name: str | None = None,
) -> tuple[Params, Any, Metrics]:
    """All epochs and minibatches over one batch.

    With ``hp.target_approxkl`` the updates after the first minibatch that exceeds it
    are skipped, that one included.

    Args:
        state: where the updates start; its ``rng`` and ``step`` give the shuffles.
        batch: a pytree whose leaves have the rows of this device in front, or those of
            all devices under ``jit``.
        update: one optimizer update on a minibatch of it.
        hp: hyperparameters, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (params, optimizer state, metrics: means over the updates done, those of
        ``OF_FIRST`` before the first; ``policy/updates`` counts them).

    Raises:
        ValueError: rows that do not divide into the minibatches.
    """

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
    (params, opt_state, _), (stacked, done) = jax.lax.scan(
        one, start, minibatches(state, batch, hp, axis_name)
    )
    return params, opt_state, _over_updates(stacked, done)


def update_policy(
    state: OnlineState,
    batch: Any,
    gradient_of: Callable[[Params, Any], tuple[Params, Metrics]],
    *,
    tx: optax.GradientTransformation,
    hp: RolloutHParams,
    axis_name: str | None = None,
) -> tuple[OnlineState, Metrics]:
    """:func:`update_epochs` where the policy is all that is trained.

    Args:
        state: ``params`` is ``{'policy': …}``.
        batch: as there.
        gradient_of: (parameters of the policy, minibatch) -> (gradient, metrics).
        tx: the optimizer over ``{'policy': …}``, static.
        hp: hyperparameters, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (new state, metrics: those of ``gradient_of`` and ``policy/grad_norm``, merged
        over the updates; ``policy/updates`` counts these).

    Raises:
        ValueError: rows that do not divide into the minibatches.
    """

    def update(
        params: Params, opt_state: Any, minibatch: Any
    ) -> tuple[Params, Any, Metrics]:
        gradient, metrics = gradient_of(params['policy'], minibatch)
        metrics['policy/grad_norm'] = Mean(optax.tree.norm(gradient), jnp.float32(1))
        params, opt_state = apply_update(params, opt_state, {'policy': gradient}, tx)
        return params, opt_state, metrics

    params, opt_state, metrics = update_epochs(
        state, batch, update, hp=hp, axis_name=axis_name
    )
    step = state.step + 1
    return state.replace(step=step, params=params, opt_state=opt_state), metrics


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
    metrics |= {name: first[name] for name in OF_FIRST if name in first}
    metrics['policy/updates'] = Last(count)
    return metrics
