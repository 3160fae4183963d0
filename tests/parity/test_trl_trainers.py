"""Trainers of TRL on small Llamas: SFT, reward models, and critic-free advantages.

Both sides start from the same Hugging Face directory. TRL's trainer computes the loss
of a batch and its gradient; the gradient is saved in place of the weights, so that our
importer reads it as a tree of parameters that ours can be compared with. Advantages are
those that the trainers make of given responses and rewards. Read ``test_trl_ppo.py``
next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from rlhf_jax import hf
from rlhf_jax.algos import estimators
from rlhf_jax.algos.policy_gradient import PolicyHParams, prepare_policy
from rlhf_jax.algos.rm import RMHParams, rm_loss
from rlhf_jax.algos.rollout import policy_logprobs
from rlhf_jax.algos.sft import sft_loss
from rlhf_jax.models.heads import CausalLM, ScalarModel
from rlhf_jax.types import (
    Generation,
    JudgedBatch,
    OnlineState,
    Params,
    Scores,
    TokenBatch,
)
from tests.parity.trl_side import PAD, llama, tokenizer

torch = pytest.importorskip('torch')
trl = pytest.importorskip('trl')
transformers = pytest.importorskip('transformers')
datasets = pytest.importorskip('datasets')

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning'),
]

V, ROWS, LENGTH = 64, 8, 12
OFF = {
    'report_to': 'none',
    'use_cpu': True,
    'bf16': False,
    'gradient_checkpointing': False,
    'disable_tqdm': True,
    'save_strategy': 'no',
}


def _long(x: Any) -> Any:
    return torch.tensor(np.asarray(x), dtype=torch.int64)


def _rows(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [*shape, LENGTH] and the mask of rows of 4 to LENGTH tokens."""
    rng = np.random.default_rng(0)
    mask = np.arange(LENGTH) < rng.integers(4, LENGTH + 1, size=(*shape, 1))
    tokens = rng.integers(3, V, size=mask.shape)
    return np.where(mask, tokens, PAD).astype(np.int32), mask


def _load(directory: Path, head: str) -> Params:
    return hf.load_params(directory, hf.load_config(directory), head=head)


def _assert_same(ours: tuple, loss: Any, model: Any, folder: Path, head: str) -> None:
    """Compares the loss, and the gradient of every parameter that both sides have."""
    value, gradient = ours
    loss.backward()
    assert float(value) == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder)
    flatten = lambda tree: traverse_util.flatten_dict(tree, sep='/')  # noqa: E731
    expected = flatten(_load(folder, head))
    got = flatten(gradient)
    assert got.keys() == expected.keys()
    for path, want in expected.items():
        if path == 'head/bias':  # transformers has none
            continue
        assert np.abs(want).max() > 1e-4, path
        np.testing.assert_allclose(got[path], want, atol=1e-5, err_msg=path)


def test_the_sft_trainer(tmp_path):
    """Its default loss, over the tokens of a batch that is one of two microbatches."""
    model = llama(transformers.LlamaForCausalLM, V, seed=0)
    model.save_pretrained(tmp_path / 'start')
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **OFF),
        processing_class=tokenizer(V),
        train_dataset=datasets.Dataset.from_dict({'input_ids': [[3, 4, 5]]}),
    )
    tokens, mask = _rows(ROWS)
    counted = mask & (np.arange(LENGTH) >= 2)
    inputs = {
        'input_ids': _long(tokens),
        'attention_mask': _long(mask),
        'labels': _long(np.where(counted, tokens, -100)),
    }
    num_items = 100  # tokens of both microbatches
    loss = trainer.compute_loss(
        trainer.model, inputs, num_items_in_batch=torch.tensor(num_items)
    )

    ours = CausalLM(hf.load_config(tmp_path / 'start'))
    batch = TokenBatch(tokens=tokens, mask=mask, loss_mask=counted)

    def mean(params):
        return sft_loss(params, batch, model=ours)[0] / num_items

    result = jax.jit(jax.value_and_grad(mean))(_load(tmp_path / 'start', 'lm'))
    _assert_same(result, loss, trainer.model, tmp_path / 'gradient', 'lm')


@pytest.mark.parametrize('center', [None, 0.3])
def test_the_reward_trainer(tmp_path, center):
    """Pairs with margins; with and without centering."""
    model = llama(transformers.LlamaForSequenceClassification, V, seed=1)
    model.save_pretrained(tmp_path / 'start')
    pair = {'chosen_ids': [[3, 4]], 'rejected_ids': [[3, 5]]}
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(
            output_dir=str(tmp_path), center_rewards_coefficient=center, **OFF
        ),
        processing_class=tokenizer(V),
        train_dataset=datasets.Dataset.from_dict(pair),
    )
    tokens, mask = _rows(ROWS, 2)
    margin = np.random.default_rng(1).uniform(0, 2, ROWS).astype(np.float32)
    stacked = [np.concatenate([x[:, 0], x[:, 1]]) for x in (tokens, mask)]
    inputs = {
        'input_ids': _long(stacked[0]),
        'attention_mask': _long(stacked[1]),
        'margin': torch.tensor(margin),
    }
    loss = trainer.compute_loss(trainer.model, inputs)

    ours = ScalarModel(hf.load_config(tmp_path / 'start'))
    batch = JudgedBatch(
        tokens=tokens, mask=mask, margin=margin, weight=np.ones(ROWS, np.float32)
    )

    def mean(params):
        hp = RMHParams(center_coef=center or 0.0)
        total, weight, _ = rm_loss(params, batch, model=ours, hp=hp)
        return total / weight

    result = jax.jit(jax.value_and_grad(mean))(_load(tmp_path / 'start', 'scalar'))
    _assert_same(result, loss, trainer.model, tmp_path / 'gradient', 'scalar')


