"""How long a run takes to its first step, cold and warm.

    python -m benchmarks.start

Starts the command, waits for the first row of metrics, which is written while the next
step runs, and ends it; in a work directory of its own each time. The cold start finds
nothing compiled or tokenised, the warm one what the cold one has left. Beside them
stands what the imports of the packages below take alone. They take turns; in each
everything is new but the files that the operating system holds in memory.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
IMPORTS = 'import jax, flax, optax, orbax.checkpoint, transformers, grain'


def imports() -> float:
    """Seconds of a Python that imports the packages and ends."""
    begun = time.monotonic()
    subprocess.run([sys.executable, '-c', IMPORTS], check=True)
    return time.monotonic() - begun


def first_step(config: str, stage: str, folder: pathlib.Path) -> float:
    """Seconds from the command to the first row of ``stage``.

    What is compiled and tokenised is kept in ``folder``.

    Raises:
        RuntimeError: the command ended before, with what it wrote.
    """
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, '-m', 'rlhf_jax.main', '--config', config]
        command += ['--workdir', workdir, f"--config.stages=('{stage}',)"]
        env = os.environ | {'XDG_CACHE_HOME': str(folder)}
        env.pop('JAX_COMPILATION_CACHE_DIR', None)
        rows = pathlib.Path(workdir, stage, 'metrics.jsonl')
        log = pathlib.Path(workdir, 'log')
        begun = time.monotonic()
        with log.open('w') as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT
            )
        try:
            while not (rows.exists() and rows.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f'{" ".join(command)}:\n{log.read_text()}')
                time.sleep(0.01)
            return time.monotonic() - begun
        finally:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', default='configs/quickstart.py')
    parser.add_argument('--stage', default='sft', help='the only one that is run')
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    seconds = {'imports': [], 'cold': [], 'warm': []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            cache = pathlib.Path(folder)
            seconds['imports'].append(imports())
            seconds['cold'].append(first_step(args.config, args.stage, cache))
            if not any(cache.glob('rlhf_jax/xla/*-cache')):
                raise SystemExit('nothing was kept: there is no warm start to measure')
            seconds['warm'].append(first_step(args.config, args.stage, cache))
    base = statistics.median(seconds['imports'])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f'{name}: {median:.1f} s, {median / base:.2f} × the imports alone')


if __name__ == '__main__':
    main()
