"""The preference losses against TRL's own code, value and gradient, on random batches.

TRL's methods run on a stand-in for the trainer and a model whose parameters *are* its
logits; ours run through ``preference_loss`` on a model of the same kind. So masks,
sums, the shift against tokens, the mean over rows and the metrics are compared as well.
Read ``test_torch_losses.py`` next.
"""

from __future__ import annotations

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import preference
from rlhf_jax.algos.preference import batch_context, preference_loss, reference_logps
from rlhf_jax.types import JudgedBatch, TokenBatch
from tests.parity.trl_side import TorchLogits

torch = pytest.importorskip('torch')
dpo_trainer = pytest.importorskip('trl.trainer.dpo_trainer')
kto_trainer = pytest.importorskip('trl.trainer.kto_trainer')
cpo_trainer = pytest.importorskip('trl.experimental.cpo.cpo_trainer')
orpo_trainer = pytest.importorskip('trl.experimental.orpo.orpo_trainer')

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning'),
]

ROWS, LENGTH, VOCABULARY = 6, 10, 11
METRICS = (
    'rewards/chosen',
    'rewards/rejected',
    'rewards/accuracies',
    'rewards/margins',
    'logps/chosen',
    'logps/rejected',
)


class _Logits:
    """Ours: ``{'logits': …}`` are the logits, whatever the tokens."""

    config = types.SimpleNamespace(logit_softcap=None, num_tokens=None)

    def apply(self, variables, tokens, mask):
        return variables['params']['logits'].reshape(-1, LENGTH, VOCABULARY)

    def unembedding(self, params):
        return jnp.eye(VOCABULARY)


def _accelerator():
    same = lambda x: x  # noqa: E731
    return types.SimpleNamespace(
        device='cpu', gather=same, gather_for_metrics=same, use_distributed=False
    )


def _texts(rng, *shape):
    place = np.arange(LENGTH)
    ends = rng.integers(3, LENGTH + 1, size=(*shape, 1))
    mask = place < ends
    tokens = rng.integers(0, VOCABULARY, size=mask.shape).astype(np.int32)
    starts = rng.integers(1, 3, size=(*shape, 1))
    return tokens, mask, mask & (place >= starts)


def _random_pairs():
    rng = np.random.default_rng(0)
    logits, ref = rng.normal(0, 2, (2, ROWS, 2, LENGTH, VOCABULARY))
    tokens, mask, response = _texts(rng, ROWS, 2)
    batch = JudgedBatch(
        tokens=tokens,
        mask=mask,
        response_mask=response,
        weight=np.ones(ROWS, np.float32),
    )
    fields = reference_logps({'logits': jnp.float32(ref)}, batch, model=_Logits())
    return batch.replace(**fields), np.float32(logits), np.float32(ref)


def _stacked(x):
    """TRL has all chosen rows in front of all rejected ones."""
    return np.concatenate([x[:, 0], x[:, 1]])


def _ours(name, batch, logits, **hp):
    module = preference.load(name, 'name')
    how = {'model': _Logits(), 'loss': module, 'loss_hp': module.HParams(**hp)}
    context = batch_context({'logits': logits}, batch, **how)

    def mean(logits):
        total, weight, metrics = preference_loss(
            {'logits': logits}, batch, context, **how
        )
        return total / weight, metrics

    (value, metrics), gradient = jax.value_and_grad(mean, has_aux=True)(logits)
    return value, gradient, {k: float(m.value()) for k, m in metrics.items()}


def _assert_same(ours, value, gradient):
    np.testing.assert_allclose(ours[0], value, rtol=1e-5, atol=1e-5)
    assert np.abs(gradient).max() > 1e-4, 'a gradient of 0 shows nothing'
    np.testing.assert_allclose(ours[1], gradient, rtol=1e-5, atol=1e-5)


def _dpo_trainer(loss_type, beta, ref, extra):
    """What ``DPOTrainer._compute_loss`` reads of its trainer. Its α-divergence knows no
    float64.
    """
    ref_model = TorchLogits(_stacked(ref))
    settings = {
        'accelerator': _accelerator(),
        'aux_loss_enabled': False,
        'ld_alpha': None,
        'precompute_ref_logps': False,
        'ref_model': ref_model,
        'model': ref_model,
        'beta': beta,
        'loss_types': [loss_type],
        'loss_weights': [1.0],
        'f_divergence_type': 'reverse_kl',
        'f_alpha_divergence_coef': 0.5,
        'label_smoothing': 0.0,
        'use_weighting': False,
        '_metrics': collections.defaultdict(lambda: collections.defaultdict(list)),
        '_total_train_tokens': 0,
        '_tp_size': 1,
        'args': types.SimpleNamespace(
            gradient_checkpointing_kwargs=None, discopop_tau=0.05
        ),
    }
    return types.SimpleNamespace(**{**settings, **extra})


