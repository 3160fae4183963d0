"""Continuous batching gives the samples of the plain loop, in fewer steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.continuous_batching import generate_continuously
from rlhf_jax.generate import generate, sampling
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.ops.stop_table import stop_table

KEY = jax.random.PRNGKey(5)
ENDS = list(range(0, 64, 6))  # about one token in six ends a response


@pytest.fixture(scope='module')
def prompts():
    mask = np.arange(5) >= 5 - np.array([5, 2, 1, 4])[:, None]
    tokens = np.random.default_rng(1).integers(0, 64, (4, 5)).astype(np.int32)
    return tokens, mask, np.array([7, 3, 11, 0, 5, 6, 2, 1, 4, 8, 9, 10])


def same(a, b):
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize('num_rows', [1, 3, 5, 12, 20])
def test_samples_are_those_of_the_plain_loop(policy, policy_params, prompts, num_rows):
    table = stop_table([bytes([i]) for i in range(64)], [bytes([5, 7])])
    how = sampling(eos_ids=ENDS, stop_table=table, top_p=0.95)
    parts = {'model': policy, 'max_new_tokens': 9}
    expected = jax.jit(functools.partial(generate, **parts))(
        policy_params, *prompts, KEY, how
    )
    lengths = expected.response_mask.sum(-1)
    assert len(set(lengths.tolist())) > 4  # rows end at different times
    pooled = functools.partial(generate_continuously, **parts, num_rows=num_rows)
    same(jax.jit(pooled)(policy_params, *prompts, KEY, how), expected)


def test_windows_and_layers_apart(config, prompts):
    """What is far away is told by places: the ring turns the order of the slots."""
    config = dataclasses.replace(
        config, sliding_window=4, windowed=(True, False), scan_unroll=2
    )
    model = CausalLM(config)
    params = jax.jit(model.init)(jax.random.PRNGKey(0), *prompts[:2])['params']
    parts = {'model': model, 'max_new_tokens': 9}
    how = sampling(eos_ids=ENDS)
    expected = jax.jit(functools.partial(generate, **parts))(params, *prompts, KEY, how)
    pooled = functools.partial(generate_continuously, **parts, num_rows=2)
    same(jax.jit(pooled)(params, *prompts, KEY, how), expected)


def test_a_free_row_takes_the_next_prompt(counted):
    """Token t is followed by t + 1, and 7 ends: responses of 7, 1, 1, 1, 5, 1, 1 and 1
    tokens. Two rows: one writes 7, the other 1, 1, 1 and 5; then 1, 1 and 1 follow.
    """
    chain = {'table': 50.0 * jnp.roll(jnp.eye(8), 1, axis=1)}
    starts = jnp.array([[0], [6], [6], [6], [2], [6], [6], [6]])
    model, calls = counted
    run = jax.jit(
        functools.partial(
            generate_continuously, model=model, max_new_tokens=10, num_rows=2
        )
    )
    out = run(chain, starts, starts >= 0, jnp.arange(8), KEY, sampling(eos_ids=[7]))
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert out.response_mask.sum(-1).tolist() == [7, 1, 1, 1, 5, 1, 1, 1]
    assert out.ended.all()
    # Row 1 is free after 1 + 1 + 1 + 5 = 8 steps, row 0 after 7, then takes 1 more at
    # step 8; both are free then and one is left: 9. Batches of two take 7 + 1 + 5 + 1.
    assert len(calls) == 9


def test_settings_that_cannot_be(policy, policy_params, prompts):
    tokens, mask, _ = prompts
    for rows, ids in ((0, 4), (2, 6)):
        with pytest.raises(ValueError, match=f'{ids} row ids of 4 prompts by {rows}'):
            generate_continuously(
                policy_params,
                tokens,
                mask,
                jnp.arange(ids),
                KEY,
                sampling(eos_ids=[]),
                model=policy,
                max_new_tokens=2,
                num_rows=rows,
            )
