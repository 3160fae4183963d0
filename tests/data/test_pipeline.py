"""Tokens and batches by hand, the order of batches, and the errors of the data path."""

import itertools
import json
import pathlib
import threading
import time
import tracemalloc
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import columns, pipeline, rows
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.types import JudgedBatch, PromptBatch, TokenBatch

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'
LETTERS = 'abcdefghijklmnopqrstuvwxyz'


def words(bos=False):
    """Word-level: <s> 0, </s> 1, <unk> 2, then a 3, b 4, …"""
    vocabulary = {t: i for i, t in enumerate(['<s>', '</s>', '<unk>', *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single='<s> $A', special_tokens=[('<s>', 0)]
        )
        core.add_special_tokens(['<s>'])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token='</s>')


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows):
        path = tmp_path / 'data.jsonl'
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        return f'jsonl:{path}'

    return write


def fails(call, *parts):
    with pytest.raises(ValueError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), (part, str(caught.value))


def spell(number):
    """Three letters that tell one number from another."""
    return ' '.join(LETTERS[number // 26**k % 26] for k in range(3))


def sets(jsonl, size=20):
    """A data set of every kind with ``size`` different examples of several lengths."""
    tail = [' z' * (i % 5) for i in range(size)]
    shown = [{'prompt': spell(i), 'completion': 'x' + tail[i]} for i in range(size)]
    judged = [
        {'prompt': spell(i), 'chosen': 'x' + tail[i], 'rejected': 'y', 'margin': i}
        for i in range(size)
    ]
    texts = [{'text': spell(i) + tail[i]} for i in range(size)]
    return {
        'texts': pipeline.load_texts(jsonl(*texts), words(), max_length=16),
        'demonstrations': pipeline.load_demonstrations(
            jsonl(*shown), words(), max_length=16
        ),
        'comparisons': pipeline.load_comparisons(
            jsonl(*judged), words(), max_length=16
        ),
        'prompts': pipeline.load_prompts(jsonl(*shown), words(), max_prompt_length=16),
    }


KINDS = ('texts', 'demonstrations', 'comparisons', 'prompts')
BUCKETS = (4, 8, 16)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert type(a) is type(b)


def first(iterator, count):
    return list(itertools.islice(iterator, count))


# ----------------------------------------------------------------------------- loading


def test_demonstration_by_hand(jsonl):
    spec = jsonl({'prompt': 'a b', 'completion': ' c'})
    for bos, expected in ((False, [3, 4, 5, 1]), (True, [0, 3, 4, 5, 1])):
        load = pipeline.load_demonstrations
        data = load(spec, words(bos), max_length=8)
        (example,) = data.examples
        assert example.tokens.tolist() == expected
        assert example.tokens.dtype == np.int32
        assert example.loss.tolist() == [False] * (len(expected) - 2) + [True] * 2
        data = load(spec, words(bos), max_length=8, loss_on='all')
        assert data.examples[0].loss.tolist() == [False] + [True] * (len(expected) - 1)
        assert data.records[0].where.endswith('data.jsonl:1')


def test_bos_of_the_template_is_not_doubled(jsonl):
    spec = jsonl({'prompt': '<s> a', 'completion': 'c'})
    data = pipeline.load_demonstrations(spec, words(bos=True), max_length=8)
    assert data.examples[0].tokens.tolist() == [0, 3, 5, 1]


def test_comparison_by_hand(jsonl):
    spec = jsonl({'prompt': 'a', 'chosen': 'b c', 'rejected': 'd', 'margin': 0.5})
    data = pipeline.load_comparisons(spec, words(bos=True), max_length=8)
    (example,) = data.examples
    assert example.prompt.tolist() == [0, 3]
    assert example.answers[0].tolist() == [4, 5, 1]
    assert example.answers[1].tolist() == [6, 1]
    assert example.margin == 0.5


def test_texts_are_cut_so_that_every_token_is_predicted_once(jsonl):
    letters = ' '.join(LETTERS[:9])  # 11 tokens with BOS and EOS
    spec = jsonl({'text': letters}, {'text': 'a b'})
    for length in range(2, 13):
        data = pipeline.load_texts(spec, words(bos=True), max_length=length)
        long = [
            example.tokens
            for example, record in zip(data.examples, data.records)
            if record.where.endswith(':1')
        ]
        assert all(2 <= len(piece) <= length for piece in long)
        assert np.concatenate([long[0][:1]] + [p[1:] for p in long]).tolist() == [
            0,
            *range(3, 12),
            1,
        ]
        for example in data.examples:
            assert not example.loss[0] and example.loss[1:].all()
        assert data.counts.truncated == (length < 11) + (length < 4)
        assert (data.counts.read, data.counts.kept) == (2, 2)
    assert 'cut into pieces' not in data.counts.describe()


def test_overlong_is_dropped_and_counted(jsonl):
    rows = [{'prompt': 'a', 'completion': 'b' + ' c' * n} for n in range(5)]
    data = pipeline.load_demonstrations(jsonl(*rows), words(), max_length=4)
    assert [len(e.tokens) for e in data.examples] == [3, 4]
    assert [r.where[-2:] for r in data.records] == [':1', ':2']
    assert (data.counts.read, data.counts.kept) == (5, 2)
    assert data.counts.dropped_overlong == 3
    assert '3 dropped as longer than 4 tokens' in data.counts.describe()


def test_overlong_is_truncated_and_counted(jsonl):
    rows = [
        {'prompt': 'a b c d e', 'completion': 'x y'},  # the prompt gives way
        {'prompt': 'a b c d e', 'completion': 'v w x y z'},  # both do
        {'prompt': 'a', 'completion': 'x'},  # fits
    ]
    data = pipeline.load_demonstrations(
        jsonl(*rows), words(bos=True), max_length=6, overlong='truncate'
    )
    # x 26, y 27, z 28; v 24, w 25; d 6, e 7.
    assert [e.tokens.tolist() for e in data.examples] == [
        [0, 6, 7, 26, 27, 1],
        [0, 6, 7, 24, 25, 1],
        [0, 3, 26, 1],
    ]
    assert [e.loss.tolist().index(True) for e in data.examples] == [3, 3, 2]
    assert [e.loss.sum() for e in data.examples] == [3, 3, 2]
    counts = data.counts
    assert (counts.kept, counts.truncated, counts.responses_cut) == (3, 2, 1)
    assert '2 truncated to 6 tokens, 1 of them in the answer' in counts.describe()


def test_pairs_that_truncation_makes_equal_are_dropped(jsonl):
    spec = jsonl(
        {'prompt': 'a', 'chosen': 'x y z', 'rejected': 'x y w'},
        {'prompt': 'a', 'chosen': 'x w z', 'rejected': 'x y w'},
    )
    data = pipeline.load_comparisons(spec, words(), max_length=4, overlong='truncate')
    (example,) = data.examples
    assert example.answers[0].tolist() == [26, 25, 1]
    assert example.answers[1].tolist() == [26, 27, 1]
    assert (data.counts.dropped_overlong, data.counts.truncated) == (1, 1)


def test_prompts_are_cut_from_the_left(jsonl):
    spec = jsonl({'prompt': 'a b c d'}, {'prompt': 'a'})
    cut = {'max_prompt_length': 3, 'overlong': 'truncate'}
    data = pipeline.load_prompts(spec, words(bos=True), **cut)
    assert [e.tokens.tolist() for e in data.examples] == [[0, 5, 6], [0, 3]]
    data = pipeline.load_prompts(spec, words(bos=True), max_prompt_length=3)
    assert [e.tokens.tolist() for e in data.examples] == [[0, 3]]


def test_bad_records_stop_or_are_counted(jsonl):
    rows = [
        {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'},
        {'prompt': 'a', 'chosen': '', 'rejected': 'c'},
        {'prompt': 'a', 'chosen': 'é', 'rejected': 'ü'},  # <unk> both
        {'prompt': 'a', 'chosen': 'b', 'rejected': 'b'},
    ]
    spec = jsonl(*rows)

    def load(on_bad, text=spec):
        return pipeline.load_comparisons(text, words(), max_length=8, on_bad=on_bad)

    fails(lambda: load('error'), "data.jsonl:2: 'chosen' is empty", "on_bad='skip'")
    data = load('skip')
    assert [r.where[-2:] for r in data.records] == [':1']
    assert (data.counts.read, data.counts.kept, data.counts.skipped_bad) == (4, 1, 3)
    assert '3 skipped as bad (first: ' in data.counts.describe()
    assert "data.jsonl:2: 'chosen' is empty)" in data.counts.describe()
    fails(lambda: load('error', jsonl(rows[2])), 'data.jsonl:1', 'equal tokens')
    fails(lambda: load('skip', jsonl(rows[1])), 'nothing is left', '1 skipped')
    fails(lambda: load('ignore'), "on_bad='ignore' is unknown", 'error, skip')


def test_loading_errors(jsonl):
    spec = jsonl(
        {'prompt': 'a b c', 'completion': 'd e'},
        {'prompt': 'a', 'completion': 'b ' * 9},
    )

    def load(**how):
        return pipeline.load_demonstrations(spec, words(), **how)

    fails(
        lambda: load(max_length=5),
        '2 demonstrations read from jsonl:',
        '0 kept, 2 dropped as longer than 5 tokens',
        'lengths: 6 to 11 tokens',
        "overlong='truncate'",
    )
    fails(lambda: load(max_length=1), 'limit of 1 tokens', '≥ 2')
    fails(
        lambda: load(max_length=9, loss_on='al'), "loss_on='al'", "did you mean 'all'"
    )
    fails(lambda: load(max_length=9, overlong='cut'), "overlong='cut' is unknown")
    fails(lambda: pipeline.load_texts(spec, words(), max_length=1), 'max_length=1')
    fails(
        lambda: pipeline.load_texts(spec, words(), max_length=4),
        "data.jsonl:1: the field 'text' is missing",
    )
    nothing = words()
    nothing.eos_token = None
    fails(
        lambda: pipeline.load_demonstrations(spec, nothing, max_length=9),
        'no EOS token',
    )


def test_a_text_without_tokens_is_bad(jsonl):
    tokenizer = words()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace('q', '')
    spec = jsonl({'prompt': 'a', 'completion': 'q'}, {'prompt': 'a', 'completion': 'a'})

    def load(on_bad):
        return pipeline.load_demonstrations(
            spec, tokenizer, max_length=8, on_bad=on_bad
        )

    fails(lambda: load('error'), "data.jsonl:1: 'completion' gives no tokens")
    assert load('skip').counts.skipped_bad == 1
    fails(
        lambda: pipeline.load_texts(jsonl({'text': 'q'}), tokenizer, max_length=8),
        'data.jsonl:1: the text gives no tokens',
    )


@pytest.mark.parametrize('kind', KINDS)
def test_data_in_many_pieces_are_the_same(jsonl, monkeypatch, kind):
    whole = sets(jsonl)[kind]
    monkeypatch.setattr(rows, 'PIECE', 10)  # characters, of one or two records
    pieces = sets(jsonl)[kind]
    assert pieces.counts == whole.counts
    assert list(pieces.records) == list(whole.records)
    same(*(next(pipeline.eval_batches(d, 20, (16,))) for d in (pieces, whole)))


def test_an_error_is_that_of_the_first_piece(jsonl, monkeypatch):
    monkeypatch.setattr(rows, 'PIECE', 1)
    texts = ['a', 'b', '?', 'c', '?', 'd']
    spec = jsonl(*({'prompt': 'a', 'completion': text} for text in texts))
    tokenizer = words()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace('?', '')
    load = pipeline.load_demonstrations
    fails(lambda: load(spec, tokenizer, max_length=9), ':3:', 'gives no tokens')
    data = load(spec, tokenizer, max_length=9, on_bad='skip')
    assert [r.where.rpartition(':')[2] for r in data.records] == ['1', '2', '4', '6']
    assert data.counts.skipped_bad == 2 and ':3:' in data.counts.first_bad


def test_memory_is_a_few_times_that_of_the_file(tmp_path, monkeypatch):
    """Neither all texts nor Python numbers for all tokens are alive at once."""
    monkeypatch.setattr(rows, 'PIECE', 2**14)
    monkeypatch.setattr(columns, 'BLOCK', 64)
    path, rng = tmp_path / 'data.jsonl', np.random.default_rng(0)
    with path.open('w') as file:
        for _ in range(3000):
            texts = [' '.join(rng.choice(list(LETTERS), 100)) for _ in range(3)]
            record = dict(zip(('prompt', 'chosen', 'rejected'), texts))
            file.write(json.dumps(record) + '\n')
    load, tokenizer = pipeline.load_comparisons, words()
    load(f'jsonl:{path}', tokenizer, max_length=400)  # what is imported meanwhile
    tracemalloc.start()
    try:
        data = load(f'jsonl:{path}', tokenizer, max_length=400)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A token for every two characters, of which each takes two bytes.
    assert len(data.examples) == 3000
    assert left < 1.4 * path.stat().st_size
    assert peak < 2.5 * path.stat().st_size


def test_take(jsonl):
    data = sets(jsonl)['comparisons']
    few = data.take(3)
    assert list(few.records) == list(data.records)[:3]
    assert list(map(content, few.examples)) == list(map(content, data.examples))[:3]
    assert few.counts.describe().endswith('; the first 3 are used')
    assert data.take(99) is data
    fails(lambda: data.take(0), 'take(0)')


# ---------------------------------------------------------------------------- batching


def test_token_batch_by_hand(jsonl):
    rows = [{'prompt': 'a b', 'completion': 'c'}, {'prompt': 'a', 'completion': 'd'}]
    data = pipeline.load_demonstrations(jsonl(*rows), words(), max_length=8)
    (batch,) = pipeline.eval_batches(data, 3, (5, 8))
    same(
        batch,
        TokenBatch(
            tokens=np.asarray([[3, 4, 5, 1, 0], [3, 6, 1, 0, 0], [0] * 5], np.int32),
            mask=np.asarray([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], bool),
            loss_mask=np.asarray([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0] * 5], bool),
        ),
    )
    assert batch.tokens.dtype == np.int32 and batch.mask.dtype == bool


def test_pair_batch_by_hand(jsonl):
    row = {'prompt': 'a', 'chosen': 'b c', 'rejected': 'd', 'margin': 0.5}
    data = pipeline.load_comparisons(jsonl(row), words(), max_length=8)
    (batch,) = pipeline.eval_batches(data, 2, (2, 5))
    same(
        batch,
        JudgedBatch(
            tokens=np.asarray(
                [[[3, 4, 5, 1, 0], [3, 6, 1, 0, 0]], [[0] * 5, [0] * 5]], np.int32
            ),
            mask=np.asarray(
                [[[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], [[1, 0, 0, 0, 0]] * 2], bool
            ),
            response_mask=np.asarray(
                [[[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]], [[0] * 5] * 2], bool
            ),
            margin=np.asarray([0.5, 0], np.float32),
            weight=np.asarray([1, 0], np.float32),
        ),
    )
    assert batch.margin.dtype == batch.weight.dtype == np.float32


def test_prompt_batch_by_hand(jsonl):
    data = pipeline.load_prompts(
        jsonl({'prompt': 'a b'}, {'prompt': 'c'}), words(), max_prompt_length=8
    )
    (batch,) = pipeline.eval_batches(data, 3, (3,))
    same(
        batch,
        PromptBatch(
            tokens=np.asarray([[0, 3, 4], [0, 0, 5], [0, 0, 0]], np.int32),
            mask=np.asarray([[0, 1, 1], [0, 0, 1], [0, 0, 1]], bool),
            index=np.asarray([0, 1, -1], np.int32),
        ),
    )
    assert batch.tokens.flags.c_contiguous


@pytest.mark.parametrize('kind', KINDS)
def test_eval_batches_go_once_in_order(jsonl, kind):
    data = sets(jsonl)[kind]
    batches = list(pipeline.eval_batches(data, 8, BUCKETS))
    assert [len(b.tokens) for b in batches] == [8, 8, 8]
    rows = [row for b in batches for row in unpadded(b)]
    assert rows[:20] == [content(example) for example in data.examples]
    assert len(rows) == 24
    for batch in batches:  # the smallest bucket that fits
        widest = batch.mask.sum(-1).max()
        assert batch.tokens.shape[-1] == min(b for b in BUCKETS if b >= widest)
    assert len({b.tokens.shape[-1] for b in batches}) <= len(BUCKETS)


def content(example):
    if isinstance(example, pipeline.JudgedExample):
        return tuple(
            tuple(np.concatenate([example.prompt, answer]).tolist())
            for answer in example.answers
        )
    return tuple(example.tokens.tolist())


def unpadded(batch):
    if isinstance(batch, JudgedBatch):
        return [
            tuple(tuple(t[m].tolist()) for t, m in zip(tokens, mask))
            for tokens, mask in zip(batch.tokens, batch.mask)
        ]
    return [tuple(t[m].tolist()) for t, m in zip(batch.tokens, batch.mask)]


@pytest.mark.parametrize('kind', KINDS)
def test_batch_k_is_a_function_of_seed_and_k(jsonl, kind):
    data = sets(jsonl)[kind]

    def run(seed, start=0):
        return pipeline.batches(data, 6, seed=seed, buckets=BUCKETS, start_step=start)

    reference = first(run(3), 30)
    for start in (0, 1, 7, 23):  # also across the ends of epochs, at 20/6 batches
        for a, b in zip(first(run(3, start), 5), reference[start:], strict=False):
            same(a, b)
    others = first(run(4), 3)
    assert [unpadded(b) for b in others] != [unpadded(b) for b in reference[:3]]


def test_a_slow_reader_sees_the_same_order(jsonl):
    data = sets(jsonl)['prompts']
    fast = first(pipeline.batches(data, 4, seed=0, buckets=BUCKETS), 25)
    for batch, expected in zip(
        pipeline.batches(data, 4, seed=0, buckets=BUCKETS), fast
    ):
        time.sleep(0.002)
        same(batch, expected)


@pytest.mark.parametrize('size, batch_size', [(20, 5), (20, 6), (7, 7)])
def test_every_epoch_has_every_example_once_in_a_new_order(jsonl, size, batch_size):
    data = sets(jsonl, size)['prompts']
    batches = pipeline.batches(data, batch_size, seed=1, buckets=BUCKETS)
    stream = np.concatenate([b.index for b in first(batches, 4 * size)])
    epochs = stream[: 4 * size].reshape(4, size)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(size), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_prompt_index_names_the_record(jsonl):
    data = sets(jsonl)['prompts']
    (batch,) = first(pipeline.batches(data, 8, seed=0, buckets=BUCKETS), 1)
    for row, index in zip(unpadded(batch), batch.index):
        assert row == tuple(words().encode(data.records[index].prompt))


@pytest.mark.parametrize('kind', KINDS)
def test_processes_share_the_global_batch(jsonl, kind):
    data = sets(jsonl)[kind]

    def run(**share):
        return first(
            pipeline.batches(data, 6, seed=2, buckets=(*range(4, 17),), **share), 12
        )

    shares = [run(process_index=i, process_count=3) for i in range(3)]
    for whole, *parts in zip(run(), *shares):
        # The same width everywhere, although a share's own longest row may be shorter.
        same(whole, jax.tree.map(lambda *x: np.concatenate(x), *parts))


def test_batching_errors(jsonl):
    data = sets(jsonl)['demonstrations']

    def batches(batch_size=4, buckets=BUCKETS, **how):
        return lambda: pipeline.batches(
            data, batch_size, seed=0, buckets=buckets, **how
        )

    fails(batches(10, process_count=4), 'batch_size=10', '4 processes', 'use 8 or 12')
    fails(batches(3, process_count=4), 'use 4 or 8')
    fails(batches(0), 'batch_size=0', 'use 1 or 2')
    fails(batches(21), 'batch_size=21', 'there are 20 examples', 'batch_size ≤ 20')
    fails(batches(process_count=2, process_index=2), 'process_index=2 of 2')
    fails(batches(start_step=-1), 'start_step=-1')
    fails(batches(buckets=()), 'buckets=()', 'ascending')
    fails(batches(buckets=(8, 4)), 'buckets=(8, 4)', 'ascending')
    # Example 4 has 3 + 5 tokens and EOS.
    fails(batches(buckets=(4, 8)), 'data.jsonl:5 has 9 tokens', 'is 8', 'add a bucket')
    fails(lambda: pipeline.eval_batches(data, 4, (4, 8)), 'has 9 tokens')
    fails(lambda: pipeline.eval_batches(data, 0, BUCKETS), 'batch_size=0')


def test_hh_harmless_is_counted_to_the_last_record():
    path = SHARED / 'hh_rlhf_harmless' / 'test.jsonl.gz'
    folder = SHARED / 'stories260k'
    if not (path.exists() and folder.exists()):
        pytest.skip(f'{path} or {folder} is not here')
    tokenizer = load_tokenizer(str(folder))
    data = pipeline.load_comparisons(
        f'hh:{path}', tokenizer, max_length=512, overlong='truncate', on_bad='skip'
    )
    assert (data.counts.read, data.counts.kept, data.counts.skipped_bad) == (
        2312,
        2308,
        4,
    )
    assert f"{path}:87: 'chosen' is empty" in data.counts.describe()
    for example in data.examples:
        assert example.prompt[0] == 1  # BOS survives truncation
        assert [answer[-1] for answer in example.answers] == [2, 2]  # so does EOS
    fails(
        lambda: pipeline.load_comparisons(f'hh:{path}', tokenizer, max_length=512),
        f"{path}:87: 'chosen' is empty",
    )


def test_pieces_that_are_given_up_are_not_waited_for():
    """The collector may end them where waiting would be for ever."""
    release, started = threading.Event(), threading.Event()

    def tokenise(piece):
        if started.is_set():
            release.wait(60)
        started.set()
        return piece

    long = 'x' * (rows.PIECE + 1)
    records = [SimpleNamespace(texts={'text': long}) for _ in range(4)]
    pieces = rows.in_pieces(records, tokenise)
    next(pieces)
    began = time.monotonic()
    pieces.close()  # while the second piece is in the thread
    assert time.monotonic() - began < 30
    release.set()