# (our loss, our hyperparameters, TRL's loss_type, what else its trainer is told)
PAIRWISE = [
    ('dpo', {}, 'sigmoid', {}),
    (
        'dpo',
        {'divergence': 'forward_kl'},
        'sigmoid',
        {'f_divergence_type': 'forward_kl'},
    ),
    ('dpo', {'divergence': 'js'}, 'sigmoid', {'f_divergence_type': 'js_divergence'}),
    # Its coefficient of the α-divergence is 1 − α.
    (
        'dpo',
        {'divergence': 'alpha', 'alpha': 0.3},
        'sigmoid',
        {'f_divergence_type': 'alpha_divergence', 'f_alpha_divergence_coef': 0.7},
    ),
    ('robust_dpo', {'label_smoothing': 0.2}, 'robust', {'label_smoothing': 0.2}),
    ('ipo', {'over': 'token'}, 'ipo', {}),
    ('hinge', {}, 'hinge', {}),
    ('exo', {'label_smoothing': 0.01}, 'exo_pair', {'label_smoothing': 0.01}),
    ('nca', {}, 'nca_pair', {}),
    ('sppo', {'beta': 0.1}, 'sppo_hard', {}),
    ('aot', {'label_smoothing': 0.1}, 'aot', {'label_smoothing': 0.1}),
    ('apo_zero', {}, 'apo_zero', {}),
    ('apo_down', {}, 'apo_down', {}),
    ('discopop', {'beta': 0.1}, 'discopop', {}),
    ('ld_dpo', {'alpha': 0.3}, 'sigmoid', {'ld_alpha': 0.3}),
]


@pytest.mark.parametrize('name, hp, loss_type, extra', PAIRWISE)
def test_losses_of_the_dpo_trainer(name, hp, loss_type, extra):
    batch, logits, ref = _random_pairs()
    ours = _ours(name, batch, logits, **hp)

    model = TorchLogits(_stacked(logits))
    trainer = _dpo_trainer(loss_type, 0.1, ref, extra)
    inputs = {
        'input_ids': torch.tensor(_stacked(batch.tokens), dtype=torch.int64),
        'attention_mask': torch.tensor(_stacked(batch.mask), dtype=torch.int64),
        'completion_mask': torch.tensor(
            _stacked(batch.response_mask), dtype=torch.int64
        ),
    }
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    gradient = model.logits.grad.numpy()
    gradient = np.stack([gradient[:ROWS], gradient[ROWS:]], 1)
    _assert_same(ours, loss.item(), gradient)
    for metric in METRICS:
        # What LD-DPO leaves out of the tail, TRL leaves out of log π as well.
        if name == 'ld_dpo' and metric.startswith('logps'):
            continue
        [theirs] = trainer._metrics['train'][metric]
        assert ours[2][metric] == pytest.approx(theirs, rel=1e-4, abs=1e-5), metric


def _response_sums(trainer_cls, model, batch, average):
    """[P] chosen and rejected log-probabilities by TRL's ``get_batch_logps``."""
    labels = np.where(_stacked(batch.response_mask), _stacked(batch.tokens), -100)
    logps = trainer_cls.get_batch_logps(
        model.logits, torch.tensor(labels, dtype=torch.int64), average_log_prob=average
    )
    return logps[:ROWS], logps[ROWS:]


@pytest.mark.parametrize('name', ['simpo', 'cpo'])
def test_losses_of_the_cpo_trainer(name):
    """Its preference term; the likelihood term is added by hand, per row."""
    batch, logits, _ = _random_pairs()
    hp = {'beta': 2.0, 'gamma': 1.0} if name == 'simpo' else {'nll_over': 'token'}
    ours = _ours(name, batch, logits, **hp)
    trainer = types.SimpleNamespace(
        accelerator=_accelerator(),
        alpha=0.0,
        beta=hp.get('beta', 0.1),
        loss_type='simpo' if name == 'simpo' else 'sigmoid',
        simpo_gamma=1.0,
        label_smoothing=0.0,
    )
    model = TorchLogits(_stacked(logits), torch.float64)
    cls = cpo_trainer.CPOTrainer
    sums = _response_sums(cls, model, batch, average=name == 'simpo')
    losses, chosen, rejected = cls.cpo_loss(trainer, *sums)
    if name == 'cpo':
        losses = losses - _response_sums(cls, model, batch, average=True)[0]
    losses.mean().backward()
    gradient = model.logits.grad.numpy()
    _assert_same(
        ours, losses.mean().item(), np.stack([gradient[:ROWS], gradient[ROWS:]], 1)
    )
    assert ours[2]['rewards/chosen'] == pytest.approx(chosen.mean().item(), rel=1e-4)
    assert ours[2]['rewards/rejected'] == pytest.approx(
        rejected.mean().item(), rel=1e-4
    )


