"""What ends a response: found once, from everything that says it, and kept."""

import json
import shutil

import pytest
from ml_collections import ConfigDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import pipeline
from rlhf_jax.data.stops import decide_ends, ends_of, eos_ids, token_bytes
from rlhf_jax.data.tokenizer import (
    check_saved,
    load_tokenizer,
    save_tokenizer,
    stage_tokenizer,
)
from rlhf_jax.ops.stop_table import stop_table
from rlhf_jax.stages.run import load_run_tokenizer
from rlhf_jax.stages.sampler import stops_of
from tests.data.test_chat import CHATML, SPECIAL, STYLES, made, turns

EOS, IM_END = SPECIAL.index('</s>'), SPECIAL.index('<|im_end|>')
ENDS = {
    'chatml': '<|im_end|>',
    'marked': '<|im_end|>',
    'llama2': '</s>',
    'llama3': '<|eot_id|>',
    'zephyr': '</s>',
    'gemma': '<end_of_turn>',
}


@pytest.mark.parametrize('style', STYLES)
def test_the_token_that_ends_a_turn_ends_a_response(style):
    tokenizer = made(STYLES[style][0])
    end = tokenizer.convert_tokens_to_ids(ENDS[style])
    assert eos_ids(tokenizer) == list(dict.fromkeys([EOS, end]))
    assert ends_of(tokenizer).closing.text.strip() == ENDS[style]


def test_nothing_is_found_where_a_template_says_nothing():
    assert eos_ids(made(None)) == [EOS]
    assert eos_ids(made('{{ raise_exception("no") }}')) == [EOS]
    assert eos_ids(made('{% for m in messages %}{{ m.role }}{% endfor %}')) == [EOS]
    # A line break is written between turns: EOS will be behind the answer.
    plain = '{% for m in messages %}{{ m.role + ": " + m.content + "\n" }}{% endfor %}'
    assert eos_ids(made(plain)) == [EOS]


def test_a_token_that_stands_for_the_unknown_ends_no_turn():
    tokenizer = made(CHATML.replace('<|im_end|>', '§'))
    tokenizer.add_special_tokens({'unk_token': '<unk>'})
    assert eos_ids(tokenizer) == [EOS]


@pytest.mark.parametrize('end', [' end.', '<|end|>'])
def test_a_turn_that_ends_in_text_is_refused_before_anything_is_read(tmp_path, end):
    """Also where it looks like a token, but the tokenizer has none of that name."""
    path = tmp_path / 'talk.jsonl'
    path.write_text(json.dumps({'messages': turns('so', 'it is')}) + '\n')
    tokenizer = made(CHATML.replace('<|im_end|>', end))
    assert eos_ids(tokenizer) == [EOS]
    for load in (
        lambda: pipeline.load_prompts(f'jsonl:{path}', tokenizer, max_prompt_length=99),
        lambda: pipeline.load_demonstrations(
            f'jsonl:{path}', tokenizer, max_length=99, loss_on='response'
        ),
    ):
        with pytest.raises(ValueError, match='write eos_token behind') as caught:
            load()
        assert repr(end + '\n') in str(caught.value)
    tokenizer.add_special_tokens({'additional_special_tokens': [end]})
    assert eos_ids(tokenizer) == [EOS, len(tokenizer) - 1]
    pipeline.load_prompts(f'jsonl:{path}', tokenizer, max_prompt_length=99)


def test_a_hub_name_stops_where_the_same_files_as_a_directory_do(tmp_path, monkeypatch):
    folder = tmp_path / 'model'
    made(None).save_pretrained(folder)
    listed = json.dumps({'eos_token_id': [EOS, 5]})
    (folder / 'generation_config.json').write_text(listed)
    (folder / 'config.json').write_text('{"model_type": "llama"}')
    cached = tmp_path / 'hub' / 'models--me--model'
    shutil.copytree(folder, cached / 'snapshots' / 'abc')
    (cached / 'refs').mkdir()
    (cached / 'refs' / 'main').write_text('abc')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert eos_ids(load_tokenizer(str(folder))) == [EOS, 5]
    assert eos_ids(load_tokenizer('me/model')) == [EOS, 5]
    # It lists nothing where it has no such file.
    (cached / 'snapshots' / 'abc' / 'generation_config.json').unlink()
    assert eos_ids(load_tokenizer('me/model')) == [EOS]


def config_of(folder, **stages):
    config = ConfigDict({'tokenizer': str(folder), 'stages': ('ppo',)})
    for stage, ids in stages.items():
        config[stage] = ConfigDict({'extra_eos_ids': ids})
    return config


def test_extra_ids_are_those_of_the_run_and_stay_with_it(tmp_path):
    folder = tmp_path / 'model'
    made(CHATML).save_pretrained(folder)
    config = config_of(folder, preference=(9, 8), ppo=(7, 9))
    config.sft = ConfigDict({'init': 'model'})
    tokenizer = load_run_tokenizer(config)
    assert eos_ids(tokenizer) == [EOS, IM_END, 7, 8, 9]
    # sample and export read the tokenizer of the run.
    save_tokenizer(tokenizer, tmp_path / 'run' / 'tokenizer')
    kept = stage_tokenizer(tmp_path / 'run' / 'ppo')
    assert eos_ids(kept) == [EOS, IM_END, 7, 8, 9]
    check_saved(tokenizer, tmp_path / 'run' / 'tokenizer', 'SPEC')
    with pytest.raises(ValueError, match='differ in EOS ids'):
        check_saved(
            load_run_tokenizer(config_of(folder)),
            tmp_path / 'run' / 'tokenizer',
            'SPEC',
        )
    for wrong in (len(tokenizer), -1, 'so'):
        with pytest.raises(
            ValueError, match=f'ppo.extra_eos_ids=.*: {wrong!r} is no id'
        ):
            load_run_tokenizer(config_of(folder, ppo=(wrong,)))


