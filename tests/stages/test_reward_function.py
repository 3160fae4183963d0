"""Reward functions: the columns they ask for, and what is found before compilation."""

import numpy as np
import pytest

from rlhf_jax.data.examples import Counts, Dataset
from rlhf_jax.data.formats import Prompt
from rlhf_jax.responses import Responses
from rlhf_jax.stages.reward_function import check_function, score_by_function
from rlhf_jax.stages.settings import RewardSource
from rlhf_jax.types import Generation, PromptBatch

WHERE = 'config.ppo.rewards.mine'
SEEN = []


def dataset(spec, *records):
    """Records of (prompt, reference, fields)."""
    rows = [Prompt(p, r, m, f'{spec}:{i}') for i, (p, r, m) in enumerate(records, 1)]
    counts = Counts(spec, 'prompts', 8, read=len(rows), kept=len(rows))
    return Dataset([None] * len(rows), rows, counts)


def plain(prompts, responses):
    SEEN.append((prompts, responses))
    return np.zeros(len(responses))


def plain_but_misspelt(prompts, respones):
    return np.zeros(len(respones))


def asks(prompts, responses, references, level, *, scale=1.0):
    SEEN.append((prompts, responses, references, level))
    return [scale * len(r) + n for r, n in zip(references, level)]


def optional(prompts, responses, references=None, level=None):
    SEEN.append((references, level))
    return np.zeros(len(responses))


def as_trl_has_them(completions, prompts, references, **columns):
    SEEN.append((prompts, completions, references, columns))
    return np.zeros(len(completions))


def all_by_name(**given):
    SEEN.append(given)
    return np.zeros(len(given['responses']))


def of_responses(*, responses):
    SEEN.append(responses)
    return np.zeros(len(responses))


def by_position(prompts, responses, references, /):
    return np.zeros(len(responses))


def needs_many(prompts, responses, references):
    return [float(r) for r in references]


def judged(prompts, responses, references):
    return np.zeros(len(responses))


def check_judged(references):
    if 'bad' in references:
        raise ValueError(f'{references!r} is bad')


TRAIN = dataset(
    'train', ('p', 'one', {'level': 1}), ('q', 'three', {'level': 3, 'tests': [1]})
)
TEST = dataset('test', ('r', 'two', {'level': 2}))


def check(name, *data, **args):
    SEEN.clear()
    source = RewardSource(fn=name if ':' in name else f'{__name__}:{name}', args=args)
    return check_function(WHERE, source, data)


def error(name, *data, **args):
    with pytest.raises(ValueError) as caught:
        check(name, *data, **args)
    return str(caught.value)


def test_a_function_gets_what_its_parameters_name():
    assert check('asks', TRAIN, TEST).columns == ('references', 'level')
    # tried on the first prompt of each, with its reference as the response
    assert SEEN == [(['p'], ['one'], ['one'], [1]), (['r'], ['two'], ['two'], [2])]
    assert check('plain', TRAIN).columns == ()
    assert check('asks', TRAIN, level=[7], scale=2.0).columns == ('references',)
    assert SEEN == [(['p'], ['one'], ['one'], [7])]


def test_texts_are_given_by_name_whatever_their_order():
    assert check('of_responses', TRAIN).columns == ()
    assert SEEN == [['one']]
    bare = dataset('bare', ('p', None, {}))
    assert check('as_trl_has_them', bare, references=3).columns == ()
    assert SEEN == [(['p'], [''], 3, {})]


def test_kwargs_get_all_fields_that_no_parameter_names():
    function = check('as_trl_has_them', TRAIN, x=1)
    assert function.columns == ('references', 'level', 'tests')
    # the first record has no field 'tests'
    rest = {'level': [1], 'tests': [None], 'x': 1}
    assert SEEN == [(['p'], ['one'], ['one'], rest)]
    check('all_by_name', TRAIN, level=7)
    given = {'prompts': ['p'], 'responses': ['one'], 'references': ['one']}
    assert SEEN == [{**given, 'tests': [None], 'level': 7}]


