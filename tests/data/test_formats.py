"""Every accepted form of a record, chat templates, and what bad records are told."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data.formats import (
    BadRecord,
    Demonstration,
    Judged,
    Prompt,
    to_comparison,
    to_demonstration,
    to_prompt,
    to_text,
)
from rlhf_jax.data.sources import SourceRecord

# <U>…</s> for the user, <A>…</s> for the assistant; refuses a system turn.
TEMPLATE = """{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ raise_exception('no system turns here') }}{%- endif -%}
{%- if m.role == 'user' -%}<U>{%- else -%}<A>{%- endif -%}
{{ m.content }}</s>
{%- endfor -%}
{%- if add_generation_prompt -%}<A>{%- endif -%}"""


def tokenizer(template=TEMPLATE):
    core = Tokenizer(models.WordLevel({'</s>': 0, '<unk>': 1}, unk_token='<unk>'))
    result = PreTrainedTokenizerFast(tokenizer_object=core, eos_token='</s>')
    result.chat_template = template
    return result


BARE = tokenizer(None)


def record(**fields):
    return SourceRecord(fields, 'f.jsonl:7')


def user(content):
    return {'role': 'user', 'content': content}


def assistant(content):
    return {'role': 'assistant', 'content': content}


def refuses(convert, fields, *parts, kind=BadRecord, by=BARE):
    with pytest.raises(kind) as caught:
        convert(record(**fields), by)
    for part in parts:
        assert part in str(caught.value), (part, str(caught.value))


def test_text_forms_are_kept_letter_by_letter():
    where = 'f.jsonl:7'
    made = to_demonstration(record(prompt=' p\n', completion=' c '), BARE)
    assert made == Demonstration(' p\n', ' c ', where)
    fields = dict(prompt='p', chosen='a', rejected='b', completion=None)
    assert to_demonstration(record(**fields), BARE) == Demonstration('p', 'a', where)
    extra = dict(margin=2, annotator='k', gold_chosen=0.5, flag=True, odd=[1], no=None)
    assert to_comparison(record(**fields, **extra), BARE) == Judged(
        'p',
        {'chosen': 'a', 'rejected': 'b'},
        None,
        {'annotator': 'k', 'gold_chosen': 0.5, 'flag': True},
        where,
        margin=2.0,
    )
    assert to_comparison(record(**fields), BARE).margin == 0
    assert to_text(record(text=' t'), BARE).text == ' t'


@pytest.mark.parametrize(
    'fields, reference',
    [
        (dict(prompt='p'), None),
        (dict(prompt='p', reference='r', completion='c'), 'r'),
        (dict(prompt='p', completion='c'), 'c'),
        (dict(prompt='p', chosen='a', rejected='b'), 'a'),
        (dict(prompt='p', chosen='  ', rejected='b'), None),
    ],
)
def test_any_record_with_a_prompt_is_a_prompt(fields, reference):
    made = to_prompt(record(**fields, id=4), BARE)
    assert made == Prompt('p', reference, {'id': 4}, 'f.jsonl:7')


def test_messages_through_the_chat_template():
    talk = [user('hi'), assistant('yo'), user('so'), assistant('ok')]
    before, answer = '<U>hi</s><A>yo</s><U>so</s><A>', 'ok</s>'
    chat = tokenizer()
    made = to_demonstration(record(messages=talk), chat)
    assert (made.prompt, made.completion) == (before, answer)
    prompt = to_prompt(record(messages=talk), chat)
    assert (prompt.prompt, prompt.reference) == (before, 'ok')
    prompt = to_prompt(record(messages=talk[:-1]), chat)
    assert (prompt.prompt, prompt.reference) == (before, None)
    prompt = to_prompt(record(prompt=talk[:-1], completion='c'), chat)
    assert (prompt.prompt, prompt.reference) == (before, 'c')


@pytest.mark.parametrize(
    'fields',
    [
        dict(prompt=[user('hi')], chosen=[assistant('a')], rejected=[assistant('b')]),
        dict(prompt=[user('hi')], chosen='a', rejected='b'),
        dict(prompt='hi', chosen=[assistant('a')], rejected=[assistant('b')]),
        dict(
            prompt='hi',
            chosen=[user('hi'), assistant('a')],
            rejected=[user('hi'), assistant('b')],
        ),
        dict(
            chosen=[user('hi'), assistant('a')], rejected=[user('hi'), assistant('b')]
        ),
    ],
)
def test_comparisons_of_messages(fields):
    chat = tokenizer()
    made = to_comparison(record(**fields), chat)
    assert made.templated
    assert (made.prompt, *made.completions.values()) == (
        '<U>hi</s><A>',
        'a</s>',
        'b</s>',
    )
    shown = to_demonstration(record(**fields), chat)
    assert (shown.prompt, shown.completion) == ('<U>hi</s><A>', 'a</s>')
    assert to_prompt(record(**fields), chat).prompt == '<U>hi</s><A>'


def test_what_stands_before_the_end_of_a_turn_stays_and_text_alone_ends_none():
    talk = dict(messages=[user('hi'), assistant('ok')])
    chat = tokenizer(TEMPLATE.replace('</s>', '<end>.</s>'))
    assert to_demonstration(record(**talk), chat).completion == 'ok<end>.</s>'
    endless = tokenizer(TEMPLATE.replace('</s>', '<end>.'))
    refuses(to_demonstration, talk, "in '<end>.', which", kind=ValueError, by=endless)


def test_bad_fields():
    pair = dict(prompt='p', chosen='a', rejected='b')
    refuses(
        to_comparison,
        dict(prompt='p', chosen='a', rejectd='b'),
        'f.jsonl:7',
        "'rejected' is missing",
        'found: prompt, chosen, rejectd',
        "is 'rejectd' meant",
    )
    refuses(to_demonstration, dict(prompt='p'), "'completion' is missing")
    refuses(to_demonstration, dict(completion='c'), "'prompt' is missing")
    refuses(to_prompt, dict(), "'prompt' is missing", 'found: none')
    refuses(to_text, dict(txt='x'), "'text' is missing", "is 'txt' meant")
    refuses(to_text, dict(text=3), "f.jsonl:7: 'text' is a int, not text")
    refuses(to_comparison, pair | dict(chosen=3), "'chosen' is a int")
    refuses(to_comparison, pair | dict(rejected=' \n'), "'rejected' is empty")
    refuses(to_comparison, pair | dict(prompt=''), "f.jsonl:7: 'prompt' is empty")
    refuses(to_comparison, pair | dict(rejected='a'), 'are equal')
    refuses(to_comparison, pair | dict(margin='2'), "margin is '2'", 'finite number')
    refuses(to_comparison, pair | dict(margin=float('nan')), 'margin is nan')
    refuses(to_comparison, pair | dict(margin=True), 'margin is True')
    refuses(to_comparison, pair | dict(margin=-1e39), 'margin is -1e+39', 'scale it')
    refuses(to_comparison, pair | dict(margin=10**400), 'margin is above 1e300')
    refuses(to_comparison, pair | dict(gold_chosen='x'), "gold_chosen is 'x'")
    refuses(to_demonstration, dict(prompt='p', completion=''), "'completion' is empty")
    refuses(to_prompt, dict(prompt='p', reference=3), 'reference is a int')
    half = 'half a surrogate pair at character 2'
    refuses(to_text, dict(text='ab\ud800'), half)
    refuses(to_prompt, dict(prompt='p', reference='ab\ud800'), "'reference'", half)
    refuses(to_prompt, dict(prompt='p', chosen='ab\ud800'), "'reference'", half)


def test_bad_messages():
    chat = tokenizer()
    told = dict(by=chat)
    talk = [user('hi'), assistant('ok')]
    refuses(
        to_demonstration,
        dict(messages=talk[:1]),
        "ends in a turn of 'user'",
        'of the assistant',
        **told,
    )
    refuses(to_demonstration, dict(messages=talk[1:]), 'before the answer', **told)
    refuses(to_demonstration, dict(messages=[]), 'at least one', **told)
    refuses(to_demonstration, dict(messages='hi'), 'a list of messages', **told)
    broken = [user('hi'), {'role': 'assistant', 'content': None}]
    refuses(to_demonstration, dict(messages=broken), 'messages[1]', 'content', **told)
    refuses(to_prompt, dict(prompt=['hi']), 'prompt[0]', 'role', **told)
    silent = [user('hi'), assistant(' ')]
    refuses(to_demonstration, dict(messages=silent), 'is empty', **told)
    refuses(
        to_comparison,
        dict(chosen=talk, rejected=[user('ho'), assistant('no')]),
        'answer different prompts',
        **told,
    )
    refuses(to_comparison, dict(chosen=talk, rejected=talk), 'are equal', **told)
    ruled = [{'role': 'system', 'content': 's'}, *talk]
    refuses(to_demonstration, dict(messages=ruled), 'no system turns here', **told)


def test_a_template_that_rewrites_the_prompt_is_refused():
    rewriting = '{{ messages | length }}{{ messages[0].content }}'
    refuses(
        to_demonstration,
        dict(messages=[user('hi'), assistant('ok')]),
        'f.jsonl:7',
        'in another way once an answer follows',
        by=tokenizer(rewriting),
    )


def test_no_chat_template_is_no_fault_of_the_record():
    with pytest.raises(
        ValueError, match='no chat template.*prompts and answers as text'
    ) as caught:
        to_prompt(record(prompt=[user('hi')]), BARE)
    assert not isinstance(caught.value, BadRecord)
