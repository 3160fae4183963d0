"""Preference optimisation on fixed data by any loss of ``preference/``:
``preference_step``.

A policy's tokens become sums of log-probabilities here, which is what a loss module
sees. Those of the reference policy are computed once, by ``reference_logps``, and stand
in the batch, or that policy itself is given to the step, as a loss that looks at single
tokens needs it. What a loss must know of all rows (``context``) comes from a pass
without a gradient over every microbatch and device, before the gradient is taken.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algos.gradients import apply_gradient, mean_gradient, microbatches
from rlhf_jax.algos.rollout import policy_states
from rlhf_jax.algos.sft import counted_logprobs, counted_tokens
from rlhf_jax.algos.soft_labels import expected_agreement, expected_preference_loss
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.ops.kl import token_kl
from rlhf_jax.ops.logprobs import token_logprobs
from rlhf_jax.preference import PreferenceLoss, wants_tokens
from rlhf_jax.ranges import at_least
from rlhf_jax.types import (
    Array,
    JudgedBatch,
    Last,
    Mean,
    Metrics,
    PairLogps,
    Params,
    TokenBatch,
    TokenLogps,
    TrainState,
    UnpairedLogps,
)

Logps = PairLogps | UnpairedLogps


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceHParams:
    """Hyperparameters of ``preference_step``, beside the loss module's own."""

    num_microbatches: Annotated[int, at_least(1)] = 1  # gradient accumulation


# -------------------------------------------------------------------- log-probabilities


# Fields of ``Logps`` that are [P] where the others have an entry for each response.
PER_PROMPT = ('weight', 'mismatched_logps', 'ref_mismatched_logps')


def _is_paired(batch: JudgedBatch) -> bool:
    return batch.tokens.shape[1] == 2


def _texts(batch: JudgedBatch) -> TokenBatch:
    """All texts of a batch, one below the other."""
    rows = (batch.tokens, batch.mask, batch.response_mask)
    tokens, mask, counted = (x.reshape(-1, x.shape[-1]) for x in rows)
    length = batch.response_length
    return TokenBatch(
        tokens=tokens, mask=mask, loss_mask=counted, response_length=length
    )


def _sums(
    params: Params,
    batch: JudgedBatch,
    model: CausalLM,
    scored: tuple[Array, Array] | None = None,
) -> tuple[dict[str, Array], Array]:
    """Sums over the responses of a batch by field of ``Logps``, and the lengths.

    ``scored``: log-probabilities of the tokens and which of them count, like the
    tokens; None where they are still to be computed.
    """
    shape, length = batch.tokens.shape, batch.response_length
    if scored is None:
        scored = counted_logprobs(params, _texts(batch), model=model)
    logprobs, counted = (x.reshape(shape) for x in scored)
    lengths = jnp.sum(counted, axis=-1)
    sums = {'logps': jnp.sum(logprobs, axis=-1)}
    if _is_paired(batch):
        shorter = jnp.min(lengths, axis=-1)[:, None, None]
        shared = jnp.cumsum(counted, axis=-1) <= shorter
        sums['shared_logps'] = jnp.sum(jnp.where(shared, logprobs, 0), axis=-1)
    elif batch.mismatched is not None:
        other = batch.mismatched.replace(response_length=length)
        logprobs, _ = counted_logprobs(params, other, model=model)
        sums['mismatched_logps'] = jnp.sum(logprobs, axis=-1)
    return sums, lengths


def _token_logps(
    params: Params, batch: JudgedBatch, ref_params: Params | None, model: CausalLM
) -> TokenLogps:
    """Every token by itself, under the policy and the reference policy, if there is
    one.
    """
    texts, config = _texts(batch), model.config
    tokens, mask, counted, missed = counted_tokens(texts)
    length = texts.response_length
    policies = [params]
    if ref_params is not None:
        policies.append(jax.lax.stop_gradient(ref_params))
    hidden, unembedding = zip(
        *(
            policy_states(
                p, tokens, mask, model=model, response_length=length, segments=None
            )
            for p in policies
        )
    )
    first = tokens.shape[1] - hidden[0].shape[1]

    def placed(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (first, 0)))
        x = jnp.where(counted, jnp.where(missed, jnp.nan, x), 0)
        return x.reshape(batch.tokens.shape)

    head = {'num_tokens': config.num_tokens}
    cap = config.logit_softcap
    logps = [
        placed(token_logprobs(h, w, tokens[:, first:], softcap=cap, **head)[0])
        for h, w in zip(hidden, unembedding)
    ]
    seen = TokenLogps(mask=counted.reshape(batch.tokens.shape), logps=logps[0])
    if ref_params is None:
        return seen
    kl = token_kl(hidden[::-1], unembedding[::-1], softcap=(cap, cap), **head)
    return seen.replace(ref_logps=logps[1], kl=placed(kl))