def test_fields_that_are_called_like_texts_do_not_replace_them():
    named = {'responses': 'theirs', 'prompts': 'theirs', 'completions': 'theirs'}
    check('all_by_name', dataset('named', ('p', None, named)))
    assert SEEN == [{'prompts': ['p'], 'responses': ['']}]


def test_what_has_a_default_is_asked_for_where_the_data_have_it():
    bare = dataset('bare', ('p', None, {}))
    assert check('optional', bare).columns == ()
    assert check('optional', TRAIN).columns == ('references', 'level')


def test_columns_follow_the_rows_of_a_batch():
    """Row i of the batch is prompt ``index[i]``; rows that fill up have no column."""
    function = check('asks', TRAIN)
    generation = Generation(
        tokens=np.zeros((4, 3), np.int32),
        mask=np.ones((4, 3), bool),
        response_mask=np.ones((4, 3), bool),
        logprobs=np.zeros((4, 3), np.float32),
        ended=np.ones(4, bool),
    )

    def decode(tokenizer, before, rows):
        return ['text'] * len(rows)

    batch = PromptBatch(
        tokens=generation.tokens, mask=generation.mask, index=np.array([1, 0, 1, -1])
    )
    responses = Responses(None, TRAIN.records, batch, generation, decode)
    scored = score_by_function(function, responses)
    assert SEEN[-1][2:] == (['three', 'one', 'three'], [3, 1, 3])
    # len('three') + 3, len('one') + 1, again; the last row repeats
    np.testing.assert_array_equal(scored.scores, [8, 4, 8, 8])


def test_a_field_that_nothing_has_is_named_with_the_data():
    message = error('asks', dataset('train', ('p', 'one', {'levle': 1})))
    for part in (WHERE, f'{__name__}:asks', "'level'", 'train', "mean 'levle'"):
        assert part in message, message
    message = error('asks', dataset('jsonl:x', ('p', None, {})), level=[1])
    assert "asks for 'references'" in message and 'jsonl:x have;' in message
    assert 'no data' in error('asks')


def test_a_record_without_the_field_is_named():
    partly = dataset('file', ('p', 'one', {'level': 1}), ('q', 'two', {}))
    message = error('asks', TEST, partly)
    for part in (WHERE, "'level'", '1 of 3 prompts', 'file:2', f'{WHERE}.args'):
        assert part in message, message
    # even where there is a default: nothing is dropped in silence
    assert 'file:2' in error('optional', TEST, partly)


def test_a_function_that_cannot_take_columns_by_name():
    message = error('by_position', TRAIN)
    assert WHERE in message and "'prompts' by position only" in message
    message = error('plain', TRAIN, speed=1)
    assert "does not take args={'speed': 1}" in message and "'speed'" in message
    message = error('plain_but_misspelt', TRAIN)
    assert "asks for 'respones'" in message and "did you mean 'responses'?" in message
    assert 'does not say which parameters' in error('builtins:dict', TRAIN)


def test_a_function_is_tried_before_anything_compiles():
    message = error('needs_many', TRAIN)
    for part in (WHERE, 'failed with ValueError', "prompt 'p'", "response 'one'"):
        assert part in message, message
    name = 'rlhf_jax.verify:regex'
    assert 'no regular expression' in error(name, TRAIN, pattern='a(')
    assert "asks for 'tests'" in error('rlhf_jax.verify:unit_tests', TEST, run='a:b')
    assert "'pattern'" in error(name, TRAIN)


def test_every_record_is_checked_where_a_function_has_a_check():
    good, bad = ('p', 'fine', {}), ('q', 'so bad', {})
    check('judged', dataset('file', good))
    message = error('judged', TEST, dataset('file', good, good, bad))
    assert f"{WHERE}: file:3: 'so bad' is bad" == message
    numbers = dataset('n', ('p', '5', {}), ('p', 'many', {}))
    message = error('rlhf_jax.verify:numeric_answer', numbers)
    assert "n:2: the reference 'many' has no number" in message
