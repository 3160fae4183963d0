"""A world so small that every response can be written down, and policies that are
tables.

Two prompts of one token; a response is up to three tokens of a vocabulary of four, of
which one is EOS: 40 responses to a prompt. ``TablePolicy`` and ``TableValue`` have the
interfaces of ``CausalLM`` and ``ScalarModel``, and their parameters are logits and
numbers by prefix, so that they hold any distribution and any values. The optimum of
E[r] − β·KL is then known in closed form, and so is every expectation: what a step does
is compared with it, without sampling or with. ``known_answers.py`` measures the
distances, ``tests/known`` tests the fixed points.
"""

from __future__ import annotations

import itertools
import types
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.transformer import KVCache
from rlhf_jax.types import Array, Generation, Params

VOCAB, EOS, LONGEST, PROMPTS = 4, 3, 3, (0, 1)
LENGTH = 1 + LONGEST  # tokens of a prompt and its response
PREFIXES = (VOCAB + 1) ** LENGTH  # numbers of VOCAB + 1 digits, with 0 for no token


# ------------------------------------------------------------------------------- models


def _prefixes(tokens: Array, mask: Array) -> Array:
    """The number of what has been read at every place, [B, T] int32."""
    number, numbers = jnp.zeros(tokens.shape[0], jnp.int32), []
    for place in range(tokens.shape[1]):
        number = _longer(number, tokens[:, place], mask[:, place])
        numbers.append(number)
    return jnp.stack(numbers, axis=1)


def _longer(number: Array, tokens: Array, real: Array) -> Array:
    return jnp.where(real, number * (VOCAB + 1) + tokens + 1, number)


class TablePolicy(nn.Module):
    """Next-token logits by prefix: params ``{'logits': [PREFIXES, VOCAB]}``.

    The hidden states are the logits, and the unembedding is the identity.
    """

    last: int | None = None
    config = types.SimpleNamespace(
        logit_softcap=None,
        is_unrolled=False,
        num_tokens=None,  # all of the vocabulary
        check_length=lambda length: None,  # a table has a row for every prefix
    )

    def setup(self) -> None:
        self.logits = self.param('logits', nn.initializers.zeros, (PREFIXES, VOCAB))

    def __call__(self, tokens: Array, mask: Array) -> Array:
        """[B, T] → [B, T, V], or the last of them."""
        hidden = self.logits[_prefixes(tokens, mask)]
        return hidden if self.last is None else hidden[:, -self.last :]

    def prefill(
        self, tokens: Array, mask: Array, cache_length: int
    ) -> tuple[Array, KVCache]:
        """Hidden states, and a cache that keeps the prefixes as its positions."""
        numbers, rows = _prefixes(tokens, mask), tokens.shape[0]
        nothing = jnp.zeros((1, rows, 1, 0, 1))
        cache = KVCache(
            keys=nothing,
            values=nothing,
            mask=jnp.zeros((rows, 0), bool),
            places=jnp.zeros((rows, 0), jnp.int32),
            slot=jnp.int32(0),
            positions=numbers[:, -1],
        )
        return self.logits[numbers], cache

    def decode(
        self, tokens: Array, real: Array, cache: KVCache
    ) -> tuple[Array, KVCache]:
        """One more token of every row, [B] → [B, V]."""
        numbers = _longer(cache.positions, tokens, real)
        return self.logits[numbers], cache.replace(positions=numbers)

    def unembedding(self, params: Params) -> Array:
        """[V, V]."""
        return jnp.eye(VOCAB)


class TableValue(nn.Module):
    """A number by prefix: params ``{'values': [PREFIXES]}``; critic or reward model."""

    last: int | None = None
    config = types.SimpleNamespace(attention='causal', is_unrolled=False)

    @nn.compact
    def __call__(self, tokens: Array, mask: Array) -> Array:
        """[B, T] → [B, T], or the last of them."""
        values = self.param('values', nn.initializers.zeros, (PREFIXES,))
        values = values[_prefixes(tokens, mask)]
        return values if self.last is None else values[:, -self.last :]


# ---------------------------------------------------------------------------- responses


class Responses(NamedTuple):
    """All responses to all prompts, [N] rows of LENGTH tokens, by prompt."""

    tokens: np.ndarray  # [N, LENGTH] int32
    mask: np.ndarray  # [N, LENGTH] bool
    prompt: np.ndarray  # [N], index of the prompt
    lengths: np.ndarray  # [N], tokens of the response

    @property
    def response_mask(self) -> np.ndarray:
        """[N, LENGTH] bool."""
        return self.mask & (np.arange(LENGTH) > 0)


