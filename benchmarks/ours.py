"""rlhf_jax behind the gate: the public functions, put together as a user would.

``examples/library.py`` is the same thing as a script. Every step is compiled by
``sharding.compile_step`` over a mesh of one device, its batch is on the host, and its
result is waited for. Read ``run.py`` next.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rlhf_jax as rj
from benchmarks.peers.gate import Gate, serve
from benchmarks.sizes import Model, Work
from rlhf_jax.algos import estimators
from rlhf_jax.optim import OptimConfig, actor_critic_optimizer, make_optimizer
from rlhf_jax.preference import dpo
from rlhf_jax.sharding import ParallelConfig, compile_step, init_sharded, make_mesh

OPTIM = OptimConfig(learning_rate=1e-5, schedule='constant', max_grad_norm=1.0)
# TRL's PPO does not clip gradients; see ``stages/ppo.py`` for what is usual here.
PPO_OPTIM = OptimConfig(learning_rate=1e-5, schedule='constant', max_grad_norm=None)
FOREVER = 10**6  # steps
UNROLLED = 4  # layers, at most

WRITE = {'inputs': ('params', 'batch', 'batch', 'batch') + ('replicated',) * 2}
SCORE = {'inputs': ('params', 'batch', 'batch')}
PREPARE = {
    'inputs': ('params', 'params', 'batch', 'batch'),
    'outputs': ('batch', 'replicated'),
}


class Bench:
    """A work with its models; random tokens, none of them padding."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.model = Model(**gate.spec['model'])
        self.work = Work(**gate.spec['work'])
        self.mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
        self.key = jax.random.PRNGKey(0)
        self.random = np.random.default_rng(0)
        self.config = config_of(self.model, self.work.tokens)

    def compile(self, step: Any, **kinds: Any) -> Any:
        """A step for the mesh."""
        return compile_step(step, mesh=self.mesh, **kinds)

    def compile_rollout(self, function: Any, kinds: Any) -> Any:
        """Something that leaves the state alone."""
        outputs = kinds.get('outputs', ('batch',))
        return self.compile(
            function, inputs=kinds['inputs'], outputs=outputs, donate=()
        )

    def params(self, module: Any, number: int) -> Any:
        """Random parameters, in place on the mesh."""
        one = jnp.zeros((1, 2), jnp.int32)

        def init(key: Any) -> Any:
            return module.init(key, one, jnp.ones((1, 2), bool))['params']

        return init_sharded(init, self.mesh, jax.random.fold_in(self.key, number))

    def state(
        self, params: Any, tx: Any, of: Any = rj.TrainState, **fields: Any
    ) -> Any:
        """Where training starts. ``params`` stay as they are."""

        def start(params: Any) -> Any:
            return of(
                step=jnp.int32(0),
                rng=self.key,
                params=params,
                opt_state=tx.init(params),
                **fields,
            )

        return init_sharded(start, self.mesh, params)

    def tokens(self, *shape: int) -> np.ndarray:
        """Random ids."""
        return self.random.integers(3, self.model.vocab, shape).astype(np.int32)

    def ready(self, **trees: Any) -> None:
        """Tells the parent what stands."""
        counts = {
            name: sum(x.size for x in jax.tree.leaves(tree))
            for name, tree in trees.items()
        }
        versions = {'rlhf_jax': 'this one', 'jax': jax.__version__}
        self.gate.ready(
            versions=versions,
            parameters=counts,
            device=jax.devices()[0].device_kind,
        )

    def repeat(self, step: Any, state: Any, batch: Any) -> None:
        """An update at every request, for ever."""
        while True:
            self.gate.begin()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            self.gate.end()

    def timed(self, phase: str, value: Any) -> Any:
        """Waits for a value, whose making was this phase."""
        jax.block_until_ready(value)
        self.gate.mark(phase)
        return value


def config_of(model: Model, tokens: int) -> rj.TransformerConfig:
    """The architecture, as rlhf_jax calls it."""
    return rj.TransformerConfig(
        vocab_size=model.vocab,
        num_layers=model.layers,
        width=model.width,
        num_heads=model.heads,
        num_kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        mlp_width=model.mlp,
        max_positions=max(1024, tokens),
        rope_theta=model.theta,
        tied_embeddings=model.tied,
        dtype=model.dtype,
        # A few layers are faster unrolled on a CPU, as in configs/ladder.py.
        scan_unroll=model.layers if model.layers <= UNROLLED else 1,
    )


