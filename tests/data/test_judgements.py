"""Rankings, ratings and steps: what they mean, what is refused, what a batch holds."""

import json

import numpy as np
import pytest

from rlhf_jax.data import pipeline
from rlhf_jax.data.loading import Limits
from rlhf_jax.data.reward_data import Wanted, load_judgements
from rlhf_jax.datasets import tiny_judgements, tiny_tldr

LIMITS = Limits(48, 'drop', 'error')


@pytest.fixture(scope='module')
def tokenizer():
    return tiny_tldr.tokenizer()


@pytest.fixture
def load(tmp_path, tokenizer):
    """Records as the data set of a kind."""

    def go(records, kind='pairs', limits=LIMITS, **wanted):
        path = tmp_path / 'data.jsonl'
        path.write_text('\n'.join(map(json.dumps, records)), encoding='utf-8')
        defaults = dict(
            by=f'config.rm.loss={kind!r}',
            heads=(),
            rating_range=(0.0, 4.0),
            rating_unit='given',
            step_separator='\n',
        )
        wanted = Wanted(kind=kind, **defaults | wanted)
        return load_judgements(f'jsonl:{path}', tokenizer, wanted, limits)

    return go


def ranks_of(batch):
    return np.where(batch.judged, batch.labels, -1)


def batch_of(data, size):
    return next(pipeline.eval_batches(data, size, (48,)))


def ranking(**fields):
    return {
        'prompt': 'Anna',
        'completions': [' a', ' b', ' c'],
        'ranks': [1, 2, 2],
    } | fields


def rating(**fields):
    return {'prompt': 'Anna', 'completion': ' saw', 'rating': 3} | fields


def stepwise(**fields):
    record = {'prompt': 'Anna', 'completions': [' a', ' b'], 'labels': [True, False]}
    return record | fields


def test_rankings_of_several_sizes_make_one_shape(load, tokenizer):
    short = ranking(prompt='Ben', completions=[' d', ' e'], ranks=[2, 1])
    batch = batch_of(load([short, ranking()]), 3)
    assert batch.tokens.shape == (3, 3, 48)
    ranks = [[2, 1, -1], [1, 2, 2], [-1, -1, -1]]
    np.testing.assert_array_equal(ranks_of(batch)[..., 0], ranks)
    np.testing.assert_array_equal(batch.weight, [1, 1, 0])
    assert (batch.mask[0, 2].sum(), batch.mask[2, 0].sum()) == (1, 1)  # fill up
    row = batch.tokens[0, 1][batch.mask[0, 1]].tolist()
    assert row == [*tokenizer('Ben')['input_ids'], *tokenizer(' e')['input_ids'], 1]


def test_a_null_completion_has_a_rank_and_no_tokens(load, tokenizer):
    texts = ranking(completions=[None, ' b', ' a'], ranks=[2, 1, 3])
    plain = ranking(prompt='Ben', completions=[' d', ' e'], ranks=[2, 1])
    data = load([texts, plain])
    assert [len(a) for a in data.examples[0].answers][0] == 0
    batch = batch_of(data, 3)
    np.testing.assert_array_equal(ranks_of(batch)[0, :, 0], [2, 1, 3])
    assert not batch.mask[0, 0].any() and not batch.tokens[0, 0].any()
    row = batch.tokens[0, 2][batch.mask[0, 2]].tolist()
    assert row == [*tokenizer('Anna')['input_ids'], *tokenizer(' a')['input_ids'], 1]
    # What is not there at all keeps its one token, and no rank.
    assert batch.mask[1, 2].sum() == 1 and ranks_of(batch)[1, 2, 0] == -1


def test_a_null_completion_is_left_alone_where_texts_are_cut(load):
    words = ' saw lamps in Paris last May because of rain'
    long = ranking(completions=[words * 3, None, ' c'], ranks=[1, 2, 3])
    (example,) = load([long], limits=Limits(20, 'truncate', 'error')).examples
    assert [len(a) > 0 for a in example.answers] == [True, False, True]
    assert len(example.prompt) + len(example.answers[0]) == 20


