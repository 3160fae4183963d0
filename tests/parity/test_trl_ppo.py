"""One PPO iteration against TRL 1.12.0, the last release of TRL with a PPO trainer.

Both sides start from the same four Hugging Face directories and get the same
responses: TRL's generation is replaced by one that returns fixed tokens with the
policy's own logits. From there on everything is compared: scores, advantages, losses,
the metrics that both report, and the weights of policy and critic after two epochs.

What reproduces TRL: ``score_at='after_last'`` (which also trains the critic one place
behind EOS), ``unbiased_variance``, ``missing_eos_penalty``, no gradient clipping, no
bias in the head of the critic. A response that fills its length has no place behind
it, and gets its score at its last token on both sides. TRL divides logits by
temperature + 1e-7, which is below what is compared.
Read ``test_torch_losses.py`` next.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from rlhf_jax import hf
from rlhf_jax.algos import ppo
from rlhf_jax.algos.ppo import ActorCritic, PPOHParams
from rlhf_jax.algos.rollout import policy_logprobs
from rlhf_jax.models.heads import CausalLM, ScalarModel
from rlhf_jax.optim import OptimConfig, actor_critic_optimizer
from rlhf_jax.rewards import ScoreHParams, reward_model_scores, shape_scores
from rlhf_jax.types import (
    Array,
    Generation,
    Metrics,
    Params,
    PPOState,
    Rollout,
    Scores,
)
from tests.parity.trl_side import EOS, PAD, llama, tokenizer

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
datasets = pytest.importorskip('datasets')
trl_ppo = pytest.importorskip(
    'trl.experimental.ppo', reason='only TRL up to 1.12.0 has a PPO trainer'
)
trl_trainer = pytest.importorskip('trl.experimental.ppo.ppo_trainer')

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning'),
]

VOCABULARY = 128
ROWS, LENGTH = 8, 12  # responses of a rollout, and their longest
# Where the responses have their EOS: in the middle, first, last, and (None) nowhere.
ENDS = (2, 5, None, 7, 0, None, 11, 9)
HPARAMS = {
    'temperature': 0.7,
    'kl_coef': 0.05,
    'score_at': 'after_last',
    'unbiased_variance': True,
    'value_coef': 0.1,
    'num_epochs': 1,  # two steps of one epoch show both losses
}
SCORE_HP = ScoreHParams(missing_eos_penalty=1.0)
LEARNING_RATE = 1e-3
CASES = [pytest.param(False, id='plain'), pytest.param(True, id='whitened')]


# --------------------------------------------------------------------------- TRL's side


@dataclasses.dataclass(kw_only=True)
class TRLRun:
    """What one iteration of TRL's trainer saw, computed and left behind."""

    queries: np.ndarray  # [B, Q] left-padded
    responses: np.ndarray  # [B, LENGTH] with tokens behind EOS that must not count
    raw_advantages: np.ndarray  # [B, LENGTH] before whitening
    advantages: np.ndarray  # [B, LENGTH] after it
    losses: list[float]  # policy + 0.1·value, one per epoch
    metrics: dict[str, float]
    policy: Path  # the trained weights
    critic: Path


@pytest.fixture(scope='module')
def directories(tmp_path_factory) -> dict[str, Path]:
    """Four random Llamas, with weights large enough to differ in earnest."""
    root = tmp_path_factory.mktemp('models')
    causal, scalar = (
        transformers.LlamaForCausalLM,
        transformers.LlamaForSequenceClassification,
    )
    kinds = {'policy': causal, 'reference': causal, 'reward': scalar, 'critic': scalar}
    for seed, (name, kind) in enumerate(kinds.items()):
        llama(kind, VOCABULARY, seed).save_pretrained(root / name)
    return {name: root / name for name in kinds}


def _trainer(directories: dict[str, Path], output: Path, whiten: bool) -> Any:
    causal, scalar = (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSequenceClassification,
    )
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 9, size=2 * ROWS)
    prompts = [rng.integers(3, VOCABULARY, size=length).tolist() for length in lengths]
    dataset = datasets.Dataset.from_dict({'input_ids': prompts})
    args = trl_ppo.PPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=2,
        total_episodes=ROWS,
        response_length=LENGTH,
        temperature=HPARAMS['temperature'],
        kl_coef=HPARAMS['kl_coef'],
        kl_estimator='k1',
        whiten_rewards=whiten,
        missing_eos_penalty=SCORE_HP.missing_eos_penalty,
        stop_token='eos',
        vf_coef=HPARAMS['value_coef'],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type='constant',
        num_sample_generations=0,
        save_strategy='no',
        report_to='none',
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    return trl_ppo.PPOTrainer(
        args=args,
        processing_class=tokenizer(VOCABULARY),
        model=causal.from_pretrained(directories['policy']),
        ref_model=causal.from_pretrained(directories['reference']),
        reward_model=scalar.from_pretrained(directories['reward']),
        value_model=scalar.from_pretrained(directories['critic']),
        train_dataset=dataset,
        eval_dataset=dataset,
    )


