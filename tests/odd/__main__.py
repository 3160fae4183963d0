"""Reads ten thousand odd inputs, the same at every call, and counts what comes of them.

    JAX_PLATFORMS=cpu python -m tests.odd
    JAX_PLATFORMS=cpu python -m tests.odd --kind templates --chunk 3

``test_odd_inputs.py`` runs the same, as tests that are marked ``odd``.
"""

import argparse
import collections
import multiprocessing
from concurrent import futures
from typing import Any

from tests.odd.running import CHUNKS, SEED, prepare, work


def main() -> None:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--kind', choices=CHUNKS)
    parser.add_argument('--chunk', type=int)
    parser.add_argument('--seed', type=int, default=SEED, help='of other inputs')
    parser.add_argument('--processes', type=int, default=2)
    values = parser.parse_args()
    jobs = [
        (kind, chunk, values.seed)
        for kind, count in CHUNKS.items()
        for chunk in range(count)
        if values.kind in (None, kind) and values.chunk in (None, chunk)
    ]
    total: dict[str, Any] = {kind: collections.Counter() for kind, *_ in jobs}
    spent: dict[str, float] = collections.Counter()
    context = multiprocessing.get_context('spawn')
    size = min(values.processes, len(jobs))
    # Unlike multiprocessing.Pool it says when a process has crashed.
    with futures.ProcessPoolExecutor(size, context, prepare) as pool:
        running = [pool.submit(work, job) for job in jobs]
        for done in futures.as_completed(running):
            kind, counts, failures, seconds = done.result()
            total[kind] += counts
            spent[kind] += seconds
            for failure in failures:
                print(failure, flush=True)
    for kind, counts in total.items():
        print(f'{kind:12} {spent[kind]:6.0f} s  {dict(counts)}')
    whole = sum(total.values(), collections.Counter())
    print(f'{"all":12} {sum(spent.values()):6.0f} s  {dict(whole)}')


if __name__ == '__main__':
    main()
