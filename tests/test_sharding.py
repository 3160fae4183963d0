"""One program, many layouts: every step gives the same numbers on each."""

import ctypes
import dataclasses
import functools
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlhf_jax.algos.ensemble import ensemble_rm_step, stack_batches, stack_members
from rlhf_jax.algos.estimators import dapo
from rlhf_jax.algos.policy_gradient import PolicyHParams, policy_step, prepare_policy
from rlhf_jax.algos.ppo import ActorCritic, PPOHParams, ppo_step, prepare
from rlhf_jax.algos.rm import RMHParams, rm_step
from rlhf_jax.algos.rollout import policy_logprobs, response_logprobs
from rlhf_jax.algos.sft import SFTHParams, sft_step
from rlhf_jax.ops import cpu, logprobs
from rlhf_jax.optim import OptimConfig, actor_critic_optimizer, make_optimizer
from rlhf_jax.sharding import (
    ParallelConfig,
    compile_step,
    make_mesh,
    place,
    spec_of,
)
from rlhf_jax.types import PPOState, Scores, TrainState

UPDATES = 3
OPTIM = OptimConfig(
    learning_rate=1e-2, eps=1e-4, schedule='constant', weight_decay=0.01
)
LAYOUTS = {
    'data8': (dict(data=8), 1),
    '2x2x2': (dict(data=2, fsdp=2, tensor=2), 1),
    'pmap8': (dict(backend='pmap'), 1),
    'microbatches4': (dict(data=1), 4),
}


def _mesh(layout):
    parallel, parts = LAYOUTS[layout] if layout else (dict(data=1), 1)
    parallel = ParallelConfig(**parallel)
    devices = jax.devices()[:1] if parallel.data == 1 else jax.devices()
    return make_mesh(parallel, devices), parallel.backend, parts


def _split(layout):
    """Devices over which the rows of a batch are split."""
    parallel = ParallelConfig(**LAYOUTS[layout][0])
    if parallel.data == 1:
        return 1
    return jax.device_count() // parallel.tensor


def _train(step, state, batches, mesh, backend, inputs=('params', 'batch')):
    state = place(jax.tree.map(jnp.array, state), mesh, 'params')
    compiled = compile_step(step, mesh=mesh, backend=backend, inputs=inputs)
    for batch in batches:
        state, metrics = compiled(state, *batch)
    return state, {name: float(metric.value()) for name, metric in metrics.items()}


def _assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one[0].params), jax.tree.leaves(other[0].params)):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        np.testing.assert_allclose(
            one[1][name], other[1][name], atol=1e-4, err_msg=name
        )


def _state(params, tx):
    return TrainState(
        step=jnp.int32(0),
        rng=jax.random.PRNGKey(7),
        params=params,
        opt_state=tx.init(params),
    )


@pytest.mark.parametrize('by_blocks', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_sft_step_agrees_with_one_device(
    layout, by_blocks, unrolled, policy_params, token_batch, monkeypatch
):
    """The logits whole, or on the layout in blocks of two tokens of a row."""
    tx = make_optimizer(OPTIM, UPDATES)
    # Rows are turned, and the last layer is cut out for half of them.
    batch = token_batch.replace(response_length=6)

    def run(layout):
        mesh, backend, parts = _mesh(layout)
        step = functools.partial(
            sft_step, model=unrolled, tx=tx, hp=SFTHParams(num_microbatches=parts)
        )
        return _train(
            step, _state(policy_params, tx), [(batch,)] * UPDATES, mesh, backend
        )

    one = run(None)
    if by_blocks:
        monkeypatch.setattr(cpu, 'MAX_SUM_LOGITS', 1)
        rows = token_batch.tokens.shape[0] // (LAYOUTS[layout][1] * _split(layout))
        monkeypatch.setattr(logprobs, 'MIN_SUM_TOKENS', 2 * rows)
    _assert_same(one, run(layout))
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), one[0].params, policy_params
    )
    assert max(jax.tree.leaves(moved)) > 1e-2  # three updates did train


