"""A template that asks for the date writes that on which the run was begun."""

import datetime
import json

import pytest
import transformers.utils.chat_template_utils as rendering

from rlhf_jax.data import clock, pipeline
from rlhf_jax.data.tokenizer import load_tokenizer, save_tokenizer
from tests.data.test_chat import CHATML, made

# As Llama 3.2 asks for it.
DATED = (
    """{% if strftime_now is defined %}{% set date = strftime_now("%d %b %Y") %}
{%- else %}{% set date = '26 Jul 2024' %}{% endif -%}
{{ '<|im_start|>system\n' + date + '<|im_end|>\n' }}"""
    + CHATML
)
DAY = datetime.datetime(2025, 1, 31, 23, 59)


@pytest.fixture
def today(monkeypatch):
    """Sets the day that everybody's clock shows."""

    def show(day):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return day

        monkeypatch.setattr(rendering, 'datetime', Clock)
        monkeypatch.setattr(clock.datetime, 'datetime', Clock)
        rendering._compile_jinja_template.cache_clear()

    return show


@pytest.fixture
def written(tmp_path):
    """The text of a demonstration, by the template of a tokenizer."""

    def read(tokenizer):
        talk = [{'role': 'user', 'content': 'so'}]
        talk.append({'role': 'assistant', 'content': 'it is'})
        path = tmp_path / 'talk.jsonl'
        path.write_text(json.dumps({'messages': talk}))
        data = pipeline.load_demonstrations(f'jsonl:{path}', tokenizer, max_length=99)
        return tokenizer.decode(data.examples[0].tokens)

    return read


def test_the_date_stays_that_of_the_beginning(today, written, tmp_path):
    made(DATED).save_pretrained(tmp_path / 'model')
    today(DAY)
    tokenizer = load_tokenizer(str(tmp_path / 'model'))
    first = written(tokenizer)
    assert '31 Jan 2025' in first
    today(DAY + datetime.timedelta(days=1))
    assert written(tokenizer) == first
    save_tokenizer(tokenizer, tmp_path / 'run')
    assert written(load_tokenizer(str(tmp_path / 'run'))) == first
    again = load_tokenizer(str(tmp_path / 'model'))
    clock.restore_date(again, tmp_path / 'run')
    assert written(again) == first
    # Another run is begun with another date.
    other = load_tokenizer(str(tmp_path / 'run'))
    clock.begin(other)
    assert '01 Feb 2025' in written(other)
    clock.same_date(other, tokenizer)
    assert written(other) == first


@pytest.mark.parametrize('call', ['strftime_now(how)', 'strftime_now("%d" + how)'])
def test_a_question_that_cannot_be_answered_once_is_refused(written, call):
    template = '{% set how = "%Y" %}{{ ' + call + ' }}' + CHATML
    with pytest.raises(ValueError, match='strftime_now with something else'):
        written(made(template))


def test_the_text_of_a_date_stays_a_text(today):
    today(DAY)
    template = """{{ strftime_now('"%Y"') + strftime_now("it's %Y") }}"""
    fixed = clock.without_clock(template, made(template))
    [text], _ = rendering.render_jinja_template([[]], chat_template=fixed)
    assert text == '"2025"it\'s 2025'


def test_a_file_without_a_date_is_named(tmp_path):
    (tmp_path / clock.FILE).write_text('{"begun": 7}')
    with pytest.raises(ValueError, match=r'begun\.json holds no date .*"begun": "2025'):
        clock.restore_date(made(CHATML), tmp_path)
