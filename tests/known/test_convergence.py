"""Training by sampling in a world of 40 responses ends at the optimum; and the sampler
draws what the policy says.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import known_answers
from experiments.table_world import ALL, EOS, LONGEST, distance, policy_of
from rlhf_jax.generate import generate, sampling
from tests.known.exact import BEST, POLICY, TOTAL

METHODS = {method.name: method for method in known_answers.METHODS}


@pytest.mark.parametrize('name, rollouts', [('PPO', 60), ('REINFORCE++', 250)])
def test_training_ends_at_the_optimum(name, rollouts):
    assert distance(known_answers.REF, known_answers.BEST) > 0.2
    state = known_answers.train(METHODS[name], rollouts)
    assert distance(state.params['policy'], known_answers.BEST) < 0.02


def test_responses_are_drawn_as_often_as_the_policy_says():
    """Pearson's χ² of 16,384 responses to the first prompt, 40 cells."""
    rows = 16_384
    run = jax.jit(
        lambda key: generate(
            policy_of(BEST / TOTAL),
            jnp.zeros((1, 1), jnp.int32),
            jnp.ones((1, 1), bool),
            jnp.arange(rows),
            key,
            sampling(eos_ids=[EOS]),
            model=POLICY,
            max_new_tokens=LONGEST,
        )
    )
    out = run(jax.random.PRNGKey(0))
    which = np.asarray(known_answers.score(out, np.arange(len(ALL.prompt))))
    drawn = np.bincount(which.astype(int), minlength=len(BEST))
    expected = np.where(ALL.prompt == 0, BEST / TOTAL, 0) * rows
    assert (drawn[expected == 0] == 0).all()
    inside = expected > 0
    chi2 = ((drawn - expected)[inside] ** 2 / expected[inside]).sum()
    assert 15 < chi2 < 75  # 39 degrees of freedom: both beyond one in a thousand


@pytest.mark.parametrize('by_length', [False, True])
@pytest.mark.parametrize('in_loss', [False, True])
def test_a_fixed_point_is_solved_for_what_it_says(in_loss, by_length):
    """With the KL in the reward and sums over tokens it is π*; a baseline moves it
    where tokens are weighed by length, and nowhere else.
    """
    rest = known_answers.Rest(in_loss=in_loss, by_length=by_length)
    reward, best = known_answers.REWARD, known_answers.BEST
    first, second = (
        known_answers.at_rest(rest, reward, known_answers.BETA, np.full(len(best), b))
        for b in (0.0, 1.0)
    )
    np.testing.assert_allclose(known_answers.per_prompt(first), 1, atol=1e-9)
    assert (np.abs(first - best).max() < 1e-6) == (not in_loss and not by_length)
    assert (np.abs(first - second).max() < 1e-9) == (not by_length)
