"""The tokenizers of exports: which token pads, and how the files are spelt."""

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from rlhf_jax import hf
from rlhf_jax.hf.tokenizers import save_tokenizer_files, with_pad
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.rewards import reward_model_scores
from tests.hf.small_tokenizers import EOS, TEXTS, byte_tokenizer, unknown_tokenizer
from tests.hf.test_directories import make_config, make_params

END = 256  # id of EOS in byte_tokenizer
RESERVED, PADDING = '<|reserved_special_token_0|>', '<|padding|>'


@pytest.mark.parametrize(
    ('tokenizer', 'chosen'),
    [
        (byte_tokenizer(), '<|pad|>'),
        (byte_tokenizer(pad_token=EOS), '<|pad|>'),
        (byte_tokenizer(['<mask>'], pad_token='<mask>'), '<mask>'),
        (byte_tokenizer([RESERVED]), RESERVED),
        (byte_tokenizer([RESERVED, PADDING]), PADDING),
        (byte_tokenizer(['<|image_pad|>', '<|im_end|>']), '<|pad|>'),
        (unknown_tokenizer(byte_fallback=True), '<unk>'),
        (unknown_tokenizer(byte_fallback=False), '<|pad|>'),
    ],
)
def test_the_token_that_pads_ends_no_text(tokenizer, chosen):
    before = tokenizer.get_vocab(), tokenizer.pad_token
    padding = with_pad(tokenizer, [tokenizer.eos_token_id])
    assert (padding.pad_token, padding.padding_side) == (chosen, 'right')
    added = {chosen} - before[0].keys()
    assert padding.get_vocab().keys() - before[0].keys() == added
    if added:
        assert padding.pad_token_id == len(before[0])
    assert (tokenizer.get_vocab(), tokenizer.pad_token) == before
    for text in TEXTS:
        assert padding(text)['input_ids'] == tokenizer(text)['input_ids']
        assert padding(text)['input_ids'][-1] != padding.pad_token_id


def test_a_pad_token_among_those_that_stop_generation_is_replaced():
    tokenizer = byte_tokenizer([PADDING], pad_token=PADDING)
    assert with_pad(tokenizer, [END]).pad_token == PADDING
    assert with_pad(tokenizer, [END, END + 1]).pad_token == '<|pad|>'


def export(tmp_path, tokenizer, rows):
    """Exports a reward model and reads it again: (scores before, after, config)."""
    config = replace(make_config(), vocab_size=rows)
    params = make_params(config, 'scalar')
    out = tmp_path / 'rm'
    ends = [tokenizer.eos_token_id]
    hf.save(out, params, config, head='scalar', tokenizer=tokenizer, eos_token_id=ends)
    again = hf.load_config(out)
    batch = tokenizer(TEXTS)['input_ids']
    length = max(map(len, batch))
    tokens = np.array([row + [0] * (length - len(row)) for row in batch])
    mask = np.array([[t < len(row) for t in range(length)] for row in batch])
    first = reward_model_scores(params, tokens, mask, model=ScalarModel(config))
    loaded = hf.load_params(out, again, head='scalar')
    second = reward_model_scores(loaded, tokens, mask, model=ScalarModel(again))
    return first, second, again, json.loads((out / 'config.json').read_text())


@pytest.mark.parametrize(
    ('special', 'rows', 'written', 'pad'),
    [((), 257, 258, 257), ((), 260, 260, 257), ((RESERVED,), 258, 258, 257)],
    ids=['grown', 'spare row', 'reserved'],
)
def test_our_reader_gives_the_same_scores(tmp_path, special, rows, written, pad):
    first, second, config, entries = export(tmp_path, byte_tokenizer(special), rows)
    np.testing.assert_array_equal(first, second)
    assert config.vocab_size == entries['vocab_size'] == written
    assert entries['pad_token_id'] == pad
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'rm')
    assert tokenizer.pad_token_id == pad and tokenizer.padding_side == 'right'


def test_a_given_pad_id_is_the_tokenizers_too(tmp_path):
    config = replace(make_config(), vocab_size=258)
    params = make_params(config, 'scalar')
    given = {'head': 'scalar', 'tokenizer': byte_tokenizer([RESERVED])}
    hf.save(tmp_path / 'rm', params, config, pad_token_id=5, **given)
    assert AutoTokenizer.from_pretrained(tmp_path / 'rm').pad_token_id == 5
    with pytest.raises(ValueError, match='pad_token_id=256, which may end a text'):
        hf.save(tmp_path / 'no', params, config, pad_token_id=END, **given)


@pytest.mark.parametrize(
    'tokenizer',
    [
        byte_tokenizer(['<|im_start|>', '<|im_end|>']),
        unknown_tokenizer(byte_fallback=True, before=True),
    ],
    ids=['extra tokens', 'bos'],
)
def test_files_say_what_transformers_4_needs(tmp_path, tokenizer):
    tokenizer.chat_template = '{{ messages }}'
    save_tokenizer_files(tokenizer, tmp_path)
    path = tmp_path / 'tokenizer_config.json'
    entries = json.loads(path.read_text())
    assert entries['tokenizer_class'] == 'PreTrainedTokenizerFast'
    assert entries['model_input_names'] == ['input_ids', 'attention_mask']
    # Version 4 takes extra_special_tokens for a dict.
    assert not {'backend', 'extra_special_tokens'} & entries.keys()
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    for text in TEXTS:
        assert again(text)['input_ids'] == tokenizer(text)['input_ids']
    if 'additional_special_tokens' in entries:
        assert entries['additional_special_tokens'] == ['<|im_start|>', '<|im_end|>']