def test_an_answer_that_ends_in_an_extra_id_is_not_closed_again(tmp_path):
    path = tmp_path / 'text.jsonl'
    path.write_text('{"prompt": "so is it", "completion": "all right?"}\n')
    tokenizer = made(None)
    stop = tokenizer.encode('?')[0]

    def last_tokens():
        data = pipeline.load_demonstrations(f'jsonl:{path}', tokenizer, max_length=99)
        return data.examples[0].tokens[-2:].tolist()

    assert last_tokens() == [stop, EOS]
    decide_ends(tokenizer, [stop])
    assert last_tokens()[-1] == stop


# --------------------------------------------------------------------- tokens as bytes


def merging(*merges):
    """A byte-level tokenizer with these merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(a + b for a, b in merges), '</s>']
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token='</s>')


def spaced(decoder):
    """In the style of SentencePiece: a space before every text, and bytes."""
    pieces = [
        '</s>',
        '▁',
        'a',
        'b',
        '.',
        '▁a',
        '▁a.',
        *(f'<0x{i:02X}>' for i in range(256)),
    ]
    core = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [('▁', 'a'), ('▁a', '.')],
            byte_fallback=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token='</s>')


BYTES = [decoders.ByteFallback(), decoders.Fuse()]
LLAMA = decoders.Sequence(
    [decoders.Replace('▁', ' '), *BYTES, decoders.Strip(' ', 1, 0)]
)
KINDS = {
    'merged bytes': lambda: merging(('.', 'Ċ'), ('.Ċ', 'Ċ'), ('Ġ', 'a')),
    'trained bytes': lambda: made(None),
    'llama': lambda: spaced(LLAMA),
    'metaspace': lambda: spaced(decoders.Sequence([*BYTES, decoders.Metaspace()])),
    'no decoder': lambda: spaced(None),
}


@pytest.mark.parametrize('kind', KINDS)
def test_tokens_are_the_bytes_that_decoding_writes(kind):
    tokenizer = KINDS[kind]()
    pieces = token_bytes(tokenizer)
    assert len(pieces) == len(tokenizer)
    assert pieces[tokenizer.eos_token_id] == b'</s>'
    for text in ('a.\n\nb a.', 'ab. a a.é', '  b\n', 'a 𝄞 ñ\u0301'):
        ids = tokenizer.encode('a' + text, add_special_tokens=False)
        written = b''.join(pieces[i] for i in ids).decode()
        # The space with which such a tokenizer begins a text is left out in decoding.
        assert written.removeprefix(' ') == tokenizer.decode(ids)


def end_of(tokenizer, stop, text):
    """What is written up to the end of a stop string; None where it is not found."""
    table = stop_table(token_bytes(tokenizer), [stop.encode()])
    ids, state = tokenizer.encode(text, add_special_tokens=False), 0
    for i, token in enumerate(ids):
        state = table[state, token]
        if state < 0:
            return tokenizer.decode(ids[: i + 1])
    return None


def test_a_stop_string_is_found_inside_longer_tokens_and_across_tokens():
    tokenizer = merging(('.', 'Ċ'), ('.Ċ', 'Ċ'), ('Ċ', 'Ċ'))
    assert tokenizer.tokenize('d.\n\nT') == ['d', '.ĊĊ', 'T']
    assert end_of(tokenizer, '\n\n', 'end.\n\nThen') == 'end.\n\n'
    assert end_of(tokenizer, '\n', 'end.\nThen') == 'end.\n'
    assert end_of(tokenizer, '.', 'end.\n\nThen') == 'end.\n\n'  # the whole token
    assert end_of(tokenizer, '\n\nT', 'end.\n\nThen') == 'end.\n\nT'
    assert end_of(tokenizer, '\n\n', 'end.\nThen\n') is None
    llama = spaced(LLAMA)
    assert end_of(llama, '.', 'b a. b') == 'b a.'
    assert end_of(llama, 'a.', 'b a. b') == 'b a.'
    assert end_of(llama, '.\n', 'a.\nb') == 'a.\n'
    assert end_of(llama, '</s>', 'a.</s>') == 'a.</s>'


@pytest.mark.parametrize(
    ('stops', 'message'),
    [
        (('',), 'an empty stop sequence would stop every response at once'),
        (('a', '\ud800'), 'surrogates not allowed'),
        (('x' * 999, 'ab'), 'the stop sequences have 1001 bytes; use at most 1000'),
    ],
)
def test_stop_strings_that_cannot_be_are_told_with_their_setting(stops, message):
    with pytest.raises(ValueError, match=f'config.ppo.stop_sequences=.*: .*{message}'):
        stops_of(made(CHATML), 'config.ppo', stops)
    assert stops_of(made(CHATML), 'config.ppo', ()) is None


@pytest.mark.parametrize('ids', [-1, 2**31, 10**40, [2**40], '2', [True]])
def test_ids_of_a_generation_config_that_are_none(tmp_path, ids):
    made(CHATML).save_pretrained(tmp_path)
    (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': ids}))
    with pytest.raises(ValueError, match='generation_config.json: eos_token_id is'):
        load_tokenizer(str(tmp_path))
