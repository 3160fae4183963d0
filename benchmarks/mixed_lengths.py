"""Continuous batching against plain batches, where responses end at different times.

    python -m benchmarks.mixed_lengths

Every token ends its response with the same chance, so lengths are geometric up to the
limit. Three ways give the same samples: all rows at once, a few rows at a time in plain
batches, and continuous batching with as few rows (``decode_rows``). They take turns,
and times are printed as ratios to the plain batches, beside the tokens that were
decoded.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import rlhf_jax as rj
from benchmarks.ours import config_of
from benchmarks.sizes import MODELS


def ways(model: rj.CausalLM, rows: int, limit: int) -> dict:
    """name → compiled function of (params, prompts, mask, row ids, key, how)."""
    plain = functools.partial(rj.generate, model=model, max_new_tokens=limit)
    continuous = functools.partial(
        rj.generate_continuously, model=model, max_new_tokens=limit, num_rows=rows
    )

    def in_batches(params, tokens, mask, ids, key, how):
        cut = (x.reshape(-1, rows, *x.shape[1:]) for x in (tokens, mask, ids))
        done = jax.lax.map(lambda part: plain(params, *part, key, how), tuple(cut))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)

    return {
        f'batches of {rows}': jax.jit(in_batches),
        f'continuous, {rows} rows': jax.jit(continuous),
        'all rows at once': jax.jit(plain),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--size', choices=MODELS, default='small')
    parser.add_argument('--prompts', type=int, default=128)
    parser.add_argument('--rows', type=int, default=16)
    parser.add_argument('--prompt', type=int, default=64, help='tokens')
    parser.add_argument('--limit', type=int, default=128, help='tokens')
    parser.add_argument('--mean', type=int, default=32, help='tokens, before the limit')
    parser.add_argument('--rounds', type=int, default=7)
    args = parser.parse_args()
    if args.prompts % args.rows:
        parser.error(f'--prompts={args.prompts} is no multiple of --rows={args.rows}')
    shape = MODELS[args.size]
    if not 1 <= args.mean <= shape.vocab:
        parser.error(f'--mean={args.mean} is not within 1 and {shape.vocab} tokens')
    model = rj.CausalLM(config_of(shape, args.prompt + args.limit))
    random = np.random.default_rng(0)
    tokens = random.integers(3, shape.vocab, (args.prompts, args.prompt), np.int32)
    mask = np.ones_like(tokens, bool)
    key = jax.random.PRNGKey(0)
    params = model.init(key, tokens[:1], mask[:1])['params']
    # Random weights of the usual size make all tokens about equally likely.
    ends = random.choice(shape.vocab, shape.vocab // args.mean, replace=False)
    how = rj.sampling(eos_ids=ends.tolist())
    inputs = (params, tokens, mask, jnp.arange(args.prompts), key, how)
    functions = ways(model, args.rows, args.limit)
    results = {name: way(*inputs) for name, way in functions.items()}
    for name, result in results.items():
        if not (result.tokens == results['all rows at once'].tokens).all():
            raise SystemExit(f'{name} wrote other samples')
    lengths = np.asarray(result.response_mask.sum(axis=1))
    print(
        f'{args.prompts} responses: mean {lengths.mean():.1f} tokens, median '
        f'{np.median(lengths):.0f}, longest {lengths.max()}'
    )
    in_batches = lengths.reshape(-1, args.rows).max(axis=1)
    print(f'a plain batch decodes {in_batches.mean():.1f} tokens on average')
    seconds = {name: np.zeros(args.rounds) for name in functions}
    for i in range(args.rounds):
        for name, way in functions.items():
            begun = time.perf_counter()
            jax.block_until_ready(way(*inputs))
            seconds[name][i] = time.perf_counter() - begun
    for name, times in seconds.items():
        ratios = seconds[f'batches of {args.rows}'] / times
        print(
            f'{name}: {np.median(ratios):.2f} × as fast as the batches '
            f'({ratios.min():.2f}–{ratios.max():.2f})'
        )


if __name__ == '__main__':
    main()
