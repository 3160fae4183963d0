"""Win rate, diversity and the report of a policy, by hand; statistics of rows."""

import jax
import numpy as np
import pytest

from rlhf_jax.evals.policy import (
    Sampled,
    distinct_bigrams,
    policy_report,
    row_statistics,
    sample_policy,
    win_rate,
)
from rlhf_jax.types import PromptBatch


def sampled(responses, scores, kl=0.0):
    size = len(responses)
    return Sampled(
        responses=responses,
        scores=np.asarray(scores, float),
        kl=np.full(size, kl),
        lengths=np.array([len(text.split()) for text in responses]),
        ended=np.arange(size) > 0,
    )


def test_win_rate_counts_ties_as_half():
    rate, interval, ties = win_rate(np.array([2, 1, 1, 5]), np.array([1, 1, 2, 4]))
    assert rate == (1 + 0.5 + 0 + 1) / 4
    assert ties == 1 / 4
    assert interval[0] <= rate <= interval[1]


def test_the_interval_narrows_with_the_number_of_prompts():
    rng = np.random.default_rng(0)
    widths = []
    for size in (50, 5000):
        rate, (low, high), _ = win_rate(rng.normal(0.5, 1, size), np.zeros(size))
        assert low < rate < high
        widths.append(high - low)
        # 95% of a proportion: 2 · 1.96 · √(p(1 − p)/n)
        expected = 2 * 1.96 * np.sqrt(rate * (1 - rate) / size)
        assert high - low == pytest.approx(expected, rel=0.15)
    assert widths[1] < widths[0] / 5


@pytest.mark.parametrize(('after', 'rate'), [(1.0, 1.0), (0.0, 0.5), (-1.0, 0.0)])
def test_a_constant_outcome_has_an_interval_without_width(after, rate):
    result = win_rate(np.full(7, after), np.zeros(7))
    assert result[:2] == (rate, [rate, rate])


def test_distinct_bigrams():
    # (a b) (b a) (a b) and (a b): 2 distinct of 4; bigrams do not cross texts
    assert distinct_bigrams(['a b a b', 'a b']) == 2 / 4
    assert distinct_bigrams(['one', '']) == 0
    assert distinct_bigrams(['a b c d']) == 1


def test_policy_report():
    before = sampled(['a b', 'a b c'], [0.0, 1.0])
    after = sampled(['a b c d', 'x'], [2.0, 1.0], kl=3.0)
    report = policy_report(before, after, (np.array([1.0, 2]), np.array([3.0, 2])))
    assert report['prompts'] == 2 and report['kl'] == 3
    assert report['proxy_reward_before'] == 0.5 and report['proxy_reward_after'] == 1.5
    assert report['length_before'] == 2.5 and report['length_after'] == 2.5
    assert report['ended_before'] == 0.5
    assert report['distinct_before'] == 2 / 3 and report['distinct_after'] == 1
    assert report['win_rate'] == 0.75 and report['ties'] == 0.5
    assert report['gold_reward_before'] == 1.5 and report['gold_reward_after'] == 2.5


def test_without_gold_there_is_no_win_rate():
    both = sampled(['a b', 'a b c'], [0.0, 1.0])
    report = policy_report(both, both, None)
    assert not {'win_rate', 'ties', 'gold_reward_after'} & report.keys()


def test_row_statistics_by_hand(bigram, token_scores, generation):
    table = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    scores = np.linspace(-1, 1, 64, dtype=np.float32)
    rows = jax.device_get(
        row_statistics(
            {'table': table},
            {'table': scores},
            generation,
            policy=bigram,
            reward=token_scores,
            temperature=2.0,
        )
    )
    log_softmax = table / 2 - np.log(np.exp(table / 2).sum(-1, keepdims=True))
    tokens, response = np.asarray(generation.tokens), generation.response_mask
    for i, keep in enumerate(response):
        places = np.flatnonzero(keep)
        reference = [log_softmax[tokens[i, t - 1], tokens[i, t]] for t in places]
        kl = (generation.logprobs[i, places] - reference).sum()
        assert rows['kl'][i] == pytest.approx(kl, abs=1e-3)
        assert rows['scores'][i] == pytest.approx(scores[tokens[i, places[-1]]])
        assert rows['lengths'][i] == len(places)
    np.testing.assert_array_equal(rows['ended'], generation.ended)


def test_rows_that_fill_a_batch_are_left_out(generation):
    class Tokenizer:
        def batch_decode(self, rows, skip_special_tokens):
            assert skip_special_tokens
            return [' '.join(map(str, row)) for row in rows]

    index = np.where(np.arange(16) < 14, np.arange(16), -1)
    empty = np.zeros((16, 5), np.int32)
    batch = PromptBatch(tokens=empty, mask=empty == 0, index=index)
    names = ('scores', 'kl', 'lengths', 'ended')
    result = sample_policy(
        lambda batch: generation,
        lambda generation: {name: np.arange(16) for name in names},
        Tokenizer(),
        [batch, batch],
    )
    assert len(result.responses) == 28
    np.testing.assert_array_equal(result.scores, [*range(14), *range(14)])
    first = generation.tokens[0][np.asarray(generation.response_mask)[0]]
    assert result.responses[0] == ' '.join(map(str, first))
