"""Preference data: pairs, single responses, and the response to another prompt."""

import json

import numpy as np
import pytest

from rlhf_jax.data import pipeline
from rlhf_jax.data.examples import mismatched
from rlhf_jax.datasets.tiny_tldr import tokenizer

PAIRED = [
    {'prompt': f'p {i} ', 'chosen': ' good' * (i + 1), 'rejected': f' bad {i}'}
    for i in range(5)
]
UNPAIRED = [
    {'prompt': f'p {i % 3} ', 'completion': f' text {i}', 'label': label}
    for i, label in enumerate([True, False, 1, 0, True])
]


@pytest.fixture(scope='module')
def words():
    return tokenizer()


def load(path, records, words, kind, max_length=64, **how):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    how |= {'wanted_by': "config.preference.name='x'", 'max_length': max_length}
    return pipeline.load_preferences(f'jsonl:{path}', words, kind=kind, **how)


def text(words, tokens, mask):
    return words.decode(tokens[mask], skip_special_tokens=True)


def test_pairs_know_their_responses(tmp_path, words):
    data = load(tmp_path / 'a.jsonl', PAIRED, words, 'pairs')
    [batch] = pipeline.eval_batches(data, 8, (32, 64))
    assert batch.weight.tolist() == [1] * 5 + [0] * 3
    for i, record in enumerate(PAIRED):
        for side, name in enumerate(('chosen', 'rejected')):
            tokens, mask = batch.tokens[i, side], batch.mask[i, side]
            response = batch.response_mask[i, side]
            assert text(words, tokens, response) == record[name]
            assert text(words, tokens, mask) == record['prompt'] + record[name]
            assert tokens[response][-1] == words.eos_token_id
    assert batch.mask[5:].sum(-1).tolist() == [[1, 1]] * 3
    assert not batch.response_mask[5:].any()


def test_single_responses_and_comparisons_taken_apart(tmp_path, words):
    data = load(tmp_path / 'a.jsonl', UNPAIRED, words, 'unpaired')
    [batch] = pipeline.eval_batches(data, 8, (64,))
    assert batch.desirable.tolist() == [True, False, True, False, True] + [False] * 3
    for i, record in enumerate(UNPAIRED):
        response = text(words, batch.tokens[i, 0], batch.response_mask[i, 0])
        assert response == record['completion']
    data = load(tmp_path / 'b.jsonl', PAIRED, words, 'unpaired')
    [batch] = pipeline.eval_batches(data, 16, (64,))
    assert batch.desirable.tolist() == [True, False] * 5 + [False] * 6
    responses = [r[name] for r in PAIRED for name in ('chosen', 'rejected')]
    for i, response in enumerate(responses):
        assert text(words, batch.tokens[i, 0], batch.response_mask[i, 0]) == response
        assert data.records[i].where.endswith(f'b.jsonl:{i // 2 + 1}')


