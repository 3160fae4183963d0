"""Critic-free losses and their gradients against TRL's own functions.

``GRPOTrainer._compute_loss`` and ``RLOOTrainer._compute_loss`` are called unbound, with
settings in place of a trainer. Both sides have the same policy, a bigram table of
random logits; compared are the loss and the table's gradient. TRL's ``'cispo'`` and
``'dapo'`` divide by all tokens of the batch, as ``'token_mean'`` does; its
``epsilon_high`` of CISPO is the bound itself, 1 + ours.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos.estimators import grpo
from rlhf_jax.algos.policy_gradient import PolicyHParams, policy_gradient_loss
from rlhf_jax.rewards import overlong_penalty
from rlhf_jax.types import Params, Rollout
from tests.parity.trl_side import TorchBigram

torch = pytest.importorskip('torch')
pytest.importorskip('trl.trainer.grpo_trainer')
import trl  # noqa: E402

pytestmark = pytest.mark.parity

ROWS, LENGTH, V = 6, 5, 7
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (ROWS, LENGTH + 1))  # one token of prompt
MASK = np.arange(LENGTH) < np.array([1, 5, 3, 2, 4, 5])[:, None]
TABLE = RNG.normal(size=(V, V)).astype(np.float32)
ADVANTAGES = np.array([1.2, -0.7, -1.5, 0.4, -0.3, 0.9], np.float32)


# The policy has moved from where it sampled, beyond the clip at some tokens and, by a
# shift of its own, in most responses as a whole.
NOW = np.asarray(jax.nn.log_softmax(TABLE))[TOKENS[:, :-1], TOKENS[:, 1:]]
SHIFT = np.array([0.3, 0.4, -0.3, -0.5, 0.2, -0.2])[:, None]  # of log π_old
MOVED = SHIFT + RNG.normal(0, 0.3, NOW.shape)
OLD = np.where(MASK, NOW + MOVED, 0).astype(np.float32)
REF = np.where(MASK, NOW + RNG.normal(0, 0.5, size=NOW.shape), 0).astype(np.float32)


class _Model:
    """The bigram policy, with the interface of ``CausalLM``."""

    config = types.SimpleNamespace(logit_softcap=None, num_tokens=None)

    def apply(self, variables: Any, tokens: Any, mask: Any) -> Any:
        return jax.nn.one_hot(tokens, V)

    def unembedding(self, params: Params) -> Any:
        return params['table']


class _Trainer(types.SimpleNamespace):
    """What the loss functions of both trainers read of a trainer."""

    def __init__(self, cls: type, **settings: Any):
        identity = types.SimpleNamespace(
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            num_processes=1,
            sync_gradients=False,
            autocast=contextlib.nullcontext,
        )
        args = types.SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1
        )
        super().__init__(
            args=args,
            accelerator=identity,
            model=types.SimpleNamespace(training=True),
            current_gradient_accumulation_steps=1,
            max_completion_length=LENGTH,
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            model_kwarg_keys=(),
            off_policy_mask_threshold=None,
            use_vllm=False,
            _entropy_bonus_enabled=settings['entropy_coef'] > 0,
            use_adaptive_entropy=False,
            _metrics={'train': collections.defaultdict(list)},
            **settings,
        )
        method = inspect.unwrap(cls._get_per_token_logps_and_entropies)
        self._get_per_token_logps_and_entropies = types.MethodType(method, self)


def _theirs(
    trainer: type, old_logprobs: np.ndarray = OLD, **settings: Any
) -> tuple[float, np.ndarray]:
    """TRL's loss and the gradient of the table."""
    defaults = {
        'loss_type': 'grpo',
        'importance_sampling_level': 'token',
        'epsilon_low': 0.2,
        'epsilon_high': 0.2,
        'beta': 0.0,
        'entropy_coef': 0.0,
        'temperature': 1.0,
    }
    settings = defaults | settings
    policy = TorchBigram(TABLE, torch.float64, settings['temperature'])
    old, mask = torch.tensor(old_logprobs).double(), torch.tensor(MASK).double()
    inputs = {
        'prompt_ids': torch.tensor(TOKENS[:, :1]),
        'prompt_mask': torch.ones(ROWS, 1, dtype=torch.int64),
        'completion_ids': torch.tensor(TOKENS[:, 1:]),
        'completion_mask': mask,
        'advantages': torch.tensor(ADVANTAGES).double(),
        'old_per_token_logps': old,
        'old_logps': (old * mask).sum(-1),
        'ref_per_token_logps': torch.tensor(REF).double(),
        'num_items_in_batch': mask.sum(),
    }
    loss = trainer._compute_loss(_Trainer(trainer, **settings), policy, inputs)
    loss.backward()
    return loss.item(), policy.logits.grad.numpy()