def reference_logps(
    params: Params, batch: JudgedBatch, *, model: CausalLM
) -> dict[str, Array]:
    """The reference fields of a batch, to be computed once per example:
    ``batch.replace(**reference_logps(…))``.

    Args:
        params: of the frozen reference policy.
        batch: pairs or unpaired responses; these may have mismatched ones.
        model: of the reference, static.

    Returns:
        ``ref_logps`` [P, K] and, of pairs, ``ref_shared_logps`` [P, 2]; with
        ``ref_mismatched_logps`` [P] where there are any. Float32, nats; independent of
        the padding and of the other rows.
    """
    sums, _ = _sums(params, batch, model)
    return {f'ref_{name}': value for name, value in sums.items()}


def batch_logps(
    params: Params,
    batch: JudgedBatch,
    ref_params: Params | None = None,
    *,
    model: CausalLM,
    tokens: bool = False,
) -> Logps:
    """What a loss module sees of a batch, from one concatenated pass of the policy.

    Rows of weight 0 get harmless numbers, whatever their tokens: sums of −1 nat, and no
    token that counts.

    Args:
        params: of the policy.
        batch: pairs or unpaired responses, with reference fields where the loss needs
            them.
        ref_params: of the frozen reference policy, which then runs here; None where the
            batch has its sums, or the loss needs none.
        model: of both, static.
        tokens: whether the loss looks at single tokens, static.
    """
    seen, scored, ref_scored = None, None, None
    if tokens:
        seen = _token_logps(params, batch, ref_params, model)
        scored, ref_scored = (seen.logps, seen.mask), (seen.ref_logps, seen.mask)
    sums, lengths = _sums(params, batch, model, scored)
    if ref_params is not None:
        known = _sums(jax.lax.stop_gradient(ref_params), batch, model, ref_scored)[0]
        batch = batch.replace(**{f'ref_{name}': x for name, x in known.items()})
    names = (field.name for field in dataclasses.fields(batch))
    refs = {name: getattr(batch, name) for name in names if name.startswith('ref_')}
    if _is_paired(batch):
        del refs['ref_mismatched_logps']

    def real(x: Array) -> Array:
        return jnp.where(batch.weight.reshape(-1, *(1,) * (x.ndim - 1)) > 0, x, -1.0)

    numbers = jax.tree.map(real, sums | refs)
    if seen is not None:
        is_real = batch.weight.reshape(-1, *(1,) * (batch.tokens.ndim - 1)) > 0
        numbers['tokens'] = jax.tree.map(
            lambda x: jnp.where(is_real, x, jnp.zeros_like(x)), seen
        )
    numbers |= {
        'lengths': jnp.maximum(lengths, 1).astype(jnp.float32),
        'weight': batch.weight,
    }
    if _is_paired(batch):
        return PairLogps(**numbers)
    numbers = {  # one response to a prompt
        name: x if name in PER_PROMPT else jax.tree.map(lambda y: y[:, 0], x)
        for name, x in numbers.items()
        if name != 'ref_shared_logps'
    }
    return UnpairedLogps(**numbers, desirable=batch.desirable)


# --------------------------------------------------------------------------------- loss


def check_batch(
    loss: PreferenceLoss, batch: JudgedBatch, ref_params: Params | None = None
) -> None:
    """Raises ValueError when a batch is not what the loss module is for."""
    kind = 'pairs' if _is_paired(batch) else 'unpaired'
    if loss.DATA != kind:
        what = {
            'pairs': 'comparisons of a chosen and a rejected response',
            'unpaired': 'single responses, each desirable or not',
        }
        raise ValueError(
            f'{loss.__name__} is a loss on {what[loss.DATA]}, and the data are '
            f'{what[kind]}; use other data, or a loss whose DATA is {kind!r}'
        )
    if batch.probability is not None and hasattr(loss, 'context'):
        raise ValueError(
            f'{loss.__name__} compares the pairs of a batch with each other, so that '
            'no pair can be swapped alone, and the batch has probabilities; use a loss '
            'without a context, or certain labels'
        )
    if loss.REFERENCE and wants_tokens(loss) and ref_params is None:
        raise ValueError(
            f'{loss.__name__} looks at single tokens under the reference policy, whose '
            'parameters the step then needs: give it ref_params'
        )
    if loss.REFERENCE and batch.ref_logps is None and ref_params is None:
        raise ValueError(
            f'{loss.__name__} needs log-probabilities of a reference policy, and the '
            'batch has none: batch.replace(**reference_logps(…)) adds them'
        )


