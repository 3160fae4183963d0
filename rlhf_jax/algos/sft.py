"""Supervised fine-tuning, and with every token in the loss also pretraining:
``sft_step``.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax

from rlhf_jax.algos.gradients import apply_gradient, mean_gradient
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.ops.logprobs import token_logprobs
from rlhf_jax.ops.masked import masked_sum
from rlhf_jax.types import Array, Last, Mean, Metrics, Params, TokenBatch, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTHParams:
    """Hyperparameters of ``sft_step``. What enters the loss is the batch's
    ``loss_mask``.
    """

    num_microbatches: int = 1  # gradient accumulation


def sft_loss(
    params: Params, batch: TokenBatch, *, model: CausalLM
) -> tuple[Array, Array, Metrics]:
    """Sum of the negative log-likelihood of the tokens under ``loss_mask``.

    L = −Σ_bt m_bt·log π(y_bt | y_b<t)

    Source: Radford et al. 2018; on demonstrations: Ouyang et al. 2022, arXiv
        2203.02155.

    Args:
        params: of ``model``.
        batch: sequences; a token at position 0 has nothing before it and never counts.
        model: the language model.

    Returns:
        (sum [] nats, weight [] tokens, metrics with ``loss`` in nats per token).
    """
    packed = () if batch.segments is None else (batch.segments,)
    hidden = model.apply({'params': params}, batch.tokens, batch.mask, *packed)
    logprobs, _ = token_logprobs(
        hidden,
        model.unembedding(params),
        batch.tokens,
        softcap=model.config.logit_softcap,
    )
    # A token is predicted only from a real one: behind left padding the first has none.
    predicted = jnp.pad(batch.mask[:, :-1], ((0, 0), (1, 0)))
    if batch.segments is not None:  # nor from another document
        same = batch.segments[:, 1:] == batch.segments[:, :-1]
        predicted = predicted & jnp.pad(same, ((0, 0), (1, 0)))
    counted = batch.loss_mask & batch.mask & predicted
    total, weight = masked_sum(-logprobs, counted), jnp.sum(counted).astype(jnp.float32)
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
