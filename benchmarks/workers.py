"""The parent's side: starts the systems, and lets them run in turns.

A system is a process of its own that stays alive while a work is measured; what is said
to it stands in ``peers/gate.py``. Read ``ours.py`` next.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sizes import Model, Work

ROOT = Path(__file__).resolve().parents[1]
PEERS = ('trl', 'tunix')
# What a peer does not have; there is no figure for it, and no error.
LACKS = {'tunix': {'rm': 'no trainer of reward models'}}

PROBES_A_ROUND = 3  # steps of the machine, before those of the systems


class WorkerError(RuntimeError):
    """A system could not do a work; the others go on."""


@dataclasses.dataclass(frozen=True)
class System:
    """Something that is measured."""

    name: str
    command: tuple[str, ...]  # the specification of the work follows
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def ours() -> System:
    """This package, in the interpreter that runs the benchmark."""
    return System('rlhf_jax', (sys.executable, '-m', 'benchmarks.ours'))


def machine() -> System:
    """The probe of the machine."""
    return System('machine', (sys.executable, '-m', 'benchmarks.machine'))


def peer(name: str, directory: Path) -> System:
    """A peer in its virtual environment ``directory/peer_NAME``.

    Raises:
        ValueError: an unknown peer, or no such environment.
    """
    if name not in PEERS:
        raise ValueError(f'--peers={name}: no such peer; known are {", ".join(PEERS)}')
    python = directory / f'peer_{name}' / 'bin' / 'python'
    if not python.exists():
        raise ValueError(
            f'--peers={name}: there is no {python}; make it by '
            f'`benchmarks/peers/setup.sh {directory} {name}`, or name another '
            '--peers_dir'
        )
    script = ROOT / 'benchmarks' / 'peers' / f'{name}_worker.py'
    return System(name, (str(python), str(script)))


class Worker:
    """A system at one work."""

    def __init__(
        self, system: System, spec: Mapping[str, Any], log: Path, limit: float
    ):
        """Starts it and waits until it is ready.

        Args:
            system: what to start.
            spec: see :func:`specification`; of the probe with 'probe'.
            log: where its stderr goes.
            limit: seconds that any answer may take.

        Raises:
            WorkerError: it ended, said why it cannot, or took too long.
        """
        self.name, self._log, self._limit = system.name, log, limit
        environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE='false')
        if spec['device'] == 'cpu':
            threads = str(spec['threads'])
            environment |= {'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': ''}
            environment |= {'OMP_NUM_THREADS': threads, 'MKL_NUM_THREADS': threads}
            # Large pages: a step of any of them frees its memory and takes it anew, and
            # a virtual machine may need longer for 4 KiB pages than for the arithmetic.
            environment.setdefault('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1')
            cores = sorted(os.sched_getaffinity(0))[: spec['threads']]
            spec = {**spec, 'cores': cores}
        environment |= system.environment
        with log.open('w') as errors:
            self._process = subprocess.Popen(
                [*system.command, json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=environment,
            )
        self.facts = self._answer()['ready']

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds of ``count`` steps, of their phases, and memory.

        Raises:
            WorkerError: see above.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({'steps': count}).encode() + b'\n')
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it has said before it ended is read below
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=30)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        is_there = select.select([out], [], [], self._limit)[0]
        line = out.readline() if is_there else b''
        # A worker that fails says so, and one that is killed says nothing.
        answer = json.loads(line) if line.strip() else {}
        if not answer or 'error' in answer:
            silent = 'ended without an answer'
            if not is_there:
                silent = f'did not answer in {self._limit:.0f} seconds'
                self._process.kill()
            self.close()
            why = answer.get('error', silent)
            raise WorkerError(f'{self.name}: {why}; see {self._log}')
        return answer


def specification(
    model: Model, work: Work, device: str, threads: int
) -> dict[str, Any]:
    """Everything a worker is told."""
    return {
        'device': device,
        'threads': threads,
        'model': dataclasses.asdict(model),
        'work': dataclasses.asdict(work),
    }


def check_parameters(name: str, model: Model, parameters: Mapping[str, int]) -> None:
    """Refuses to compare models of different size.

    Policies are equal to the last parameter; a model with one score has a weight for
    every entry of the width, and may have a bias.

    Raises:
        WorkerError: a model of another size.
    """
    score = model.backbone + model.width
    for role, count in parameters.items():
        is_scorer = role in ('critic', 'reward_model')
        allowed = (score, score + 1) if is_scorer else (model.policy,)
        if count not in allowed:
            raise WorkerError(
                f'{name}: its {role} has {count:,} parameters, not {allowed[0]:,}: '
                'that would not be the same work'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is run."""

    device: str
    threads: int
    rounds: int  # of all systems in turn
    steps: int  # in a turn
    warmup: int  # steps before the first round, which compile
    limit: float  # seconds that a worker may take to answer


def measure(
    systems: Sequence[System],
    probe: Worker,
    model: Model,
    work: Work,
    plan: Plan,
    logs: Path,
) -> dict[str, Any]:
    """Runs one work on all systems, A B A B …, and the probe before every round.

    Returns:
        By system: its facts, seconds of the first steps, and by round its answers; or
        why it has none ('error'), or what it lacks ('lacks'). Under 'machine' the
        probe's.
    """
    spec = specification(model, work, plan.device, plan.threads)
    results: dict[str, Any] = {}
    workers: list[Worker] = []
    for system in systems:
        name = system.name
        lacks = LACKS.get(name, {}).get(work.kind)
        if lacks:
            results[name] = {'lacks': lacks}
            continue
        try:
            worker = Worker(system, spec, logs / f'{name}.log', plan.limit)
            check_or_close(worker, model)
            warm = worker.steps(plan.warmup)
        except WorkerError as error:
            results[name] = {'error': str(error)}
            continue
        workers.append(worker)
        results[name] = {
            'facts': worker.facts,
            'warm': warm['seconds'],
            'rounds': [],
        }
    results['machine'] = {'rounds': []}
    for _ in range(plan.rounds):
        results['machine']['rounds'].append(probe.steps(PROBES_A_ROUND))
        for worker in list(workers):
            try:
                results[worker.name]['rounds'].append(worker.steps(plan.steps))
            except WorkerError as error:
                results[worker.name] = {'error': str(error)}
                workers.remove(worker)
    for worker in workers:
        worker.close()
    return results


def check_or_close(worker: Worker, model: Model) -> None:
    """``check_parameters`` of a worker, which does not outlive a refusal."""
    try:
        check_parameters(worker.name, model, worker.facts['parameters'])
    except WorkerError:
        worker.close()
        raise
