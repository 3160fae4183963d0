"""Verifiable rewards: numbers as people write them, answers, formats, test runners."""

import numpy as np
import pytest

from rlhf_jax.verify import (
    check_numeric_answer,
    exact_match,
    find_answer,
    numeric_answer,
    read_number,
    regex,
    tagged,
    unit_tests,
)


def blank(texts):
    return [''] * len(texts)


# ----------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ('text', 'number'),
    [
        ('72', 72),
        ('-3', -3),
        ('−7', -7),
        ('(+4)', 4),
        ('$1,234.50', 1234.5),
        ('-$5', -5),
        ('1{,}000', 1000),
        ('.5', 0.5),
        ('1e3', 1000),
        ('2.5E-2 m', 0.025),
        ('1.5 × 10^3', 1500),
        (r'1.5\times 10^{-3}', 0.0015),
        ('3/4', 0.75),
        (r'-\frac{3}{4}', -0.75),
        (r'1\dfrac{1}{2}', 1.5),
        ('2 1/2 cups', 2.5),
        (r'50\%', 0.5),
        ('20 percent', 0.2),
        ('72.', 72),  # the full stop of a sentence
        ('12kg', 12),
    ],
)
def test_a_number_is_read(text, number):
    assert read_number(text) == pytest.approx(number, rel=1e-12)
    assert read_number(f'It is {text}') == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize(
    'text', ['', 'seven', 'x2', 'H2O', '1/0', '1e999', '1e99999999999', '9' * 5000, '½']
)
def test_what_is_no_finite_number_is_none(text):
    assert read_number(text) is None


def test_the_first_and_the_last_number():
    # '5-3' is a difference; '1,2,3' are three numbers, '1,234' is one
    for text, first, last in (
        ('5-3', 5, 3),
        ('10 - 3 = 7', 10, 7),
        ('1,2,3', 1, 3),
        ('1,234,567', 1234567, 1234567),
        ('48/2=24', 24, 24),
    ):
        assert (read_number(text), read_number(text, last=True)) == (first, last)
    assert read_number('5%', percent=1.0) == 5


def test_the_first_place_that_is_there_decides():
    text = r'So the answer is 5. \boxed{6 \text{ of } {7}} <answer>8</answer>' + '\n'
    assert find_answer(text, ['boxed']) == (r'6 \text{ of } {7}', 'boxed')
    assert find_answer(text, ['####', '<answer>', 'boxed']) == ('8', '<answer>')
    assert find_answer(text, ['answer is'])[0].startswith('5. ')
    assert find_answer('### 5', ['####', 'boxed', '<answer>']) == (None, None)
    assert find_answer(r'\boxed{5', ['boxed']) == (None, None)  # cut off
    assert find_answer('</answer><answer>5', ['<answer>']) == (None, None)
    # the last mark counts, and only its line
    assert find_answer('#### 1\n#### 2\n3', ['####'])[0] == '2'
    assert find_answer('The answer is\n\n 4\n5', ['answer is'])[0] == '4'


def score(responses, references, **options):
    return numeric_answer(blank(responses), responses, references, **options).tolist()


def test_numeric_answer_by_hand():
    responses = ['12 + 7 = 19. #### 19', '#### 18', '19', 'none', '#### none, 19 + 0']
    expected = [1, 0, 1, -1, 1]
    assert score(responses, ['19'] * 5, unreadable=-1.0) == expected
    # with '####' alone: the third has no such place
    expected[2] = -1
    assert score(responses, ['19'] * 5, where=['####'], unreadable=-1.0) == expected
    # the reference is read as a response is: a whole worked answer will do
    assert score(['19'], ['10 + 9 = 19. #### 19']) == [1]
    assert score(['#### 1,900'], ['$1900.00']) == [1]
    assert score(['50%', '50%', '1/2'], ['0.5', '50', '0.5']) == [1, 0, 1]
    assert score(['50%'], ['50'], percent=1.0) == [1]


def test_a_place_without_a_number_is_not_passed_over():
    assert score(['5 apples. #### unsure'], ['5']) == [0]
    assert score(['5 apples. #### unsure'], ['5'], where=['last']) == [1]


def test_tolerance_is_relative_above_one_and_absolute_below():
    # |1010 − 1000| = 10 ≤ 0.01·1000; |0.02 − 0.01| = 0.01 ≤ 0.01·1; 0.021 is beyond
    assert score(
        ['1010', '1011', '0.02', '0.021'],
        ['1000', '1000', '0.01', '0.01'],
        tolerance=0.01,
    ) == [1, 0, 1, 0]
    assert score(['3.0000001', '3'], ['3', '3'], tolerance=0.0) == [0, 1]


@pytest.mark.parametrize(
    ('options', 'parts'),
    [
        ({'where': ['###']}, ["'###'", 'known are ####']),
        ({'where': '####'}, ["where='####'", 'a list']),
        ({'where': []}, ['where=[]']),
        ({'tolerance': -1.0}, ['tolerance=-1.0']),
        ({'tolerance': float('nan')}, ['tolerance=nan']),
    ],
)
def test_options_are_checked(options, parts):
    with pytest.raises(ValueError) as caught:
        score([], [], **options)
    for part in parts:
        assert part in str(caught.value)


def test_a_reference_without_a_number_is_an_error():
    with pytest.raises(ValueError, match=r"'many' of prompt 'How many\?'"):
        numeric_answer(['How many?'], ['3'], ['many'])
    with pytest.raises(ValueError, match="'many' has no number"):
        check_numeric_answer('many')
    check_numeric_answer('#### 5')
    with pytest.raises(ValueError, match='shorter'):
        numeric_answer(['a', 'b'], ['1', '2'], ['1'])


