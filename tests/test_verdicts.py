"""Verdicts both ways, warnings, and numbers for people."""

import math

import pytest

from rlhf_jax.pages import language_model, policy, reward_model
from rlhf_jax.pages.page import number
from tests.test_report import evaluation

PAGES = {
    'pretrain': language_model.PAGE,
    'sft': language_model.PAGE,
    'rm': reward_model.PAGE,
    'preference': policy.PREFERENCE,
    'ppo': policy.ONLINE,
}
SIGNS = {'sign_accuracy': 0.7, 'sign_interval': [0.61, 0.8], 'sign_baseline': 0.6}
CASES = [
    # stage, changes to a passing evaluation, verdict
    ('pretrain', {}, 'pass'),
    ('pretrain', {'loss': 8.33}, 'fail'),  # below before, not below uniform
    ('pretrain', {'loss_before': 3.0}, 'fail'),
    ('sft', {}, 'pass'),
    ('sft', {'loss': 3.39}, 'fail'),  # equal is not below
    ('sft', {'loss': 9.0, 'loss_before': 9.5}, 'fail'),  # not below uniform
    ('sft', {'loss': None}, 'fail'),
    ('rm', {}, 'pass'),
    ('rm', {'interval': [0.58, 0.742]}, 'fail'),  # not above 'longer wins'
    ('rm', {'interval': [0.59, 0.76], 'length_baseline': 0.4}, 'fail'),  # 'shorter'
    ('rm', {'interval': [0.61, 0.76], 'length_baseline': 0.4}, 'pass'),
    ('rm', {'interval': [0.49, 0.76], 'length_baseline': 0.5}, 'fail'),  # chance
    ('rm', {'interval': [0.51, 0.76], 'length_baseline': 0.5}, 'pass'),
    ('rm', {'accuracy_ceiling': 0.78}, 'fail'),  # 0.721 < 0.73
    ('rm', {'accuracy_ceiling': 0.77}, 'pass'),  # 0.721 ≥ 0.72
    ('rm', {'accuracy_ceiling': None}, 'pass'),
    ('rm', SIGNS, 'pass'),
    ('rm', SIGNS | {'sign_interval': [0.59, 0.8]}, 'fail'),  # always 'harmful': 0.6
    ('rm', SIGNS | {'interval': [0.49, 0.76]}, 'fail'),  # the order is not learned
    ('rm', {'accuracy': None, 'interval': [None, None]}, 'fail'),
    ('ppo', {}, 'pass'),
    ('ppo', {'win_rate_interval': [0.59, 0.8]}, 'fail'),  # expected 0.6
    ('ppo', {'win_rate_interval': [0.51, 0.8], 'expected_win_rate': None}, 'pass'),
    ('ppo', {'win_rate_interval': [0.49, 0.8], 'expected_win_rate': None}, 'fail'),
    ('ppo', {'win_rate_interval': None}, 'unknown'),  # gold there, but not judged by it
    ('ppo', {'ended_after': 0.04}, 'fail'),  # 0.91 before
    ('ppo', {'ended_before': 0.0, 'ended_after': 0.0}, 'pass'),  # nothing has to end
    ('ppo', {'ended_before': 0.0, 'ended_after': 0.0, 'needs_end': True}, 'fail'),
    ('ppo', {'proxy_range_after': [-1.0, 2.0]}, 'pass'),
    ('ppo', {'proxy_range_after': [1.0, 1.0], 'proxy_reward_after': 1.0}, 'pass'),
    ('ppo', {'proxy_range_after': [-1.0, -1.0], 'proxy_reward_after': -1.0}, 'fail'),
    ('preference', {}, 'pass'),
    ('preference', {'ended_after': 0.04}, 'fail'),
    ('preference', {'win_rate_interval': [0.59, 0.8]}, 'fail'),  # expected 0.6
    ('preference', {'interval': [0.4, 0.6]}, 'pass'),  # the judge decides
]


@pytest.mark.parametrize(('stage', 'changes', 'expected'), CASES)
def test_verdict(stage, changes, expected):
    assert (
        PAGES[stage].verdict(evaluation(stage, gold=True) | changes).verdict == expected
    )


def test_the_floor_of_a_reward_model_is_named():
    good = evaluation('rm', gold=True)
    for longer, text in (
        (0.58, 'interval above 0.580 (longer wins)'),
        (0.421, 'interval above 0.579 (shorter wins)'),
        (0.5, 'interval above 0.500 (chance)'),
        (None, 'interval above 0.500 (chance)'),
    ):
        assert (
            PAGES['rm']
            .verdict(good | {'length_baseline': longer})
            .expected.startswith(text)
        )


@pytest.mark.parametrize(('after', 'expected'), [(0.1, 'pass'), (-0.21, 'fail')])
def test_verdict_without_gold_is_the_proxy_and_says_so(after, expected):
    got = PAGES['ppo'].verdict(
        evaluation('ppo', gold=False) | {'proxy_reward_after': after}
    )
    assert got.verdict == expected
    assert 'proves nothing' in got.expected


@pytest.mark.parametrize(('low', 'expected'), [(0.51, 'pass'), (0.49, 'fail')])
def test_verdict_without_gold_is_the_implicit_accuracy(low, expected):
    changes = {'interval': [low, 0.7], 'length_baseline': 0.6}
    got = PAGES['preference'].verdict(evaluation('preference', gold=False) | changes)
    assert got.verdict == expected and got.figure.startswith('implicit accuracy 0.721')


@pytest.mark.parametrize(
    ('stage', 'changes', 'words'),
    [
        ('ppo', {'gold_reward_after': 0.11}, 'Reward hacking suspected'),
        ('ppo', {'length_after': 32.0}, '1.5 times'),  # 1.5 × 21.3 = 31.95
        ('ppo', {'ended_after': 0.89}, 'Fewer responses end'),  # by more than 0.01
        ('ppo', {'ended_before': 0.0, 'ended_after': 0.0}, 'which tokens end a resp'),
        ('ppo', {'proxy_range_after': [1.0, 1.0]}, 'nothing is left to learn'),
        ('ppo', {'kl': 50.1}, 'above 50'),
        ('preference', {'kl': 50.1}, 'above 50'),
        ('preference', {'length_after': 32.0}, '1.5 times'),
        ('rm', {'padding_gap': 0.02}, 'side of the padding'),
    ],
)
def test_warning(stage, changes, words):
    good = evaluation(stage, gold=True)
    assert PAGES[stage].warnings(good) == []
    (found,) = PAGES[stage].warnings(good | changes)
    assert words in found


def test_no_hacking_warning_when_the_proxy_fell_too():
    changes = {'gold_reward_after': 0.11, 'proxy_reward_after': -0.3}
    assert PAGES['ppo'].warnings(evaluation('ppo', gold=True) | changes) == []


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (None, '–'),
        (math.inf, '–'),
        (-0.21, '−0.21'),
        (65_536, '65,536'),
        (1234.5, '1,234'),
        (0.12345, '0.123'),
        (2e-6, '2e−06'),
    ],
)
def test_number(value, text):
    assert number(value) == text
