"""A prompt and its answer as tokens: those of the joined text, and back again."""

import json
import pathlib

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import pipeline, token_cache
from rlhf_jax.data.joining import decode_behind, find_joint, open_prompts
from rlhf_jax.data.loading import Limits
from rlhf_jax.data.reward_data import Wanted, load_judgements
from rlhf_jax.data.tokenizer import encode, load_tokenizer
from rlhf_jax.datasets import tiny_tldr
from rlhf_jax.stages.scoring import step_batch, text_batch

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'
MERGES = [('▁', 'Y'), ('▁Y', 'es'), ('e', 's'), ('i', 's'), ('▁', 'is'), ('.', '.')]


def sentencepiece(style):
    """A BPE whose texts begin with ▁: '▁Yes' is one token, 'Yes' is 'Y' + 'es'."""
    letters = sorted(set('YesNoit:.\nab0?▁<>U'))
    merged = [a + b for a, b in MERGES]
    names = ['<unk>', '<s>', '</s>', '<U>', '<A>', *letters, *merged]
    vocabulary = {piece: i for i, piece in enumerate(names)}
    core = Tokenizer(models.BPE(vocabulary, MERGES, unk_token='<unk>'))
    if style == 'prepend':
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style)
    core.decoder = decoders.Sequence(
        [decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token='<unk>',
        bos_token='<s>',
        eos_token='</s>',
        additional_special_tokens=['<U>', '<A>'],
    )


STYLES = ('prepend', 'first', 'always')
TEMPLATE = """{% for m in messages %}{% if m.role == 'user' %}{{ '<U>' + m.content }}
{%- else %}{{ '<A>' + m.content + '</s>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<A>' }}{% endif %}"""


def shown(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(list(map(int, ids)))


@pytest.fixture
def spec(tmp_path):
    def write(*records, kind='jsonl'):
        path = tmp_path / 'data.jsonl'
        path.write_text(''.join(json.dumps(record) + '\n' for record in records))
        return f'{kind}:{path}'

    return write


@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize(
    ('prompt', 'answer', 'expected'),
    [
        ('is it:', ' Yes.', ['▁Yes', '.']),
        ('is it:', 'Yes.', ['Y', 'es', '.']),  # no space where there is none
        ('is it: ', 'Yes.', ['Y', 'es', '.']),  # ▁Yes would reach into the prompt
        ('is it.', '..', ['..']),  # joined it would be .. + .
        ('is it\n', 'is a', ['is', '▁', 'a']),
        ('is it:', '  Yes', ['▁', '▁Yes']),
        ('is it:', ':a', [':', 'a']),
    ],
)
def test_an_answer_has_the_tokens_it_has_behind_its_prompt(
    style, prompt, answer, expected
):
    tokenizer = sentencepiece(style)
    (before,) = encode(tokenizer, [prompt])
    (ids,) = find_joint(tokenizer).encode([before[-1]], [answer])
    assert shown(tokenizer, ids) == expected
    # Decoded behind the prompt they are the text, and so they are told to a reward.
    assert tokenizer.decode(before + ids) == prompt + answer
    assert decode_behind(tokenizer, [before[-1]], [np.asarray(ids)]) == [answer]
    joined = encode(tokenizer, [prompt + answer])[0]
    if joined[: len(before)] == before:
        assert ids == joined[len(before) :]


@pytest.mark.parametrize('style', STYLES)
def test_behind_a_special_token_it_is_what_transformers_makes_of_the_whole(spec, style):
    tokenizer = sentencepiece(style)
    tokenizer.chat_template = TEMPLATE
    talk = [{'role': 'user', 'content': 'is it'}, {'role': 'assistant'}]
    talk[1]['content'] = 'Yes.'
    whole = tokenizer.apply_chat_template(talk, return_dict=False)
    begins = {'prepend': '▁Yes', 'always': '▁Yes', 'first': 'Y'}[style]
    where = spec({'messages': talk})
    for loss_on in ('response', 'assistant'):
        data = pipeline.load_demonstrations(
            where, tokenizer, max_length=40, loss_on=loss_on
        )
        (example,) = data.examples
        assert example.tokens.tolist() == whole
        assert shown(tokenizer, example.tokens[example.loss])[0] == begins
    prompt, answer = example.tokens[~example.loss], example.tokens[example.loss]
    (text,) = decode_behind(tokenizer, [int(prompt[-1])], [answer])
    assert text == 'Yes.'
    # Read back from text, by a reward model of the same tokenizer, it is the same row.
    asked = pipeline.load_prompts(where, tokenizer, max_prompt_length=40).records
    tokens, mask, _ = text_batch(tokenizer, [asked[0].prompt], [text], [True], 40)
    assert tokens[mask].tolist() == whole


@pytest.mark.parametrize('style', STYLES)
def test_every_kind_of_data_joins_alike(spec, style):
    tokenizer = sentencepiece(style)
    whole = ['<s>', '▁is', '▁', 'i', 't', ':']
    good, bad = ['▁Yes', '.', '</s>'], ['▁', 'N', 'o', '</s>']

    def wanted(kind, heads=()):
        about = dict(rating_range=(0, 4), rating_unit='given', step_separator='\n')
        return Wanted(kind=kind, by='', heads=heads, **about)

    def joined(data):
        return [*data.examples[0].prompt, *data.examples[0].answers[0]]

    limits, fields = Limits(40, 'drop', 'error'), {'prompt': 'is it:'}
    pair = {**fields, 'chosen': ' Yes.', 'rejected': ' No'}
    example = pipeline.load_comparisons(spec(pair), tokenizer, max_length=40).examples[
        0
    ]
    told = [shown(tokenizer, part) for part in (example.prompt, *example.answers)]
    assert told == [whole, good, bad]
    for kind, parts in (('pairs', 3), ('unpaired', 2)):
        data = pipeline.load_preferences(
            spec(pair, {**pair, 'prompt': 'a'}),
            tokenizer,
            kind=kind,
            wanted_by='',
            max_length=40,
        )
        ids = data.examples[0].prompt, *data.examples[0].answers
        assert [shown(tokenizer, x) for x in ids] == [whole, good, bad][:parts]
    texts = {**fields, 'completions': [' Yes.', ' No'], 'ranks': [1, 2]}
    data = load_judgements(spec(texts), tokenizer, wanted('pairs'), limits)
    assert [shown(tokenizer, x) for x in data.examples[0].answers] == [good, bad]
    rated = {**fields, 'completion': ' Yes.', 'rating': 3}
    data = load_judgements(spec(rated), tokenizer, wanted('ratings'), limits)
    assert shown(tokenizer, joined(data)) == whole + good
    steps = {**fields, 'completions': [' Yes.', ' No'], 'labels': [True, False]}
    data = load_judgements(spec(steps), tokenizer, wanted('steps'), limits)
    expected = [*whole, '▁Yes', '.', '\n', *bad]
    assert shown(tokenizer, joined(data)) == expected
    tokens, mask, ends, _ = step_batch(
        tokenizer, ['is it:'], [' Yes.\n No'], [True], 40, '\n'
    )
    assert shown(tokenizer, tokens[mask]) == expected
    assert np.flatnonzero(ends[0]).tolist() == data.examples[0].ends.tolist()
    hh = {
        'chosen': '\n\nHuman: is it\n\nAssistant: Yes.',
        'rejected': '\n\nHuman: is it\n\nAssistant: No',
    }
    data = pipeline.load_comparisons(spec(hh, kind='hh'), tokenizer, max_length=99)
    assert [shown(tokenizer, x) for x in data.examples[0].answers] == [good, bad]


@pytest.mark.parametrize('style', STYLES)
def test_what_a_policy_wrote_is_read_again_with_the_same_tokens(style):
    tokenizer = sentencepiece(style)
    rng = np.random.default_rng(0)
    letters = list('YesNoit:.\nab0? ')
    texts = [''.join(rng.choice(letters, rng.integers(1, 9))) for _ in range(200)]
    joint = find_joint(tokenizer)
    (before,) = encode(tokenizer, ['is it:'])
    ends = [before[-1]] * len(texts)
    ids = joint.encode(ends, texts)
    assert joint.decode(ends, ids) == texts
    tokens, mask, _ = text_batch(
        tokenizer, ['is it:'] * len(texts), texts, [False] * len(texts), 64
    )
    for row, real, answer in zip(tokens, mask, ids):
        assert row[real].tolist() == [1, *before, *answer]


def test_other_tokenizers_write_a_text_alike_everywhere():
    tokenizer = tiny_tldr.tokenizer()
    joint = find_joint(tokenizer)
    assert joint.anchors == ()
    texts = [' Anna sold', 'Anna', '\n\nit', ' ', '<|eos|>', 'ü']
    assert joint.encode([None] * 6, texts) == encode(tokenizer, texts)
    rows = encode(tokenizer, texts)
    assert joint.decode([None] * 6, rows) == tokenizer.batch_decode(
        rows, skip_special_tokens=True
    )
    words = Tokenizer(models.WordLevel({'<unk>': 0, 'is': 1, 'it': 2}, '<unk>'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=words, unk_token='<unk>')
    assert find_joint(plain).anchors == ()


def test_a_word_level_tokenizer_that_hides_its_unknown_word_uses_no_anchor():
    """':' and ':a' are both the unknown word: nothing tells how 'a' stands behind."""
    core = Tokenizer(models.WordLevel({'?': 0, 'two': 1, '</s>': 2}, '?'))
    core.pre_tokenizer = pre_tokenizers.Split(' ', 'removed')
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token='</s>')
    assert find_joint(tokenizer).encode([0, None], ['two two', 'so']) == [[1, 1], [0]]


def test_a_byte_level_tokenizer_with_a_space_of_its_own_joins_too():
    core = Tokenizer(models.BPE({c: i for i, c in enumerate('Ġab:0Ċ')}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert shown(tokenizer, tokenizer.encode('ab')) == ['Ġ', 'a', 'b']
    joint = find_joint(tokenizer)
    ids = joint.encode([1, 1], ['ab', ' b'])
    assert [shown(tokenizer, row) for row in ids] == [['a', 'b'], ['Ġ', 'b']]


def test_a_prompt_is_opened_once_and_in_one_way(spec):
    tokenizer = sentencepiece('prepend')
    tokenizer.chat_template = TEMPLATE  # without BOS
    rows = open_prompts(tokenizer, ['a', '<U>a', '<s>a', ''], [False, True, False] * 2)
    assert [shown(tokenizer, row) for row in rows] == [
        ['<s>', '▁', 'a'],
        ['<U>', '▁', 'a'],
        ['<s>', '▁', 'a'],
        [],
    ]
    talk = [{'role': 'user', 'content': 'is it'}]
    steps = {'prompt': talk, 'completions': ['a', 'b'], 'labels': [True, False]}
    about = dict(rating_range=None, rating_unit='given', step_separator='\n')
    data = load_judgements(
        spec(steps),
        tokenizer,
        Wanted(kind='steps', by='', heads=(), **about),
        Limits(40, 'drop', 'error'),
    )
    example = data.examples[0]
    learned = [*example.prompt, *example.answers[0]]
    (record,) = pipeline.load_prompts(
        spec(steps), tokenizer, max_prompt_length=40
    ).records
    for templated in (None, [True]):
        tokens, mask, *_ = step_batch(
            tokenizer, [record.prompt], ['a\nb'], [True], 40, '\n', templated
        )
        assert tokens[mask].tolist() == learned
        tokens, _, _ = text_batch(
            tokenizer, [record.prompt], ['a'], [True], 40, templated
        )
        assert tokens[0][:2].tolist() == learned[:2]
    tokens, _, _ = text_batch(tokenizer, [record.prompt], ['a'], [True], 40, [False])
    assert tokens[0, 0] == tokenizer.bos_token_id


def test_a_response_that_spells_a_control_token_does_not_write_it():
    tokenizer = sentencepiece('first')
    tokens, mask, _ = text_batch(tokenizer, ['is it:'], [' a</s>b'], [True], 40)
    ids = tokens[mask].tolist()
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


def test_ids_that_are_kept_are_those_of_the_joined_texts(spec, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(token_cache, 'LEAST', 0)
    tokenizer = sentencepiece('prepend')
    # What a cache holds of the answers by themselves is not what is asked for.
    token_cache.encode_cached(tokenizer, ['is it:', ' Yes.', ' No'])
    where = spec({'prompt': 'is it:', 'chosen': ' Yes.', 'rejected': ' No'})
    for _ in range(2):
        data = pipeline.load_comparisons(where, tokenizer, max_length=40)
        assert shown(tokenizer, data.examples[0].answers[0]) == ['▁Yes', '.', '</s>']


def test_stories_are_joined_as_they_were_learned(spec):
    folder = SHARED / 'stories260k'
    if not folder.exists():
        pytest.skip(f'{folder} is not here')
    tokenizer = load_tokenizer(str(folder))
    prompt, answer = 'Once upon a time.', ' She was a little girl.'
    where = spec({'prompt': prompt, 'completion': answer})
    (example,) = pipeline.load_demonstrations(where, tokenizer, max_length=90).examples
    assert example.tokens[:-1].tolist() == tokenizer.encode(prompt + answer)
    rng = np.random.default_rng(0)
    (before,) = encode(tokenizer, [prompt])
    rows = [rng.integers(3, 512, 6).tolist() for _ in range(300)]  # bytes too
    texts = decode_behind(tokenizer, [before[-1]] * 300, rows)
    for row, text in zip(rows, texts):
        assert tokenizer.decode(before + row) == prompt + text
