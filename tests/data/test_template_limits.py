"""Chat templates that do not end, or fail in other ways than Jinja does."""

import json
import threading
import time

import jinja2
import pytest

from rlhf_jax.data import pipeline, template_limits
from rlhf_jax.data.stops import decide_ends
from rlhf_jax.data.template_limits import TemplateStuck, limited
from tests.data.test_chat import CHATML, made

TALK = [{'role': 'user', 'content': 'so'}, {'role': 'assistant', 'content': 'it is'}]
# Only for what records say, so that a tokenizer with it can be loaded.
IF = "{% if messages[0].content == 'so' %}"
MANY = '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}'
NO_CALL = """{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}
{%- endfor %}{% endfor %}"""
DOUBLING = """{% set n = namespace(x='abcdefgh') %}{% for a in range(60) %}
{%- set n.x = n.x ~ n.x %}{% endfor %}"""
CALLS_ITSELF = '{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}'


@pytest.fixture
def fails(tmp_path):
    """The error of a record whose template begins with some text."""

    def load(text, on_bad='error'):
        path = tmp_path / 'data.jsonl'
        lines = [{'prompt': 'so', 'completion': 'it'}, {'messages': TALK}]
        path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
        tokenizer = made(f'{IF}{text}{{% endif %}}{CHATML}')
        start = time.monotonic()
        with pytest.raises(ValueError) as caught:
            data = pipeline.load_demonstrations(
                f'jsonl:{path}', tokenizer, max_length=900, on_bad=on_bad
            )
            assert data.counts.skipped_bad == 1  # one error for both
            raise ValueError(data.counts.first_bad)
        assert time.monotonic() - start < 10
        return str(caught.value)

    return load


@pytest.mark.parametrize('text', [MANY, NO_CALL])
@pytest.mark.parametrize('on_bad', ['error', 'skip'])
def test_a_loop_without_end_is_one_error_with_its_place(
    fails, monkeypatch, text, on_bad
):
    monkeypatch.setattr(template_limits, 'SECONDS', 0.5)
    error = fails(text, on_bad)
    assert 'data.jsonl:2: the chat template was stopped' in error
    assert 'not come to its end in 0.5 seconds' in error


def test_memory_without_end_is_an_error(fails, monkeypatch):
    monkeypatch.setattr(template_limits, 'MEMORY', 2**26)
    error = fails(DOUBLING)
    assert 'data.jsonl:2: the chat template' in error
    assert 'more than 0.0625 GiB' in error


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{{ 1 // 0 }}', 'ZeroDivisionError'),
        (CALLS_ITSELF, 'RecursionError'),
        ("{{ 'x' * 999999 * 999999 * 999 }}", 'MemoryError'),
        ('{{ range(999999999) }}', 'OverflowError: Range too big'),
        ('{{ messages[7].x.y }}', 'refuses the conversation'),
        ('{% for x in 7 %}{% endfor %}', 'not iterable'),
        ('{{ ' + '(' * 999 + '1' + ')' * 999 + ' }}', 'nested too deep'),
        ('{% for x in 3 %}', 'no Jinja: line'),
        ('{{ "\\ud800" }}', 'half a surrogate pair'),
    ],
)
def test_other_ways_to_fail(fails, text, message):
    error = fails(text)
    assert 'data.jsonl:2: ' in error and message in error, error


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{{ range(10**9) }}', 'has a power in line 1'),
        ('\n{{ 10 ** 10 ** 10 }}', 'has a power in line 2'),
        ("{{ 'x' * 9999999999 }}", 'has × 9999999999 in line 1'),
    ],
)
def test_a_single_call_without_bound_is_refused_by_its_line(text, message):
    tokenizer = made(f'{IF}{text}{{% endif %}}{CHATML}')
    with pytest.raises(ValueError, match=f"tokenizer '': the chat template {message}"):
        decide_ends(tokenizer)


def test_a_template_that_is_stuck_on_everything_is_told_of_its_tokenizer(monkeypatch):
    monkeypatch.setattr(template_limits, 'SECONDS', 0.5)
    with pytest.raises(ValueError, match='tokenizer .*the chat template was stopped'):
        decide_ends(made(MANY + CHATML))


def test_an_honest_product_and_a_slow_thread_beside_it():
    with limited("{{ '-' * 80 }}"):
        assert len(jinja2.Template("{{ '-' * 80 }}").render()) == 80
    done = []

    def work():
        for _ in range(200):
            with limited(''):
                time.sleep(0.001)
        done.append(True)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 3 and not template_limits.WATCH.renderings


def test_only_the_thread_that_is_stuck_is_ended(monkeypatch):
    monkeypatch.setattr(template_limits, 'SECONDS', 0.3)
    ended = []

    def work():
        try:
            with limited(''):
                while True:
                    pass
        except TemplateStuck as error:
            ended.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.8)  # not watched itself
    thread.join(5)
    assert len(ended) == 1 and 'in 0.3 seconds' in ended[0]