def batch_context(
    params: Params,
    batch: JudgedBatch,
    ref_params: Params | None = None,
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
    check_batch(loss, batch, ref_params)
    rows, tokens = batch.tokens.shape[0], wants_tokens(loss)
    parts = jax.lax.map(
        lambda part: batch_logps(params, part, ref_params, model=model, tokens=tokens),
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
    batch: JudgedBatch,
    ref_params: Params | None = None,
    *,
    model: CausalLM,
    loss: PreferenceLoss,
    loss_hp: Any,
    axis_name: str | None = None,
) -> Array:
    """What a policy claims of the responses: the rewards that its loss reports.

    Returns:
        [P, 2] of pairs, [P] of unpaired responses, float32.

    Raises:
        ValueError: pairs given to a loss on unpaired responses or the reverse, or no
            reference policy.
    """
    check_batch(loss, batch, ref_params)
    how = {'model': model, 'loss': loss, 'loss_hp': loss_hp}
    context = batch_context(params, batch, ref_params, **how, axis_name=axis_name)
    tokens = wants_tokens(loss)
    numbers = batch_logps(params, batch, ref_params, model=model, tokens=tokens)
    return loss.loss(numbers.replace(context=context), loss_hp)[1]


def preference_loss(
    params: Params,
    batch: JudgedBatch,
    context: dict[str, Array],
    ref_params: Params | None = None,
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
        ref_params: as in :func:`batch_logps`.
        model: the policy, static.
        loss: a module of ``rlhf_jax.preference``, or one like it; static.
        loss_hp: ``loss.HParams(…)``, static.

    Returns:
        (sum [], weight [] rows, metrics: ``loss``, ``rewards/…``, ``logps/…`` and the
        means of ``context``). A pair's ``rewards/accuracies`` is strict: a tie is an
        error. With ``probability`` in the batch loss and accuracy are expected, see
        ``soft_labels.py``.

    Raises:
        ValueError: pairs given to a loss on unpaired responses or the reverse, or no
            reference policy.
    """
    check_batch(loss, batch, ref_params)
    tokens = wants_tokens(loss)
    numbers = batch_logps(params, batch, ref_params, model=model, tokens=tokens)
    numbers, p = numbers.replace(context=context), batch.probability
    if p is None:
        per_row, rewards = loss.loss(numbers, loss_hp)
    else:
        per_row, rewards = expected_preference_loss(numbers, p, loss, loss_hp)
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
        agrees = rewards[:, 0] > rewards[:, 1]
        if p is not None:
            agrees = expected_agreement(rewards[:, 0] - rewards[:, 1], p)
        metrics['rewards/accuracies'] = mean(agrees)
        metrics['rewards/margins'] = mean(rewards[:, 0] - rewards[:, 1])
    metrics |= {name: mean(x) for name, x in context.items()}
    return jnp.sum(per_row * batch.weight), weight, metrics


def preference_step(
    state: TrainState,
    batch: JudgedBatch,
    ref_params: Params | None = None,
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
        ref_params: of the frozen reference policy, for a loss that looks at single
            tokens, and instead of reference fields for any other; it then runs in the
            step. None for the fields, or for a loss without a reference policy.
        model: the policy, static.
        tx: the optimizer, static.
        hp: hyperparameters of the step, static.
        loss: a module of ``rlhf_jax.preference``, or one like it; static.
        loss_hp: ``loss.HParams(…)``, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (new state, metrics: see :func:`preference_loss`, and ``grad_norm``).

    Raises:
        ValueError: pairs given to a loss on unpaired responses or the reverse, or no
            reference policy.
    """
    how = {'model': model, 'loss': loss, 'loss_hp': loss_hp}
    context = batch_context(
        state.params,
        batch,
        ref_params,
        **how,
        num_microbatches=hp.num_microbatches,
        axis_name=axis_name,
    )
    batch = batch.replace(mismatched=None)  # the context was all it was for
    gradient, metrics = mean_gradient(
        lambda params, part: preference_loss(params, *part, ref_params, **how),
        state.params,
        (batch, context),
        num_microbatches=hp.num_microbatches,
        axis_name=axis_name,
    )
    metrics['grad_norm'] = Last(optax.tree.norm(gradient))
    return apply_gradient(state, gradient, tx), metrics