def test_mismatched_rows_join_a_prompt_and_the_response_to_another(tmp_path, words):
    data = load(tmp_path / 'a.jsonl', PAIRED, words, 'unpaired')
    [batch] = pipeline.eval_batches(data, 10, (64,))
    other = batch.mismatched
    owner = {r[name]: r['prompt'] for r in PAIRED for name in ('chosen', 'rejected')}
    given = []
    for i in range(10):
        tokens, response = other.tokens[i], other.loss_mask[i]
        prompt = text(words, tokens, other.mask[i] & ~response)
        assert prompt == text(words, batch.tokens[i, 0], ~response & other.mask[i])
        assert prompt == PAIRED[i // 2]['prompt']
        given.append(text(words, tokens, response))
        assert owner[given[-1]] != prompt
    assert len(set(given)) >= 5  # not always the same ones
    # Fixed for the data set, whatever the batches.
    for again in pipeline.batches(data, 5, seed=3, buckets=(64,)):
        rows = {
            text(words, t, m): text(words, o, r)
            for t, m, o, r in zip(
                again.tokens[:, 0],
                again.mask[:, 0],
                again.mismatched.tokens,
                again.mismatched.mask,
            )
        }
        for i, prompt in enumerate(r['prompt'] for r in PAIRED for _ in range(2)):
            own = text(words, batch.tokens[i, 0], batch.mask[i, 0])
            if own in rows:
                assert rows[own] == prompt + given[i]
        break


@pytest.mark.parametrize('seed', range(5))
def test_every_prompt_meets_a_response_to_another_one(seed):
    rng = np.random.default_rng(seed)
    prompts = [np.full(4, i, np.int32) for i in rng.integers(0, 3, 20)]
    responses = [np.asarray([100 + p[0]] * 9, np.int32) for p in prompts]
    others = mismatched(prompts, responses, 10)
    for prompt, other in zip(prompts, others):
        assert len(other) == 6  # cut to the limit
        assert other[0] - 100 != prompt[0]
    with pytest.raises(ValueError, match='have the same prompt'):
        mismatched([prompts[0]] * 3, responses[:3], 10)


@pytest.mark.parametrize(
    ('kind', 'records'),
    [('pairs', PAIRED), ('unpaired', PAIRED), ('unpaired', UNPAIRED)],
)
def test_the_longest_response_of_the_data_is_known(tmp_path, words, kind, records):
    """It is static, so it is the same in every batch of a bucket."""
    data = load(tmp_path / 'a.jsonl', records, words, kind)
    [batch] = pipeline.eval_batches(data, 16, (64,))
    masks = [batch.response_mask]
    masks += [batch.mismatched.loss_mask] if kind == 'unpaired' else []
    longest = max(int(mask.sum(-1).max()) for mask in masks)
    rounded = {26: 32, 8: 16}[longest]
    lengths = {
        b.response_length
        for b, _ in zip(pipeline.batches(data, 2, seed=0, buckets=(64,)), range(8))
    }
    assert lengths == {batch.response_length} == {rounded}
    # It spares nothing in rows that are no longer.
    [batch] = pipeline.eval_batches(data, 16, (rounded,))
    assert batch.response_length is None


def test_a_long_response_costs_the_shorter_bucket_nothing(tmp_path, words):
    records = [*PAIRED[:3], PAIRED[0] | {'chosen': ' good' * 8}]
    data = load(tmp_path / 'a.jsonl', records, words, 'pairs')
    batches = pipeline.eval_batches(data, 1, (24, 64))
    known = [(batch.tokens.shape[-1], batch.response_length) for batch in batches]
    assert known == [(24, 16)] * 3 + [(64, 48)]


def test_columns_follow_the_examples(tmp_path, words):
    data = load(tmp_path / 'a.jsonl', PAIRED, words, 'pairs')
    column = np.arange(10, dtype=np.float32).reshape(5, 2)
    data = pipeline.dataclasses.replace(data, columns={'ref_logps': column})
    [batch] = pipeline.eval_batches(data, 8, (64,))
    expected = np.concatenate([column, np.zeros((3, 2))])
    np.testing.assert_array_equal(batch.ref_logps, expected)
    batch = next(pipeline.batches(data, 5, seed=1, buckets=(64,)))
    for row, ref in zip(batch.tokens, batch.ref_logps):
        [place] = [
            i
            for i, e in enumerate(data.examples)
            if row[0][: len(e.prompt)].tolist() == e.prompt.tolist()
        ]
        assert ref.tolist() == column[place].tolist()
    assert data.take(2).columns['ref_logps'].tolist() == column[:2].tolist()


@pytest.mark.parametrize(
    ('records', 'kind', 'parts'),
    [
        (UNPAIRED, 'pairs', ['completion, label, prompt', 'a chosen', "as 'kto'"]),
        ([{'prompt': 'a', 'completion': ' b'}], 'pairs', ['chosen', 'other data']),
        ([{'prompt': 'a', 'completion': ' b'}], 'unpaired', ['a label', 'other data']),
        (UNPAIRED[::2], 'unpaired', ['all 3 labels are True', 'the other label']),
        ([UNPAIRED[0], {**UNPAIRED[1], 'label': 'no'}], 'unpaired', [':2', "'no'"]),
        ([UNPAIRED[0], {**UNPAIRED[1], 'label': 2}], 'unpaired', [':2: label is 2']),
        (
            [UNPAIRED[0], {**UNPAIRED[1], 'label': 0.5}],
            'unpaired',
            [':2: label is 0.5'],
        ),
        (
            [*UNPAIRED, {'prompt': 'a', 'completion': ' b'}],
            'unpaired',
            [':6: the field'],
        ),
        (UNPAIRED[::3], 'unpaired', ['a.jsonl: all examples have the same prompt']),
    ],
)
def test_data_that_a_loss_cannot_use(tmp_path, words, records, kind, parts):
    with pytest.raises(ValueError) as caught:
        load(tmp_path / 'a.jsonl', records, words, kind)
    for part in ['a.jsonl', *parts]:
        assert part in str(caught.value), str(caught.value)


def test_bad_labels_can_be_left_out_and_are_counted(tmp_path, words):
    records = [*UNPAIRED, {**UNPAIRED[0], 'label': None}]
    data = load(tmp_path / 'a.jsonl', records, words, 'unpaired', on_bad='skip')
    assert len(data.examples) == 5 and data.counts.skipped_bad == 1
    assert "6: the field 'label' is missing" in data.counts.describe()