def _responses() -> Any:
    rng = np.random.default_rng(7)
    tokens = rng.integers(3, VOCABULARY, size=(ROWS, LENGTH))
    for row, end in enumerate(ENDS):
        if end is not None:
            tokens[row, end] = EOS
    return torch.from_numpy(tokens)


@pytest.fixture(scope='module', params=CASES)
def iteration(request, directories, tmp_path_factory) -> tuple[PPOHParams, TRLRun]:
    """One TRL iteration over the fixed responses, with the settings that mirror it."""
    whiten = request.param
    output = tmp_path_factory.mktemp('trl')
    trainer = _trainer(directories, output, whiten)
    seen: dict[str, Any] = {'whitened': [], 'losses': []}

    def generate(model, queries, batch_size, pad_token_id, generation_config):
        seen['queries'], seen['responses'] = queries.clone(), _responses()
        tokens = torch.cat([queries, seen['responses']], 1)
        logits = trl_trainer.forward(model, tokens, pad_token_id).logits
        temperature = generation_config.temperature  # as generation has divided by it
        return tokens, logits[:, queries.shape[1] - 1 : -1] / temperature

    whiten_of_trl = trl_trainer.masked_whiten

    def whiten_and_record(values, mask, shift_mean=True):
        result = whiten_of_trl(values, mask, shift_mean)
        seen['whitened'].append((values.clone(), torch.where(mask, result, 0)))
        return result

    backward = trainer.accelerator.backward

    def backward_and_record(loss, **kwargs):
        seen['losses'].append(loss.item())
        backward(loss, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_trainer, 'batch_generation', generate)
        patch.setattr(trl_trainer, 'masked_whiten', whiten_and_record)
        patch.setattr(trainer.accelerator, 'backward', backward_and_record)
        patch.setattr(trainer, 'log', lambda metrics: seen.update(metrics=metrics))
        trainer.train()
    trainer.policy_model.save_pretrained(output / 'policy')
    trainer.value_model.save_pretrained(output / 'critic')
    raw, whitened = seen['whitened'][-1]  # the last one: rewards are whitened before
    run = TRLRun(
        queries=seen['queries'].numpy(),
        responses=seen['responses'].numpy(),
        raw_advantages=raw.numpy(),
        advantages=whitened.numpy(),
        losses=seen['losses'],
        metrics=seen['metrics'],
        policy=output / 'policy',
        critic=output / 'critic',
    )
    hp = PPOHParams(**HPARAMS, whiten_rewards=whiten)
    return hp, run


# ---------------------------------------------------------------------------- our side


@dataclasses.dataclass(kw_only=True)
class OurRun:
    """The same iteration by this package."""

    rollout: Rollout
    prepared: dict[str, float]  # metrics of the rollout
    epochs: list[dict[str, float]]  # metrics of each of two epochs
    before: Params  # policy and critic
    after: Params


# Compiled once for all cases; ``prepare`` alone differs between them.
logprobs_of = jax.jit(policy_logprobs, static_argnames=('model', 'temperature'))
model_scores = jax.jit(reward_model_scores, static_argnames='model')
prepare = jax.jit(ppo.prepare, static_argnames=('model', 'hp'))
ppo_step = jax.jit(ppo.ppo_step, static_argnames=('model', 'tx', 'hp'))


def _load(directory: Path, head: str) -> Params:
    return hf.load_params(directory, hf.load_config(directory), head=head)


def _generation(run: TRLRun, params: Params, model: CausalLM) -> Generation:
    """The fixed tokens as ``generate`` returns them: masked behind EOS."""
    ends = np.array([LENGTH - 1 if end is None else end for end in ENDS])
    response = np.arange(LENGTH) <= ends[:, None]
    prompt = run.queries != PAD
    response_mask = np.concatenate([np.zeros_like(prompt), response], 1)
    tokens = np.concatenate([run.queries, run.responses], 1).astype(np.int32)
    mask = np.concatenate([prompt, response], 1)
    logprobs, _ = logprobs_of(
        params, tokens, mask, model=model, temperature=HPARAMS['temperature']
    )
    return Generation(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        response_mask=jnp.asarray(response_mask),
        logprobs=jnp.where(response_mask, logprobs, 0),
        ended=jnp.asarray([end is not None for end in ENDS]),
    )


def _values(metrics: Metrics) -> dict[str, float]:
    return {name: float(metric.value()) for name, metric in metrics.items()}


