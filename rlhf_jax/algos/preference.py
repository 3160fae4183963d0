"""Preference optimisation on fixed data by any loss of ``preference/``:
``preference_step``.

A policy's tokens become sums of log-probabilities here, the loss module sees nothing
else. Reference log-probabilities are computed once, by ``reference_logps``, and stand
in the batch. What a loss must know of all rows (``context``) comes from a pass without
a gradient over every microbatch and device, before the gradient is taken.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algos.gradients import apply_gradient, mean_gradient, microbatches
from rlhf_jax.algos.sft import counted_logprobs
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.preference import PreferenceLoss
from rlhf_jax.ranges import at_least
from rlhf_jax.types import (
    Array,
    Last,
    Mean,
    Metrics,
    PairLogps,
    Params,
    PreferencePairs,
    PreferenceSingles,
    SingleLogps,
    TokenBatch,
    TrainState,
)

Batch = PreferencePairs | PreferenceSingles
Logps = PairLogps | SingleLogps


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceHParams:
    """Hyperparameters of ``preference_step``, beside the loss module's own."""

    num_microbatches: Annotated[int, at_least(1)] = 1  # gradient accumulation


# -------------------------------------------------------------------- log-probabilities


def _sums(
    params: Params, batch: Batch, model: CausalLM
) -> tuple[dict[str, Array], Array]:
    """Sums over the responses of a batch by field of ``Logps``, and the lengths."""
    shape, length = batch.tokens.shape, batch.response_length
    rows = (batch.tokens, batch.mask, batch.response_mask)
    tokens, mask, response_mask = (x.reshape(-1, shape[-1]) for x in rows)
    texts = TokenBatch(
        tokens=tokens, mask=mask, loss_mask=response_mask, response_length=length
    )
    logprobs, counted = (
        x.reshape(shape) for x in counted_logprobs(params, texts, model=model)
    )
    lengths = jnp.sum(counted, axis=-1)
    sums = {'logps': jnp.sum(logprobs, axis=-1)}
    if isinstance(batch, PreferencePairs):
        shorter = jnp.min(lengths, axis=-1)[:, None, None]
        shared = jnp.cumsum(counted, axis=-1) <= shorter
        sums['shared_logps'] = jnp.sum(jnp.where(shared, logprobs, 0), axis=-1)
    elif batch.mismatched is not None:
        other = batch.mismatched.replace(response_length=length)
        logprobs, _ = counted_logprobs(params, other, model=model)
        sums['mismatched_logps'] = jnp.sum(logprobs, axis=-1)
    return sums, lengths


def reference_logps(
    params: Params, batch: Batch, *, model: CausalLM
) -> dict[str, Array]:
    """The reference fields of a batch, to be computed once per example:
    ``batch.replace(**reference_logps(…))``.

    Args:
        params: of the frozen reference policy.
        batch: pairs or singles; singles may have mismatched responses.
        model: of the reference, static.

    Returns:
        ``ref_logps`` and, of pairs, ``ref_shared_logps`` [P, 2]; of singles [P], with
        ``ref_mismatched_logps`` [P] where there are any. Float32, nats; independent of
        the padding and of the other rows.
    """
    sums, _ = _sums(params, batch, model)
    return {f'ref_{name}': value for name, value in sums.items()}


def batch_logps(params: Params, batch: Batch, *, model: CausalLM) -> Logps:
    """What a loss module sees of a batch, from one concatenated pass of the policy.

    Rows of weight 0 get harmless numbers, whatever their tokens: sums of −1 nat.
    """
    sums, lengths = _sums(params, batch, model)
    names = (field.name for field in dataclasses.fields(batch))
    refs = {name: getattr(batch, name) for name in names if name.startswith('ref_')}

    def real(x: Array) -> Array:
        return jnp.where(batch.weight.reshape(-1, *(1,) * (x.ndim - 1)) > 0, x, -1.0)

    numbers = jax.tree.map(real, sums | refs)
    numbers |= {
        'lengths': jnp.maximum(lengths, 1).astype(jnp.float32),
        'weight': batch.weight,
    }
    if isinstance(batch, PreferencePairs):
        return PairLogps(**numbers)
    return SingleLogps(**numbers, desirable=batch.desirable)


# --------------------------------------------------------------------------------- loss


def check_batch(loss: PreferenceLoss, batch: Batch) -> None:
    """Raises ValueError when a batch is not what the loss module is for."""
    kind = 'pairs' if isinstance(batch, PreferencePairs) else 'singles'
    if loss.DATA != kind:
        what = {
            'pairs': 'comparisons of a chosen and a rejected response',
            'singles': 'single responses, each desirable or not',
        }
        raise ValueError(
            f'{loss.__name__} is a loss on {what[loss.DATA]}, and the data are '
            f'{what[kind]}; use other data, or a loss whose DATA is {kind!r}'
        )
    if loss.REFERENCE and batch.ref_logps is None:
        raise ValueError(
            f'{loss.__name__} needs log-probabilities of a reference policy, and the '
            'batch has none: batch.replace(**reference_logps(…)) adds them'
        )