def test_nothing_that_a_policy_writes_takes_long_or_fails():
    """Linear in the length, whatever it repeats; no exponent becomes an integer."""
    for piece in ('1,', '1 ', '1/', '-', '{', r'\frac{', r'\boxed{', '####', 'answer '):
        text = piece * 20_000
        assert score([text], ['5']) in ([0], [1])
        assert tagged([''], ['<think>' + text]).tolist() == [0]


# ----------------------------------------------------------------------------- matches


def test_exact_match_by_hand():
    responses = [' paris', 'Paris!', 'London', 'The  city of\nParis', '']
    references = ['Paris'] * 3 + ['the city of paris'] * 2

    def match(**options):
        scores = exact_match(blank(responses), responses, references, **options)
        return scores.tolist()

    assert match() == [1, 0, 0, 1, 0]
    assert match(ignore=()) == [0, 0, 0, 0, 0]
    assert match(ignore=('space',)) == [0, 0, 0, 0, 0]
    assert match(ignore=('case', 'space', 'punctuation')) == [1, 1, 0, 1, 0]


def test_several_accepted_answers_and_places():
    responses = ['I say <answer>UK</answer>', 'UK', '<answer>Britain, UK</answer>']
    references = ['Britain | UK | '] * 3
    options = dict(where=['<answer>'], separator='|')
    scores = exact_match(blank(responses), responses, references, **options)
    assert scores.tolist() == [1, 0, 0]
    # an empty alternative accepts nothing
    assert exact_match([''], ['<answer></answer>'], ['a|'], **options).tolist() == [0]
    with pytest.raises(ValueError, match=r"reference '\?!' is empty without case, "):
        exact_match([''], ['x'], ['?!'], ignore=('case', 'punctuation'))
    with pytest.raises(ValueError, match="ignore has 'cases'"):
        exact_match([], [], [], ignore=('cases',))


def test_regex():
    responses = ['abc', 'xabcx', 'ABC', 'a\nc']

    def match(pattern, **options):
        return regex(blank(responses), responses, pattern=pattern, **options).tolist()

    assert match('a.c') == [1, 1, 0, 0]
    assert match('a.c', match='full') == [1, 0, 0, 0]
    assert match('(?is)a.c') == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"pattern='a\(' is no regular expression"):
        match('a(')
    with pytest.raises(ValueError, match="match has 'whole'; known are search, full"):
        match('a', match='whole')


def test_tagged():
    responses = [
        '<think>a\nb</think>\n<answer>c</answer>\n',
        '<think></think><answer></answer>',
        '<think>a</think><answer>c</answer> more',
        '<answer>c</answer><think>a</think>',
        '<think>a<think>b</think><answer>c</answer>',
        '<think>a</think><answer>c</answer><answer>d</answer>',
        '<think>a</think><answer>c',
    ]
    assert tagged(blank(responses), responses).tolist() == [1, 1, 0, 0, 0, 0, 0]
    # A template has opened the first part: it is not opened again.
    asked = ['q<assistant><think>\n'] * 3 + ['use <think> and <answer>'] * 2
    rest = '2 and 2\n</think>\n<answer>4</answer>'
    written = [rest, '<think>' + rest, rest.replace('</think>', ''), rest]
    written.append('<think>' + rest)
    assert tagged(asked, written).tolist() == [1, 0, 0, 0, 1]
    only = tagged(['', ''], ['<a.b>x</a.b>', '<aab>x</aab>'], tags=['a.b'])
    assert only.tolist() == [1, 0]
    with pytest.raises(ValueError, match="tags='think'"):
        tagged([], [], tags='think')


# ------------------------------------------------------------------------------- tests


def count_words(prompt, response, tests):
    """A runner: how many of the words does the response have?"""
    if 'crash' in response:
        raise TimeoutError('too slow')
    return sum(word in response for word in tests), len(tests)


def no_pair(prompt, response, tests):
    return {'one': 1, 'more': (2, 1), 'none': (0, 0), 'float': (0.5, 1)}[response]


def test_unit_tests():
    responses, tests = ['a b', 'a', ''], [['a', 'b']] * 3
    arguments = (blank(responses), responses, tests)
    runner = f'{__name__}:count_words'
    assert unit_tests(*arguments, run=runner).tolist() == [1, 0, 0]
    scores = unit_tests(*arguments, run=runner, reward='share')
    np.testing.assert_array_equal(scores, [1, 0.5, 0])
    with pytest.raises(ValueError, match="reward has 'most'"):
        unit_tests([], [], [], run=runner, reward='most')


def test_a_runner_that_fails_is_told_with_the_prompt():
    with pytest.raises(ValueError) as caught:
        unit_tests(['Sort it'], ['crash'], [['a']], run=f'{__name__}:count_words')
    for part in ('TimeoutError: too slow', "'Sort it'", "'crash'", 'count_words'):
        assert part in str(caught.value)
    for response in ('one', 'more', 'none', 'float'):
        with pytest.raises(ValueError, match="passed and total.*prompt 'p'"):
            unit_tests(['p'], [response], [[]], run=f'{__name__}:no_pair')
    with pytest.raises(ValueError, match="run='no.such:thing' cannot be imported"):
        unit_tests([], [], [], run='no.such:thing')