def test_ranks_by_dimension_and_comparisons_in_one(load):
    heads = ('helpful', 'safe')
    two = ranking(ranks={'helpful': [1, 2, 3], 'safe': [2, None, 1]})
    pair = {'prompt': 'Ben', 'chosen': ' d', 'rejected': ' e', 'margin': 0.5}
    batch = batch_of(load([two, pair | {'dimension': 'safe'}], heads=heads), 2)
    np.testing.assert_array_equal(ranks_of(batch)[0], [[1, 2], [2, -1], [3, 1]])
    np.testing.assert_array_equal(ranks_of(batch)[1], [[-1, 1], [-1, 2], [-1, -1]])
    np.testing.assert_array_equal(batch.margin, [0, 0.5])


def test_plain_comparisons_stay_pairs(load):
    data = load([{'prompt': 'Ben', 'chosen': ' d', 'rejected': ' e'}])
    assert data.counts.what == 'comparisons' and data.examples[0].labels is None


def test_ratings_and_the_unit_interval(load):
    records = [rating(rating=4), rating(prompt='Ben', rating=1.5)]
    for unit, wanted in (('given', [4, 1.5]), ('range', [1, 0.375])):
        batch = batch_of(load(records, 'ratings', rating_unit=unit), 3)
        np.testing.assert_allclose(batch.labels[:2, 0, 0], wanted)
        assert batch.judged[:, 0, 0].tolist() == [True, True, False]
    named = [
        rating(ratings={'a': 2}),
        rating(prompt='Ben', ratings={'b': 4, 'a': None}),
    ]
    batch = batch_of(load(named, 'ratings', heads=('a', 'b')), 2)
    np.testing.assert_array_equal(batch.labels[:, 0], [[2, 0], [0, 4]])
    np.testing.assert_array_equal(batch.judged[:, 0], [[True, False], [False, True]])


def test_steps_are_read_at_their_separators_and_at_eos(load, tokenizer):
    record = stepwise(completions=[' a', ' b\n', ' c'], labels=[True, 1, False])
    batch = batch_of(load([record], 'steps'), 2)
    newline, eos = tokenizer('\n')['input_ids'][-1], tokenizer.eos_token_id
    ends = batch.tokens[0][batch.judged[0]].tolist()
    assert ends == [newline, newline, eos]
    assert batch.labels[0][batch.judged[0]].tolist() == [1, 1, 0]
    assert batch.judged[1].sum() == batch.weight[1] == 0
    text = tokenizer.decode(batch.tokens[0][batch.mask[0]])
    assert text.startswith('Anna a\n b\n c')


