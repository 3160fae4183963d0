"""Online DPO against TRL's own ``training_step``, loss, gradient and metrics.

TRL's method runs on a stand-in for the trainer with given samples and rewards, and on a
model that is a table of bigram logits, as ours is. So the choice of the better response
is compared as well. Read ``test_trl_preference.py`` next.
"""

from __future__ import annotations

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import preference
from rlhf_jax.algos.online_preference import (
    OnlinePreferenceHParams,
    online_preference_step,
    prepare_pairs,
)
from rlhf_jax.types import Generation, Scores, TrainState
from tests.parity.trl_side import LATEST, TorchBigram

torch = pytest.importorskip('torch')
online_dpo = pytest.importorskip('trl.experimental.online_dpo.online_dpo_trainer')

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning'),
]

PROMPTS, PROMPT, RESPONSE, VOCABULARY, BETA = 5, 3, 6, 11, 0.3


def _samples():
    """Two responses per prompt: tokens, masks, scores; adjacent rows."""
    rng = np.random.default_rng(0)
    rows = 2 * PROMPTS
    starts = np.repeat(rng.integers(0, PROMPT, PROMPTS), 2)[:, None]
    ends = rng.integers(1, RESPONSE + 1, rows)[:, None]
    prompt_mask = np.arange(PROMPT) >= starts
    response = np.arange(RESPONSE) < ends
    tokens = rng.integers(0, VOCABULARY, (rows, PROMPT + RESPONSE))
    tokens[1::2, :PROMPT] = tokens[::2, :PROMPT]
    return tokens, prompt_mask, response, rng.normal(size=rows)


def _ours(bigram, loss, table, ref, samples):
    tokens, prompt_mask, response, scores = samples
    response_mask = np.concatenate([np.zeros_like(prompt_mask), response], 1)
    generation = Generation(
        tokens=jnp.asarray(tokens, jnp.int32),
        mask=jnp.asarray(np.concatenate([prompt_mask, response], 1)),
        response_mask=jnp.asarray(response_mask),
        logprobs=jnp.zeros(tokens.shape),
        ended=jnp.ones(len(tokens), bool),
    )
    module, hp = preference.load(loss, 'loss'), OnlinePreferenceHParams()
    batch, before = prepare_pairs(
        None,
        {'table': ref},
        generation,
        Scores(jnp.float32(scores)),
        model=bigram,
        hp=hp,
        loss=module,
    )
    tx, params = optax.sgd(1.0), {'policy': {'table': table}}
    state = TrainState(
        step=jnp.int32(0),
        rng=jax.random.PRNGKey(0),
        params=params,
        opt_state=tx.init(params),
    )
    how = {'model': bigram, 'tx': tx, 'hp': hp, 'loss': module}
    state, metrics = online_preference_step(
        state, batch, **how, loss_hp=module.HParams(beta=BETA)
    )
    numbers = {k: float(m.value()) for k, m in {**before, **metrics}.items()}
    return numbers, np.asarray(table - state.params['policy']['table'])


def _theirs(loss, table, ref, samples):
    # All first responses stand in front of all second ones.
    tokens, prompt_mask, response, scores = (
        torch.tensor(np.concatenate([x[::2], x[1::2]])) for x in samples
    )
    same = lambda x: x  # noqa: E731
    generated = (
        tokens[:, :PROMPT],
        prompt_mask.long(),
        tokens[:, PROMPT:],
        response.long(),
    )
    cls, model = online_dpo.OnlineDPOTrainer, TorchBigram(table, torch.float64)
    trainer = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(
            gather_for_metrics=same, backward=lambda x: x.backward()
        ),
        args=types.SimpleNamespace(
            use_vllm=False,
            missing_eos_penalty=None,
            loss_type=loss,
            torch_empty_cache_steps=None,
            optim='adamw_torch',
            n_gpu=1,
            gradient_accumulation_steps=1,
        ),
        # The latest returns what it knows of images, too.
        _generate=lambda model, prompts, images: generated + (None,) * LATEST,
        _calculate_rewards_from_functions=lambda **known: scores.clone(),
        _tokenizer=types.SimpleNamespace(eos_token_id=VOCABULARY),
        eos_token_ids=[VOCABULARY],
        processing_class=types.SimpleNamespace(
            batch_decode=lambda ids, skip_special_tokens: [''] * len(ids)
        ),
        beta=BETA,
        is_vision_model=False,
        max_length=PROMPT + RESPONSE,
        ref_model=TorchBigram(ref, torch.float64),
        reward_funcs=[None],
        state=types.SimpleNamespace(global_step=1),
        stats=collections.defaultdict(list),
    )
    trainer._forward = types.MethodType(cls._forward, trainer)
    inputs = {'prompt': ['a prompt'] * PROMPTS}
    value = cls.training_step(trainer, model, inputs)
    numbers = {name: column[0] for name, column in trainer.stats.items()}
    return value.item(), model.logits.grad.numpy(), numbers


@pytest.mark.parametrize('loss', ['sigmoid', 'ipo'])
def test_a_training_step(bigram, loss):
    rng = np.random.default_rng(1)
    table, ref = np.float32(rng.normal(0, 2, (2, VOCABULARY, VOCABULARY)))
    samples = _samples()
    better = samples[3][::2] > samples[3][1::2]
    assert 0 < better.sum() < PROMPTS  # both orders occur
    name = {'sigmoid': 'dpo', 'ipo': 'ipo'}[loss]
    ours, gradient = _ours(bigram, name, table, ref, samples)
    value, expected, numbers = _theirs(loss, table, ref, samples)
    assert ours['loss/policy'] == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    assert np.abs(expected).max() > 1e-2
    for metric in (
        'objective/scores',
        'objective/scores_margin',
        'logps/chosen',
        'logps/rejected',
        'rewards/chosen',
        'rewards/rejected',
        'rewards/margins',
        'rewards/accuracies',
    ):
        # Ours of IPO is measured by β·d too.
        assert ours[metric] == pytest.approx(numbers[metric], rel=1e-4), metric