@pytest.mark.parametrize('layout', LAYOUTS)
def test_rm_step_agrees_with_one_device(
    layout, reward_model, reward_params, pair_batch
):
    tx = make_optimizer(OPTIM, UPDATES)

    def run(layout):
        mesh, backend, parts = _mesh(layout)
        hp = RMHParams(num_microbatches=parts, center_coef=0.01)
        step = functools.partial(rm_step, model=reward_model, tx=tx, hp=hp)
        state = _state(reward_params, tx)
        return _train(step, state, [(pair_batch,)] * UPDATES, mesh, backend)

    _assert_same(run(None), run(layout))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_members_of_an_ensemble_agree_with_single_runs(
    layout, reward_model, pair_batch
):
    """Each with parameters and an order of its own; the first one's texts are shorter,
    so that they are padded. The metrics are the mean over the members.
    """
    tx = make_optimizer(OPTIM, UPDATES)
    parts = LAYOUTS[layout][1]
    hp = RMHParams(num_microbatches=parts, center_coef=0.01)
    keys = jax.random.split(jax.random.PRNGKey(3), 3)
    tokens = jnp.zeros((1, 2), jnp.int32)
    starts = [
        jax.jit(reward_model.init)(k, tokens, tokens == 0)['params'] for k in keys
    ]

    def drawn(member, update):
        order = np.random.default_rng((member, update)).permutation(16)
        batch = jax.tree.map(lambda x: x[order], pair_batch)
        keep = 10 if member else 8
        return batch.replace(
            tokens=batch.tokens[..., :keep], mask=batch.mask[..., :keep]
        )

    batches = [[drawn(m, t) for m in range(3)] for t in range(UPDATES)]
    step = functools.partial(rm_step, model=reward_model, tx=tx, hp=hp)
    mesh, backend, _ = _mesh(None)
    singles = [
        _train(step, _state(params, tx), [(b[m],) for b in batches], mesh, backend)
        for m, params in enumerate(starts)
    ]
    stacked = stack_members(starts)
    state = _state(stacked, tx).replace(opt_state=jax.vmap(tx.init)(stacked))
    mesh, backend, _ = _mesh(layout)
    step = functools.partial(ensemble_rm_step, model=reward_model, tx=tx, hp=hp)
    together = [(stack_batches(b),) for b in batches]
    state, metrics = _train(step, state, together, mesh, backend)
    assert state.step.shape == () and int(state.step) == UPDATES
    for m, (single, _) in enumerate(singles):
        for a, b in zip(jax.tree.leaves(single.params), jax.tree.leaves(state.params)):
            np.testing.assert_allclose(a, b[m], atol=1e-5, rtol=0)
    for name, value in metrics.items():
        of_each = [single[name] for _, single in singles]
        np.testing.assert_allclose(value, np.mean(of_each), atol=1e-4, err_msg=name)


def test_a_stack_of_parameters_keeps_its_rules():
    mesh = make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2))
    path = 'opt_state/0/mu/backbone/layers/attention/query_kernel'
    one = P(None, 'fsdp', 'tensor', None)
    assert spec_of(path, (2, 32, 4, 8), mesh) == one
    assert spec_of(path, (6, 2, 32, 4, 8), mesh) == P(None, *one)
    assert spec_of(path, (6, 2, 32, 3, 8), mesh) == P(None, None, 'fsdp', None, None)
    assert not any(spec_of('head/kernel', (6, 32), mesh))  # whole, as a single one