@pytest.fixture(scope='module')
def optimizer() -> optax.GradientTransformation:
    """TRL's: one rate, no clipping, and no bias to train in the head of the critic."""
    policy = OptimConfig(
        learning_rate=LEARNING_RATE, schedule='constant', max_grad_norm=None
    )
    critic = dataclasses.replace(policy, trainable='backbone|head/kernel')
    return actor_critic_optimizer(policy, critic, num_steps=2)


@pytest.fixture(scope='module')
def ours(iteration, directories, optimizer) -> OurRun:
    """Scores, rollout and two epochs from the directories that TRL started from."""
    hp, run = iteration
    params = {
        'policy': _load(directories['policy'], 'lm'),
        'critic': _load(directories['critic'], 'scalar'),
    }
    scalar_model = ScalarModel(hf.load_config(directories['critic']))
    model = ActorCritic(CausalLM(hf.load_config(directories['policy'])), scalar_model)
    state = PPOState(
        step=jnp.int32(0),
        rng=jax.random.key(0),
        params=params,
        opt_state=optimizer.init(params),
        kl_coef=jnp.float32(hp.kl_coef),
    )
    generation = _generation(run, params['policy'], model.policy)
    reward_params = _load(directories['reward'], 'scalar')
    scores = shape_scores(
        model_scores(
            reward_params, generation.tokens, generation.mask, model=scalar_model
        ),
        generation.ended,
        jnp.sum(generation.response_mask, axis=-1),
        hp=SCORE_HP,
        max_length=LENGTH,
    )
    reference = _load(directories['reference'], 'lm')
    rollout, prepared = prepare(
        state, reference, generation, Scores(scores), model=model, hp=hp
    )
    epochs = []
    for _ in range(2):
        # The cases differ in nothing that the update reads, so HPARAMS alone will do.
        state, metrics = ppo_step(
            state, rollout, model=model, tx=optimizer, hp=PPOHParams(**HPARAMS)
        )
        epochs.append(_values(metrics))
    return OurRun(
        rollout=rollout,
        prepared=_values(prepared),
        epochs=epochs,
        before=params,
        after=state.params,
    )


# ------------------------------------------------------------------------------- tests


def _response_part(x: Array) -> np.ndarray:
    return np.asarray(x)[:, -LENGTH:]


def test_scores_and_kl(iteration, ours):
    hp, run = iteration
    pairs = {
        'objective/scores': 'objective/scores',
        'objective/rlhf_reward': 'objective/rlhf_reward',
        'objective/entropy': 'objective/entropy',
        'objective/kl': 'objective/kl',
    }
    for name, name_in_trl in pairs.items():
        np.testing.assert_allclose(
            ours.prepared[name], run.metrics[name_in_trl], rtol=1e-5, err_msg=name
        )


def test_advantages(iteration, ours):
    _, run = iteration
    whitened = _response_part(ours.rollout.advantages)
    np.testing.assert_allclose(whitened, run.advantages, atol=1e-5)
    # Returns are made of the advantages before whitening, and reach one place behind
    # EOS: the policy has no token there, but the critic has a target.
    raw = _response_part(ours.rollout.returns - ours.rollout.old_values)
    np.testing.assert_allclose(raw, run.raw_advantages, atol=1e-5)


def test_losses(iteration, ours):
    hp, run = iteration
    epochs = ours.epochs
    losses = [m['loss/policy'] + hp.value_coef * m['loss/value'] for m in epochs]
    np.testing.assert_allclose(losses, run.losses, atol=1e-5)
    assert epochs[0]['policy/approxkl'] < 1e-10  # the first update sees ratio 1
    pairs = {
        'loss/policy': 'loss/policy_avg',
        'loss/value': 'loss/value_avg',
        'policy/clipfrac': 'policy/clipfrac_avg',
        'val/clipfrac': 'val/clipfrac_avg',
    }
    for name, name_in_trl in pairs.items():
        mean = np.mean([metrics[name] for metrics in epochs])
        np.testing.assert_allclose(
            mean, run.metrics[name_in_trl], atol=1e-5, err_msg=name
        )
    # Nothing would be shown about clipping if nothing were clipped.
    assert epochs[1]['policy/clipfrac'] > 0
    assert epochs[1]['val/clipfrac'] > 0


def test_parameters(iteration, ours):
    _, run = iteration
    trained = {'policy': _load(run.policy, 'lm'), 'critic': _load(run.critic, 'scalar')}
    result, expected, start = (
        traverse_util.flatten_dict(tree, sep='/')
        for tree in (ours.after, trained, ours.before)
    )
    assert result.keys() == expected.keys()
    for path, value in expected.items():
        error = np.abs(result[path] - value)
        # Adam divides by the size of a gradient, so the smallest ones show rounding.
        assert np.max(error) < 1e-4, path
        assert np.mean(error) < 1e-6, path
        if path != 'critic/head/bias':  # transformers has none
            assert np.max(np.abs(value - start[path])) > LEARNING_RATE, path
