"""Memory and seconds from a file of records to the first batch, by number of records.

    python -m benchmarks.data_memory --out benchmarks/results/data_memory.json
    python -m benchmarks.data_memory --baseline DIR  # another checkout in the same run

Writes synthetic records of about 0.67 kB a line with a fixed seed, and a BPE tokenizer
of 8,192 tokens that is trained on them. Every measurement is a process of its own: it
imports, loads the tokenizer, and then reads, tokenises and makes the first batch. Peak
memory is what the process held at its highest (VmHWM) above what it held before that.
The token cache is empty ('cold'), or filled by the run before ('warm'). With a baseline
the two checkouts take turns, at up to 200,000 records; the first batches must be equal.
Seconds are of the clock and of all threads together ('cpu_seconds'): with other work on
the machine the latter say more.
"""

import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

ROWS = {
    'comparisons': (50_000, 100_000, 200_000),
    'demonstrations': (250_000, 500_000, 1_000_000),
}
CHARACTERS = {'prompt': 250, 'completion': 380, 'chosen': 180, 'rejected': 180}
FIELDS = {
    'comparisons': ('prompt', 'chosen', 'rejected'),
    'demonstrations': ('prompt', 'completion'),
}
VOCABULARY, MAX_LENGTH, BATCH = 8192, 1024, 64
BASELINE_ROWS = 200_000  # of more the baseline may take more memory than there is
FULL = 10_000_000  # rows that the peak is extrapolated to


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of made-up words, whose frequencies fall as those of a language do."""
    draw = random.Random(seed)
    parts = [c + v for c in 'bdfgklmnprstvz' for v in 'aeiou']
    words = [''.join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    chosen = draw.choices(words, weights, k=12 * count)
    rows = (chosen[12 * i : 12 * (i + 1)] for i in range(count))
    return [' '.join(row).capitalize() + '.' for row in rows]


def write(path: pathlib.Path, kind: str, rows: int) -> int:
    """Writes records; returns the bytes of the file."""
    draw, pool = random.Random(1), sentences(50_000)

    def text(size: int) -> str:
        found = ''
        while len(found) < size:
            found += ' ' + pool[int(draw.random() * len(pool))]
        return found[:size]

    with path.open('w', encoding='utf-8') as file:
        for i in range(rows):
            record = {name: text(CHARACTERS[name]) for name in FIELDS[kind]}
            file.write(json.dumps({**record, 'number': i}) + '\n')
    return path.stat().st_size


def train_tokenizer(folder: pathlib.Path) -> None:
    """A byte-level BPE tokenizer."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=['<|eos|>'],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(sentences(20_000), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token='<|eos|>')
    tokenizer.save_pretrained(folder)


def status(name: str) -> int:
    """Bytes, by a line of ``/proc/self/status``."""
    text = pathlib.Path('/proc/self/status').read_text()
    return int(text.split(f'{name}:')[1].split()[0]) * 1024


def load(kind: str, path: str, tokenizer_dir: str) -> None:
    """In the child: reads, tokenises, makes a batch, and prints what it took."""
    import rlhf_jax
    from rlhf_jax.data import pipeline
    from rlhf_jax.data.tokenizer import load_tokenizer
    from rlhf_jax.ops.cpu import rarely_collect_garbage

    rarely_collect_garbage()  # as rlhf_jax.main does
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer('a first text')  # what it allocates once belongs to the import
    loader = getattr(pipeline, f'load_{kind}')
    before, start, cpu = status('VmRSS'), time.monotonic(), time.process_time()
    data = loader(f'jsonl:{path}', tokenizer, max_length=MAX_LENGTH)
    buckets = (256, 512, MAX_LENGTH)
    batch = next(iter(pipeline.batches(data, BATCH, seed=0, buckets=buckets)))
    result = {
        'seconds': time.monotonic() - start,
        'cpu_seconds': time.process_time() - cpu,
        'peak': status('VmHWM') - before,
        'left': status('VmRSS') - before,
        'kept': data.counts.kept,
        'batch': int(batch.tokens.sum()),
        'code': str(pathlib.Path(rlhf_jax.__file__ or '').parent.parent),
    }
    print(json.dumps(result))