def _ours(old_logprobs: np.ndarray = OLD, **settings: Any) -> tuple[float, np.ndarray]:
    edge = functools.partial(np.pad, pad_width=((0, 0), (1, 0)))
    rollout = Rollout(
        tokens=jnp.asarray(TOKENS),
        mask=jnp.pad(MASK, ((0, 0), (1, 0)), constant_values=True),
        response_mask=jnp.asarray(edge(MASK)),
        old_logprobs=jnp.asarray(edge(old_logprobs)),
        ref_logprobs=jnp.asarray(edge(REF)),
        advantages=jnp.asarray(edge(MASK * ADVANTAGES[:, None])),
        aggregation=grpo.AGGREGATION,
    )
    hp = PolicyHParams(**settings)

    def mean(params: Params) -> Any:
        total, weight, _ = policy_gradient_loss(params, rollout, model=_Model(), hp=hp)
        return total / weight

    value, gradient = jax.value_and_grad(mean)({'table': TABLE})
    return float(value), np.asarray(gradient['table'])


CASES = {
    'grpo': ({}, {}),
    'grpo-kl': ({'beta': 0.3}, {'kl_loss_coef': 0.3}),
    'temperature': ({'temperature': 0.7}, {'temperature': 0.7}),
    'dr_grpo': (
        {'loss_type': 'dr_grpo'},
        {'aggregation': 'fixed_length', 'fixed_length': LENGTH},
    ),
    'dapo': (
        {'loss_type': 'dapo', 'epsilon_high': 0.28, 'entropy_coef': 0.1},
        {'aggregation': 'token_mean', 'clip_eps_high': 0.28, 'entropy_coef': 0.1},
    ),
    'bnpo': ({'loss_type': 'bnpo'}, {'aggregation': 'token_mean'}),
    'luspo': (
        {'loss_type': 'luspo', 'importance_sampling_level': 'sequence'},
        {'ratio_level': 'sequence', 'aggregation': 'sequence_sum'},
    ),
    'gspo': (
        {'importance_sampling_level': 'sequence', 'epsilon_low': 0.05},
        {'ratio_level': 'sequence', 'clip_eps_low': 0.05},
    ),
    'cispo': (
        {'loss_type': 'cispo', 'epsilon_high': 1.3, 'beta': 0.1},
        {
            'objective': 'cispo',
            'aggregation': 'token_mean',
            'clip_eps_low': None,
            'clip_eps_high': 0.3,
            'kl_loss_coef': 0.1,
        },
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_losses_of_grpo_trainer(name: str) -> None:
    theirs, ours = CASES[name]
    loss, gradient = _theirs(trl.GRPOTrainer, **theirs)
    got, got_gradient = _ours(**ours)
    assert got == pytest.approx(loss, rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(got_gradient, gradient, atol=1e-5)
    assert np.abs(gradient).max() > 1e-2


def test_loss_of_rloo_trainer_where_it_samples() -> None:
    """TRL's ratio is that of whole responses, ours of tokens: equal where old = now."""
    now = np.where(MASK, NOW, 0)
    _, gradient = _theirs(trl.RLOOTrainer, now)
    _, got = _ours(now, aggregation='sequence_sum')
    np.testing.assert_allclose(got, gradient, atol=1e-5)
    assert np.abs(gradient).max() > 1e-2


def test_the_overlong_penalty() -> None:
    rewards = pytest.importorskip('trl.rewards')
    theirs = rewards.get_soft_overlong_punishment(20, 6)
    expected = theirs([[1] * length for length in range(25)])
    got = overlong_penalty(jnp.arange(25), max_length=20, buffer=6)
    np.testing.assert_allclose(got, expected, atol=1e-6)
