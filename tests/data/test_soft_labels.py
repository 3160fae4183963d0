"""Comparisons with a probability or a tie: reading, batches, and what is refused."""

import json

import numpy as np
import pytest

from rlhf_jax.data import pipeline
from rlhf_jax.data.formats import (
    BadRecord,
    to_comparison,
    to_demonstration,
)
from rlhf_jax.data.loading import Limits, refuse_soft
from rlhf_jax.data.reward_data import Wanted, load_judgements
from rlhf_jax.data.sources import SourceRecord
from rlhf_jax.datasets.tiny_tldr import tokenizer

PAIR = {'prompt': 'p', 'chosen': ' a', 'rejected': ' b'}
WORDS = tokenizer()


def comparison(**fields):
    return to_comparison(SourceRecord(PAIR | fields, 'f.jsonl:7'), WORDS)


def refuses(fields, *parts, convert=to_comparison):
    with pytest.raises(BadRecord) as caught:
        convert(SourceRecord(PAIR | fields, 'f.jsonl:7'), WORDS)
    for part in ('f.jsonl:7', *parts):
        assert part in str(caught.value), (part, str(caught.value))


@pytest.fixture
def load(tmp_path):
    """Comparisons that differ in the given fields, as a data set."""

    def go(*rows, by=pipeline.load_comparisons, **how):
        path = tmp_path / 'data.jsonl'
        path.write_text(
            ''.join(
                json.dumps({**PAIR, 'prompt': f'p {i} ', **row}) + '\n'
                for i, row in enumerate(rows)
            )
        )
        return by(f'jsonl:{path}', WORDS, max_length=32, **how)

    return go


def batch_of(data, size):
    return next(pipeline.eval_batches(data, size, (32,)))


def test_a_record_says_how_sure_it_is():
    assert (comparison().probability, comparison().tied) == (1, False)
    assert comparison(probability=0.25).probability == 0.25
    assert comparison(probability=0).probability == 0
    assert comparison(probability=None, tie=None).probability == 1
    assert comparison(probability=0.75, tie=False).tied is False
    tied = comparison(tie=True, annotator='k')
    assert (tied.probability, tied.tied, tied.meta) == (0.5, True, {'annotator': 'k'})
    assert comparison(probability=0.75).meta == {}


def test_what_is_no_probability_is_a_bad_record():
    refuses({'probability': 1.01}, 'probability is 1.01', 'from 0 to 1')
    refuses({'probability': -0.5}, 'probability is -0.5')
    refuses({'probability': float('nan')}, 'probability is nan', 'finite number')
    refuses({'probability': True}, 'probability is True')
    refuses({'probability': '0.7'}, "probability is '0.7'")
    refuses({'tie': 1}, 'tie is 1; use true or false')
    refuses({'tie': 'yes'}, "tie is 'yes'")
    refuses({'tie': True, 'probability': 0.5}, 'a tie has no probability')


def test_the_worse_answer_is_no_demonstration():
    refuses({'probability': 0.4}, 'the worse answer', '0.4', convert=to_demonstration)
    record = SourceRecord(PAIR | {'tie': True}, 'f.jsonl:7')
    assert to_demonstration(record, WORDS).completion == ' a'


def test_batches_have_the_probabilities(load):
    # The first record has neither field: it is certain all the same.
    data = load({}, {'probability': 0.75}, {'tie': True}, {'probability': 0})
    batch = batch_of(data, 6)
    np.testing.assert_array_equal(batch.probability, [1, 0.75, 0.5, 0, 1, 1])
    assert batch.probability.dtype == np.float32
    assert batch.tied.tolist() == [False, False, True, False, False, False]
    assert data.take(2).examples[1].probability == 0.75
    assert batch_of(load({}, {'probability': 0.75}), 2).tied is None


def test_certain_labels_give_the_same_batches_with_and_without_the_field(load):
    sure = batch_of(load({'probability': 1}, {'probability': 1.0, 'tie': False}), 4)
    plain = batch_of(load({}, {}), 4)
    for batch in (sure, plain):
        assert batch.probability is None and batch.tied is None
    np.testing.assert_array_equal(sure.tokens, plain.tokens)


def test_ties_alone_have_no_order(load):
    with pytest.raises(ValueError, match=r'all 2 comparisons are ties .*no order'):
        load({'tie': True}, {'probability': 0.5})


def test_a_bad_probability_is_skipped_and_counted(load):
    data = load({}, {'probability': 7}, on_bad='skip')
    assert data.counts.skipped_bad == 1 and len(data.examples) == 1


def test_single_responses_are_not_made_of_uncertain_comparisons(load):
    rows = {}, {'probability': 0.75}, {'tie': True}
    how = dict(by=pipeline.load_preferences, wanted_by="name='kto'")
    assert len(load(*rows, kind='pairs', **how).examples) == 3
    with pytest.raises(ValueError, match=r"2 of 3.*jsonl:2.*name='kto'.*for certain"):
        load(*rows, kind='unpaired', **how)
    assert len(load({}, {'probability': 1}, kind='unpaired', **how).examples) == 4


def test_a_loss_that_cannot_swap_refuses_them(load):
    refuse_soft(load({}, {}), "name='aot'", 'compares')
    with pytest.raises(ValueError, match=r"1 of 2.*jsonl:2.*name='aot' compares"):
        refuse_soft(load({}, {'probability': 0}), "name='aot'", 'compares')


def test_a_dimension_keeps_probability_and_tie(load):
    wanted = Wanted(
        kind='pairs',
        by='loss',
        heads=('kind', 'brief'),
        rating_range=None,
        rating_unit='given',
        step_separator='\n',
    )

    def judged(spec, tokenizer, max_length):
        limits = Limits(max_length, 'drop', 'error')
        return load_judgements(spec, tokenizer, wanted, limits)

    rows = (
        {'dimension': 'kind', 'probability': 0.75},
        {'dimension': 'brief', 'tie': True},
        {'dimension': 'brief'},
    )
    batch = batch_of(load(*rows, by=judged), 3)
    np.testing.assert_array_equal(batch.probability, [0.75, 0.5, 1])
    ranks = np.where(batch.judged, batch.labels, -1)
    assert ranks[0].tolist() == [[1, -1], [2, -1]]
    assert ranks[1].tolist() == [[-1, 1], [-1, 1]]
