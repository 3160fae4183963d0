"""Tunix behind the gate: its trainers, learners and sampler, on its own Llama.

Its loops read their batches from an iterator, which is where the gate stands: a step
lasts from one batch to the next, and the parameters are waited for before it ends.
Matrix products have the dtype of the parameters: for bfloat16 these are cast, as Tunix
loads its own checkpoints, optimizer moments too. It has no trainer of reward models;
the one that PPO asks is a critic with a random head.
"""

import os

os.environ.update(HF_HUB_OFFLINE='1', WANDB_MODE='disabled')

import gate as gate_file
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler as sampling
from tunix.models.llama3 import model as llama
from tunix.rl import common, rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.grpo import grpo_learner
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import peft_trainer
from tunix.sft.dpo import dpo_trainer

NEVER = 10**9  # steps
NO_EOS = [-1]  # no response ends before its last token
PAD, BOS, EOS = 0, 1, 2


class Llama(llama.Llama3):
    """PPO hands its models ``segment_ids``, which this family does not take. Where rows
    are not packed, the attention mask says the same.
    """

    def __call__(
        self, input_tokens, positions, cache, attention_mask, segment_ids=None
    ):
        if attention_mask is None:
            raise ValueError('rows are packed')
        return super().__call__(input_tokens, positions, cache, attention_mask)


def mesh_of():
    """A mesh of one device."""
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    return jax.sharding.Mesh(devices, ('fsdp', 'tp'))


def model_of(spec, seed):
    """A language model."""
    shape = spec['model']
    config = llama.ModelConfig(
        num_layers=shape['layers'],
        vocab_size=shape['vocab'],
        embed_dim=shape['width'],
        hidden_dim=shape['mlp'],
        num_heads=shape['heads'],
        head_dim=shape['width'] // shape['heads'],
        num_kv_heads=shape['kv_heads'],
        rope_theta=int(shape['theta']),
        norm_eps=1e-5,
        weight_tying=shape['tied'],
    )
    model = Llama(config, rngs=nnx.Rngs(seed))
    if shape['dtype'] == 'bfloat16':
        state = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    return model