# ---------------------------------------------------------------------- advantages

G, QUERY = 4, 3
REWARDS = [0.25, -0.75, 1.5, 0.4, 0.5, 0.5, 0.5, 0.5]  # group 2: all equal


def _rollout_of_trl(cls: Any, config: Any, folder: Path, **settings: Any) -> Any:
    """What a trainer makes of fixed responses with the rewards above."""
    tokens, mask = _rows(ROWS)
    prompts = np.full((ROWS, QUERY), 7)
    trainer = cls(
        model=str(folder),
        reward_funcs=lambda completions, **_: REWARDS,
        args=config(
            output_dir=str(folder / 'out'),
            per_device_train_batch_size=ROWS,
            num_generations=G,
            max_completion_length=LENGTH,
            **settings,
            **OFF,
        ),
        processing_class=tokenizer(V),
        train_dataset=datasets.Dataset.from_dict({'prompt': ['w7 w7 w7'] * ROWS}),
    )
    responses = [row[real].tolist() for row, real in zip(tokens, mask)]
    texts = ['w3'] * ROWS
    if cls is trl.GRPOTrainer:
        generated = (prompts.tolist(), responses, None, texts, None, {}, None, None)
    else:
        generated = (prompts.tolist(), responses, texts)
    trainer._generate = lambda _: generated
    trainer.model.train()
    # The policy has moved away from the reference, which is that of the directory.
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    rows = [{'prompt': 'w7 w7 w7'}] * ROWS
    return trainer, trainer._generate_and_score_completions(rows)


ADVANTAGES = {
    # TRL's ε is 1e-4, ours 1e-6 by default.
    'grpo': ('GRPO', {'beta': 0.0}, {}, {'eps': 1e-4}),
    'dr_grpo': ('GRPO', {'beta': 0.0, 'scale_rewards': 'none'}, {}, {}),
    'rloo': ('RLOO', {'beta': 0.05}, {'kl_coef': 0.05}, {}),
}


@pytest.mark.parametrize('name', ADVANTAGES)
def test_advantages(tmp_path, name):
    """RLOO's rewards hold the KL to the reference, at temperature 0.7 on both sides."""
    kind, theirs, hp, estimator_hp = ADVANTAGES[name]
    llama(transformers.LlamaForCausalLM, V, seed=2).save_pretrained(tmp_path)
    trainer, rollout = _rollout_of_trl(
        getattr(trl, f'{kind}Trainer'),
        getattr(trl, f'{kind}Config'),
        tmp_path,
        temperature=0.7,
        **theirs,
    )
    trainer.model.save_pretrained(tmp_path / 'policy')

    tokens, mask = _rows(ROWS)
    tokens = np.concatenate([np.full((ROWS, QUERY), 7, np.int32), tokens], 1)
    whole = np.concatenate([np.ones((ROWS, QUERY), bool), mask], 1)
    response = whole & (np.arange(QUERY + LENGTH) >= QUERY)
    model = CausalLM(hf.load_config(tmp_path))
    params = _load(tmp_path / 'policy', 'lm')
    logprobs, _ = policy_logprobs(params, tokens, whole, model=model, temperature=0.7)
    state = OnlineState(
        step=jnp.int32(0),
        rng=jax.random.key(0),
        params={'policy': params},
        opt_state=(),
    )
    generation = Generation(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(whole),
        response_mask=jnp.asarray(response),
        logprobs=jnp.where(response, logprobs, 0),
        ended=jnp.ones(ROWS, bool),
    )
    estimator = estimators.load(name, 'name')
    result, metrics = prepare_policy(
        state,
        _load(tmp_path, 'lm'),
        generation,
        Scores(jnp.float32(REWARDS)),
        model=model,
        hp=PolicyHParams(group_size=G, temperature=0.7, **hp),
        estimator=estimator,
        estimator_hp=estimator.HParams(**estimator_hp),
    )
    want = np.where(response, rollout['advantages'].numpy()[:, None], 0)
    np.testing.assert_allclose(result.advantages, want, rtol=1e-5, atol=1e-5)
    assert np.abs(want).max() > 0.5
    if name == 'rloo':  # or nothing would be shown about the KL
        assert abs(float(metrics['objective/kl'].value())) > 1
    else:
        assert not np.any(want[G:])  # a group of equal rewards
