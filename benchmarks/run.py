"""Speed, side by side with peers, and as a share of what the machine can do.

    benchmarks/peers/setup.sh DIR
    python -m benchmarks.run --peers trl,tunix --peers_dir DIR --out results

Every system is a worker process; the workers of a work are started together and run in
turns, A B A B …, so that what else the machine does falls on all of them alike. Writes
``results.json``, ``tables.md`` and the workers' logs to ``--out``.
``benchmarks/README.md`` says what is measured. Read ``sizes.py`` next.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import avx2, tables
from benchmarks.sizes import (
    MODELS,
    PROBES,
    SIZES_OF_DEVICE,
    WORKS,
    Model,
    Probe,
    Work,
    scaling,
)
from benchmarks.workers import (
    Plan,
    System,
    Worker,
    WorkerError,
    machine,
    measure,
    ours,
    peer,
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: an unknown size or work.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--peers', default='', help='trl, tunix or trl,tunix')
    parser.add_argument('--peers_dir', type=Path, default=Path('runs/peers'))
    parser.add_argument('--device', choices=sorted(SIZES_OF_DEVICE), default='cpu')
    parser.add_argument('--size', help=f'of {", ".join(MODELS)}; several by commas')
    parser.add_argument('--work', help='of those of the size; several by commas')
    parser.add_argument('--scaling', action='store_true', help='tables over one size')
    parser.add_argument('--rounds', type=int, default=7, help='turns of each system')
    parser.add_argument('--steps', type=int, default=3, help='in a turn')
    parser.add_argument('--warmup', type=int, default=3, help='steps before them')
    parser.add_argument('--threads', type=int, default=2, help='of a worker on the CPU')
    parser.add_argument('--isa', choices=['avx2'], help='as if there was no AVX-512')
    parser.add_argument('--limit', type=float, default=1800.0, help='s to an answer')
    parser.add_argument('--out', type=Path, default=Path('runs/benchmarks'))
    args = parser.parse_args(argv)
    args.size = args.size.split(',') if args.size else SIZES_OF_DEVICE[args.device]
    args.work = args.work.split(',') if args.work else None
    for size in args.size:
        if size not in MODELS:
            raise ValueError(f'--size={size} is unknown; use {", ".join(MODELS)}')
        for work in args.work or ():
            if work not in WORKS[size]:
                raise ValueError(
                    f'--work={work} is not among the works of --size={size}: '
                    f'{", ".join(WORKS[size])}'
                )
    if args.isa and args.device != 'cpu':
        raise ValueError(f'--isa={args.isa} is for --device=cpu, not {args.device}')
    for name in ('rounds', 'steps', 'warmup', 'threads'):
        if getattr(args, name) < 1:
            raise ValueError(f'--{name}={getattr(args, name)}: use at least 1')
    return args


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """Where and when, and what was asked for."""
    return {
        'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'cpu': processor(Path('/proc/cpuinfo')),
        'cores': len(os.sched_getaffinity(0)),
        'python': platform.python_version(),
        'platform': platform.platform(),
        'arguments': {  # but for the places of files
            name: value
            for name, value in vars(args).items()
            if not isinstance(value, Path)
        },
    }


def processor(info: Path) -> str:
    """Its name, and on Linux its family and model: clouds give one name to several
    generations.
    """
    if not info.exists():
        return platform.processor()
    pairs = (line.partition(':') for line in info.read_text().splitlines())
    known = {key.strip(): value.strip() for key, _, value in pairs}
    name = known.get('model name') or platform.processor()
    if 'cpu family' not in known:  # other architectures than x86
        return name
    return f'{name} (family {known["cpu family"]}, model {known["model"]})'


def say(text: str) -> None:
    """To the terminal at once."""
    print(text, flush=True)


# The place of a work in the results and in the logs, and what it is.
Jobs = Iterator[tuple[tuple[str, ...], Model, Work]]


def jobs_of(args: argparse.Namespace) -> Jobs:
    """Everything that is to be measured, in order: (size, work), or with ``--scaling``
    (size, what varies, its value).
    """
    for size in args.size:
        if args.scaling:
            for what, variations in scaling(MODELS[size]).items():
                for value, (model, work) in variations.items():
                    yield (size, what, str(value)), model, work
        else:
            for label in args.work or WORKS[size]:
                yield (size, label), MODELS[size], WORKS[size][label]


def measure_all(
    args: argparse.Namespace,
    systems: list[System],
    probe: Worker,
    plan: Plan,
    save: Callable[[Any], None],
) -> None:
    """Measures job after job, and saves the results so far behind each: nested by the
    parts of the place, and below them by system.
    """
    results: dict[str, Any] = {}
    for place, model, work in jobs_of(args):
        say(': '.join(place))
        logs = args.out.joinpath('logs', *place)
        logs.mkdir(parents=True, exist_ok=True)
        *path, label = place
        branch = results
        for part in path:
            branch = branch.setdefault(part, {})
        branch[label] = measure(systems, probe, model, work, plan, logs)
        save(results)


def rounds_of_probe(results: Any) -> list[Any]:
    """The machine's answers, wherever they stand in the results."""
    if 'machine' in results:
        return results['machine']['rounds']
    return [answer for part in results.values() for answer in rounds_of_probe(part)]


