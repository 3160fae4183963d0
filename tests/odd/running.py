"""Chunks of odd inputs: how many of which kind, made from their numbers, and run.

A process imports JAX when it runs its first chunk.
"""

import collections
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

SIZE = 100  # inputs of a chunk
# Chunks of every kind.
CHUNKS = {
    'records': 37,
    'files': 10,
    'specs': 4,
    'configs': 12,
    'weights': 4,
    'tokenizers': 5,
    'templates': 10,
    'stops': 2,
    'settings': 8,
    'flags': 4,
    'runs': 2,
    'checkpoints': 2,
}
SEED = 28


def makers() -> dict[str, Any]:
    """What makes an input of every kind."""
    from tests.odd import directories, records, run_files, settings

    return {
        'records': records.odd_records,
        'files': records.odd_files,
        'specs': records.odd_specs,
        'configs': directories.odd_configs,
        'weights': directories.odd_weights,
        'tokenizers': directories.odd_tokenizers,
        'templates': directories.odd_templates,
        'stops': directories.odd_stops,
        'settings': settings.odd_configs,
        'flags': settings.odd_flags,
        'runs': run_files.odd_runs,
        'checkpoints': run_files.odd_checkpoints,
    }


def prepare() -> None:
    """What a process sets before it reads odd inputs."""
    from huggingface_hub import constants

    from rlhf_jax.data import template_limits

    template_limits.SECONDS, template_limits.MEMORY = 0.5, 2**27
    constants.HF_HUB_OFFLINE = True


def run_chunk(
    kind: str, chunk: int, seed: int = SEED
) -> tuple[collections.Counter[str], list[str]]:
    """(how many of each outcome, what went wrong)."""
    from tests.odd.cases import outcome

    make = makers()[kind]
    counts: collections.Counter[str] = collections.Counter()
    failures = []
    for number in range(chunk * SIZE, (chunk + 1) * SIZE):
        rng = random.Random(f'{seed} {kind} {number}')
        folder = Path(tempfile.mkdtemp(prefix='odd'))
        try:
            result = outcome(make(rng, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        name, _, what = result.partition(': ')
        counts[name] += 1
        if what:
            failures.append(f'{kind} {number}: {result}')
    return counts, failures


def work(job: tuple[str, int, int]) -> tuple[str, Any, list[str], float]:
    """:func:`run_chunk` of (kind, chunk, seed), with the kind and the seconds."""
    start = time.monotonic()
    counts, failures = run_chunk(*job)
    return job[0], counts, failures, time.monotonic() - start