def all_responses() -> Responses:
    """Every response that ends by EOS, or at the longest length."""
    texts = [
        y
        for size in range(1, LONGEST + 1)
        for y in itertools.product(range(VOCAB), repeat=size)
        if EOS not in y[:-1] and (y[-1] == EOS or size == LONGEST)
    ]
    rows = [(i, y) for i in range(len(PROMPTS)) for y in texts]
    tokens = np.zeros((len(rows), LENGTH), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, (i, y) in enumerate(rows):
        tokens[row, : 1 + len(y)] = (PROMPTS[i], *y)
        mask[row, : 1 + len(y)] = True
    prompt = np.array([i for i, _ in rows])
    return Responses(tokens, mask, prompt, mask.sum(1) - 1)


ALL = all_responses()
NUMBERS = np.asarray(_prefixes(jnp.asarray(ALL.tokens), jnp.asarray(ALL.mask)))
SAME = ALL.prompt[:, None] == ALL.prompt  # [N, N] bool, responses to one prompt


def per_prompt(x: np.ndarray) -> np.ndarray:
    """Sums over the responses to a prompt, given to each of them, [N]."""
    return SAME @ x


def token_logprobs(params: Params) -> Array:
    """Log-probabilities of the tokens of all responses, [N, LENGTH]; 0 outside."""
    logits = jax.nn.log_softmax(params['logits'], axis=-1)
    logits = logits[NUMBERS[:, :-1], ALL.tokens[:, 1:]]
    return jnp.where(ALL.response_mask, jnp.pad(logits, ((0, 0), (1, 0))), 0)


def probabilities(params: Params) -> Array:
    """π(y|x) of all responses, [N]; they sum to 1 for each prompt."""
    return jnp.exp(jnp.sum(token_logprobs(params), axis=-1))


def policy_of(probability: np.ndarray) -> Params:
    """The table of a distribution of responses, [N] that sum to 1 for each prompt."""
    mass = np.zeros((PREFIXES, VOCAB))
    for row, place in np.argwhere(ALL.response_mask):
        before = NUMBERS[row, place - 1]
        mass[before, ALL.tokens[row, place]] += probability[row]
    logits = np.where(mass > 0, np.log(np.where(mass > 0, mass, 1)), 0)
    total = np.log(np.maximum(mass.sum(1, keepdims=True), 1e-300))
    return {'logits': jnp.asarray(np.where(mass > 0, logits - total, 0), jnp.float32)}


def values_of(probability: np.ndarray, to_go: np.ndarray) -> Params:
    """The table of true values: the mean, by prefix, of what is to come.

    Args:
        probability: [N] of the policy.
        to_go: [N, LENGTH], at t the sum of the rewards of the tokens from t on.
    """
    mass, total = np.zeros(PREFIXES), np.zeros(PREFIXES)
    for row, place in np.argwhere(ALL.response_mask):
        before = NUMBERS[row, place - 1]
        mass[before] += probability[row]
        total[before] += probability[row] * to_go[row, place]
    return {'values': jnp.asarray(total / np.where(mass > 0, mass, 1), jnp.float32)}


def to_go(scores: np.ndarray, kl: np.ndarray, kl_coef: float) -> np.ndarray:
    """Σ_{s≥t} r_s with r_t = −β·kl_t and the score at the last token, [N, LENGTH]."""
    rewards = np.where(ALL.response_mask, -kl_coef * np.asarray(kl), 0)
    rewards[np.arange(len(rewards)), ALL.lengths] += scores
    return np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]


def generation(params: Params, rows: np.ndarray) -> Generation:
    """Responses by their row in ``ALL``, as the policy ``params`` would have sampled
    them. [B] → B rows.
    """
    tokens, mask, response = (
        jnp.asarray(x)[rows] for x in (ALL.tokens, ALL.mask, ALL.response_mask)
    )
    return Generation(
        tokens=tokens,
        mask=mask,
        response_mask=response,
        logprobs=token_logprobs(params)[rows],
        ended=jnp.any(response & (tokens == EOS), axis=-1),
    )


# ------------------------------------------------------------------------------ answers


def counted_policy(seed: int, total: int) -> np.ndarray:
    """How often each response is in a batch that *is* a distribution, [N] integers that
    sum to ``total`` for each prompt; none is 0.
    """
    rng = np.random.default_rng(seed)
    counts = []
    for _ in PROMPTS:
        size = len(ALL.prompt) // len(PROMPTS)
        weights = rng.dirichlet(np.full(size, 1.5))
        counts.append(1 + rng.multinomial(total - size, weights))
    return np.concatenate(counts)


def optimum(
    ref: np.ndarray, reward: np.ndarray, kl_coef: float
) -> tuple[np.ndarray, np.ndarray]:
    """π* = π_ref·exp(r/β)/Z, which maximises E[r] − β·KL(π ‖ π_ref), and β·log Z, the
    maximum; [N] each.
    """
    weight = ref * np.exp(reward / kl_coef)
    return weight / per_prompt(weight), kl_coef * np.log(per_prompt(weight))


def objective(
    params: Params, ref: np.ndarray, reward: np.ndarray, beta: float
) -> Array:
    """E[r] − β·KL(π ‖ π_ref), the mean over the prompts, exactly; [] and with its
    gradient.
    """
    probability = probabilities(params)
    regret = reward - beta * (jnp.log(probability) - np.log(ref))
    return jnp.sum(probability * regret) / len(PROMPTS)


def distance(params: Params, target: np.ndarray) -> float:
    """Total variation ½·Σ_y |π(y) − π*(y)|, the mean over the prompts."""
    difference = np.abs(np.asarray(probabilities(params), np.float64) - target)
    return float(difference.sum() / 2 / len(PROMPTS))
