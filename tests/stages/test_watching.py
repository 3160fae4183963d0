"""Warnings of a stage that samples: equal scores, responses that do not end."""

import json

import pytest

from rlhf_jax.main import launch
from rlhf_jax.stages.watching import PATIENCE, Watch, why_not_finite
from tests.small_config import get_config


def values(low=0.0, high=1.0, ended=0.5):
    return {
        'objective/scores_min': low,
        'objective/scores_max': high,
        'rollout/ended': ended,
    }


@pytest.mark.parametrize(
    ('bad', 'words'),
    [
        (values(-1.0, -1.0), 'have the score -1: nothing can be learned'),
        (values(ended=0.01), '1.0% of the responses end by themselves'),
    ],
)
def test_it_speaks_after_some_rollouts_in_a_row_and_once(bad, words):
    watch = Watch(needs_end=False)
    for _ in range(2):  # again when it comes back
        assert watch(values()) == []
        said = [watch(bad) for _ in range(PATIENCE + 2)]
        assert said[: PATIENCE - 1] == [[]] * (PATIENCE - 1)
        assert words in said[PATIENCE - 1][0]
        assert said[PATIENCE:] == [[], []]


def test_without_rewards_nothing_is_said_of_scores():
    watch = Watch(needs_end=False)
    assert [watch({'rollout/ended': 0.5}) for _ in range(2 * PATIENCE)] == [[]] * 6


def test_it_says_that_responses_without_an_end_are_marked_down():
    for needs_end in (True, False):
        watch = Watch(needs_end)
        [[said]] = [watch(values(ended=0.0)) for _ in range(PATIENCE)][-1:]
        assert ('marked down' in said) == needs_end


def test_a_run_in_which_nothing_ends_fails_and_says_so(finished, tmp_path, capsys):
    """Every response is cut after its first token, so every score is the same."""
    config = get_config()
    config.stages = ('ppo',)
    config.ppo.init = config.ppo.critic = str(finished / 'sft')
    config.ppo.rewards.rm.model = str(finished / 'rm')
    config.ppo.max_new_tokens = 1
    config.ppo.missing_eos_penalty = None
    config.ppo.missing_eos_score = -1.0
    report = launch(config, tmp_path)['stages']['ppo']
    assert report['verdict'] == 'fail'
    assert report['figure'].startswith('responses that ended')
    said = capsys.readouterr().out
    assert 'warning: ppo, step 3: all responses of 3 rollouts' in said
    assert 'and those that do not are marked down' in said
    assert '[ppo] warning: ' in said
    rows = list(map(json.loads, (tmp_path / 'ppo' / 'metrics.jsonl').open()))
    assert {row['objective/scores'] for row in rows} == {-1.0}
    assert len({row['objective/proxy_reward'] for row in rows}) > 1


def test_a_reward_that_is_too_large_is_named_in_place_of_the_learning_rate():
    told = why_not_finite({'objective/kl': float('nan'), 'train/loss': 1e30})
    assert told.startswith('Lower the learning rate')
    rewards = {'objective/scores_max': float('inf'), 'reward/short': -1e25}
    told = why_not_finite({'objective/kl': float('nan'), **rewards})
    assert told.startswith('reward/short is -1e+25, beyond ±1e+18')


def test_a_run_whose_weighted_reward_is_too_large_says_so(tmp_path):
    config = get_config('1')
    config.ppo.rewards.rm.weight = 1e35
    with pytest.raises(ValueError) as caught:
        launch(config, tmp_path)
    message = str(caught.value)
    assert 'ppo: ' in message and 'not finite at step 1' in message
    assert 'beyond ±1e+18' in message and 'lower the weights of the rewards' in message
