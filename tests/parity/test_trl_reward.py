"""Losses of reward models against TRL's own code, value and gradient.

TRL's methods run on a stand-in for the trainer and a model whose parameters *are* its
scores; ours run through ``rm_loss`` on a model of the same kind.
"""

from __future__ import annotations

import collections
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.algos.rm import RMHParams, rm_loss
from rlhf_jax.data.formats import Judged
from rlhf_jax.data.rows import step_rows
from rlhf_jax.reward_losses import bradley_terry, stepwise
from rlhf_jax.types import JudgedBatch

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # read when the libraries are imported
torch = pytest.importorskip('torch')
reward_trainer = pytest.importorskip('trl.trainer.reward_trainer')
prm_trainer = pytest.importorskip('trl.experimental.prm.prm_trainer')

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning'),
]

PAIRS, LENGTH = 6, 5


class _Scores:
    """Ours: ``{'scores': [B, T]}`` are the scores, whatever the tokens."""

    config = types.SimpleNamespace(attention='causal')

    def apply(self, variables, tokens, mask):
        return variables['params']['scores']


def _ours(scores, batch, loss, **hp):
    def mean(scores):
        total, weight, metrics = rm_loss(
            {'scores': scores}, batch, model=_Scores(), hp=RMHParams(**hp), loss=loss
        )
        return total / weight, metrics

    (value, metrics), gradient = jax.value_and_grad(mean, has_aux=True)(scores)
    return value, gradient, metrics


@pytest.mark.parametrize('margin', [False, True])
@pytest.mark.parametrize('center', [None, 0.01])
def test_reward_trainer(margin, center):
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 2, (PAIRS, 2)).astype(np.float32)
    margins = rng.uniform(0, 2, PAIRS).astype(np.float32) * margin
    theirs = torch.tensor(scores, dtype=torch.float64, requires_grad=True)

    def model(**inputs):  # all chosen texts stand in front of all rejected ones
        return types.SimpleNamespace(logits=theirs.T.reshape(-1, 1))

    model.training = True
    trainer = types.SimpleNamespace(
        model=model,
        args=types.SimpleNamespace(center_rewards_coefficient=center),
        accelerator=types.SimpleNamespace(
            gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        _metrics={'train': collections.defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {'attention_mask': torch.ones(2 * PAIRS, LENGTH)}
    if margin:
        inputs['margin'] = torch.tensor(margins)
    loss = reward_trainer.RewardTrainer.compute_loss(trainer, model, inputs)
    loss.backward()

    batch = JudgedBatch(
        tokens=np.zeros((PAIRS, 2, 1), np.int32),
        mask=np.ones((PAIRS, 2, 1), bool),
        margin=margins,
        weight=np.ones(PAIRS, np.float32),
    )
    flat = jnp.asarray(scores).reshape(2 * PAIRS, 1)
    value, gradient, metrics = _ours(
        flat, batch, bradley_terry, center_coef=center or 0.0
    )
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    want = theirs.grad.numpy()
    assert np.abs(want).max() > 0.01
    np.testing.assert_allclose(gradient.reshape(PAIRS, 2), want, atol=1e-5)
    accuracy = trainer._metrics['train']['accuracy'][0]
    assert float(metrics['accuracy'].value()) == pytest.approx(accuracy)


def _tokenizer():
    words = ['[UNK]', '</s>', '\n', 'two', 'and', 'is', 'four', 'five', '?']
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, '[UNK]'))
    backend.pre_tokenizer = pre_tokenizers.Split(' ', 'removed')
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token='</s>')


PROMPT = 'two and two ?'
STEPS, LABELS = ['two is two', 'two and two is five', 'four'], [True, False, False]


def _tokenized():
    return prm_trainer.PRMTrainer.tokenize_row(
        {'prompt': PROMPT, 'completions': STEPS, 'labels': LABELS},
        _tokenizer(),
        '\n',
        None,
        None,
        False,
        False,
    )


def test_steps_end_where_they_do_in_trl():
    """The one difference: EOS stands in the place of the last separator."""
    theirs = _tokenized()
    record = Judged(PROMPT, dict(enumerate(STEPS)), None, {}, '')
    (row,) = step_rows([record], _tokenizer(), '\n')
    ours = row.prompt + row.answers[0]
    assert ours[:-1] == theirs['input_ids'][:-1]
    assert (ours[-1], theirs['input_ids'][-1]) == (1, 2)
    places = np.flatnonzero(np.asarray(theirs['labels']) != -100)
    assert [len(row.prompt) + place for place in row.steps] == places.tolist()


def test_prm_loss():
    """Two logits and a cross-entropy are one logit, their difference."""
    rng = np.random.default_rng(1)
    theirs = _tokenized()
    labels = np.asarray([theirs['labels']])
    logits = rng.normal(0, 2, (*labels.shape, 2)).astype(np.float32)
    tensor = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    # What transformers' token classifiers, and so PRMTrainer, compute.
    loss = torch.nn.functional.cross_entropy(
        tensor.view(-1, 2), torch.tensor(labels).view(-1)
    )
    loss.backward()
    batch = JudgedBatch(
        tokens=np.asarray([[theirs['input_ids']]], np.int32),
        mask=np.ones((1, *labels.shape), bool),
        labels=(labels == 1)[None].astype(np.float32),
        judged=(labels != -100)[None],
        weight=np.ones(1, np.float32),
    )
    scores = jnp.asarray(logits[..., 1] - logits[..., 0])
    value, gradient, _ = _ours(scores, batch, stepwise)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, tensor.grad.numpy()[..., 1], atol=1e-5)
    assert np.abs(gradient).max() > 0.01
