"""Win rate, diversity and the report of a policy, by hand; statistics of rows."""

import jax
import numpy as np
import pytest

from rlhf_jax.data.formats import Prompt
from rlhf_jax.evals.policy import (
    Sampled,
    distinct_bigrams,
    policy_report,
    row_statistics,
    sample_policy,
    win_rate,
)
from rlhf_jax.responses import Scored
from rlhf_jax.types import PromptBatch


def sampled(responses, kl=0.0, **scores):
    size = len(responses)
    lengths = np.array([len(text.split()) for text in responses])
    return Sampled(
        responses=responses,
        scores={name: np.asarray(column, float) for name, column in scores.items()},
        kl=np.full(size, kl),
        ref_logprobs=-0.5 * lengths**2,
        lengths=lengths,
        ended=np.arange(size) > 0,
        truncated={'rm': 1},
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
    before = sampled(['a b', 'a b c'], rm=[0.0, 1.0], fn=[1, 2], gold=[1.0, 2])
    after = sampled(['a b c d', 'x'], 3.0, rm=[2.0, 1.0], fn=[0, 1], gold=[3.0, 2])
    report = policy_report(before, after, {'rm': 1.0, 'fn': -0.5})
    assert report['prompts'] == 2 and report['kl'] == 3
    # means: rm 0.5, fn 1.5, so 0.5 − 0.75; then rm 1.5, fn 0.5, so 1.5 − 0.25
    assert report['rewards_before'] == {'rm': 0.5, 'fn': 1.5}
    assert report['rewards_after'] == {'rm': 1.5, 'fn': 0.5}
    assert report['proxy_reward_before'] == -0.25
    assert report['proxy_reward_after'] == 1.25
    assert report['proxy_range_before'] == [-0.5, 0.0]  # 0 − 0.5 and 1 − 1
    assert report['rewards_truncated_after'] == {'rm': 1}
    # per token: −½(2² + 3²)/(2 + 3) and −½(4² + 1²)/(4 + 1)
    assert report['ref_logprob_before'] == pytest.approx(-1.3)
    assert report['ref_logprob_after'] == pytest.approx(-1.7)
    assert report['length_before'] == 2.5 and report['length_after'] == 2.5
    assert report['ended_before'] == 0.5
    assert report['distinct_before'] == 2 / 3 and report['distinct_after'] == 1
    assert report['win_rate'] == 0.75 and report['ties'] == 0.5
    assert report['gold_reward_before'] == 1.5 and report['gold_reward_after'] == 2.5


def test_without_gold_there_is_no_win_rate():
    both = sampled(['a b', 'a b c'], rm=[0.0, 1.0])
    report = policy_report(both, both, {'rm': 1.0})
    assert not {'win_rate', 'ties', 'gold_reward_after'} & report.keys()


def test_row_statistics_by_hand(bigram, generation):
    table = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    rows = jax.device_get(
        row_statistics({'table': table}, generation, policy=bigram, temperature=2.0)
    )
    log_softmax = table / 2 - np.log(np.exp(table / 2).sum(-1, keepdims=True))
    tokens, response = np.asarray(generation.tokens), generation.response_mask
    for i, keep in enumerate(response):
        places = np.flatnonzero(keep)
        reference = [log_softmax[tokens[i, t - 1], tokens[i, t]] for t in places]
        kl = (generation.logprobs[i, places] - reference).sum()
        assert rows['kl'][i] == pytest.approx(kl, abs=1e-3)
        assert rows['ref_logprobs'][i] == pytest.approx(sum(reference), abs=1e-3)
        assert rows['lengths'][i] == len(places)
    np.testing.assert_array_equal(rows['ended'], generation.ended)


def test_rows_that_fill_a_batch_are_left_out(generation):
    def decode(tokenizer, before, rows):
        assert before == [0] * len(rows)  # the last ids of the prompts
        return [' '.join(map(str, row)) for row in rows]

    index = np.where(np.arange(16) < 14, 13 - np.arange(16), -1)
    empty = np.zeros((16, 5), np.int32)
    batch = PromptBatch(tokens=empty, mask=empty == 0, index=index)
    records = [Prompt(f'prompt {i}', None, {}, 'here') for i in range(14)]
    seen = []

    def scorer(responses):
        seen.extend(responses.prompts)
        texts = [len(text.split()) for text in responses.texts]
        return Scored(responses.spread(np.asarray(texts)), truncated=3)

    result = sample_policy(
        lambda batch: generation,
        lambda generation: {
            name: np.arange(16) for name in ('kl', 'ref_logprobs', 'lengths', 'ended')
        },
        {'words': scorer, 'row': lambda responses: Scored(np.arange(16))},
        None,
        records,
        [batch, batch],
        decode,
    )
    assert len(result.responses) == 28
    assert seen == [f'prompt {i}' for i in range(13, -1, -1)] * 2
    np.testing.assert_array_equal(result.kl, [*range(14), *range(14)])
    np.testing.assert_array_equal(result.scores['row'], result.kl)
    words = np.asarray(generation.response_mask).sum(-1)[:14]
    np.testing.assert_array_equal(result.scores['words'], [*words, *words])
    assert result.truncated == {'words': 6}
    first = generation.tokens[0][np.asarray(generation.response_mask)[0]]
    assert result.responses[0] == ' '.join(map(str, first))
