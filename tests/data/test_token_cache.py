"""The token cache: a hit gives the ids of the same texts and the same tokenizer."""

import jax
import numpy as np
import pytest

from rlhf_jax.data import pipeline, token_cache
from rlhf_jax.data.tokenizer import encode, word_tokenizer
from rlhf_jax.datasets import tiny_tldr

TEXTS = ['News of Anna.', '', ' Tom sold boats', 'ünï 日本語 🙂']


@pytest.fixture(scope='module')
def tokenizer():
    return tiny_tldr.tokenizer()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache of these tests, in which everything is kept."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(token_cache, 'LEAST', 0)
    return tmp_path / 'rlhf_jax' / 'tokens'


@pytest.fixture
def no_tokenizing(monkeypatch):
    def fail(*_):
        raise AssertionError('tokenised again')

    return lambda: monkeypatch.setattr(token_cache, 'encode', fail)


def test_the_second_time_nothing_is_tokenised(tokenizer, folder, no_tokenizing):
    expected = encode(tokenizer, TEXTS)
    assert expected[1] == []
    assert token_cache.encode_cached(tokenizer, TEXTS) == expected
    no_tokenizing()
    assert token_cache.encode_cached(tokenizer, TEXTS) == expected
    assert len(list(folder.iterdir())) == 1
    with pytest.raises(AssertionError, match='tokenised again'):
        token_cache.encode_cached(tokenizer, TEXTS[:-1])


def test_other_texts_and_other_tokenizers_are_told_apart(tokenizer, folder):
    shorter = word_tokenizer(['ĠAnna'])
    moved = ['News of Anna. ', *TEXTS[1:2], 'Tom sold boats', TEXTS[3]]
    assert ''.join(moved) == ''.join(TEXTS)
    asked = [(tokenizer, TEXTS), (tokenizer, moved), (shorter, TEXTS)]
    for _ in range(2):
        for one, texts in asked:
            assert token_cache.encode_cached(one, texts) == encode(one, texts)
    assert len(list(folder.iterdir())) == len(asked)


def test_a_tokenizer_that_splits_special_tokens_is_another(folder):
    texts, found = ['Anna <|eos|>'], []
    for split in (False, True):
        one = tiny_tldr.tokenizer()
        one.split_special_tokens = split
        found.append(token_cache.encode_cached(one, texts))
        assert found[-1] == encode(one, texts)
    assert found[0][0][-1] == 1 != found[1][0][-1]


@pytest.mark.parametrize('highest', [0, 255, 256, 65_535, 65_536, 2**31 - 1])
def test_ids_of_any_size(highest, folder):
    rows = [[highest, 1], [], [0, highest, 7]]
    path = folder / 'some.npz'
    token_cache._save(path, rows)
    assert token_cache._load(path) == rows


def test_no_texts(tokenizer):
    assert (
        token_cache.encode_cached(tokenizer, [])
        == token_cache.encode_cached(tokenizer, [])
        == []
    )


def test_of_few_texts_nothing_is_kept(tokenizer, folder, monkeypatch):
    size = sum(map(len, TEXTS))
    monkeypatch.setattr(token_cache, 'LEAST', size + 1)
    assert token_cache.encode_cached(tokenizer, TEXTS) == encode(tokenizer, TEXTS)
    assert not folder.exists()
    monkeypatch.setattr(token_cache, 'LEAST', size)
    token_cache.encode_cached(tokenizer, TEXTS)
    assert folder.exists()


def test_a_cache_that_cannot_be_written_is_told_and_costs_nothing(tokenizer, folder):
    folder.parent.mkdir()
    folder.write_text('a file where a folder should be')
    with pytest.warns(UserWarning, match=r'tokens/\w+\.npz: token ids cannot be kept'):
        ids = token_cache.encode_cached(tokenizer, TEXTS)
    assert ids == encode(tokenizer, TEXTS)


def test_what_is_written_is_whole_or_not_there(tokenizer, folder, monkeypatch):
    def broken(file, **_):
        file.write(b'half of it')
        raise KeyboardInterrupt

    monkeypatch.setattr(np, 'savez', broken)
    with pytest.raises(KeyboardInterrupt):
        token_cache.encode_cached(tokenizer, TEXTS)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize('left', [slice(-40), slice(0), slice(40, None)])
def test_a_damaged_file_is_named(left, tokenizer, folder):
    token_cache.encode_cached(tokenizer, TEXTS)
    [path] = folder.iterdir()
    path.write_bytes(path.read_bytes()[left])
    with pytest.raises(ValueError, match=rf'{path.name} cannot be read .*; remove it'):
        token_cache.encode_cached(tokenizer, TEXTS)


@pytest.mark.parametrize('kind', ['texts', 'comparisons'])
def test_data_are_read_from_it(kind, tokenizer, no_tokenizing):
    def load():
        if kind == 'texts':
            spec = 'tfds:tiny_tldr/articles:test[:20]'
            return pipeline.load_texts(spec, tokenizer, max_length=64)
        spec = 'tfds:tiny_tldr/comparisons:test[:20]'
        return pipeline.load_comparisons(spec, tokenizer, max_length=128)

    first = load()
    no_tokenizing()
    second = load()
    assert first.counts == second.counts and list(first.records) == list(second.records)
    [one], [other] = (pipeline.eval_batches(d, 99, (128,)) for d in (first, second))
    jax.tree.map(np.testing.assert_array_equal, one, other)