def measure(code: pathlib.Path, cache: pathlib.Path, *what: str) -> dict:
    """A measurement of the checkout ``code`` in a process of its own."""
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), '--child', *what]
    environment = {
        **os.environ,
        'PYTHONPATH': str(code),
        'XDG_CACHE_HOME': str(cache),
        'JAX_PLATFORMS': 'cpu',
    }
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    result = json.loads(done.stdout.splitlines()[-1])
    if pathlib.Path(result['code']) != code:
        raise SystemExit(f'{result["code"]} was measured in the place of {code}')
    return result


def measure_size(
    folder: pathlib.Path,
    kind: str,
    rows: int,
    baseline: pathlib.Path | None,
    rounds: int,
) -> dict:
    """Every measurement of a kind at a size: medians of the rounds."""
    path = folder / f'{kind}.jsonl'
    size = write(path, kind, rows)
    here = pathlib.Path(__file__).resolve().parent.parent
    what = (kind, str(path), str(folder / 'tokenizer'))
    baseline = baseline if rows <= BASELINE_ROWS else None
    found: dict[str, list[dict]] = {}
    for turn in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            for name in ('cold', 'warm'):
                one = measure(here, pathlib.Path(cache), *what)
                found.setdefault(name, []).append(one)
        if baseline is not None:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                one = measure(baseline, pathlib.Path(cache), *what)
                found.setdefault('baseline', []).append(one)
        print(f'{kind} {rows:,}, round {turn + 1} of {rounds}', flush=True)
    path.unlink()
    if len({one['batch'] for results in found.values() for one in results}) > 1:
        raise SystemExit(f'{kind}: the first batches differ')
    row = {'kind': kind, 'rows': rows, 'line': size / rows}
    for name, results in found.items():
        row[name] = {
            key: statistics.median(one[key] for one in results)
            for key in ('seconds', 'cpu_seconds', 'peak', 'left')
        }
        row[name]['peak_per_line'] = row[name]['peak'] / size
    if baseline is not None:
        row['times_as_fast'] = {
            f'{name} {key}': statistics.median(
                theirs[key] / ours[key]
                for theirs, ours in zip(found['baseline'], found[name])
            )
            for name in ('cold', 'warm')
            for key in ('seconds', 'cpu_seconds')
        }
    return row


def extrapolated(rows: list[dict]) -> float:
    """Bytes at ``FULL`` rows, on the line through the smallest and the largest size."""
    first, last = rows[0], rows[-1]
    slope = (last['cold']['peak'] - first['cold']['peak']) / (
        last['rows'] - first['rows']
    )
    return last['cold']['peak'] + slope * (FULL - last['rows'])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kinds', default=','.join(ROWS))
    parser.add_argument('--rows', help='numbers of rows with commas, for all kinds')
    parser.add_argument('--baseline', help='another checkout of this project')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--out', help='the results as JSON')
    parser.add_argument('--child', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        load(*args.child)
        return
    baseline = pathlib.Path(args.baseline).resolve() if args.baseline else None
    results: dict = {'rounds': args.rounds, 'sizes': [], 'extrapolated': {}}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        train_tokenizer(folder / 'tokenizer')
        for kind in args.kinds.split(','):
            sizes = [int(n) for n in args.rows.split(',')] if args.rows else ROWS[kind]
            rows = [measure_size(folder, kind, n, baseline, args.rounds) for n in sizes]
            results['sizes'] += rows
            if len(rows) > 1:
                results['extrapolated'][kind] = extrapolated(rows)
            for row in rows:
                print(json.dumps(row))
    print(json.dumps(results['extrapolated']))
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
