"""What chat templates write, as tokens: which are learned, and what a prompt is."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import pipeline
from rlhf_jax.data.chat import open_prompt, readable
from rlhf_jax.data.tokenizer import (
    check_saved,
    eos_ids,
    load_tokenizer,
    save_tokenizer,
)
from rlhf_jax.generate import generate, sampling

CHATML = """{% for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

MARKED = """{% for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' -%}
{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ m.content + '<|im_end|>\n' }}{% endif -%}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA2 = """{% if messages[0].role == 'system' -%}
{% set turns = messages[1:] %}
{%- set ruling = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' -%}
{% else %}{% set turns = messages %}{% set ruling = '' %}{% endif -%}
{% for m in turns -%}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('roles must alternate') }}{% endif -%}
{% if m.role == 'user' -%}
{{ bos_token + '[INST] ' + (ruling if loop.first else '') + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif -%}
{%- endfor %}"""

LLAMA3 = """{{ bos_token }}{% for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{{- m.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

ZEPHYR = """{% for m in messages -%}
{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor -%}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

GEMMA = """{{ bos_token }}{% for m in messages -%}
{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}
{%- endif -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- m.content | trim + '<end_of_turn>\n' }}{% endfor -%}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# As Qwen 3 does: what was thought in an earlier turn is left out of the history.
FORGETFUL = """{% for m in messages -%}
{% set words = m.content if loop.last else m.content.split('</think>')[-1] -%}
{{ '<|im_start|>' + m.role + '\n' + words + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

SPECIAL = ['<s>', '</s>', '<|im_start|>', '<|im_end|>', '<|start_header_id|>']
SPECIAL += ['<|end_header_id|>', '<|eot_id|>', '<start_of_turn>', '<end_of_turn>']


def made(template, bos=False):
    """A byte-level BPE with merges across words and line breaks; ``bos`` before all."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        ['user assistant model so it is all right\n\n'] * 9, trainer
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single='<s> $A', special_tokens=[('<s>', 0)]
        )
    result = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token='<s>', eos_token='</s>'
    )
    result.chat_template = template
    return result


def turns(*contents, roles=('user', 'assistant')):
    """Turns of the roles in turn; 'role: content' names another."""
    result = []
    for i, content in enumerate(contents):
        role, _, rest = content.partition(': ')
        turn = (role, rest) if rest else (roles[i % len(roles)], content)
        result.append(dict(zip(('role', 'content'), turn)))
    return result


TALK = turns('so it is?\n', 'all right', 'is it so', ' it is so\n\nall right')


@pytest.fixture
def load(tmp_path):
    def read(messages, tokenizer, max_length=500, **how):
        path = tmp_path / 'talk.jsonl'
        path.write_text(json.dumps({'messages': messages}) + '\n')
        data = pipeline.load_demonstrations(
            f'jsonl:{path}',
            tokenizer,
            max_length=max_length,
            loss_on='assistant',
            **how,
        )
        return data.examples[0]

    return read


def learned(example, tokenizer):
    """The text of every run of tokens in the loss."""
    flags = np.flatnonzero(np.diff([0, *example.loss, 0]))
    return [
        tokenizer.decode(example.tokens[start:stop])
        for start, stop in flags.reshape(-1, 2)
    ]


STYLES = {
    'chatml': (CHATML, ['all right<|im_end|>', ' it is so\n\nall right<|im_end|>']),
    'marked': (MARKED, ['all right<|im_end|>', ' it is so\n\nall right<|im_end|>']),
    'llama2': (LLAMA2, [' all right </s>', ' it is so\n\nall right </s>']),
    'llama3': (LLAMA3, ['all right<|eot_id|>', 'it is so\n\nall right<|eot_id|>']),
    'zephyr': (ZEPHYR, ['all right</s>', ' it is so\n\nall right</s>']),
    'gemma': (GEMMA, ['all right<end_of_turn>', 'it is so\n\nall right<end_of_turn>']),
}


def test_a_templated_prompt_is_readable_without_its_special_tokens():
    tokenizer = made(CHATML)
    prompt = open_prompt(turns('so <it> is?'), tokenizer)
    assert readable(tokenizer, prompt) == 'user\nso <it> is?\nassistant\n'
    assert readable(tokenizer, 'so it is') == 'so it is'


@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize('bos', [False, True])
def test_every_assistant_turn_and_its_end_are_learned_and_nothing_else(
    load, style, bos
):
    template, expected = STYLES[style]
    tokenizer = made(template, bos)
    example = load(TALK, tokenizer)
    assert learned(example, tokenizer) == expected
    whole = tokenizer.apply_chat_template(TALK, return_dict=False)
    assert example.tokens.tolist() == whole[: len(example.tokens)]
    assert example.loss[-1] and not example.loss[0]


def test_the_mask_is_that_of_transformers_where_a_template_has_marks(load):
    talk = [*turns('system: all right'), *TALK, *turns('is it?', ' right \n', 'so')]
    tokenizer = made(MARKED)
    theirs = tokenizer.apply_chat_template(
        talk, return_dict=True, return_assistant_tokens_mask=True
    )
    example = load(talk, tokenizer)
    size = len(example.tokens)
    assert example.tokens.tolist() == theirs['input_ids'][:size]
    assert example.loss.tolist() == [bool(i) for i in theirs['assistant_masks'][:size]]
    assert not any(theirs['assistant_masks'][size:])
    # Rendering prefixes of a template without marks comes to the same.
    unmarked = load(talk, made(CHATML))
    assert unmarked.tokens.tolist() == example.tokens.tolist()
    assert unmarked.loss.tolist() == example.loss.tolist()


@pytest.mark.parametrize(
    ('messages', 'expected'),
    [
        (turns('system: so', 'user: is it', 'assistant: it is'), ['it is']),
        (turns('so', 'user: is it', 'assistant: all', 'user: so'), ['all']),
        (turns('so', 'it is', 'assistant: all right'), ['it is', 'all right']),
        (turns('so', 'is it', 'tool: 7', 'assistant: it is'), ['is it', 'it is']),
    ],
)
@pytest.mark.parametrize('template', [CHATML, MARKED])
def test_other_orders_of_turns(load, template, messages, expected):
    tokenizer = made(template)
    example = load(messages, tokenizer)
    assert learned(example, tokenizer) == [f'{text}<|im_end|>' for text in expected]


def test_a_call_of_a_tool_needs_no_content(load):
    template = CHATML.replace('m.content', "(m.content or m.tool_calls[0]['name'])")
    messages = turns('so', 'x', 'tool: 7', 'assistant: it is')
    messages[1] = {'role': 'assistant', 'tool_calls': [{'name': 'all'}]}
    tokenizer = made(template)
    assert learned(load(messages, tokenizer), tokenizer) == [
        'all<|im_end|>',
        'it is<|im_end|>',
    ]


def test_truncation_keeps_mask_and_tokens_together(load):
    tokenizer = made(LLAMA3, bos=True)
    whole = load(TALK, tokenizer)
    pairs = list(zip(whole.tokens.tolist(), whole.loss.tolist()))
    prompt = whole.loss.tolist().index(True)
    for limit in range(4, len(pairs)):
        cut = load(TALK, tokenizer, max_length=limit, overlong='truncate')
        kept = max(limit - (len(pairs) - prompt), limit // 2)  # of the first prompt
        left = pairs[:prompt]
        if kept < prompt:
            left = pairs[:1] + pairs[prompt - kept + 1 : prompt]
        expected = (left + pairs[prompt:])[:limit]
        assert list(zip(cut.tokens.tolist(), cut.loss.tolist())) == expected
        assert cut.loss.any()


def test_records_and_templates_that_cannot_be_learned(load, tmp_path):
    def fails(messages, template, *parts):
        with pytest.raises(ValueError) as caught:
            load(messages, made(template))
        for part in parts:
            assert part in str(caught.value), (part, str(caught.value))

    place = 'talk.jsonl:1'
    fails(turns('so'), CHATML, place, 'no turn is of the assistant')
    fails(turns('assistant: so'), CHATML, place, 'nothing stands before')
    fails(turns('so', ' '), CHATML, place, "'messages[1]' is empty")
    fails(turns('system: s', 'so', 'it is'), GEMMA, place, 'System role not supported')
    fails(turns('so', 'it', 'assistant: is'), LLAMA2, place, 'must alternate')
    thought = turns('so', 'is</think>it', 'all', 'right')
    fails(thought, FORGETFUL, place, "template of ''", 'up to messages[1]', '{% gene')
    endless = MARKED.replace(" + '<|im_end|>' }}{% end", ' }}{% end')
    fails(TALK, endless, "ends an assistant turn in 'all right'", 'to stop', 'EOS')
    fails(TALK, CHATML.replace('<|im_end|>', ' end.'), 'turn in', "right end.'")
    # Skipping counts a record that a template refuses, but a template that is at fault
    # with every record stops the run.
    skip = {'on_bad': 'skip'}
    with pytest.raises(ValueError, match='nothing is left.* 1 skipped'):
        load(thought, made(FORGETFUL), **skip)
    with pytest.raises(ValueError, match='nothing would teach'):
        load(TALK, made(endless), **skip)


def test_text_is_no_conversation(tmp_path):
    path = tmp_path / 'text.jsonl'
    path.write_text('{"prompt": "so", "completion": "it is"}\n')
    with pytest.raises(ValueError, match="text.jsonl:1: .*loss_on='response'"):
        pipeline.load_demonstrations(
            f'jsonl:{path}', made(CHATML), max_length=99, loss_on='assistant'
        )


# ------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize('bos', [False, True])
def test_a_prompt_of_several_turns_is_what_the_template_opens(tmp_path, style, bos):
    tokenizer = made(STYLES[style][0], bos)
    talk = turns('so it is?', 'all right', 'is it so')
    if style != 'gemma':
        talk = turns('system: so\nit is') + talk
    path = tmp_path / 'prompts.jsonl'
    records = [{'prompt': talk}, {'messages': talk + turns('assistant: it is')}]
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    data = pipeline.load_prompts(f'jsonl:{path}', tokenizer, max_prompt_length=400)
    expected = tokenizer.apply_chat_template(
        talk, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    for example in data.examples:
        assert example.tokens.tolist() == expected
    assert expected.count(0) == {'llama2': 2, 'llama3': 1, 'gemma': 1}.get(style, 0)
    assert [record.reference for record in data.records] == [None, 'it is']


def chatty(tmp_path, listed):
    """A ChatML tokenizer whose model ends its turns with more than EOS, from a disk."""
    folder = tmp_path / 'model'
    made(CHATML).save_pretrained(folder)
    text = json.dumps({'eos_token_id': listed})
    (folder / 'generation_config.json').write_text(text)
    return load_tokenizer(str(folder))


def test_generation_stops_at_the_end_of_a_turn(tmp_path, bigram):
    tokenizer = chatty(tmp_path, [3, 1])
    assert tokenizer.eos_token == '</s>' and eos_ids(tokenizer) == [1, 3]
    prompt = tokenizer.apply_chat_template(
        turns('so'), add_generation_prompt=True, return_dict=False
    )
    o, k = tokenizer.encode('o')[0], tokenizer.encode('k')[0]
    table = np.zeros((len(tokenizer), len(tokenizer)), np.float32)
    for before, after in [(prompt[-1], o), (o, k), (k, 3), (3, o)]:
        table[before, after] = 9
    tokens = jnp.asarray([prompt])

    def write(ends):
        out = generate(
            {'table': jnp.asarray(table)},
            tokens,
            jnp.ones_like(tokens, bool),
            jnp.arange(1),
            jax.random.PRNGKey(0),
            sampling(eos_ids=ends, temperature=0.0),
            model=bigram,
            max_new_tokens=6,
        )
        return tokenizer.decode(out.tokens[0][out.response_mask[0]]), bool(out.ended[0])

    assert write(eos_ids(tokenizer)) == ('ok<|im_end|>', True)
    assert not write([1])[1]  # the tokenizer's own EOS is never written


def test_an_answer_that_the_template_closed_is_not_closed_twice(tmp_path):
    path = tmp_path / 'talk.jsonl'
    path.write_text(json.dumps({'messages': turns('so', 'it is')}) + '\n')

    def answer(tokenizer):
        data = pipeline.load_demonstrations(
            f'jsonl:{path}', tokenizer, max_length=99, loss_on='response'
        )
        return learned(data.examples[0], tokenizer)

    assert answer(chatty(tmp_path, [1, 3])) == ['it is<|im_end|>']
    assert answer(made(ZEPHYR)) == ['it is</s>']
    # No generation config lists what ends the turn: the template says it.
    assert answer(made(CHATML)) == ['it is<|im_end|>']
    # Nothing of what a template writes behind the end of the last turn is learned.
    over = CHATML.replace('{% endif %}', '{% else %}{{ eos_token }}{% endif %}')
    assert answer(made(over)) == ['it is<|im_end|>']


def test_the_eos_ids_survive_the_work_directory(tmp_path):
    tokenizer = chatty(tmp_path, [3, 1])
    saved = tmp_path / 'run' / 'tokenizer'
    save_tokenizer(tokenizer, saved)
    assert eos_ids(load_tokenizer(str(saved))) == [1, 3]
    check_saved(tokenizer, saved, 'a')
