"""Which pairs of responses are compared."""

import numpy as np
import pytest

from rlhf_jax.labels.pairs import draw, group


def responses(prompt, scores, members=None):
    rows = []
    for i, score in enumerate(scores):
        row = {'prompt': prompt, 'completion': f'{i}', 'score_rm': score}
        if members is not None:
            row['members_rm'] = members[i]
        rows.append(row)
    return rows


def names(pairs):
    return [{row['completion'] for row in pair} for pair in pairs]


def test_equal_responses_to_a_prompt_count_once():
    rows = responses('a', [0, 1]) + responses('b', [2]) + responses('a', [3])
    found = group(rows)
    assert [len(g) for g in found.groups] == [2, 1] and found.repeated == 1
    assert found.groups[0][0]['score_rm'] == 0  # the first of the equal ones
    messages = [{'role': 'user', 'content': 'a'}]
    found = group([{'prompt': messages, 'completion': c} for c in 'xyx'])
    assert [len(g) for g in found.groups] == [2] and found.repeated == 1


def test_random_pairs_are_all_different_and_as_many_as_there_can_be():
    groups = [responses('a', [0, 1, 2]), responses('b', [1]), responses('c', [1, 2])]
    pairs = draw(groups, np.random.default_rng(0), per_prompt=5)
    assert sorted(map(sorted, names(pairs[:3]))) == [['0', '1'], ['0', '2'], ['1', '2']]
    assert len(pairs) == 4 and names(pairs[3:]) == [{'0', '1'}]
    firsts = {
        draw(groups, np.random.default_rng(seed))[0][0]['completion']
        for seed in range(30)
    }
    assert firsts == {'0', '1', '2'}


def test_a_limit_of_random_pairs_draws_among_the_prompts():
    groups = [responses(str(i), [0, 1]) for i in range(10)]
    pairs = draw(groups, np.random.default_rng(1), limit=4)
    prompts = [pair[0]['prompt'] for pair in pairs]
    assert len(set(prompts)) == 4 and prompts == sorted(prompts)
    assert prompts != ['0', '1', '2', '3']


def test_near_and_far_by_the_difference_of_a_score():
    groups = [responses('a', [0.0, 0.9, 5.0]), responses('b', [0.0, 0.1])]
    rng = np.random.default_rng(0)
    near = draw(groups, rng, rule='near', score='rm')
    assert names(near) == [{'0', '1'}, {'0', '1'}]
    (only,) = draw(groups, rng, rule='near', score='rm', limit=1)
    assert only[0]['prompt'] == 'b'  # 0.1 apart
    (only,) = draw(groups, rng, rule='far', score='rm', limit=1)
    assert names([only]) == [{'0', '2'}] and only[0]['prompt'] == 'a'


def test_uncertain_is_where_the_members_disagree_about_the_difference():
    # Both members shift by 3 on every response: they agree on all differences but one.
    members = [[0.0, 3.0], [1.0, 4.0], [2.0, 1.0]]
    groups = [responses('a', [0, 0, 0], members)]
    (pair, second, third) = draw(
        groups, np.random.default_rng(0), rule='uncertain', score='rm', per_prompt=3
    )
    # Differences of (0, 2): −2 and 2; of (1, 2): −1 and 3; of (0, 1): −1 and −1.
    assert names([pair, second]) in ([{'0', '2'}, {'1', '2'}], [{'1', '2'}, {'0', '2'}])
    assert names([third]) == [{'0', '1'}]


def test_best_and_worst_leaves_ties_out_and_turns_at_random():
    groups = [responses('a', [1.0, 3.0, 0.0]), responses('b', [2.0, 2.0])]
    seen = set()
    for seed in range(20):
        (pair,) = draw(
            groups, np.random.default_rng(seed), rule='best_and_worst', score='rm'
        )
        assert names([pair]) == [{'1', '2'}]
        seen.add(pair[0]['completion'])
    assert seen == {'1', '2'}


def test_a_score_that_responses_do_not_have_is_told_with_those_they_have():
    groups = [responses('a', [1.0, 3.0])]
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="score='rn'.*known are rm"):
        draw(groups, rng, rule='near', score='rn')
    with pytest.raises(ValueError, match='no score of an ensemble'):
        draw(groups, rng, rule='uncertain', score='rm')
