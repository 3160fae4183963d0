"""Packing: by hand, nothing lost, and a packed document as if it were alone."""

import itertools

import jax
import numpy as np
import pytest

from rlhf_jax.algos.sft import sft_loss
from rlhf_jax.data import pipeline
from rlhf_jax.data.columns import Packed, Table
from rlhf_jax.data.examples import Counts, Dataset, Origin, TokenExample
from rlhf_jax.data.packing import best_fit, pack


def documents(seed=0, count=40, longest=12):
    rng = np.random.default_rng(seed)
    examples = []
    for size in rng.integers(2, longest + 1, count):
        loss = rng.random(size) < 0.7
        loss[0] = False
        tokens = rng.integers(0, 64, size).astype(np.int32)
        examples.append(TokenExample(tokens, loss))
    counts = Counts('here', 'texts', longest, read=count, kept=count)
    origins = Packed.of([(f'here:{i}',) for i in range(count)], Origin)
    return Dataset(Table.of(examples), origins, counts)


def test_best_fit_by_hand():
    # 7 and 5 open a row each; 4 fits behind 5 alone, 3 fills 7, 1 fills 5 + 4.
    assert best_fit([5, 3, 7, 1, 4], 10) == [[0, 3, 4], [1, 2]]
    # Into the fullest row that has room: 2 goes behind 8, not behind 6.
    assert best_fit([6, 8, 2], 10) == [[0], [1, 2]]
    # Of equal rows the first.
    assert best_fit([6, 6, 3, 3], 10) == [[0, 2], [1, 3]]


@pytest.mark.parametrize('seed', range(3))
def test_every_document_is_packed_once_and_fits(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 101, 500)
    rows = best_fit(lengths, 100)
    assert sorted(itertools.chain(*rows)) == list(range(500))
    assert max(lengths[row].sum() for row in rows) <= 100
    # 11/9 of the optimum, which is at least the sum over the capacity.
    assert len(rows) <= 11 / 9 * -(-lengths.sum() // 100) + 1


def test_a_packed_batch_by_hand():
    data = documents()
    packed = pack(data, 16)
    assert packed.counts.describe() == (
        f'40 texts read from here, 40 kept; packed into {len(packed.examples)} rows of '
        '16 tokens'
    )
    (batch,) = pipeline.eval_batches(packed, len(packed.examples), (16,))
    assert batch.mask.sum() == sum(len(e.tokens) for e in data.examples)
    assert batch.loss_mask.sum() == sum(e.loss.sum() for e in data.examples)
    found = [
        tuple(batch.tokens[row][batch.mask[row] & (batch.segments[row] == document)])
        for row in range(len(batch.tokens))
        for document in np.unique(batch.segments[row][batch.mask[row]])
    ]
    assert sorted(found) == sorted(tuple(e.tokens) for e in data.examples)


def test_a_packed_document_has_the_loss_it_has_alone(policy, policy_params):
    data = documents()
    packed = pack(data, 30)
    assert len(packed.examples) < len(data.examples) / 2

    @jax.jit
    def gradient(batch):
        def loss(params):
            total, weight, _ = sft_loss(params, batch, model=policy)
            return total, weight

        return jax.value_and_grad(loss, has_aux=True)(policy_params)

    (alone,) = pipeline.eval_batches(data, 40, (12,))
    (together,) = pipeline.eval_batches(packed, len(packed.examples), (30,))
    for a, b in zip(
        jax.tree.leaves(gradient(alone)), jax.tree.leaves(gradient(together))
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_batches_sorted_by_length_hold_every_example_once_an_epoch():
    data = documents(count=48)
    plain = pipeline.batches(data, 4, seed=1, buckets=(4, 8, 12))
    ours = pipeline.batches(data, 4, seed=1, buckets=(4, 8, 12), sort_batches=6)
    lengths, sizes = [], []
    for _ in range(2):  # two epochs of 12 batches
        epoch = [next(ours) for _ in range(12)]
        rows = [row[m] for b in epoch for row, m in zip(b.tokens, b.mask)]
        assert sorted(map(tuple, rows)) == sorted(
            tuple(e.tokens) for e in data.examples
        )
        lengths += [b.mask.sum(-1) for b in epoch]
        sizes.append([b.tokens.shape[1] for b in epoch])
    # Within a window of six the batches are slices of the sorted rows …
    for window in (lengths[:6], lengths[6:12], lengths[12:18]):
        ordered = sorted(window, key=lambda x: (x.min(), x.max()))
        assert all(a.max() <= b.min() for a, b in zip(ordered, ordered[1:]))
    # … in a random order, other from epoch to epoch, and there is less padding.
    assert sizes[0] != sorted(sizes[0]) and sizes[0] != sizes[1]
    before = sum(next(plain).tokens.size for _ in range(24))
    assert 4 * sum(map(sum, sizes)) < 0.9 * before


def test_sorted_batches_resume_and_are_shared_by_processes():
    data = documents()
    how = {'seed': 3, 'buckets': (12,), 'sort_batches': 3}
    batches = list(itertools.islice(pipeline.batches(data, 8, **how), 8))
    later = pipeline.batches(data, 8, **how, start_step=5)
    np.testing.assert_array_equal(next(later).tokens, batches[5].tokens)
    halves = [
        next(pipeline.batches(data, 8, **how, process_index=i, process_count=2)).tokens
        for i in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(halves), batches[0].tokens)
