"""Preference losses in a world of 40 responses, on every comparison with its exact
probability: the gradient is zero at the loss's own closed form.

``W[i, j]`` is how often response i is chosen over j. Which pairs are drawn does not
matter to most losses, so that they get a random measure.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.table_world import ALL, SAME, per_prompt, policy_of, token_logprobs
from rlhf_jax import preference
from rlhf_jax.algos.preference import (
    PreferenceHParams,
    preference_step,
    reference_logps,
)
from rlhf_jax.types import JudgedBatch, TokenBatch, TrainState
from tests.known.exact import BEST, PI_REF, POLICY, REF_PARAMS, START, TOTAL

RATE = 1e3  # so that the logits do not round the gradient
SGD = optax.sgd(RATE)
N, LENGTHS = len(ALL.prompt), ALL.lengths
CHOSEN, REJECTED = np.nonzero(SAME)  # every ordered pair of responses to a prompt
PI, OTHER = BEST / TOTAL, START / TOTAL
REWARD = np.random.default_rng(5).normal(size=N) * 0.3
DRAWN = np.random.default_rng(6).uniform(0.5, 1.5, (N, N))
DRAWN = (DRAWN + DRAWN.T) / 2  # how often a pair is compared


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def beats(score):
    """P(i beats j) of Bradley and Terry, [N, N]."""
    return sigmoid(score[:, None] - score)


def normalised(log_weight):
    """[N] probabilities that sum to 1 for each prompt."""
    weight = np.exp(log_weight)
    return weight / per_prompt(weight)


def root(f, low, high):
    """Where an increasing function of one number for each prompt is 0, [N]."""
    low, high = np.full(N, low), np.full(N, high)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            np.where(f(middle) < 0, middle, low),
            np.where(f(middle) < 0, high, middle),
        )
    return low


# ------------------------------------------------------------------------- closed forms


def dpo(beta, score, tempted=0.0):
    """π ∝ π_ref·exp((r − tempted)/β)."""
    return normalised(np.log(PI_REF) + (score - tempted) / beta)


def dpo_divergence(name, beta):
    """r = β·f′(π/π_ref), any policy being the optimum of some reward."""
    u = PI / PI_REF
    derivative = {
        'forward_kl': -1 / u,
        'js': np.log(u / (1 + u)),
        'alpha': -(u**-0.5) / 0.5,
    }[name]
    return PI, DRAWN * beats(beta * derivative)


def smoothed(beta, flips):
    """Labels such that with ε of them turned round they are those of r."""
    return dpo(beta, REWARD), DRAWN * (beats(REWARD) - flips) / (1 - 2 * flips)


def flipped(beta, flips):
    """Labels of r of which ε were turned round."""
    right = beats(REWARD)
    return dpo(beta, REWARD), DRAWN * ((1 - flips) * right + flips * (1 - right))


def ld_dpo(beta, alpha):
    """β·(d_shared + α·d_tail) is the reward of a response beside another one."""
    d = np.asarray(token_logprobs(policy_of(PI)) - token_logprobs(REF_PARAMS))
    sums = np.pad(np.cumsum(d[:, 1:], axis=1), ((0, 0), (1, 0)))
    shared = sums[np.arange(N)[:, None], np.minimum(LENGTHS[:, None], LENGTHS)]
    score = beta * (shared + alpha * (sums[:, -1:] - shared))
    return PI, DRAWN * sigmoid(score - score.T)


def ipo(beta, over):
    """d = E[P(y beats y′)]/β + const, for any preferences and pairs drawn evenly; per
    token d/|y|.
    """
    chance = np.random.default_rng(7).uniform(0.2, 0.8, (N, N))
    chance = np.where(SAME, (chance + 1 - chance.T) / 2, 0)
    won = chance.sum(1) / per_prompt(np.ones(N))
    if over == 'response':
        return dpo(beta, won), chance

    def log_pi(constant):
        return np.log(PI_REF) + LENGTHS * (won / beta + constant)

    constant = root(lambda c: per_prompt(np.exp(log_pi(c))) - 1, -50.0, 50.0)
    return np.exp(log_pi(constant)), chance


def exo(beta, flips):
    """β·(d_w − d_l) = (2P − 1)·log((1 − ε)/ε)."""
    gap = beta * np.log(PI / PI_REF)
    gap = gap[:, None] - gap
    return PI, DRAWN * (0.5 + gap / (2 * np.log((1 - flips) / flips)))


def simpo(beta, gamma):
    """P/(1 − P) = σ(h + γ)/σ(γ − h), h = β·(a_w − a_l); BT in β·a where γ = 0."""
    average = beta * np.log(PI) / LENGTHS
    gap = average[:, None] - average
    win, lose = sigmoid(gap + gamma), sigmoid(gamma - gap)
    return PI, DRAWN * win / (win + lose)


def cpo():
    """β = 1: BT in log π, and the chosen responses distributed as π."""
    return PI, np.repeat(PI[:, None], N, axis=1)


def orpo():
    """BT in the log odds of the mean probability of a token, and chosen responses
    distributed as |y|·π.
    """
    average = np.log(PI) / LENGTHS
    chance = np.where(SAME, beats(average - np.log(-np.expm1(average))), 0)
    often = np.ones(N)
    for _ in range(2000):
        often = np.sqrt(often * LENGTHS * PI / (chance @ often))
    return PI, chance * often[:, None] * often


def nca():
    """β = 1, pairs drawn from π_ref: π is the distribution of the chosen ones."""
    shift = np.random.default_rng(8).uniform(-0.8, 0.8, N)
    chosen = PI_REF * (1 + shift - per_prompt(PI_REF * shift))
    return chosen, chosen[:, None] * (2 * PI_REF - chosen)


def sppo(beta):
    """d = (P(y wins) − ½)/β + const·π/μ, where y is drawn with μ (here evenly)."""
    d = np.log(PI / PI_REF)
    excess = beta * (d - per_prompt(d) * PI)  # of the win rate over ½
    assert np.abs(per_prompt(excess)).max() < 1e-9
    return PI, 0.5 + excess[:, None] - excess


CLOSED = {
    'dpo': ('dpo', {'beta': 0.2}, lambda: (dpo(0.2, REWARD), DRAWN * beats(REWARD))),
    'dpo-forward_kl': (
        'dpo',
        {'beta': 0.2, 'divergence': 'forward_kl'},
        lambda: dpo_divergence('forward_kl', 0.2),
    ),
    'dpo-js': (
        'dpo',
        {'beta': 0.2, 'divergence': 'js'},
        lambda: dpo_divergence('js', 0.2),
    ),
    'dpo-alpha': (
        'dpo',
        {'beta': 0.2, 'divergence': 'alpha', 'alpha': 0.5},
        lambda: dpo_divergence('alpha', 0.2),
    ),
    'dpo-smoothed': (
        'dpo',
        {'beta': 0.2, 'label_smoothing': 0.1},
        lambda: smoothed(0.2, 0.1),
    ),
    'robust_dpo': (
        'robust_dpo',
        {'beta': 0.2, 'label_smoothing': 0.2},
        lambda: flipped(0.2, 0.2),
    ),
    'r_dpo': (
        'r_dpo',
        {'beta': 0.2, 'alpha': 0.15},
        lambda: (dpo(0.2, REWARD, 0.15 * LENGTHS), DRAWN * beats(REWARD)),
    ),
    'ld_dpo': ('ld_dpo', {'beta': 0.2, 'alpha': 0.3}, lambda: ld_dpo(0.2, 0.3)),
    'ipo': ('ipo', {'beta': 0.3}, lambda: ipo(0.3, 'response')),
    'ipo-token': ('ipo', {'beta': 0.3, 'over': 'token'}, lambda: ipo(0.3, 'token')),
    'exo': ('exo', {'beta': 0.1}, lambda: exo(0.1, 1e-3)),
    'simpo': ('simpo', {'beta': 0.7, 'gamma': 0.0}, lambda: simpo(0.7, 0.0)),
    'simpo-margin': ('simpo', {'beta': 0.7, 'gamma': 0.5}, lambda: simpo(0.7, 0.5)),
    'cpo': ('cpo', {'beta': 1.0}, cpo),
    'orpo': ('orpo', {'beta': 0.5}, orpo),
    'nca': ('nca', {'beta': 1.0}, nca),
    'sppo': ('sppo', {'beta': 0.05}, lambda: sppo(0.05)),
}


# ----------------------------------------------------------------------------- the step


@functools.partial(jax.jit, static_argnames=('loss', 'loss_hp'))
def _moved(params, batch, *, loss, loss_hp):
    """Minus the gradient of the mean loss, of the public step."""
    state = TrainState(
        step=jnp.int32(0),
        rng=jax.random.PRNGKey(0),
        params=params,
        opt_state=SGD.init(params),
    )
    after, _ = preference_step(
        state,
        batch,
        model=POLICY,
        tx=SGD,
        hp=PreferenceHParams(),
        loss=loss,
        loss_hp=loss_hp,
    )
    return (after.params['logits'] - params['logits']) / RATE


def moved(probability, batch, name, settings):
    loss = preference.load(name, 'name')
    if loss.REFERENCE:
        batch = batch.replace(**reference_logps(REF_PARAMS, batch, model=POLICY))
    params = policy_of(probability)
    return np.abs(_moved(params, batch, loss=loss, loss_hp=loss.HParams(**settings)))


def pairs(chosen):
    """Every comparison, with how often each is in the data.

    ``chosen`` [N, N]: how often the first response is chosen over the second.
    """
    two = np.stack([CHOSEN, REJECTED], axis=1)
    weight = chosen[CHOSEN, REJECTED]
    assert weight.min() >= 0
    return JudgedBatch(
        tokens=jnp.asarray(ALL.tokens[two]),
        mask=jnp.asarray(ALL.mask[two]),
        response_mask=jnp.asarray(ALL.response_mask[two]),
        weight=jnp.asarray(weight / weight.mean(), jnp.float32),
    )


@pytest.mark.parametrize('case', CLOSED)
def test_the_gradient_is_zero_at_the_closed_form(case):
    name, settings, closed = CLOSED[case]
    best, chosen = closed()
    np.testing.assert_allclose(per_prompt(best), 1, atol=1e-9)
    batch = pairs(chosen)
    elsewhere = moved(OTHER, batch, name, settings).max()
    here = moved(best, batch, name, settings).max()
    assert here < 1e-4 * elsewhere and elsewhere > 1e-4


# ----------------------------------------------------------------------------- unpaired


def unpaired(good, often):
    """Every response once as desirable and once not, by how often it is either."""
    twice = np.concatenate([np.arange(N)] * 2)
    tokens, mask, response = (
        jnp.asarray(x[twice]) for x in (ALL.tokens, ALL.mask, ALL.response_mask)
    )
    weight = np.concatenate([often * good, often * (1 - good)])
    return JudgedBatch(
        tokens=tokens[:, None],
        mask=mask[:, None],
        response_mask=response[:, None],
        labels=jnp.asarray(np.repeat([1.0, 0.0], N)[:, None, None], jnp.float32),
        weight=jnp.asarray(weight / weight.mean(), jnp.float32),
        mismatched=TokenBatch(tokens=tokens, mask=mask, loss_mask=response),
    )


def bco(beta):
    """π ∝ π_ref·exp(logit P(desirable)/β), where the mean logit of the data is 0."""
    often = np.random.default_rng(9).uniform(0.5, 1.5, N)
    # δ is one number for both prompts, so that both must have the same log Z.
    score = REWARD - beta * np.log(per_prompt(PI_REF * np.exp(REWARD / beta)))
    score -= (often * score).sum() / often.sum()
    return normalised(np.log(PI_REF) + score / beta), sigmoid(score), often


def kto(beta, gain):
    """m·(λ_D·q − λ_U·(1 − q))·σ′(β·(d − z)) ∝ π: q desirable of m responses."""
    good = np.random.default_rng(9).uniform(0.5, 0.9, N)
    d, anchor = np.log(PI / PI_REF), 0.0
    for _ in range(100):
        above = beta * (d - anchor)
        slope = sigmoid(above) * sigmoid(-above)
        often = PI / (slope * (gain * good - (1 - good)))
        anchor = max(0.0, (often * d).sum() / often.sum())
    return PI, good, often


@pytest.mark.parametrize(
    'name, settings, closed',
    [
        ('bco', {'beta': 0.2}, lambda: bco(0.2)),
        ('kto', {'beta': 0.2, 'desirable_weight': 1.3}, lambda: kto(0.2, 1.3)),
    ],
    ids=['bco', 'kto'],
)
def test_the_gradient_on_single_responses_is_zero_at_the_closed_form(
    name, settings, closed
):
    best, good, often = closed()
    batch = unpaired(good, often)
    elsewhere = moved(OTHER, batch, name, settings).max()
    here = moved(best, batch, name, settings).max()
    assert here < 1e-4 * elsewhere and elsewhere > 1e-4