@pytest.mark.parametrize('layout', LAYOUTS)
def test_ppo_step_agrees_with_one_device(
    layout, policy, policy_params, reward_model, reward_params, generation, token_batch
):
    """Three rollouts of two epochs of two minibatches, with everything optional
    switched on.
    """
    model = ActorCritic(policy, reward_model)
    tx = actor_critic_optimizer(OPTIM, OPTIM, UPDATES)
    scores = jnp.asarray(np.random.default_rng(3).normal(size=16), jnp.float32)

    def run(layout):
        mesh, backend, parts = _mesh(layout)
        hp = PPOHParams(
            num_epochs=2,
            num_minibatches=2,
            num_microbatches=parts,
            kl_target=1.0,
            kl_horizon=100.0,
            whiten_rewards=True,
            entropy_coef=0.01,
            ptx_coef=0.5,
        )
        state = place(_ppo_state(policy_params, reward_params, tx), mesh, 'params')
        ready = compile_step(
            functools.partial(prepare, model=model, hp=hp),
            mesh=mesh,
            backend=backend,
            inputs=('params', 'params', 'batch', 'batch'),
            outputs=('batch', 'replicated'),
            donate=(),
        )
        step = compile_step(
            functools.partial(ppo_step, model=model, tx=tx, hp=hp),
            mesh=mesh,
            backend=backend,
            inputs=('params', 'batch', 'batch'),
        )
        ref = place(policy_params, mesh, 'params')
        for _ in range(UPDATES):
            rollout, before = ready(state, ref, generation, Scores(scores))
            state, metrics = step(state, rollout, token_batch)
        metrics = {**before, **metrics}
        return state, {name: float(metric.value()) for name, metric in metrics.items()}

    one, other = run(None), run(layout)
    _assert_same(one, other)
    assert float(one[0].kl_coef) == pytest.approx(float(other[0].kl_coef), rel=1e-6)
    assert float(one[0].kl_coef) != pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_policy_step_agrees_with_one_device(layout, policy, policy_params, generation):
    """Pairs of responses, one of them without a difference; everything optional on."""
    tx = make_optimizer(OPTIM, UPDATES)
    scores = jnp.asarray(np.random.default_rng(3).normal(size=16), jnp.float32)
    scores = scores.at[4].set(scores[5])
    logprobs, _ = response_logprobs(
        policy_params, generation, model=policy, temperature=1.0
    )
    generation = generation.replace(logprobs=logprobs)  # what it samples with

    def run(layout):
        mesh, backend, parts = _mesh(layout)
        hp = PolicyHParams(
            group_size=2,
            ratio_level='sequence',
            num_epochs=2,
            num_minibatches=2,
            num_microbatches=parts,
            kl_loss_coef=0.1,
            entropy_coef=0.01,
        )
        state = _state({'policy': policy_params}, tx)
        state = place(jax.tree.map(jnp.array, state), mesh, 'params')
        how = {'estimator': dapo, 'estimator_hp': dapo.HParams()}
        ready = compile_step(
            functools.partial(prepare_policy, model=policy, hp=hp, **how),
            mesh=mesh,
            backend=backend,
            inputs=('params', 'params', 'batch', 'batch'),
            outputs=('batch', 'replicated'),
            donate=(),
        )
        step = compile_step(
            functools.partial(policy_step, model=policy, tx=tx, hp=hp),
            mesh=mesh,
            backend=backend,
            inputs=('params', 'batch'),
        )
        ref = place(policy_params, mesh, 'params')
        rollout, before = ready(state, ref, generation, Scores(scores))
        for _ in range(UPDATES):
            state, metrics = step(state, rollout)
        metrics = {**before, **metrics}
        return state, {name: float(metric.value()) for name, metric in metrics.items()}

    one = run(None)
    _assert_same(one, run(layout))
    assert one[1]['rollout/equal_groups'] == 1 / 8
    assert one[1]['rollout/kept'] == 7 / 8


def _ppo_state(policy_params, critic_params, tx):
    params = {'policy': policy_params, 'critic': critic_params}
    params = jax.tree.map(jnp.array, params)
    return PPOState(
        step=jnp.int32(0),
        rng=jax.random.PRNGKey(7),
        params=params,
        opt_state=tx.init(params),
        kl_coef=jnp.float32(0.05),
    )