def count(model):
    """Parameters."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def optimizer(max_norm=1.0):
    """AdamW, behind the clipping that the other systems have."""
    adamw = optax.adamw(1e-5, weight_decay=0.0)
    return (
        adamw
        if max_norm is None
        else optax.chain(optax.clip_by_global_norm(max_norm), adamw)
    )


class Letters:
    """A tokenizer: a letter is a token, and no text needs more."""

    def __init__(self, vocab):
        self._vocab = vocab

    def encode(self, text, **_):
        return [3 + ord(letter) % (self._vocab - 3) for letter in text]

    def decode(self, ids, **_):
        return ''.join(chr(97 + int(i) % 26) for i in ids)

    def bos_id(self):
        return BOS

    def eos_id(self):
        return EOS

    def pad_id(self):
        return PAD


def prompts_of(random, rows, length):
    """Strings of ``length`` tokens: BOS is put in front of them."""
    letters = random.integers(97, 123, (rows, length - 1))
    return [''.join(map(chr, row)) for row in letters]


def ready(gate, **models):
    """Tells the parent what stands."""
    import importlib.metadata

    names = ('google-tunix', 'jax', 'flax')
    gate.ready(
        versions={name: importlib.metadata.version(name) for name in names},
        parameters={name: count(model) for name, model in models.items()},
    )


def stand_at(gate, batches, *trained):
    """Batches for ever; a step is all the parts of one of them.

    Args:
        gate: where it stands.
        batches: () -> the parts (microbatches) that a trainer reads for one step.
        trained: models whose parameters are waited for at the end of a step.
    """
    while True:
        for model in trained:
            jax.block_until_ready(jax.tree.leaves(nnx.state(model, nnx.Param)))
        gate.end()
        gate.begin()
        yield from batches()


# -------------------------------------------------------------------------------- works


def sft(gate, spec):
    """PeftTrainer on all parameters."""
    work = spec['work']
    model = model_of(spec, 0)
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=NEVER,
        gradient_accumulation_steps=work['microbatches'],
        pbar_description=None,
    )
    trainer = peft_trainer.PeftTrainer(model, optimizer(), config)
    trainer.is_managed_externally = True
    trainer.with_gen_model_input_fn(
        lambda x: {
            'input_tokens': x.input_tokens,
            'input_mask': x.input_mask,
            'positions': common.build_positions_from_mask(x.input_mask),
            'attention_mask': common.make_causal_attn_mask(x.input_mask),
        }
    )
    random = np.random.default_rng(0)
    shape = (work['batch'] // work['microbatches'], work['length'])

    def part():
        tokens = random.integers(3, spec['model']['vocab'], shape).astype(np.int32)
        return peft_trainer.TrainingInput(
            input_tokens=tokens, input_mask=np.ones(shape, np.bool_)
        )

    parts = [part() for _ in range(work['microbatches'])]
    ready(gate, policy=model)
    trainer.train(stand_at(gate, lambda: parts, model))


def dpo(gate, spec):
    """DPOTrainer, which asks the reference in every step."""
    work = spec['work']
    model, reference = model_of(spec, 0), model_of(spec, 1)
    config = dpo_trainer.DPOTrainingConfig(
        eval_every_n_steps=NEVER,
        gradient_accumulation_steps=work['microbatches'],
        beta=0.1,
        pbar_description=None,
    )
    trainer = dpo_trainer.DPOTrainer(
        model=model,
        ref_model=reference,
        optimizer=optimizer(),
        training_config=config,
    )
    trainer.is_managed_externally = True
    random = np.random.default_rng(0)
    shape = (work['batch'] // work['microbatches'], work['length'] // 2)

    def part():
        texts = {}
        for name in ('prompt', 'chosen', 'rejected'):
            ids = random.integers(3, spec['model']['vocab'], shape)
            texts[f'{name}_ids'] = ids.astype(np.int32)
            texts[f'{name}_mask'] = np.ones(shape, np.int32)
        return dpo_trainer.TrainingInput(**texts)

    parts = [part() for _ in range(work['microbatches'])]
    ready(gate, policy=model, reference=reference)
    trainer.train(stand_at(gate, lambda: parts, model))


def generate(gate, spec):
    """Its sampler, which takes texts."""
    work, shape = spec['work'], spec['model']
    model = model_of(spec, 0)
    cache = sampling.CacheConfig(
        cache_size=work['prompt'] + work['response'],
        num_layers=shape['layers'],
        num_kv_heads=shape['kv_heads'],
        head_dim=shape['width'] // shape['heads'],
    )
    sampler = sampling.Sampler(model, Letters(shape['vocab']), cache)
    prompts = prompts_of(np.random.default_rng(0), work['batch'], work['prompt'])
    ready(gate, policy=model)
    seed = 0
    while True:
        gate.begin()
        out = sampler(
            input_strings=prompts,
            max_generation_steps=work['response'],
            max_prompt_length=work['prompt'],
            temperature=1.0,
            top_p=work['top_p'],
            eos_tokens=NO_EOS,
            seed=seed,
        )
        jax.block_until_ready(out.tokens)
        gate.end()
        seed += 1
        lengths = {len(row) for row in out.tokens}
        if lengths != {work['response']}:
            raise RuntimeError(f'{lengths} tokens a response, not {work["response"]}')


def cluster_of(spec, models, max_norm):
    """All models on one mesh, and how they sample and train."""
    work, mesh, role = spec['work'], mesh_of(), rl_cluster.Role
    rows = work['batch'] // work['group']  # prompts
    parts = {}
    if work['microbatches'] > 1:
        part = max(rows // work['microbatches'], 1)
        parts = {
            'mini_batch_size': rows,
            'train_micro_batch_size': part,
            'rollout_micro_batch_size': rows,
            'compute_logps_micro_batch_size': part,
        }
    return rl_cluster.RLCluster(
        **models,
        tokenizer=Letters(spec['model']['vocab']),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(role, mesh),
            rollout_engine='vanilla',
            offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizer(max_norm),
                critic_optimizer=optimizer(max_norm),
                eval_every_n_steps=NEVER,
                max_steps=NEVER,
                pbar_description=None,
                **parts,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=work['response'],
                max_prompt_length=work['prompt'],
                kv_cache_size=work['prompt'] + work['response'],
                temperature=1.0,
                top_p=1.0,
                eos_tokens=NO_EOS,
            ),
        ),
    )


def texts_for(spec):
    """() -> the one batch of prompts of an iteration. An array: a list is a pytree."""
    work, random = spec['work'], np.random.default_rng(0)
    rows = work['batch'] // work['group']
    return lambda: [{'prompts': np.array(prompts_of(random, rows, work['prompt']))}]


def trivial_reward(prompts, completions, **_):
    """A function of the texts."""
    return [float(text.count('a')) for text in completions]


def without_critic(gate, spec):
    """GRPOLearner, with the advantages of GRPO or RLOO."""
    work = spec['work']
    actor, reference = model_of(spec, 0), model_of(spec, 0)
    config = grpo_learner.GRPOConfig(
        num_generations=work['group'],
        num_iterations=work['epochs'],
        beta=0.04,
        advantage_estimator=work['kind'],
    )
    cluster = cluster_of(spec, {'actor': actor, 'reference': reference}, 1.0)
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster, algo_config=config, reward_fns=trivial_reward
    )
    ready(gate, policy=actor, reference=reference)
    trained = cluster.actor_trainer.model
    learner.train(stand_at(gate, texts_for(spec), trained))


def ppo(gate, spec):
    """PPOLearner with four models."""
    work = spec['work']
    models = {
        'actor': model_of(spec, 0),
        'reference': model_of(spec, 0),
        'critic': rl_utils.create_critic_model(model_of(spec, 1)),
        'reward': rl_utils.create_critic_model(model_of(spec, 2)),
    }
    config = ppo_learner.PPOConfig(num_iterations=work['epochs'], beta=0.04)
    cluster = cluster_of(spec, models, None)
    learner = ppo_learner.PPOLearner(rl_cluster=cluster, ppo_config=config)
    names = {'actor': 'policy', 'reward': 'reward_model'}
    ready(gate, **{names.get(name, name): model for name, model in models.items()})
    trained = cluster.actor_trainer.model, cluster.critic_trainer.model
    learner.train(stand_at(gate, texts_for(spec), *trained))


WORKS = {
    'sft': sft,
    'dpo': dpo,
    'generate': generate,
    'grpo': without_critic,
    'rloo': without_critic,
    'ppo': ppo,
}


def device_memory():
    """The accelerator's peak."""
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get('peak_bytes_in_use')
    return {} if peak is None else {'device_peak_bytes': peak}


def begin_work(gate):
    """Runs what the specification says."""
    with mesh_of():
        WORKS[gate.spec['work']['kind']](gate, gate.spec)


if __name__ == '__main__':
    gate_file.serve(begin_work, device_memory)
