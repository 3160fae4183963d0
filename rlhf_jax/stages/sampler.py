"""The sampler of a stage: compiled generation with the stage's rules for ending.

Training, evaluation and the stage that writes samples down use it alike. Read
``stages/scoring.py`` next.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.continuous_batching import generate_continuously
from rlhf_jax.data.stops import eos_ids, token_bytes
from rlhf_jax.generate import Sampling, generate, sampling
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.ops.rows import repeat_prompts
from rlhf_jax.ops.stop_table import stop_table
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import SamplerSettings
from rlhf_jax.types import Generation, Params, PRNGKey, PromptBatch


def _check_decode_rows(run: Run, where: str, rows: int | None) -> None:
    """Refuses continuous batching where the rows would not stand on one device.

    Raises:
        ValueError: several devices in one compiled program.
    """
    if rows is None:
        return
    if run.mesh.size > 1 and run.config.parallel.backend != 'pmap':
        raise ValueError(
            f'{where}.decode_rows={rows}: rows are taken by each device for itself, '
            f"which wants config.parallel.backend='pmap' on {run.mesh.size} devices"
        )


def check_sampler(run: Run, where: str, settings: SamplerSettings) -> None:
    """Refuses stop strings and rows that cannot be.

    Raises:
        ValueError: a stop string that :func:`stops_of` refuses, or continuous batching
            where the rows would not stand on one device.
    """
    _check_decode_rows(run, where, settings.decode_rows)
    stops_of(run.tokenizer, where, settings.stop_sequences)


def stops_of(tokenizer: Any, where: str, stops: Sequence[str]) -> np.ndarray | None:
    """Stop strings over the tokens of a tokenizer, see ``ops/stop_table.py``; None
    where there are none.

    Raises:
        ValueError: one is empty or no text, they are too long, or the tokenizer does
            not write its texts token by token.
    """
    if not stops:
        return None
    try:
        return stop_table(token_bytes(tokenizer), [text.encode() for text in stops])
    except ValueError as error:
        shown = f'{stops!r}' if len(str(stops)) < 200 else f'{str(stops)[:200]}…'
        raise ValueError(f'{where}.stop_sequences={shown}: {error}') from error


def stop_rules(run: Run, settings: SamplerSettings, temperature: float) -> Sampling:
    """The sampling parameters of a stage: its stop strings over the tokens, all EOS
    ids.
    """
    table = stops_of(run.tokenizer, 'settings', settings.stop_sequences)
    return sampling(
        eos_ids=eos_ids(run.tokenizer),
        temperature=temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_table=table,
        stop_after=settings.stop_after,
    )


def make_sampler(
    run: Run, settings: SamplerSettings, temperature: float, policy: CausalLM
) -> Any:
    """(params, prompt batch, key, temperature=None, samples=1) -> Generation, compiled
    once per prompt bucket; a temperature takes the place of the stage's, 0 is greedy;
    the samples of a prompt are adjacent rows.
    """
    parts = {'model': policy, 'max_new_tokens': settings.max_new_tokens}
    draw = functools.partial(generate, **parts)
    if settings.decode_rows is not None:
        draw = functools.partial(
            generate_continuously, **parts, num_rows=settings.decode_rows
        )
    compiled = run.compile(
        lambda params, batch, *rest: draw(params, batch.tokens, batch.mask, *rest),
        inputs=('params', 'batch', 'batch', 'replicated', 'replicated'),
        outputs=('batch',),
        donate=(),
    )
    how = stop_rules(run, settings, temperature)

    def sample(
        params: Params,
        batch: PromptBatch,
        key: PRNGKey,
        temperature: float | None = None,
        samples: int = 1,
    ) -> Generation:
        rows = np.arange(len(batch.index) * samples, dtype=np.int32)
        # A sample does not depend on how many processes share the work.
        rows += jax.process_index() * len(rows)
        copies = _copies(len(batch.index) * jax.process_count(), samples, run.mesh)
        batch = repeat_prompts(batch, copies)
        drawn = how
        if temperature is not None:
            drawn = how.replace(temperature=jnp.float32(temperature))
        return compiled(params, batch, rows, key, drawn)

    return sample


def _copies(prompts: int, samples: int, mesh: Mesh) -> int:
    """How often every prompt is run, so that prompts divide over the devices: once
    where that can be.
    """
    devices = mesh.shape['data'] * mesh.shape['fsdp']
    return next(
        copies
        for copies in range(1, samples + 1)
        if copies == samples or not (samples % copies or prompts * copies % devices)
    )
