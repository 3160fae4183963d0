"""Two prompts with four responses each, from a table of bigram logits; not a test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.sharding import ParallelConfig, compile_step, make_mesh, place
from rlhf_jax.types import Generation, Scores, TrainState

V, ROWS, G, T = 6, 8, 4, 7
LENGTHS = (1, 5, 3, 2, 4, 5, 2, 3)  # tokens of the responses, behind prompts of 2


def table(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(V, V)), jnp.float32)


PARAMS = {'policy': {'table': table(0)}}
REF = {'table': PARAMS['policy']['table'] + table(2) / 4}


def logprobs(logits, tokens):
    """[B, T] log-probabilities of tokens under a table; position 0 holds 0."""
    logp = jax.nn.log_softmax(logits, -1)[tokens[:, :-1], tokens[:, 1:]]
    return jnp.pad(logp, ((0, 0), (1, 0)))


def generation(temperature=1.0):
    """The responses, with the policy's own numbers at a temperature."""
    tokens = jnp.asarray(np.random.default_rng(4).integers(0, V, (ROWS, T)), jnp.int32)
    lengths, place = jnp.asarray(LENGTHS)[:, None], jnp.arange(T) - 2
    response = (place >= 0) & (place < lengths)
    own = logprobs(PARAMS['policy']['table'] / temperature, tokens)
    return Generation(
        tokens=tokens,
        mask=response | (place < 0),
        response_mask=response,
        logprobs=jnp.where(response, own, 0),
        ended=lengths[:, 0] < 5,
    )


def state(tx, step=0, rng=None):
    """At the start of a stage, or at a later step of it."""
    params = jax.tree.map(jnp.array, PARAMS)
    return TrainState(
        step=jnp.int32(step),
        rng=jax.random.PRNGKey(5) if rng is None else rng,
        params=params,
        opt_state=tx.init(params),
    )


def moved(state):
    """[V, V] how far the table has gone."""
    return np.asarray(state.params['policy']['table'] - PARAMS['policy']['table'])


def numbers(metrics):
    """The values of metrics."""
    return {name: float(metric.value()) for name, metric in metrics.items()}


def on_one_and_on_eight(backend, prepare, step, scores, *models, tx):
    """One iteration on a device and on eight, with the rollout eight times over.

    Args:
        prepare, step: with all but their arrays and ``tx``.
        scores: [8·ROWS].
        models: further parameters that ``prepare`` takes.

    Returns:
        ``numbers`` of both steps, after the policies have been found to move alike.
    """
    whole = jax.tree.map(
        lambda x: jnp.tile(x, (8,) + (1,) * (x.ndim - 1)), generation()
    )
    scores = Scores(jnp.asarray(scores, jnp.float32))

    def run(mesh, backend):
        ready = compile_step(
            prepare,
            mesh=mesh,
            backend=backend,
            inputs=('params', 'params', 'batch', 'batch') + ('params',) * len(models),
            outputs=('batch', 'replicated'),
            donate=(),
        )
        update = functools.partial(step, tx=tx)
        update = compile_step(update, mesh=mesh, backend=backend)
        ref, *others = (place(x, mesh, 'params') for x in (REF, *models))
        batch, before = ready(None, ref, whole, scores, *others)
        after, metrics = update(place(state(tx), mesh, 'params'), batch)
        return moved(after), numbers({**before, **metrics})

    mesh = make_mesh(ParallelConfig(backend=backend))
    assert mesh.size == 8
    one = run(make_mesh(ParallelConfig(), jax.devices()[:1]), 'jit')
    many = run(mesh, backend)
    np.testing.assert_allclose(one[0], many[0], atol=1e-5)
    assert np.abs(one[0]).max() > 1e-2
    assert one[1] == pytest.approx(many[1], rel=1e-4, abs=1e-6)
    return one[1]


def uses_no_key_twice(step, batch, tx):
    """Fails where a step draws from a key that it has drawn from."""
    with jax.debug_key_reuse(True):
        jax.jit(functools.partial(step, tx=tx))(state(tx, rng=jax.random.key(5)), batch)
