"""What the machine itself can do, behind the gate: a matrix product and a copy.

A step is one product of square matrices (phase 'product', 2·n³ FLOPs) and one pass over
an array that is read and written (phase 'copy'). It runs between the systems, in their
turn, so that its figures are of the same minutes as theirs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.peers.gate import Gate, serve
from benchmarks.sizes import Probe


def begin_work(gate: Gate) -> None:
    """Runs the probe of the specification."""
    probe = Probe(**gate.spec['probe'])
    dtype = jnp.dtype(probe.dtype)
    matrix = jax.random.normal(jax.random.PRNGKey(0), (probe.side,) * 2, dtype)
    array = jnp.zeros(probe.copied // 4, jnp.float32)
    product = jax.jit(lambda x: x @ x)
    copy = jax.jit(lambda x: x + 1)
    device = jax.devices()[0].device_kind
    gate.ready(versions={'jax': jax.__version__}, parameters={}, device=device)
    while True:
        gate.begin()
        jax.block_until_ready(product(matrix))
        gate.mark('product')
        jax.block_until_ready(copy(array))
        gate.mark('copy')
        gate.end()


if __name__ == '__main__':
    serve(begin_work)
