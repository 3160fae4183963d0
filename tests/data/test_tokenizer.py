"""What a tokenizer must have, and cutting by hand."""

import pathlib

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data.tokenizer import (
    bos_ids,
    check_saved,
    check_vocabulary,
    encode,
    encode_spans,
    eos_ids,
    load_tokenizer,
    opened,
    save_tokenizer,
    truncate,
)

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'


def words(template=None, **special):
    """Word-level: <s> 0, </s> 1, <unk> 2, then a 3 to e 7."""
    vocabulary = {t: i for i, t in enumerate(['<s>', '</s>', '<unk>', *'abcde'])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        core.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[('<s>', 0), ('</s>', 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def plain():
    return words(eos_token='</s>')


def endless():
    return words()


def no_tokenizer():
    return 'a string'


def test_load_by_directory_and_by_function(tmp_path):
    words('<s> $A', eos_token='</s>', bos_token='<s>').save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode('a b') == [0, 3, 4]
    assert load_tokenizer(f'{__name__}:plain').encode('a b') == [3, 4]


def test_load_names_the_fault(tmp_path):
    def fails(spec, *parts):
        with pytest.raises(ValueError) as caught:
            load_tokenizer(spec)
        for part in parts:
            assert part in str(caught.value), (part, str(caught.value))

    fails(f'{__name__}:endless', 'no EOS token', 'eos_token=')
    fails(f'{__name__}:no_tokenizer', 'gives a str', 'PreTrainedTokenizerFast')
    fails(f'{__name__}:nothing', 'cannot be imported')
    fails(str(tmp_path), str(tmp_path), 'cannot be loaded')
    fails('./no/such/folder', './no/such/folder', 'cannot be loaded')


def test_special_tokens():
    assert eos_ids(plain()) == [1]
    assert bos_ids(plain()) == []
    assert bos_ids(words('<s> $A', eos_token='</s>')) == [0]
    with pytest.raises(ValueError, match=r"appends \['</s>'\].*stay open"):
        bos_ids(words('<s> $A </s>', eos_token='</s>'))


def test_eos_ids_that_the_model_lists_follow_the_first(tmp_path):
    plain().save_pretrained(tmp_path)
    path = tmp_path / 'generation_config.json'
    for listed, expected in [
        ('{"eos_token_id": [5, 1, 4, 5]}', [1, 5, 4]),
        ('{"eos_token_id": 3}', [1, 3]),
        ('{"eos_token_id": null}', [1]),
        ('{"max_length": 512}', [1]),
    ]:
        path.write_text(listed)
        tokenizer = load_tokenizer(str(tmp_path))
        assert eos_ids(tokenizer) == expected
        save_tokenizer(tokenizer, tmp_path / 'saved')
        assert eos_ids(load_tokenizer(str(tmp_path / 'saved'))) == expected
    for faulty, part in [
        ('{"eos_token_id": "</s>"}', "is '</s>'; it must be an id or a list"),
        ('{"eos_token_id": [true]}', 'must be an id'),
        ('[1]', 'no JSON object'),
        ('{', 'no JSON object'),
    ]:
        path.write_text(faulty)
        with pytest.raises(ValueError, match=part) as caught:
            load_tokenizer(str(tmp_path))
        assert str(path) in str(caught.value)


def test_a_tokenizer_made_by_a_function_lists_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what lies about there is not the tokenizer's
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": 7}')
    assert eos_ids(plain()) == [1]


def test_another_tokenizer_of_the_same_name_is_told_apart(tmp_path):
    chat, special = '{{ messages }}\n', {'eos_token': '</s>', 'bos_token': '<s>'}

    def made(template='<s> $A', **changes):
        tokenizer = words(template, **{**special, **changes})
        tokenizer.chat_template = chat
        return tokenizer

    save_tokenizer(made(), tmp_path)
    check_saved(made(), tmp_path, 'a')
    other, larger = made(), made()
    other.chat_template = '{{ messages }}'
    larger.add_tokens(['f'])
    for changed, trait in [
        (other, 'differ in chat template;'),
        (larger, 'differ in vocabulary;'),
        (made(unk_token='<unk>'), 'differ in special tokens;'),
        (made(eos_token='e'), 'differ in special tokens, EOS ids;'),
        (made(template=None), 'differ in tokens before a text;'),
    ]:
        with pytest.raises(ValueError, match=trait) as caught:
            check_saved(changed, tmp_path, 'a')
        assert str(tmp_path) in str(caught.value)


def test_which_tokens_reach_into_a_span():
    text = 'a bb c bb'  # bb is no word: <unk>, two characters wide
    ids, inside = encode_spans(
        words('<s> $A', eos_token='</s>'), text, [(3, 6), (7, 8)]
    )
    assert ids == [3, 2, 5, 2]
    assert inside == [False, True, True, True]
    assert encode_spans(plain(), text, [(1, 2), (4, 5)])[1] == [False] * 4


def test_encode_adds_and_cuts_nothing():
    tokenizer = words('<s> $A', eos_token='</s>', model_max_length=2)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=6, pad_id=2)
    assert encode(tokenizer, ['a b c d', 'e']) == [[3, 4, 5, 6], [7]]
    assert encode(tokenizer, []) == []


def test_vocabulary():
    check_vocabulary(plain(), 8)
    with pytest.raises(
        ValueError, match="token 'e' has id 7, the model has 7 .*least 8"
    ):
        check_vocabulary(plain(), 7)


def test_bos_is_written_once():
    assert opened([3, 4], [0]) == [0, 3, 4]
    assert opened([0, 3], [0]) == [0, 3]
    assert opened([3], []) == [3]


def test_truncate_by_hand():
    prompt = [0, 11, 12, 13, 14, 15]  # BOS first
    # Limit 8, answer of 3: the prompt keeps BOS and its last 4.
    assert truncate(prompt, [[21, 22, 1]], 8, [0], 1) == (
        [0, 12, 13, 14, 15],
        [[21, 22, 1]],
    )
    # Limit 6: the longer answer (4) would leave 2 to the prompt, which keeps half, 3;
    # the longer answer is cut to 3 and still ends in EOS, the shorter one is whole.
    assert truncate(prompt, [[21, 22, 23, 1], [31, 1]], 6, [0], 1) == (
        [0, 14, 15],
        [[21, 22, 1], [31, 1]],
    )
    # A short prompt is not cut for a long answer.
    assert truncate([11], [[21, 22, 23, 24, 1]], 4, [], 1) == ([11], [[21, 22, 1]])
    # Without an answer the prompt may fill the limit.
    assert truncate(prompt, [], 3, [0], 1) == ([0, 14, 15], [])
    assert truncate(prompt, [], 1, [0], 1) == ([0], [])
    # A prompt without BOS gets none, an answer without EOS neither.
    assert truncate([11, 12, 13], [[21, 22, 23]], 4, [0], None) == (
        [12, 13],
        [[21, 22]],
    )


def test_stories_tokenizer_puts_bos_before_a_text():
    folder = SHARED / 'stories260k'
    if not folder.exists():
        pytest.skip(f'{folder} is not here')
    tokenizer = load_tokenizer(str(folder))
    assert (bos_ids(tokenizer), eos_ids(tokenizer)) == ([1], [2, 1])
    check_vocabulary(tokenizer, 512)