def test_odds_ratio_of_the_orpo_trainer():
    """Our likelihood term is that of the response per row, so it is added by hand."""
    batch, logits, _ = _random_pairs()
    # Half of the responses are likely ones, where 1 − eᵃ is small.
    boost = 8 * np.eye(VOCABULARY)[np.roll(batch.tokens, -1, -1)]
    boost[::2] = 0
    logits = np.float32(logits + boost)
    ours = _ours('orpo', batch, logits, beta=0.5)
    model = TorchLogits(_stacked(logits), torch.float64)
    cls = orpo_trainer.ORPOTrainer
    chosen, rejected = _response_sums(cls, model, batch, average=True)
    trainer = types.SimpleNamespace(accelerator=_accelerator(), beta=0.5)
    losses, *_ = cls.odds_ratio_loss(trainer, chosen, rejected)
    loss = -losses.mean() - chosen.mean()
    loss.backward()
    gradient = model.logits.grad.numpy()
    _assert_same(ours, loss.item(), np.stack([gradient[:ROWS], gradient[ROWS:]], 1))


def _random_unpaired():
    rng = np.random.default_rng(1)
    logits, ref = rng.normal(0, 2, (2, ROWS, LENGTH, VOCABULARY))
    tokens, mask, response = _texts(rng, ROWS)
    other = dict(zip(('tokens', 'mask', 'loss_mask'), _texts(rng, ROWS)))
    batch = JudgedBatch(
        tokens=tokens[:, None],
        mask=mask[:, None],
        response_mask=response[:, None],
        labels=(np.arange(ROWS) % 3 > 0).astype(np.float32)[:, None, None],
        weight=np.ones(ROWS, np.float32),
        mismatched=TokenBatch(**other),
    )
    fields = reference_logps({'logits': jnp.float32(ref)}, batch, model=_Logits())
    return batch.replace(**fields), np.float32(logits), np.float32(ref)


@pytest.mark.parametrize('weights', [(1.0, 1.0), (1.5, 0.7)])
def test_the_kto_trainer(weights):
    """On both sides the mismatched texts meet the logits of the row itself."""
    batch, logits, ref = _random_unpaired()
    ours = _ours(
        'kto',
        batch,
        logits,
        beta=0.3,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    ours_kl = ours[2]['kl']
    cls = kto_trainer.KTOTrainer
    trainer = types.SimpleNamespace(
        accelerator=_accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        calculate_KL=True,
        use_liger_kernel=False,
        ref_model=TorchLogits(ref, torch.float64),
        model=TorchLogits(ref, torch.float64),
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        beta=0.3,
        loss_type='kto',
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = types.MethodType(cls._compute_kl_logps, trainer)

    def long(x):
        return torch.tensor(np.asarray(x), dtype=torch.int64)

    other = batch.mismatched
    inputs = {
        'input_ids': long(batch.tokens[:, 0]),
        'attention_mask': long(batch.mask[:, 0]),
        'completion_mask': long(batch.response_mask[:, 0]),
        'KL_input_ids': long(other.tokens),
        'KL_attention_mask': long(other.mask),
        'KL_completion_mask': long(other.loss_mask),
        'label': torch.tensor(batch.desirable),
    }
    model = TorchLogits(logits, torch.float64)
    loss = cls._compute_loss(trainer, model, inputs, False)
    loss.backward()
    _assert_same(ours, loss.item(), model.logits.grad.numpy())
    [kl] = trainer._metrics['train']['kl']
    assert kl > 0 and ours_kl == pytest.approx(kl, rel=1e-5)
    for metric in ('rewards/chosen', 'rewards/rejected', 'logps/chosen'):
        [theirs] = trainer._metrics['train'][metric]
        assert ours[2][metric] == pytest.approx(theirs, rel=1e-4), metric


def test_the_bco_trainer():
    """At its first batch, where its running mean is that of the batch."""
    bco_trainer = pytest.importorskip(
        'trl.experimental.bco.bco_trainer', reason='TRL 1.16.0 has no BCO trainer'
    )
    batch, logits, ref = _random_unpaired()
    ours = _ours('bco', batch, logits, beta=0.3)
    cls, good = bco_trainer.BCOTrainer, torch.tensor(batch.desirable)
    labels = np.where(batch.response_mask, batch.tokens, -100)[:, 0]
    labels = torch.tensor(labels, dtype=torch.int64)
    model = TorchLogits(logits, torch.float64)
    logps = cls.get_batch_logps(model.logits, labels)
    refs = cls.get_batch_logps(TorchLogits(ref, torch.float64).logits.detach(), labels)
    trainer = types.SimpleNamespace(
        accelerator=_accelerator(),
        beta=0.3,
        match_underlying_distribution=False,
        running=bco_trainer.RunningMoments(accelerator=_accelerator()),
    )
    losses, _, _, delta = cls.bco_loss(
        trainer, logps[good], logps[~good], refs[good], refs[~good], None, None
    )
    losses.mean().backward()
    _assert_same(ours, losses.mean().item(), model.logits.grad.numpy())
    assert ours[2]['delta'] == pytest.approx(delta.item(), rel=1e-4)