@pytest.mark.parametrize(
    'kind, record, message',
    [
        ('pairs', ranking(ranks=[1, 3, 3]), r'\[1, 3, 3\].*is \[1, 2, 2\] meant'),
        ('pairs', ranking(ranks=[0, 1, 2]), r'is \[1, 2, 3\] meant'),
        ('pairs', ranking(ranks=[1, 2]), 'for 3 completions; give one rank for each'),
        ('pairs', ranking(ranks=[1, 2.5, 3]), 'ranks are whole numbers'),
        ('pairs', ranking(ranks=[1, True, 2]), 'ranks are whole numbers'),
        ('pairs', ranking(ranks=[1, None, None]), 'ranks a single completion'),
        ('pairs', ranking(completions=[' a'], ranks=[1]), 'a list of at least 2'),
        ('pairs', ranking(completions=' a', ranks=[1]), 'a list of at least 2'),
        ('pairs', ranking(completions=[' a', ' b', ' a']), 'two completions are equal'),
        (
            'pairs',
            ranking(completions=[' a', ' ', ' b']),
            r'completions\[1\].*is empty',
        ),
        (
            'pairs',
            ranking(completions=[None, ' b', None]),
            r'completions\[0\] and completions\[2\] are null; a single one',
        ),
        (
            'pairs',
            ranking(completions=[' a', None], ranks=[1, 2]),
            r'beside completions\[1\], which is null, there is one',
        ),
        (
            'pairs',
            ranking(completions=[' a', ' b', None], ranks=[1, 2, None]),
            r'completions\[2\] is null and has no rank',
        ),
        (
            'pairs',
            ranking(completions=[' a', ' b', ' ']),
            r'completions\[2\].*is empty',
        ),
        ('pairs', ranking(ranks={'x': [1, 2, 3]}), r"by dimension \(x\); .*\('x',\)"),
        ('pairs', ranking(prompt=None), "'prompt' is missing"),
        ('pairs', ranking(gold=[1, 'x', 3]), r"gold\[1\] is 'x'; it must be a finite"),
        ('pairs', ranking(gold=[1, 2, 3, 4]), 'gold has 4 numbers for 3 completions'),
        ('pairs', ranking(gold=1), "'gold' must be a list of at least 3"),
        ('ratings', rating(rating=5), r'rating is 5, outside of rating_range=\(0, 4\)'),
        ('ratings', rating(rating='good'), "rating is 'good'; it must be a finite"),
        ('ratings', rating(rating=10**400), 'rating is above 1e300, which is beyond'),
        (
            'ratings',
            rating(rating=-2e18),
            'rating is -2e.18, which is beyond ±1e.18',
        ),
        ('ratings', rating(rating=True), 'rating is True; it must be a finite'),
        ('ratings', rating(rating={'a': 1}), 'by dimension'),
        ('steps', stepwise(labels=[True]), '1 labels of 2 steps'),
        ('steps', stepwise(labels=[True, 'no']), 'use true and false'),
        (
            'steps',
            stepwise(completions=[' a\n b', ' c']),
            r'completions\[0\] holds the',
        ),
        ('steps', stepwise(completions=[' a', '\n']), r'completions\[1\].*is empty'),
        ('steps', stepwise(completions=[], labels=[]), 'a list of at least 1'),
    ],
)
def test_a_bad_record_is_told_with_its_place(load, kind, record, message):
    good = {'pairs': ranking(), 'ratings': rating(), 'steps': stepwise()}[kind]
    with pytest.raises(ValueError, match=r'data.jsonl:2: ?.*' + message):
        load([good, record], kind)


def test_bad_records_can_be_skipped_and_are_counted(load):
    limits = LIMITS._replace(on_bad='skip')
    data = load([ranking(), ranking(ranks=[1, 3, 3])], limits=limits)
    assert (data.counts.kept, data.counts.skipped_bad) == (1, 1)
    assert 'data.jsonl:2' in data.counts.describe()


@pytest.mark.parametrize(
    'kind, records, wanted, message',
    [
        (
            'ratings',
            [ranking()],
            {},
            "needs rating or ratings .*use loss='bradley_terry'",
        ),
        ('pairs', [rating()], {}, "needs chosen or ranks .*use loss='squared'"),
        ('steps', [rating()], {}, "needs labels .*use loss='squared'"),
        ('pairs', [{'text': 'a'}], {}, 'has text in its records.*use other data'),
        ('pairs', [ranking(ranks=[1, 1, 1])], {}, 'all 1 rankings are ties'),
        (
            'pairs',
            [ranking(completions=[' a', ' b', None], ranks=[1, 1, 2])],
            {},
            'all 1 rankings are ties',
        ),
        ('steps', [stepwise(labels=[True, True])], {}, 'all steps are labelled True'),
        (
            'pairs',
            [{'prompt': 'B', 'chosen': ' d', 'rejected': ' e', 'dimension': 'x'}],
            {},
            'name the dimensions in heads',
        ),
        (
            'pairs',
            [{'prompt': 'B', 'chosen': ' d', 'rejected': ' e', 'dimension': 'x'}],
            {'heads': ('y',)},
            "dimension is 'x', and the heads are y",
        ),
        (
            'ratings',
            [rating(ratings={'a': 1})],
            {'heads': ('a', 'b')},
            "no judgement in the dimension 'b'",
        ),
        ('ratings', [rating(ratings={'c': 1})], {'heads': ('a',)}, 'has none of a'),
        ('ratings', [rating(ratings=3)], {'heads': ('a',)}, 'needs one by dimension'),
    ],
)
def test_data_that_do_not_fit_are_told(load, kind, records, wanted, message):
    with pytest.raises(ValueError, match=message):
        load(records, kind, **wanted)