# ------------------------------------------------------------------------------ offline


def sft(bench: Bench) -> None:
    """All tokens but the first are in the loss."""
    tokens = bench.tokens(bench.work.batch, bench.work.length)
    mask = np.ones_like(tokens, bool)
    model, tx = rj.CausalLM(bench.config), make_optimizer(OPTIM, FOREVER)
    hp = rj.SFTHParams(num_microbatches=bench.work.microbatches)
    step = bench.compile(functools.partial(rj.sft_step, model=model, tx=tx, hp=hp))
    state = bench.state(bench.params(model, 0), tx)
    bench.ready(policy=state.params)
    bench.repeat(step, state, rj.TokenBatch(tokens=tokens, mask=mask, loss_mask=mask))


def rm(bench: Bench) -> None:
    """Pairs of equal length."""
    pairs, length = bench.work.batch, bench.work.length
    tokens = bench.tokens(pairs, 2, length)
    batch = rj.JudgedBatch(
        tokens=tokens,
        mask=np.ones_like(tokens, bool),
        margin=np.zeros(pairs, np.float32),
        weight=np.ones(pairs, np.float32),
    )
    model, tx = rj.ScalarModel(bench.config), make_optimizer(OPTIM, FOREVER)
    hp = rj.RMHParams(num_microbatches=bench.work.microbatches)
    step = bench.compile(functools.partial(rj.rm_step, model=model, tx=tx, hp=hp))
    state = bench.state(bench.params(model, 0), tx)
    bench.ready(reward_model=state.params)
    bench.repeat(step, state, batch)


def dpo_work(bench: Bench) -> None:
    """The reference is asked inside the step, as the peers do. A run of ours asks it
    once per example, before training.
    """
    work = bench.work
    tokens = bench.tokens(work.batch, 2, work.length)
    batch = rj.JudgedBatch(
        tokens=tokens,
        mask=np.ones_like(tokens, bool),
        response_mask=np.broadcast_to(
            np.arange(work.length) >= work.length // 2, tokens.shape
        ),
        weight=np.ones(work.batch, np.float32),
        response_length=work.length - work.length // 2,  # as the data pipeline says it
    )
    model, tx = rj.CausalLM(bench.config), make_optimizer(OPTIM, FOREVER)
    how = {'tx': tx, 'loss': dpo, 'loss_hp': dpo.HParams(beta=0.1)}
    hp = rj.PreferenceHParams(num_microbatches=work.microbatches)
    rows = work.batch // work.microbatches

    def step(state: Any, batch: Any, ref_params: Any) -> Any:
        parts = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), batch)
        of = functools.partial(rj.reference_logps, ref_params, model=model)
        reference = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(of, parts)
        )
        batch = batch.replace(**reference)
        return rj.preference_step(state, batch, model=model, hp=hp, **how)

    compiled = bench.compile(step, inputs=('params', 'batch', 'params'))
    state, reference = bench.state(bench.params(model, 0), tx), bench.params(model, 1)
    bench.ready(policy=state.params, reference=reference)
    bench.repeat(lambda s, b: compiled(s, b, reference), state, batch)


# ------------------------------------------------------------------------------- online


