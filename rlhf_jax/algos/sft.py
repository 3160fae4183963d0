"""Supervised fine-tuning, and with every token in the loss also pretraining:
``sft_step``.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax.numpy as jnp
import optax

from rlhf_jax.algos.gradients import apply_gradient, mean_gradient
from rlhf_jax.algos.rollout import policy_logprobs, policy_states
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.ops.logprobs import logprob_sum
from rlhf_jax.ops.masked import right_align
from rlhf_jax.ranges import at_least
from rlhf_jax.types import Array, Last, Mean, Metrics, Params, TokenBatch, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTHParams:
    """Hyperparameters of ``sft_step``. What enters the loss is the batch's
    ``loss_mask``.
    """

    num_microbatches: Annotated[int, at_least(1)] = 1  # gradient accumulation


def counted_tokens(batch: TokenBatch) -> tuple[Array, Array, Array, Array]:
    """The texts of a batch, and which of their tokens are in a loss.

    With ``response_length`` the texts are right-aligned, so that the last layer and the
    head run for that many places of each.

    Args:
        batch: sequences; a token at position 0 has nothing before it and never counts.

    Returns:
        (tokens [B, T], mask [B, T] bool, counted [B, T] bool, missed [B, T] bool, those
            of the counted that ``response_length`` does not reach).

    Raises:
        ValueError: ``response_length`` of rows that hold several texts.
    """
    tokens, mask, counted = batch.tokens, batch.mask, batch.loss_mask
    if batch.response_length is not None:
        if batch.segments is not None:
            raise ValueError(
                f'response_length={batch.response_length} with segments: a packed row '
                'has several responses; use response_length=None'
            )
        tokens, counted, mask = (right_align(x, mask) for x in (tokens, counted, mask))
    # A token is predicted only from a real one: behind left padding the first has none.
    predicted = jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))
    if batch.segments is not None:  # nor from another document
        same = batch.segments[:, 1:] == batch.segments[:, :-1]
        predicted = predicted & jnp.pad(same, ((0, 0), (1, 0)))
    counted = counted & mask & predicted
    length = mask.shape[-1]
    reach = length if batch.response_length is None else batch.response_length
    return tokens, mask, counted, counted & (jnp.arange(length) < length - reach)


def counted_logprobs(
    params: Params, batch: TokenBatch, *, model: CausalLM
) -> tuple[Array, Array]:
    """Log-probabilities of the tokens in a loss, and which tokens those are.

    Args:
        params: of ``model``.
        batch: sequences, see :func:`counted_tokens`.
        model: the language model.

    Returns:
        (logprobs [B, T] nats, 0 elsewhere, counted [B, T] bool), each text in its
            order, at places of its own. NaN for a token that ``response_length`` does
            not reach.

    Raises:
        ValueError: see :func:`counted_tokens`.
    """
    tokens, mask, counted, missed = counted_tokens(batch)
    logprobs, _ = policy_logprobs(
        params,
        tokens,
        mask,
        model=model,
        temperature=1.0,
        response_length=batch.response_length,
        segments=batch.segments,
    )
    logprobs = jnp.where(missed, jnp.nan, logprobs)
    return jnp.where(counted, logprobs, 0), counted


def sft_loss(
    params: Params, batch: TokenBatch, *, model: CausalLM
) -> tuple[Array, Array, Metrics]:
    """Sum of the negative log-likelihood of the tokens under ``loss_mask``.

    L = −Σ_bt m_bt·log π(y_bt | y_b<t)

    Source: Radford et al. 2018; on demonstrations: Ouyang et al. 2022, arXiv
        2203.02155.

    Args:
        params: of ``model``.
        batch: sequences, see :func:`counted_tokens`.
        model: the language model.

    Returns:
        (sum [] nats, weight [] tokens, metrics with ``loss`` in nats per token). The
            sum is NaN where ``response_length`` does not reach a token that counts.

    Raises:
        ValueError: see :func:`counted_tokens`.
    """
    tokens, mask, counted, missed = counted_tokens(batch)
    hidden, unembedding = policy_states(
        params,
        tokens,
        mask,
        model=model,
        response_length=batch.response_length,
        segments=batch.segments,
    )
    first = tokens.shape[1] - hidden.shape[1]
    total = -logprob_sum(
        hidden,
        unembedding,
        tokens[:, first:],
        counted[:, first:].astype(jnp.float32),
        softcap=model.config.logit_softcap,
        num_tokens=model.config.num_tokens,
    )
    total = jnp.where(jnp.any(missed), jnp.nan, total)
    weight = jnp.sum(counted).astype(jnp.float32)
    return total, weight, {'loss': Mean(total, weight)}


def sft_step(
    state: TrainState,
    batch: TokenBatch,
    *,
    model: CausalLM,
    tx: optax.GradientTransformation,
    hp: SFTHParams,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update on demonstrations or plain text.

    Args:
        state: parameters and optimizer.
        batch: rows of this device, or of all devices under ``jit``.
        model: the language model, static.
        tx: the optimizer, static.
        hp: hyperparameters, static.
        axis_name: mapped device axis under ``pmap``.

    Returns:
        (new state, metrics: ``loss`` nats per token, ``grad_norm`` before clipping).
    """
    gradient, metrics = mean_gradient(
        lambda params, part: sft_loss(params, part, model=model),
        state.params,
        batch,
        num_microbatches=hp.num_microbatches,
        axis_name=axis_name,
    )
    metrics['grad_norm'] = Last(optax.tree.norm(gradient))
    return apply_gradient(state, gradient, tx), metrics