def systems_of(args: argparse.Namespace, directory: Path) -> list[System]:
    """The machine, this package and the peers.

    Args:
        args: the command line.
        directory: an empty one, for what the systems need.

    Raises:
        ValueError: no such peer, or it cannot do with ``--isa``.
    """
    place = args.peers_dir.resolve()
    peers = [peer(name, place) for name in args.peers.split(',') if name]
    systems = [machine(), ours(), *peers]
    if not args.isa:
        return systems
    limited = avx2.environment([each.command[0] for each in systems], directory)
    return [dataclasses.replace(each, environment=limited) for each in systems]


def render(report: dict[str, Any], names: list[str], probe: Probe) -> str:
    """The whole report as markdown."""
    where, peak = report['circumstances'], report['peak']
    limited = ' without AVX-512' if where['arguments']['isa'] else ''
    parts = [
        f'{where["date"]}, {report["device"]}, {where["cpu"]}{limited}, '
        f'{where["cores"]} cores. '
        f'Best of all works: matrix product {peak["flops"] / 1e9:,.0f} GFLOP/s, copy '
        f'{peak["bandwidth"] / 1e9:,.1f} GB/s. Load before and after: '
        f'{report["load"][0]:.2f}, {report["load"][1]:.2f}.\n'
    ]
    for size, results in report.get('works', {}).items():
        works = WORKS[size]
        parts += [f'## {size}\n', tables.speed_table(results, names)]
        parts.append(tables.share_table(results, names, MODELS[size], works, probe))
        parts += [tables.cost_table(results, names), tables.phase_table(results)]
        parts.append(tables.reasons(results))
    for size, by_what in report.get('scaling', {}).items():
        parts.append(f'## Scaling of {size}\n')
        for what, results in by_what.items():
            parts.append(tables.scaling_table(what, results, names))
            parts.append(tables.reasons(results))
    return '\n'.join(part for part in parts if part)


def measure_and_write(args: argparse.Namespace, all_systems: list[System]) -> None:
    """Measures them, the first of which is the machine, and writes.

    Raises:
        WorkerError: the machine could not be probed.
    """
    probed, *systems = all_systems
    names = [system.name for system in systems]
    plan = Plan(
        device=args.device,
        threads=args.threads,
        rounds=args.rounds,
        steps=args.steps,
        warmup=args.warmup,
        limit=args.limit,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    size = PROBES['tiny' if args.size == ['tiny'] else args.device]
    spec = {'device': args.device, 'threads': args.threads}
    spec['probe'] = dataclasses.asdict(size)
    what, before = 'scaling' if args.scaling else 'works', os.getloadavg()[0]
    probe = Worker(probed, spec, args.out / 'machine.log', args.limit)
    probe.steps(1)  # compiles

    def save(results: Any) -> None:
        report = {
            'circumstances': circumstances(args),
            'device': probe.facts['device'],
            'load': [before, os.getloadavg()[0]],
            'peak': tables.peak_of(rounds_of_probe(results), size),
            what: results,
        }
        (args.out / 'results.json').write_text(json.dumps(report, indent=1) + '\n')
        (args.out / 'tables.md').write_text(render(report, names, size))

    measure_all(args, systems, probe, plan, save)
    probe.close()
    say((args.out / 'tables.md').read_text())


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes.

    Raises:
        ValueError: what is wrong with the command line.
        WorkerError: the machine could not be probed.
    """
    args = parse(argv)
    with tempfile.TemporaryDirectory() as directory:
        measure_and_write(args, systems_of(args, Path(directory)))


if __name__ == '__main__':
    try:
        main()
    except (ValueError, WorkerError) as error:
        sys.exit(str(error))