class Writer:
    """Samples responses, none of which ends before its last token."""

    def __init__(self, bench: Bench, model: rj.CausalLM) -> None:
        work = self.work = bench.work
        prompts = bench.tokens(work.batch // work.group, work.prompt)
        self.prompts = np.repeat(prompts, work.group, axis=0)
        self.how = rj.sampling(eos_ids=[], temperature=1.0, top_p=work.top_p)
        self.key = bench.key
        self.done = 0
        function = functools.partial(
            rj.generate, model=model, max_new_tokens=work.response
        )
        self.function = bench.compile_rollout(function, WRITE)

    def __call__(self, params: Any) -> rj.Generation:
        key = jax.random.fold_in(self.key, self.done)
        self.done += 1
        rows = np.arange(self.work.batch, dtype=np.int32)
        mask = np.ones_like(self.prompts, bool)
        return self.function(params, self.prompts, mask, rows, key, self.how)


def generate(bench: Bench) -> None:
    """Sampling alone."""
    model = rj.CausalLM(bench.config)
    write, params = Writer(bench, model), bench.params(model, 0)
    bench.ready(policy=params)
    while True:
        bench.gate.begin()
        jax.block_until_ready(write(params))
        bench.gate.end()


def without_critic(bench: Bench) -> None:
    """RLOO and GRPO, as ``docs/algorithms`` sets them, with the peers' β."""
    work = bench.work
    estimator = estimators.load(work.kind, 'work.kind')
    penalty = {'rloo': {'kl_coef': 0.04}, 'grpo': {'kl_loss_coef': 0.04}}[work.kind]
    aggregation = {'rloo': 'sequence_sum', 'grpo': 'sequence_mean'}[work.kind]
    hp = rj.PolicyHParams(
        group_size=work.group,
        num_epochs=work.epochs,
        num_microbatches=work.microbatches,
        aggregation=aggregation,
        **penalty,
    )
    model, tx = rj.CausalLM(bench.config), make_optimizer(OPTIM, FOREVER)
    how = {'estimator': estimator, 'estimator_hp': estimator.HParams()}
    ready = functools.partial(rj.prepare_policy, model=model, hp=hp, **how)
    prepare = bench.compile_rollout(ready, PREPARE)
    update = bench.compile(functools.partial(rj.policy_step, model=model, tx=tx, hp=hp))
    reference = bench.params(model, 0)
    state = bench.state({'policy': reference}, tx, of=rj.OnlineState)
    write = Writer(bench, model)
    bench.ready(policy=state.params, reference=reference)
    while True:
        bench.gate.begin()
        texts = bench.timed('generate', write(state.params['policy']))
        scores = np.sum(np.asarray(texts.tokens), axis=1).astype(np.float32) % 7
        bench.gate.mark('score')
        rollout, _ = bench.timed(
            'prepare', prepare(state, reference, texts, rj.Scores(scores))
        )
        state, _ = bench.timed('update', update(state, rollout))
        bench.gate.end()


def ppo(bench: Bench) -> None:
    """Four models: policy, critic, reference and reward model."""
    work = bench.work
    hp = rj.PPOHParams(num_epochs=work.epochs, num_microbatches=work.microbatches)
    models = rj.ActorCritic(rj.CausalLM(bench.config), rj.ScalarModel(bench.config))
    tx = actor_critic_optimizer(PPO_OPTIM, PPO_OPTIM, FOREVER)
    judge = functools.partial(rj.reward_model_scores, model=models.critic)
    score = bench.compile_rollout(judge, SCORE)
    ready = functools.partial(rj.prepare, model=models, hp=hp)
    prepare = bench.compile_rollout(ready, PREPARE)
    update = bench.compile(functools.partial(rj.ppo_step, model=models, tx=tx, hp=hp))
    reference, reward = bench.params(models.policy, 0), bench.params(models.critic, 1)
    params = {'policy': reference, 'critic': reward}
    kl = jnp.float32(hp.kl_coef)
    state = bench.state(params, tx, of=rj.PPOState, kl_coef=kl)
    write = Writer(bench, models.policy)
    bench.ready(**state.params, reference=reference, reward_model=reward)
    while True:
        bench.gate.begin()
        texts = bench.timed('generate', write(state.params['policy']))
        scores = bench.timed('score', score(reward, texts.tokens, texts.mask))
        rollout, _ = bench.timed(
            'prepare', prepare(state, reference, texts, rj.Scores(scores))
        )
        state, _ = bench.timed('update', update(state, rollout))
        bench.gate.end()


WORKS = {
    'sft': sft,
    'rm': rm,
    'dpo': dpo_work,
    'generate': generate,
    'rloo': without_critic,
    'grpo': without_critic,
    'ppo': ppo,
}


def device_memory() -> dict[str, int]:
    """The accelerator's peak since the process began; {} on a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get('peak_bytes_in_use')
    return {} if peak is None else {'device_peak_bytes': peak}


def begin_work(gate: Gate) -> None:
    """Runs what the specification says."""
    WORKS[gate.spec['work']['kind']](Bench(gate))


if __name__ == '__main__':
    serve(begin_work, device_memory)
