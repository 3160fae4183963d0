"""The steps in code of one's own: SFT, a reward model and PPO on any decoder.

    python -m examples.library MODEL
    python -m examples.library MODEL OUT

No config files, no stages, no work directory: models and steps are imported, states are
pytrees. MODEL is a Hugging Face directory of any decoder in ``docs/models.md``
(``config.json`` and safetensors). The script fine-tunes it on one batch of
demonstrations, trains a reward model on one batch of comparisons, runs PPO iterations
against it, and writes the policy to OUT. The texts are random ids: it shows the calls.
``ppo_in_one_file.py`` does the same on data that mean something.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import (
    ActorCritic,
    CausalLM,
    JudgedBatch,
    PPOHParams,
    PPOState,
    RMHParams,
    ScalarModel,
    Scores,
    SFTHParams,
    TokenBatch,
    generate,
    hf,
    ppo_step,
    prepare,
    reward_model_scores,
    rm_step,
    sampling,
    sft_step,
    start_from,
    train_state,
)

MODEL = sys.argv[1]
config = hf.load_config(MODEL)
model, critic = CausalLM(config), ScalarModel(config)
params = hf.load_params(MODEL, config, head='lm')
key, ids = jax.random.PRNGKey(0), np.random.default_rng(0)

# 1. SFT. Masks say which tokens are real, and which count in the loss.
tokens = ids.integers(3, config.vocab_size, (8, 16)).astype(np.int32)
mask = np.ones_like(tokens, bool)
demonstrations = TokenBatch(
    tokens=tokens, mask=mask, loss_mask=mask & (np.arange(16) >= 8)
)
tx = optax.adamw(1e-3)
step = jax.jit(functools.partial(sft_step, model=model, tx=tx, hp=SFTHParams()))
sft = train_state(params, tx, key)
for _ in range(5):
    sft, metrics = step(sft, demonstrations)
    print('sft loss', float(metrics['loss'].value()))

# 2. A reward model that starts from the SFT model. Index 0 of a pair is the chosen one.
pairs = ids.integers(3, config.vocab_size, (8, 2, 16)).astype(np.int32)
comparisons = JudgedBatch(
    tokens=pairs,
    mask=np.ones_like(pairs, bool),
    margin=np.zeros(8, np.float32),
    weight=np.ones(8, np.float32),
)
reward_params = critic.init(key, tokens, mask)['params']
reward_params = start_from(reward_params, sft.params)
step = jax.jit(functools.partial(rm_step, model=critic, tx=tx, hp=RMHParams()))
rm = train_state(reward_params, tx, key)
for _ in range(5):
    rm, metrics = step(rm, comparisons)
    print(
        'rm loss',
        float(metrics['loss'].value()),
        'accuracy',
        float(metrics['accuracy'].value()),
    )

# 3. PPO: sample, score, prepare once per rollout, update. Prompts are left-padded.
hp = PPOHParams(kl_coef=0.05, num_epochs=2)
models = ActorCritic(policy=model, critic=critic)
both = {'policy': sft.params, 'critic': rm.params}
ppo = train_state(both, tx, key, of=PPOState, kl_coef=jnp.float32(hp.kl_coef))
how = sampling(eos_ids=[1, 2], temperature=hp.temperature)
write = jax.jit(functools.partial(generate, model=model, max_new_tokens=12))
score = jax.jit(functools.partial(reward_model_scores, model=critic))
ready = jax.jit(functools.partial(prepare, model=models, hp=hp))
step = jax.jit(functools.partial(ppo_step, model=models, tx=tx, hp=hp))
prompts, prompt_mask = tokens[:, :8], mask[:, :8]
for i in range(3):
    draw = jax.random.fold_in(key, i)
    responses = write(
        ppo.params['policy'], prompts, prompt_mask, jnp.arange(8), draw, how
    )
    scores = score(rm.params, responses.tokens, responses.mask)
    rollout, before = ready(ppo, sft.params, responses, Scores(scores))
    ppo, metrics = step(ppo, rollout)
    print(
        'ppo reward',
        float(before['objective/scores'].value()),
        'kl',
        float(before['objective/kl'].value()),
    )

# 4. Out again, for anybody's server.
if len(sys.argv) > 2:
    hf.save(sys.argv[2], ppo.params['policy'], config, head='lm', eos_token_id=2)
