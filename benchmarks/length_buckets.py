"""Microbatches cut behind their longest response, where lengths differ.

    python -m benchmarks.length_buckets

One update of a policy over a rollout whose lengths are geometric up to a limit, in
microbatches of whole rows and in ones sorted by length (``num_length_buckets``). They
take turns, and times are printed as ratios to the update over whole rows.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rlhf_jax as rj
from benchmarks.ours import config_of
from benchmarks.sizes import MODELS
from rlhf_jax.algos.policy_gradient import PolicyHParams, policy_step


def rollout(random: np.random.Generator, args: argparse.Namespace) -> rj.Rollout:
    """Random responses with random advantages."""
    rows, longest = args.rows, args.limit
    lengths = np.minimum(random.geometric(1 / args.mean, rows), longest)
    response = np.zeros((rows, args.prompt + longest), bool)
    response[:, args.prompt :] = np.arange(longest) < lengths[:, None]
    mask = response.copy()
    mask[:, : args.prompt] = True
    vocab = MODELS[args.size].vocab
    logprobs = np.where(response, -np.log(vocab), 0).astype(np.float32)
    return rj.Rollout(
        tokens=random.integers(3, vocab, mask.shape).astype(np.int32),
        mask=mask,
        response_mask=response,
        old_logprobs=logprobs,
        ref_logprobs=logprobs,
        advantages=random.normal(size=mask.shape).astype(np.float32) * response,
        response_length=longest,
    )


def update(model: rj.CausalLM, parts: int, buckets: int) -> object:
    """Compiled function of (params, rollout) → new parameters."""
    tx = optax.sgd(1e-2)
    hp = PolicyHParams(
        aggregation='sequence_mean', num_microbatches=parts, num_length_buckets=buckets
    )
    step = functools.partial(policy_step, model=model, tx=tx, hp=hp)

    def updated(params, batch):
        state = rj.TrainState(
            step=jnp.int32(0),
            rng=jax.random.PRNGKey(0),
            params={'policy': params},
            opt_state=tx.init({'policy': params}),
        )
        return step(state, batch)[0].params

    return jax.jit(updated)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--size', choices=MODELS, default='small')
    parser.add_argument('--rows', type=int, default=128)
    parser.add_argument('--microbatches', type=int, default=8)
    parser.add_argument('--prompt', type=int, default=64, help='tokens')
    parser.add_argument('--limit', type=int, default=128, help='tokens')
    parser.add_argument('--mean', type=int, default=32, help='tokens, before the limit')
    parser.add_argument('--rounds', type=int, default=7)
    args = parser.parse_args()
    model = rj.CausalLM(config_of(MODELS[args.size], args.prompt + args.limit))
    batch = rollout(np.random.default_rng(0), args)
    one = jnp.zeros((1, 2), jnp.int32)
    params = model.init(jax.random.PRNGKey(0), one, one == 0)['params']
    updates = {n: update(model, args.microbatches, n) for n in (1, 2, 4)}
    compiling, results = {}, {}
    for buckets, run in updates.items():
        begun = time.perf_counter()
        results[buckets] = jax.block_until_ready(run(params, batch))
        compiling[buckets] = time.perf_counter() - begun
        for got, want in zip(*map(jax.tree.leaves, (results[buckets], results[1]))):
            if not np.allclose(got, want, atol=1e-5):
                raise SystemExit(f'{buckets} buckets gave another update')
    lengths = batch.response_mask.sum(axis=1)
    print(
        f'{args.rows} responses: mean {lengths.mean():.1f} tokens, median '
        f'{np.median(lengths):.0f}, longest {lengths.max()}'
    )
    seconds = {n: np.zeros(args.rounds) for n in updates}
    for i in range(args.rounds):
        for buckets, run in updates.items():
            begun = time.perf_counter()
            jax.block_until_ready(run(params, batch))
            seconds[buckets][i] = time.perf_counter() - begun
    for buckets, times in seconds.items():
        ratios = seconds[1] / times
        print(
            f'length buckets {buckets}: {np.median(ratios):.2f} × as fast as whole '
            f'rows ({ratios.min():.2f}–{ratios.max():.2f}), first call '
            f'{compiling[buckets] / compiling[1]:.2f} × as long'
        )


if __name__ == '__main__':
    main()
