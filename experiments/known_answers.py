"""How far methods come to rest from the optimum that is known in closed form.

    python -m experiments.known_answers        # experiments/results/known_answers.json

Every method trains a table policy in the world of ``table_world.py``, by ``generate``
and its public steps, and its total variation from π* ∝ π_ref·exp(r/β) is written down;
where a method has another fixed point, its total variation from that too. What the
fixed points are is in docs/algorithms/known_answers.md. A few minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from experiments.table_world import (
    ALL,
    EOS,
    LONGEST,
    NUMBERS,
    PREFIXES,
    PROMPTS,
    VOCAB,
    TablePolicy,
    TableValue,
    counted_policy,
    distance,
    optimum,
    per_prompt,
    policy_of,
    token_logprobs,
)
from rlhf_jax.algos.estimators import dr_grpo, grpo, reinforce_pp, remax, rloo
from rlhf_jax.algos.lagrangian import (
    ActorCritics,
    LagrangianHParams,
    initial_log_lambda,
    lagrangian_step,
    prepare_lagrangian,
)
from rlhf_jax.algos.policy_gradient import PolicyHParams, policy_step, prepare_policy
from rlhf_jax.algos.ppo import ActorCritic, PPOHParams, ppo_step, prepare
from rlhf_jax.generate import generate, sampling
from rlhf_jax.types import (
    Array,
    Generation,
    LagrangianState,
    OnlineState,
    Params,
    PPOState,
    Scores,
)

BETA = 0.5
TOTAL = 400  # the reference policy's probabilities are counts out of so many
BATCH = 4096  # responses of a rollout
MODEL, CRITIC = TablePolicy(), TableValue()
PI_REF = counted_policy(0, TOTAL) / TOTAL
REF = policy_of(PI_REF)
# Noise, a taste for length, and one prompt that pays more than the other.
REWARD = np.random.default_rng(1).normal(size=len(PI_REF)) * 0.6 + 0.3 * ALL.lengths
REWARD = REWARD + np.array([0.8, -0.8])[ALL.prompt]
COST, LIMIT = ALL.lengths.astype(float), 2.2  # tokens
BEST = optimum(PI_REF, REWARD, BETA)[0]
FIXED = {'aggregation': 'fixed_length', 'fixed_length': LONGEST}


# ------------------------------------------------------------------------- fixed points


@dataclasses.dataclass(frozen=True)
class Rest:
    """Where a policy gradient rests: at every prefix, for some constant ν,

    E[w·A | prefix, a] = ν for all a, with A = r − β·Σ_{s≥t} d_s − b     (KL in reward)
    E[w·r | prefix, a] − c·E[w | prefix, a]·(1 − π_ref/π) = ν             (k3 in loss)

    w is what the aggregation gives a token of the response: 1, or 1/|y|.
    """

    in_loss: bool = False
    by_length: bool = False  # w = 1/|y|


def at_rest(
    rest: Rest,
    reward: np.ndarray,
    kl_coef: float,
    baseline: np.ndarray,
) -> np.ndarray:
    """The policy that :class:`Rest` says, [N], from the last tokens back to the first.

    Args:
        rest: the kind.
        reward: [N].
        kl_coef: β or c.
        baseline: [N], b, by prompt; without effect where w is 1.
    """
    weight = 1 / ALL.lengths if rest.by_length else np.ones(len(reward))
    ref = np.exp(np.asarray(token_logprobs(REF), np.float64))
    chance = np.ones(len(reward))  # π(rest of y | prefix)
    paid = np.zeros(len(reward))  # Σ of d from here on
    for place in range(LONGEST, 0, -1):
        before = NUMBERS[:, place - 1]
        here = ALL.response_mask[:, place]
        for prefix in np.unique(before[here]):
            rows = here & (before == prefix)
            tokens = ALL.tokens[rows, place]
            gain = weight * (reward - baseline - (not rest.in_loss) * kl_coef * paid)
            value, share = np.zeros(VOCAB), np.zeros(VOCAB)
            np.add.at(value, tokens, (chance * gain)[rows])
            np.add.at(share, tokens, (chance * weight)[rows])
            prior = np.zeros(VOCAB)
            prior[tokens] = ref[rows, place]
            policy = _solve(value, kl_coef * share, prior, rest.in_loss)
            chance[rows] *= policy[tokens]
            paid[rows] += np.log(policy[tokens] / ref[rows, place])
    return chance


def _solve(
    value: np.ndarray, price: np.ndarray, prior: np.ndarray, in_loss: bool
) -> np.ndarray:
    """π with v − price·log(π/π_ref) = ν, or v − price·(1 − π_ref/π) = ν, where ν makes
    it sum to 1.
    """

    def policy(nu: float) -> np.ndarray:
        if in_loss:
            return prior * price / (price + nu - value)
        return prior * np.exp(np.clip((value - nu) / price, -700, 700))

    low = (value - price).max() if in_loss else (value - 50 * price).min()
    high = (value + 50 * price).max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if policy(middle).sum() > 1 else (low, middle)
    return policy(high)


def self_consistent(
    solve: Callable[[np.ndarray], np.ndarray], start: np.ndarray
) -> np.ndarray:
    """π = solve(π), by going half of the way again and again."""
    policy = start
    for _ in range(400):
        policy = np.sqrt(policy * solve(policy))
        policy = policy / per_prompt(policy)
    return policy


def _to_go(policy: np.ndarray) -> np.ndarray:
    """Σ_{s≥t} r_s of all responses, [N, T], KL penalty included."""
    d = np.asarray(token_logprobs(policy_of(policy)) - token_logprobs(REF), np.float64)
    rewards = -BETA * d
    rewards[np.arange(len(d)), ALL.lengths] += REWARD
    return np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]


def over_tokens(policy: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    """Mean and variance over all response tokens of a large rollout."""
    weight = policy[:, None] * ALL.response_mask
    mean = (weight * x).sum() / weight.sum()
    return mean, (weight * (x - mean) ** 2).sum() / weight.sum()


def whitened_rewards(policy: np.ndarray) -> np.ndarray:
    """π_ref·exp((r + κ·|y|)/β)/Z, κ = μ·(σ − 1), from the token rewards under π."""
    sums = np.pad(_to_go(policy), ((0, 0), (0, 1)))
    mean, variance = over_tokens(policy, sums[:, :-1] - sums[:, 1:])
    return optimum(PI_REF, REWARD + mean * (variance**0.5 - 1) * ALL.lengths, BETA)[0]


def divided(policy: np.ndarray, rest: Rest) -> np.ndarray:
    """At rest with (r − mean r)/std r of the prompt in the place of r: large groups."""
    mean = per_prompt(policy * REWARD)
    std = np.sqrt(per_prompt(policy * (REWARD - mean) ** 2))
    return at_rest(rest, (REWARD - mean) / std, BETA, np.zeros(len(policy)))


def normalised_by_length(policy: np.ndarray) -> np.ndarray:
    """REINFORCE++ with a mean over the tokens of a response."""
    mean = np.full(len(policy), over_tokens(policy, _to_go(policy))[0])
    return at_rest(Rest(by_length=True), REWARD, BETA, mean)


def greedy_by_length(policy: np.ndarray) -> np.ndarray:
    """ReMax with a mean over the tokens of a response."""
    return at_rest(Rest(by_length=True), REWARD, BETA, REWARD[greedy_rows(policy)])


def greedy_rows(policy: np.ndarray) -> np.ndarray:
    """For every response the row of the greedy one to its prompt, [N]."""
    logits = np.asarray(policy_of(policy)['logits'])
    best = {}
    for row in range(len(policy)):
        places = np.nonzero(ALL.response_mask[row])[0]
        choice = logits[NUMBERS[row, places - 1]].argmax(1)
        if (choice == ALL.tokens[row, places]).all():
            best[ALL.prompt[row]] = row
    return np.array([best[i] for i in ALL.prompt])


# ------------------------------------------------------------------------------ methods

Step = Callable[[OnlineState, Generation, Array, Array], OnlineState]


def score(generation: Generation, table: np.ndarray) -> Array:
    """Looks responses up, [B]."""
    number = jnp.zeros(generation.tokens.shape[0], jnp.int32)
    for place in range(generation.tokens.shape[1]):
        longer = number * (VOCAB + 1) + generation.tokens[:, place] + 1
        number = jnp.where(generation.mask[:, place], longer, number)
    by_number = np.zeros(PREFIXES, np.float32)
    by_number[NUMBERS[np.arange(len(table)), ALL.lengths]] = table
    return jnp.asarray(by_number)[number]


def sample(params: Params, key: Array, per: int, temperature: float) -> Generation:
    """A rollout of ``per`` adjacent responses, each to a prompt; BATCH in all."""
    prompts = jnp.tile(jnp.asarray(PROMPTS), BATCH // per // len(PROMPTS))[:, None]
    return generate(
        params,
        prompts,
        jnp.ones_like(prompts, bool),
        jnp.arange(BATCH),
        key,
        sampling(eos_ids=[EOS], temperature=temperature),
        model=MODEL,
        max_new_tokens=LONGEST,
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    hp: PolicyHParams | PPOHParams
    estimator: ModuleType | None = None  # None: PPO
    rate: float = 0.03  # of Adam, at first; it falls to 0
    fixed_point: Callable[[], np.ndarray] | None = None  # None: π*
    constraint: LagrangianHParams | None = None


def critic_free(name: str, estimator: ModuleType, **settings) -> Method:
    """A method without a critic; ``rest``: its own fixed point."""
    rest = settings.pop('rest', None)
    settings = {'group_size': 8, 'kl_coef': BETA, **settings}
    return Method(name, PolicyHParams(**settings), estimator, fixed_point=rest)


def from_best(solve: Callable[[np.ndarray], np.ndarray]) -> Callable[[], np.ndarray]:
    """A fixed point that is found from π* on."""
    return lambda: self_consistent(solve, BEST)


LOSS = {'kl_coef': 0.0, 'kl_loss_coef': BETA}
ONE = {'group_size': 1}
PLAIN = {'kl_coef': BETA, 'num_epochs': 2, 'num_minibatches': 2, 'value_coef': 1.0}
METHODS = [
    Method('PPO', PPOHParams(**PLAIN)),
    critic_free('RLOO', rloo),
    critic_free('Dr. GRPO, KL in the reward', dr_grpo, **FIXED),
    critic_free('REINFORCE++', reinforce_pp, **ONE),
    critic_free('ReMax', remax, **ONE),
    critic_free(
        'GSPO over RLOO, sum',
        rloo,
        ratio_level='sequence',
        aggregation='sequence_sum',
    ),
    critic_free('CISPO over RLOO', rloo, objective='cispo', aggregation='token_mean'),
    critic_free('GRPO, KL in the reward', grpo, group_size=64),
    Method(
        'PPO, rewards whitened',
        PPOHParams(**PLAIN, whiten_rewards=True),
        fixed_point=from_best(whitened_rewards),
    ),
    critic_free(
        'REINFORCE++, sequence_mean',
        reinforce_pp,
        **ONE,
        aggregation='sequence_mean',
        rest=from_best(normalised_by_length),
    ),
    critic_free(
        'ReMax, sequence_mean',
        remax,
        **ONE,
        aggregation='sequence_mean',
        rest=from_best(greedy_by_length),
    ),
    critic_free(
        'Dr. GRPO, k3 in the loss',
        dr_grpo,
        **FIXED,
        **LOSS,
        # Advantages from the mean of the group are (G − 1)/G of what they stand for.
        rest=lambda: at_rest(Rest(in_loss=True), REWARD, BETA * 8 / 7, 0 * REWARD),
    ),
    critic_free(
        'GRPO, k3 in the loss, sum',
        grpo,
        **LOSS,
        group_size=64,
        aggregation='sequence_sum',
        rest=from_best(lambda p: divided(p, Rest(in_loss=True))),
    ),
    critic_free(
        'GRPO, k3 in the loss (the paper)',
        grpo,
        **LOSS,
        group_size=64,
        rest=from_best(lambda p: divided(p, Rest(in_loss=True, by_length=True))),
    ),
    Method(
        'PPO-Lagrangian',
        PPOHParams(**PLAIN),
        constraint=LagrangianHParams(cost_limit=LIMIT, lambda_init=0.5, lambda_lr=0.05),
        fixed_point=lambda: constrained()[0],
    ),
]


def constrained() -> tuple[np.ndarray, float]:
    """π ∝ π_ref·exp((r − λ·c)/β) with the λ ≥ 0 that meets the limit, and λ."""
    low, high = 0.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        policy = optimum(PI_REF, REWARD - middle * COST, BETA)[0]
        above = (policy * COST).sum() / len(PROMPTS) > LIMIT
        low, high = (middle, high) if above else (low, middle)
    return policy, high


def _start(method: Method, tx: optax.GradientTransformation, seed: int) -> OnlineState:
    params = {'policy': REF}
    values = {'values': jnp.zeros(PREFIXES)}
    if method.estimator is None:
        params['critic'] = values
    if method.constraint is not None:
        params['cost_critic'] = values
    start = {
        'step': jnp.int32(0),
        'rng': jax.random.PRNGKey(seed),
        'params': params,
        'opt_state': tx.init(params),
    }
    if method.constraint is not None:
        return LagrangianState(
            **start,
            kl_coef=jnp.float32(BETA),
            log_lambda=initial_log_lambda(method.constraint),
        )
    if method.estimator is None:
        return PPOState(**start, kl_coef=jnp.float32(BETA))
    return OnlineState(**start)


def _iteration(
    method: Method, tx: optax.GradientTransformation
) -> Callable[[OnlineState], OnlineState]:
    """One rollout and its updates, by the public functions."""
    hp, estimator = method.hp, method.estimator
    group = getattr(hp, 'group_size', 1)

    def run(state: OnlineState) -> OnlineState:
        key = jax.random.fold_in(state.rng, state.step)
        params = state.params['policy']
        rows = sample(params, key, group, 1.0)
        scores = score(rows, REWARD)
        if method.constraint is not None:
            costs = score(rows, COST)
            models = ActorCritics(MODEL, CRITIC, CRITIC)
            how = {'model': models, 'hp': hp, 'constraint': method.constraint}
            rollout, _ = prepare_lagrangian(
                state, REF, rows, Scores(scores, {'cost': costs}), **how
            )
            return lagrangian_step(state, rollout, tx=tx, **how)[0]
        if estimator is None:
            how = {'model': ActorCritic(MODEL, CRITIC), 'hp': hp}
            rollout, _ = prepare(state, REF, rows, Scores(scores), **how)
            return ppo_step(state, rollout, tx=tx, **how)[0]
        baseline = None
        if estimator is remax:
            baseline = score(sample(params, key, group, 0.0), REWARD)
        how = {'model': MODEL, 'hp': hp}
        rollout, _ = prepare_policy(
            state,
            REF,
            rows,
            Scores(scores, baseline=baseline),
            estimator=estimator,
            estimator_hp=estimator.HParams(),
            **how,
        )
        return policy_step(state, rollout, tx=tx, **how)[0]

    return run


def train(method: Method, rollouts: int, seed: int = 0) -> OnlineState:
    """The state after so many rollouts, from the reference policy on."""
    updates = getattr(method.hp, 'num_epochs', 1) * method.hp.num_minibatches
    tx = optax.adam(optax.linear_schedule(method.rate, 0.0, rollouts * updates))
    run = _iteration(method, tx)
    state, _ = jax.jit(
        lambda s: jax.lax.scan(lambda s, _: (run(s), None), s, None, rollouts)
    )(_start(method, tx, seed))
    return state


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    values = flags.FLAGS
    table = {}
    for method in METHODS:
        state = train(method, values.rollouts)
        params = state.params['policy']
        row = {'from_optimum': distance(params, BEST)}
        if method.fixed_point is not None:
            own = method.fixed_point()
            row['own_from_optimum'] = float(np.abs(own - BEST).sum() / 2 / len(PROMPTS))
            row['from_own'] = distance(params, own)
        if method.constraint is not None:
            row['lambda'] = float(jnp.exp(state.log_lambda))
            row['price'] = constrained()[1]
        table[method.name] = row
        print(method.name, row, flush=True)
    content = {
        'jax': jax.__version__,
        'rollouts': values.rollouts,
        'reference_from_optimum': distance(REF, BEST),
        'methods': table,
    }
    path = Path(values.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')


def run() -> None:
    """Entry point; defines the flags, so that an import of this file defines none."""
    flags.DEFINE_string('out', 'experiments/results/known_answers.json', 'Where to.')
    flags.DEFINE_integer('rollouts', 800, 'Of every method.', lower_bound=1)
    app.run(main)


if __name__ == '__main__':
    run()
