"""How long an SFT step compiles, over the depth of the model.

    python -m benchmarks.compilation

Traces, lowers and compiles the step from the shapes of its arguments; nothing is run
and nothing is read from what an earlier run has kept. The depths take turns. Up to
``ours.UNROLLED`` layers are unrolled, more are one scanned loop.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import rlhf_jax as rj
from benchmarks.ours import FOREVER, OPTIM, config_of
from benchmarks.sizes import MODELS, Model
from rlhf_jax.optim import make_optimizer

ROWS, LENGTH = 8, 128


def compile_seconds(model: Model) -> float:
    """Seconds from a new function to its program."""
    config = config_of(model, LENGTH)
    policy, tx = rj.CausalLM(config), make_optimizer(OPTIM, FOREVER)
    one = jnp.zeros((1, 2), jnp.int32)

    def init(key: jax.Array) -> rj.TrainState:
        params = policy.init(key, one, one == 0)['params']
        opt_state = tx.init(params)
        return rj.TrainState(
            step=jnp.int32(0), rng=key, params=params, opt_state=opt_state
        )

    state = jax.eval_shape(init, jax.random.PRNGKey(0))
    tokens = np.zeros((ROWS, LENGTH), np.int32)
    batch = rj.TokenBatch(tokens=tokens, mask=tokens == 0, loss_mask=tokens == 0)
    step = functools.partial(rj.sft_step, model=policy, tx=tx, hp=rj.SFTHParams())
    jax.clear_caches()
    begun = time.monotonic()
    jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return time.monotonic() - begun


def compare(model: Model, depths: Sequence[int], rounds: int) -> dict[int, list[float]]:
    """Depth → seconds in every round, after one that is not counted."""
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    for number in range(rounds + 1):
        for depth in depths:
            took = compile_seconds(dataclasses.replace(model, layers=depth))
            if number:
                seconds[depth].append(took)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--size', choices=list(MODELS), default='small')
    parser.add_argument('--depths', default='4,8,16,28', help='layers, by commas')
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    jax.config.update('jax_enable_compilation_cache', False)
    depths = [int(depth) for depth in args.depths.split(',')]
    seconds = compare(MODELS[args.size], depths, args.rounds)
    base = seconds[depths[0]]
    for depth, times in seconds.items():
        ratios = [one / first for one, first in zip(times, base)]
        median = statistics.median(times) / statistics.median(base)
        print(
            f'{depth} layers: {median:.2f} × that of {depths[0]} '
            f'({min(ratios):.2f} to {max(ratios):.2f} in a round)'
        )


if __name__ == '__main__':
    main()
