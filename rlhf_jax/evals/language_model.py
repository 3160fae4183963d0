"""Held-out loss of a language model.

Read ``evals/preference.py`` next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax

from rlhf_jax.algos.sft import sft_loss
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.types import Metrics, Params, TokenBatch, merge_metrics, reduce_metrics

# Its kinds for sharding.compile_step.
KINDS = {'inputs': ('params', 'batch'), 'outputs': ('replicated',), 'donate': ()}


def batch_loss(
    params: Params, batch: TokenBatch, *, model: CausalLM, axis_name: str | None = None
) -> Metrics:
    """Loss of one batch as a mergeable metric; a pure function to compile."""
    return reduce_metrics(sft_loss(params, batch, model=model)[2], axis_name)


def evaluate_loss(
    compiled: Callable[[Params, TokenBatch], Metrics],
    params: Params,
    batches: Iterable[TokenBatch],
) -> dict[str, float]:
    """Mean loss over all counted tokens.

    Returns:
        ``loss`` in nats per token and ``tokens``, how many were counted.

    Raises:
        ValueError: no token was counted.
    """
    total: Metrics | None = None
    for batch in batches:
        # Fetched one by one: XLA's virtual CPU devices deadlock when many programs with
        # collectives are queued.
        metrics = jax.device_get(compiled(params, batch))
        total = metrics if total is None else merge_metrics(total, metrics)
    loss = total['loss'] if total else None
    if loss is None or loss.weight == 0:
        raise ValueError('the evaluation data hold no token that counts in the loss')
    return {'loss': float(loss.sum / loss.weight), 'tokens': int(loss.weight)}
