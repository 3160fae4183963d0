"""What a record tells the chat template beside plain messages: honoured or refused."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from rlhf_jax.data import pipeline
from rlhf_jax.data.loading import Limits
from rlhf_jax.data.reward_data import Wanted, load_judgements
from tests.data.test_chat import CHATML, FORGETFUL, LLAMA3, STYLES, made

TOOLS = (
    """{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}
{%- endif %}"""
    + CHATML
)
CALLS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if 'tool_calls' in m %}{{ 'CALL ' + (m.tool_calls | tojson) }}
{%- else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Content, then calls, as Hermes and Qwen have it; `~` writes a null as None.
BOTH = CALLS.replace("{{ 'CALL '", "{{ m.content ~ 'CALL '")
# As DeepSeek V3 asks for a call.
IS_NONE = CALLS.replace("'tool_calls' in m", "m['content'] is none")
NAMES = """{% for m in messages %}{{ '<|im_start|>' + m.role }}
{%- if m.name is defined %}{{ ' name=' ~ m.name }}{% endif %}
{{- '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TOOL = {'type': 'function', 'function': {'name': 'weather', 'parameters': {}}}


def user(content):
    return {'role': 'user', 'content': content}


def assistant(content, **more):
    return {'role': 'assistant', 'content': content, **more}


TALK = [user('so'), assistant('it is')]
CALL = [{'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 1}}}]


@pytest.fixture
def load(tmp_path):
    """The text of the one example of a record; of prompts, of the prompt."""

    def read(record, template, load=pipeline.load_demonstrations, kind='jsonl', **how):
        path = tmp_path / f'data.{kind}'
        if kind == 'parquet':
            parquet.write_table(pa.Table.from_pylist([record]), path)
        else:
            path.write_text(json.dumps(record) + '\n')
        tokenizer = made(template)
        limit = {'max_length': 900}
        if load is pipeline.load_prompts:
            limit = {'max_prompt_length': 900}
        data = load(f'{kind}:{path}', tokenizer, **limit, **how)
        example = data.examples[0]
        if hasattr(example, 'answers'):
            parts = example.prompt, *example.answers
            return [tokenizer.decode(part) for part in parts]
        return tokenizer.decode(example.tokens)

    return read


@pytest.fixture
def fails(load):
    def check(record, template, *parts, **how):
        with pytest.raises(ValueError) as caught:
            load(record, template, **how)
        for part in ('data.jsonl:1', *parts):
            assert part in str(caught.value), (part, str(caught.value))

    return check


# ------------------------------------------------------------------------------- tools


@pytest.mark.parametrize('tools', [[TOOL], json.dumps([TOOL])])
def test_tools_reach_the_template(load, tools):
    expected = made(TOOLS).apply_chat_template(TALK, tools=[TOOL], tokenize=False)
    for loss_on in ('response', 'assistant'):
        text = load({'messages': TALK, 'tools': tools}, TOOLS, loss_on=loss_on)
        assert expected.startswith(text.removesuffix('</s>')) and 'weather' in text
    prompt = {'prompt': TALK[:1], 'tools': tools}
    assert 'weather' in load(prompt, TOOLS, pipeline.load_prompts)
    pair = {**prompt, 'chosen': TALK[1:], 'rejected': [assistant('no')]}
    assert 'weather' in load(pair, TOOLS, pipeline.load_comparisons)[0]


def test_tools_reach_rankings_and_steps(tmp_path):
    path, tokenizer = tmp_path / 'data.jsonl', made(TOOLS)
    about = dict(rating_range=None, rating_unit='given', step_separator='\n')
    told = {'prompt': TALK[:1], 'completions': ['it', 'is'], 'tools': [TOOL]}
    for kind, more in (('pairs', {'ranks': [1, 2]}), ('steps', {'labels': [1, 0]})):
        path.write_text(json.dumps({**told, **more}))
        data = load_judgements(
            f'jsonl:{path}',
            tokenizer,
            Wanted(kind=kind, by='', heads=(), **about),
            Limits(900, 'drop', 'error'),
        )
        assert 'weather' in tokenizer.decode(data.examples[0][0])


def test_what_a_template_does_not_read_is_refused_by_name(load, fails):
    fails({'messages': TALK, 'tools': [TOOL]}, CHATML, 'tools is given', 'not read it')
    fails({'messages': TALK, 'tools': 'a tool'}, TOOLS, 'tools is text, but no JSON')
    fails({'messages': TALK, 'tools': [7]}, TOOLS, 'tools must be a list')
    asked = {'messages': TALK, 'chat_template_kwargs': {'enable_thinking': False}}
    fails(asked, CHATML, "chat_template_kwargs['enable_thinking'] is given")
    thinks = "{% if enable_thinking is false %}{{ 'NO ' }}{% endif %}" + CHATML
    assert load(asked, thinks).startswith('NO <|im_start|>user')
    fails({'messages': TALK, 'chat_template_kwargs': 7}, CHATML, 'must be a dict')
    reserved = {'messages': TALK, 'chat_template_kwargs': {'messages': []}}
    fails(reserved, CHATML, "chat_template_kwargs['messages'] is given")
    called = [*TALK[:1], assistant('x', tool_calls=CALL)]
    fails({'messages': called}, CHATML, 'has tool_calls', "role 'assistant'")
    thought = [*TALK[:1], assistant('x', reasoning_content='hm')]
    fails({'messages': thought}, CHATML, 'has reasoning_content')
    fails({'messages': called}, CALLS, 'messages[1] has content beside its tool_calls')
    assert load({'messages': TALK, 'tools': [], 'chat_template_kwargs': {}}, CHATML)
    # A text is written already: nothing is told to a template.
    assert load({'prompt': 'so', 'completion': 'it', 'tools': [TOOL]}, CHATML)
    with pytest.raises(ValueError, match='nothing is left.* 1 skipped'):
        load({'messages': TALK, 'tools': [TOOL]}, CHATML, on_bad='skip')


def test_reasoning_is_told_by_the_name_that_the_template_reads(load):
    template = CHATML.replace(
        "m.content + '", "(m.reasoning_content or '') + m.content + '"
    )
    for name in ('reasoning_content', 'thinking', 'reasoning'):
        talk = [*TALK[:1], assistant('x', **{name: 'hm, '})]
        assert 'assistant\nhm, x<|im_end|>' in load({'messages': talk}, template)


# ---------------------------------------------------------------------------- null keys


def test_keys_that_are_null_are_absent(load):
    nulls = [{**turn, 'name': None, 'tool_calls': None} for turn in TALK]
    for template in (CHATML, CALLS, NAMES):
        expected = load({'messages': TALK}, template)
        assert load({'messages': nulls}, template) == expected
        assert load({'messages': nulls}, template, kind='parquet') == expected
        prompt = load({'prompt': nulls[:1]}, template, pipeline.load_prompts)
        assert prompt == load({'prompt': TALK[:1]}, template, pipeline.load_prompts)
    named = [{**nulls[0], 'name': 'Bob'}, nulls[1]]
    assert 'user name=Bob\nso' in load({'messages': named}, NAMES)


def test_what_arrow_adds_inside_of_calls_and_tools_is_left_out(load):
    other = {'type': 'function', 'function': {'name': 'g', 'arguments': {'y': 'a'}}}
    talk = [*TALK[:1], assistant(None, tool_calls=[*CALL, other]), assistant('three')]
    record = {'messages': talk, 'tools': [TOOL, {**TOOL, 'strict': True}]}
    record['tools'][0] = {'type': 'function', 'function': {'name': 'weather'}}
    record['tools'][1]['function'] = {'name': 'time', 'description': 'tells it'}
    template = TOOLS.removesuffix(CHATML) + CALLS
    text = load(record, template)
    assert 'null' not in text and load(record, template, kind='parquet') == text


@pytest.mark.parametrize('content', [{'content': None}, {}, {'content': ''}])
def test_no_content_beside_tool_calls_is_not_written_as_none(load, content):
    call = {'role': 'assistant', 'tool_calls': CALL, **content}
    talk = [*TALK[:1], call, {'role': 'tool', 'content': '3'}, assistant('three')]
    for template in (CALLS, BOTH, CALLS.replace("'CALL '", "m.content + 'CALL '")):
        text = load({'messages': talk}, template)
        assert 'None' not in text and 'assistant\nCALL [{' in text
    if content != {'content': ''}:  # that is no null, and such a template asks for one
        assert 'assistant\nCALL [{' in load({'messages': talk}, IS_NONE)


# ------------------------------------------------------------------ an open last turn


OPEN = [user('so'), assistant('Answer:')]


@pytest.mark.parametrize('style', STYLES)
def test_a_prompt_that_ends_in_an_assistant_turn_goes_on(load, style):
    template = STYLES[style][0]
    opened = made(template).apply_chat_template(
        OPEN, continue_final_message=True, tokenize=False
    )
    assert opened.endswith('Answer:') and opened.count('Answer') == 1
    whole = [user('so'), assistant('Answer: 4')]
    expected = load({'messages': whole}, template)
    for answer in (' 4', [assistant(' 4')]):
        record = {'prompt': OPEN, 'completion': answer}
        assert load(record, template, pipeline.load_prompts) == opened
        assert load(record, template) == expected
        text = load(record, template, loss_on='assistant')
        assert text == load({'messages': whole}, template, loss_on='assistant')
    pair = {'prompt': OPEN, 'chosen': [assistant(' 4')], 'rejected': ' 5'}
    prompt, chosen, rejected = load(pair, template, pipeline.load_comparisons)
    assert prompt == opened and prompt + chosen == expected
    assert chosen.replace('4', '5') == rejected


def test_the_reference_of_a_turn_that_goes_on_is_its_rest(tmp_path):
    path = tmp_path / 'data.jsonl'
    record = {'prompt': OPEN, 'completion': [assistant(' 4')]}
    path.write_text(json.dumps(record) + '\n' + json.dumps({'messages': OPEN}))
    data = pipeline.load_prompts(f'jsonl:{path}', made(CHATML), max_prompt_length=99)
    assert [record.reference for record in data.records] == [' 4', 'Answer:']
    assert data.records[1].prompt.endswith('assistant\n')  # a reference is no prompt


def test_turns_that_cannot_go_on(load, fails):
    called = [user('so'), assistant('', tool_calls=CALL)]
    record = {'prompt': called, 'completion': [assistant('4')]}
    for how in (pipeline.load_demonstrations, pipeline.load_prompts):
        fails(record, CALLS, 'ends in an assistant turn with tool_calls', load=how)
    fails({'prompt': OPEN, 'completion': [assistant(' ')]}, CHATML, 'is empty')
    # The template drops what stands before the mark, which is how the turn begins.
    thought = {'prompt': [user('so'), assistant('<think>')], 'completion': 'x</think>4'}
    assert '<think>x</think>4' in load(thought, FORGETFUL)
    dropped = LLAMA3.replace('m.content | trim', "m.content.split('</think>')[-1]")
    fails(thought, dropped, 'in another way once an answer follows')
