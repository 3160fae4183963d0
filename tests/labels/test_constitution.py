"""Constitutions: what their files say, and what is wrong with some."""

import json

import numpy as np
import pytest

from rlhf_jax.labels.constitution import TEXTS, draw, read_constitution
from rlhf_jax.labels.critique import critique_prompt, fill, revision_prompt

REQUESTS = TEXTS[:2]
ONE = {'id': 'truth', 'critique_request': 'What is wrong?', 'revision_request': 'Mend.'}


def written(tmp_path, text, name='rules.json'):
    path = tmp_path / name
    path.write_text(text if isinstance(text, str) else json.dumps(text, indent=1))
    return path


def test_json_and_markdown_say_the_same(tmp_path):
    rules = [
        {**ONE, 'preference_question': 'Which is true?', 'weight': 2.5},
        {**ONE, 'id': 'brief'},
    ]
    text = """# Rules
Some words on them.

## truth
The article is the only source.

- **Critique request:** What is
  wrong?
- **Revision request:** Mend.

A remark.
- Preference question: Which is true?
- Weight: 2.5

## brief
critique request: What is wrong?
revision request: Mend.
"""
    found = read_constitution(written(tmp_path, rules), REQUESTS)
    nested = read_constitution(written(tmp_path, {'principles': rules}), REQUESTS)
    marked = read_constitution(written(tmp_path, text, 'rules.md'), REQUESTS)
    for principles in (found, nested, marked):
        for principle, rule in zip(principles, rules, strict=True):
            for name in (*TEXTS, 'id'):
                assert getattr(principle, name) == rule.get(name)
            assert principle.weight == rule.get('weight', 1.0)
    places = [principle.where.rsplit(':', 1)[1] for principle in found]
    assert places == ['2', '9']
    assert [p.where.rsplit(':', 1)[1] for p in marked] == ['4', '15']


def test_prose_is_one_principle(tmp_path):
    path = written(tmp_path, '# Rule\n\nState only what\nthe article says.\n', 'a.txt')
    (principle,) = read_constitution(path, TEXTS)
    assert principle.id == 'a' and principle.weight == 1
    for name in TEXTS:
        assert 'State only what the article says.' in getattr(principle, name)


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        (' \n', ['is empty']),
        ('[]', ['holds no principle']),
        ('{"principles": []}', ['holds no principle']),
        ('{"rules": []}', ["unknown field 'rules'"]),
        ('[1]', ['rules.json:1', 'no object']),
        ('[\n{"id": }]', ['rules.json:2', 'no JSON']),
        ('"text"', ['neither a list']),
        ([ONE, {'id': 'b', 'critique_request': 'x'}], [':7', "'b'", 'no revision req']),
        ([ONE, ONE], [':7', "'truth' stands at", ':2 too']),
        ([{**ONE, 'weight': -1}], [':2', 'weight', '-1', '0 or more']),
        ([{**ONE, 'weight': True}], ['weight', 'True']),
        ('[{"id": "a", "weight": NaN}]', ['no critique request']),
        ([{**ONE, 'weight': 0}], ['all weights are 0']),
        ([{**ONE, 'wieght': 1}], ["'wieght'", "did you mean 'weight'"]),
        ([{**ONE, 'critique_request': ' '}], ['critique_request', 'no text']),
        ([{'critique_request': 'x'}], ['without id']),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path, text, words):
    with pytest.raises(ValueError) as caught:
        read_constitution(written(tmp_path, text), REQUESTS)
    for word in ('rules.json', *words):
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('Weight: 1\n', ['rules.md:1', 'no heading']),
        ('## a\nWeight: x\nCritique request: c\n', ['rules.md:1', "'a' is 'x'"]),
        ('## a\nCritique request: c\nCritique request: d\n', ['rules.md:3', 'again']),
        ('## a\nCritique request: c\n\n## b\n', ['rules.md:1', "'a' has no revision"]),
        ('## a\nCritique request:\nRevision request: r\n', ['no text']),
    ],
)
def test_markdown_likewise(tmp_path, text, words):
    with pytest.raises(ValueError) as caught:
        read_constitution(written(tmp_path, text, 'rules.md'), REQUESTS)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match='cannot be read'):
        read_constitution(tmp_path / 'none.json', REQUESTS)
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9')
    with pytest.raises(ValueError, match='latin.txt cannot be read'):
        read_constitution(tmp_path / 'latin.txt', REQUESTS)


def test_principles_are_drawn_by_weight(tmp_path):
    rules = [{**ONE, 'id': name, 'weight': w} for name, w in zip('abc', (3, 0, 1))]
    principles = read_constitution(written(tmp_path, rules), REQUESTS)
    rng = np.random.default_rng(0)
    drawn = [draw(principles, rng).id for _ in range(4000)]
    assert drawn.count('b') == 0
    assert 0.72 < drawn.count('a') / 4000 < 0.78  # 3/4, by 4 standard deviations


def test_prompt_files(tmp_path):
    own = critique_prompt()
    assert own.turn == '{critique_request}' and own.text.endswith('Critique:')
    values = {'prompt': 'P{response}', 'response': ' R', 'critique_request': 'C?'}
    text = fill(own.text, **values)
    assert text == 'P{response} R\n\nCritique Request: C?\n\nCritique:'
    path = tmp_path / 'ask.txt'
    path.write_text('Of {response}: {critique_request} {braces}\n')
    turn = critique_prompt(path)
    assert turn.text is None and turn.turn.endswith('{braces}')
    for text, word in (
        ('{prompt} {critique}', 'no value'),
        ('{prompt}', '{response} stands nowhere'),
        ('Say.', '{critique_request} stands nowhere'),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=word):
            critique_prompt(path)
    path.write_text('{prompt}{response}')
    with pytest.raises(ValueError, match='{critique} stands nowhere'):
        revision_prompt(path)