@pytest.mark.parametrize('backend', ['jit', 'pmap'])
def test_freed_memory_is_given_back_behind_every_compilation(backend, monkeypatch):
    given_back = []
    monkeypatch.setattr(cpu, 'give_back_freed_memory', lambda: given_back.append(True))
    mesh = make_mesh(ParallelConfig(backend=backend))
    step = compile_step(
        lambda x: x + 1,
        mesh=mesh,
        backend=backend,
        inputs=('batch',),
        outputs=('batch',),
        donate=(),
    )
    for rows, compiled in ((8, 1), (8, 1), (16, 2), (8, 2)):
        np.testing.assert_array_equal(step(np.zeros(rows)), np.ones(rows))
        assert len(given_back) == compiled


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='glibc keeps memory')
def test_what_is_freed_below_something_in_use_is_given_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

    def resident():
        fields = Path('/proc/self/statm').read_text().split()
        return int(fields[1]) * 4 // 1024  # MiB

    # Blocks that are too small for a mapping of their own; the last stays in use.
    blocks = [libc.malloc(64 * 1024) for _ in range(3200)]
    for block in blocks:
        ctypes.memset(block, 1, 64 * 1024)
    for block in blocks[:-1]:
        libc.free(block)
    before = resident()
    cpu.give_back_freed_memory()
    assert before - resident() > 150  # of 200 MiB
    libc.free(blocks[-1])


def test_bfloat16_is_rounded_alike_in_every_program(policy, policy_params, token_batch):
    """Whole batches, parts of them, longer rows, with a gradient: the same numbers."""
    model = policy.clone(config=dataclasses.replace(policy.config, dtype='bfloat16'))

    def score(params, tokens, mask):
        how = {'model': model, 'temperature': 1.0}
        return policy_logprobs(params, tokens, mask, **how)[0]

    def with_gradient(params, tokens, mask):
        def loss(params):
            logprobs = score(params, tokens, mask)
            return jnp.sum(logprobs), logprobs

        return jax.grad(loss, has_aux=True)(params)[::-1]

    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    inputs = 'params', 'batch', 'batch'
    run = compile_step(score, mesh=mesh, inputs=inputs, outputs=('batch',), donate=())
    train = compile_step(
        with_gradient, mesh=mesh, inputs=inputs, outputs=('batch', 'params'), donate=()
    )
    tokens, mask = token_batch.tokens, token_batch.mask
    wide = [np.pad(x, ((0, 0), (0, 20))) for x in (tokens, mask)]
    real = np.asarray(mask)
    expected = np.asarray(run(policy_params, tokens, mask))
    others = {
        'few rows': [run(policy_params, tokens[i : i + 2], mask[i : i + 2])
                     for i in range(0, 16, 2)],
        'longer rows': [run(policy_params, *wide)[:, :12]],
        'a gradient': [train(policy_params, tokens, mask)[0]],
    }  # fmt: skip
    for name, parts in others.items():
        apart = np.abs(np.concatenate(parts) - expected)[real]
        # A sum in another order may fall to the other side of a rounding.
        assert np.mean(apart > 1e-5) < 0.05 and apart.max() < 0.05, name


def test_a_step_is_lowered_from_shapes(policy, policy_params, token_batch):
    """No array is made; what is compiled is what runs."""
    mesh = make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2))
    tx = make_optimizer(OPTIM, UPDATES)
    state = TrainState(
        step=jnp.int32(0),
        rng=jax.random.PRNGKey(0),
        params=policy_params,
        opt_state=tx.init(policy_params),
    )
    step = functools.partial(sft_step, model=policy, tx=tx, hp=SFTHParams())
    compiled = compile_step(step, mesh=mesh, donate=())
    shapes = jax.eval_shape(lambda *args: args, state, token_batch)
    ahead = compiled.lower(*shapes).compile()
    got = ahead(place(state, mesh, 'params'), place(token_batch, mesh, 'batch'))
    expected = compiled(place(state, mesh, 'params'), token_batch)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    kernel = policy_params['backbone']['layers']['mlp']['up_kernel']
    memory = ahead.memory_analysis()
    whole = sum(x.nbytes for x in jax.tree.leaves((state, token_batch)))
    assert kernel.nbytes < memory.argument_size_in_bytes < whole / 2