def batch_context(
    params: Params,
    batch: Batch,
    *,
    model: CausalLM,
    loss: PreferenceLoss,
    loss_hp: Any,
    num_microbatches: int = 1,
    axis_name: str | None = None,
) -> dict[str, Array]:
    """What ``loss.context`` says of the whole batch, for the rows of this device.

    Exact over microbatches and devices, because the module sees the numbers of all
    rows at once. Empty, and free, for a loss without a ``context``.

    Returns:
        [P] each, without a gradient.
    """
    if not hasattr(loss, 'context'):
        return {}
    check_batch(loss, batch)
    rows = batch.tokens.shape[0]
    parts = jax.lax.map(
        lambda part: batch_logps(params, part, model=model),
        microbatches(batch, num_microbatches),
    )
    # Microbatch i holds the rows i, i + count, …: put them back in their order.
    whole = jax.tree.map(
        lambda x: jnp.swapaxes(x, 0, 1).reshape(rows, *x.shape[2:]), parts
    )
    if axis_name is not None:
        whole = jax.lax.all_gather(whole, axis_name, tiled=True)
    context = jax.lax.stop_gradient(loss.context(whole, loss_hp))
    if axis_name is not None:
        first = jax.lax.axis_index(axis_name) * rows
        context = {
            name: jax.lax.dynamic_slice_in_dim(x, first, rows)
            for name, x in context.items()
        }
    return context


def implicit_rewards(
    params: Params,
    batch: Batch,
    *,
    model: CausalLM,
    loss: PreferenceLoss,
    loss_hp: Any,
    axis_name: str | None = None,
) -> Array:
    """What a policy claims of the responses: the rewards that its loss reports.

    Returns:
        [P, 2] of pairs, [P] of singles, float32.

    Raises:
        ValueError: pairs given to a loss on singles or the reverse, or no reference.
    """
    check_batch(loss, batch)
    how = {'model': model, 'loss': loss, 'loss_hp': loss_hp}
    context = batch_context(params, batch, **how, axis_name=axis_name)
    numbers = batch_logps(params, batch, model=model).replace(context=context)
    return loss.loss(numbers, loss_hp)[1]


def preference_loss(
    params: Params,
    batch: Batch,
    context: dict[str, Array],
    *,
    model: CausalLM,
    loss: PreferenceLoss,
    loss_hp: Any,
) -> tuple[Array, Array, Metrics]:
    """Sum of a preference loss over the rows of a batch.

    Args:
        params: of the policy.
        batch: with reference fields where the loss needs them.
        context: from :func:`batch_context`; {} for most losses.
        model: the policy, static.
        loss: a module of ``rlhf_jax.preference``, or one like it; static.
        loss_hp: ``loss.HParams(…)``, static.

    Returns:
        (sum [], weight [] rows, metrics: ``loss``, ``rewards/…``, ``logps/…`` and the
        means of ``context``). A pair's ``rewards/accuracies`` is strict: a tie is an
        error.

    Raises:
        ValueError: pairs given to a loss on singles or the reverse, or no reference.
    """
    check_batch(loss, batch)
    numbers = batch_logps(params, batch, model=model).replace(context=context)
    per_row, rewards = loss.loss(numbers, loss_hp)
    weight = jnp.sum(batch.weight)

    def mean(x: Array, weights: Array = batch.weight) -> Mean:
        return Mean(jnp.sum(x * weights), jnp.sum(weights))

    metrics = {'loss': mean(per_row)}
    for name, x in (('rewards', rewards), ('logps', numbers.logps)):
        if loss.DATA == 'pairs':
            chosen, rejected = mean(x[:, 0]), mean(x[:, 1])
        else:
            chosen = mean(x, batch.weight * batch.desirable)
            rejected = mean(x, batch.weight * ~batch.desirable)
        metrics |= {f'{name}/chosen': chosen, f'{name}/rejected': rejected}
    if loss.DATA == 'pairs':
        metrics['rewards/accuracies'] = mean(rewards[:, 0] > rewards[:, 1])
        metrics['rewards/margins'] = mean(rewards[:, 0] - rewards[:, 1])
    metrics |= {name: mean(x) for name, x in context.items()}
    return jnp.sum(per_row * batch.weight), weight, metrics


def preference_step(
    state: TrainState,
    batch: Batch,
    *,
    model: CausalLM,
    tx: optax.GradientTransformation,
    hp: PreferenceHParams,
    loss: PreferenceLoss,
    loss_hp: Any,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of the policy.

    Args:
        state: parameters and optimizer.
        batch: rows of this device, or of all devices under ``jit``, with reference
            fields where the loss needs them.
        model: the policy, static.
        tx: the optimizer, static.
        hp: hyperparameters of the step, static.
        loss: a module of ``rlhf_jax.preference``, or one like it; static.
        loss_hp: ``loss.HParams(…)``, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (new state, metrics: see :func:`preference_loss`, and ``grad_norm``).

    Raises:
        ValueError: pairs given to a loss on singles or the reverse, or no reference.
    """
    how = {'model': model, 'loss': loss, 'loss_hp': loss_hp}
    context = batch_context(
        state.params,
        batch,
        **how,
        num_microbatches=hp.num_microbatches,
        axis_name=axis_name,
    )
    if isinstance(batch, PreferenceSingles):
        batch = batch.replace(mismatched=None)  # the context was all it was for
    gradient, metrics = mean_gradient(
        lambda params, part: preference_loss(params, *part, **how),
        state.params,
        (batch, context),
        num_microbatches=hp.num_microbatches,
        axis_name=axis_name,
    )
    metrics['grad_norm'] = Last(optax.tree.norm(gradient))
    return apply_gradient(state, gradient, tx), metrics