def test_steps_are_not_cut(load):
    with pytest.raises(ValueError, match="use 'drop'"):
        load([stepwise()], 'steps', LIMITS._replace(overlong='truncate'))


def test_rankings_are_cut_for_the_longest_completion(load):
    words = ' saw lamps in Paris last May because of rain'
    long = ranking(completions=[words * 3, ' b', ' c'])
    data = load([ranking(prompt='Ben'), long], limits=Limits(20, 'truncate', 'error'))
    assert data.counts.truncated == 1
    assert max(len(e.prompt) + len(a) for e in data.examples for a in e.answers) == 20
    assert all(a[-1] == 1 for e in data.examples for a in e.answers)
    assert (
        load(
            [ranking(prompt='Ben'), long], limits=Limits(20, 'drop', 'error')
        ).counts.kept
        == 1
    )


# ------------------------------------------------------------------------ embedded data


@pytest.mark.parametrize('make', ['rankings', 'ratings', 'steps'])
def test_embedded_judgements_are_the_same_at_every_call(make):
    make = getattr(tiny_judgements, make)
    train, test = make('train'), make('test')
    assert test == make('test') and (len(train), len(test)) == (4000, 500)
    if make is not tiny_judgements.steps:  # sums are few: they repeat
        assert not {r['prompt'] for r in train} & {r['prompt'] for r in test}
    with pytest.raises(ValueError, match="split='dev'; use 'train' or 'test'"):
        make('dev')


def test_embedded_judgements_are_good_records(tokenizer):
    for kind, name, wanted in (
        ('pairs', 'rankings', {}),
        ('ratings', 'ratings', {'heads': ('coverage', 'faithfulness', 'brevity')}),
        ('ratings', 'ratings', {}),
        ('steps', 'steps', {}),
    ):
        fields = dict(heads=(), rating_range=(0.0, 4.0), rating_unit='given', by='it')
        wanted = Wanted(kind=kind, **fields | wanted, step_separator='\n')
        spec = f'python:rlhf_jax.datasets.tiny_judgements:{name}?split=test'
        data = load_judgements(spec, tokenizer, wanted, Limits(88, 'drop', 'error'))
        assert data.counts.skipped_bad == 0 and data.counts.kept >= 495


def test_rankings_follow_their_gold_and_have_ties():
    records = tiny_judgements.rankings('test')
    right = total = ties = 0
    for record in records:
        for a in range(len(record['ranks'])):
            for b in range(a):
                gold = record['gold'][a] - record['gold'][b]
                order = record['ranks'][b] - record['ranks'][a]
                ties += order == 0
                total += gold != 0 and order != 0
                right += gold * order > 0
    assert 0.7 < right / total < 0.95 and ties > 50


def test_sums_are_right_until_the_first_slip():
    for record in tiny_judgements.steps('test'):
        terms = (
            record['prompt'].removeprefix('What is ').removesuffix('?\n').split(' + ')
        )
        true = int(terms[0])
        for term, line, label in zip(
            terms[1:], record['completions'], record['labels']
        ):
            true += int(term)
            # A later slip can make up for the first: what is wrong stays wrong.
            assert not label or int(line.split(' = ')[1]) == true
        assert record['labels'] == sorted(record['labels'], reverse=True)
