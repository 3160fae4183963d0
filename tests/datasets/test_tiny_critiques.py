"""Critiques of summaries by rule: true, in words of the world, and asked for as
the kind revise asks.
"""

import numpy as np
import pytest

from rlhf_jax.data.formats import Prompt
from rlhf_jax.data.sources import SourceRecord
from rlhf_jax.datasets import tiny_critiques, tiny_tldr, tiny_world
from rlhf_jax.labels.constitution import TEXTS, read_constitution
from rlhf_jax.labels.critique import critique_prompt, revision_prompt
from rlhf_jax.stages.revision import Asked, ask_critique, ask_revision


@pytest.fixture(scope='module')
def made():
    rng = np.random.default_rng(5)
    return [tiny_critiques.make_criticised(rng) for _ in range(200)]


def test_a_revision_invents_nothing_and_is_the_same_where_nothing_was_wrong(made):
    wrong = 0
    for one in made:
        before, after = (
            tiny_world.gold_parts(one.article.text, text)
            for text in (one.summary, one.revision)
        )
        assert after.invented == 0 and after.words == before.words
        assert (one.summary == one.revision) == (before.invented == 0)
        assert one.critique.count('wrong') == before.invented
        wrong += before.invented > 0
    assert 100 < wrong < 160


def test_a_critique_says_of_every_fact_whether_it_is_right():
    rng = np.random.default_rng(3)
    article = tiny_world.make_article(rng)
    facts = article.main.facts
    wrong = next(w for w in tiny_world.LEXICON['where'] if w not in article.text)
    summary = f'{facts["who"]} {article.main.verb} {facts["what"]} in {wrong}.'
    assert tiny_critiques.make_critique(article, summary) == (
        f'{facts["who"]} right, {article.main.verb} {facts["what"]} right, '
        f'in {wrong} wrong, in {facts["where"]} right.'
    )
    assert tiny_critiques.make_critique(article, 'Someone was seen.') == (
        'something is wrong.'
    )


def test_demonstrations_are_of_known_words_and_split():
    rows = tiny_critiques.demonstrations('test')
    assert len(rows) == 2 * tiny_critiques.SIZES['test']
    tokenizer = tiny_tldr.tokenizer()
    words = {*tiny_tldr.WORDS.read_text(encoding='utf-8').split()}
    for row in rows:
        assert {*tokenizer.tokenize(row['prompt'] + row['completion'])} <= words
    articles = {row['prompt'].split(tiny_world.SEPARATOR)[0] for row in rows}
    others = tiny_critiques.demonstrations('train')
    assert not articles & {r['prompt'].split(tiny_world.SEPARATOR)[0] for r in others}
    assert tiny_critiques.demonstrations('test') == rows
    with pytest.raises(ValueError, match="split='tset'"):
        tiny_critiques.demonstrations('tset')


def test_the_critic_learns_what_the_stage_asks():
    (principle,) = read_constitution(tiny_critiques.CONSTITUTION, TEXTS)
    templates = (
        critique_prompt(tiny_critiques.CRITIQUE),
        revision_prompt(tiny_critiques.REVISION),
    )
    rows = tiny_critiques.demonstrations('test')
    first = 2 * tiny_critiques.SIZES['test'] // 4 * 2
    critique, revision = rows[first : first + 2]
    i = tiny_critiques.SIZES['train'] + first // 2
    rng = np.random.default_rng((tiny_tldr.SEED, tiny_critiques.NUMBER, i))
    one = tiny_critiques.make_criticised(rng)
    prompt = tiny_tldr.make_prompt(one.article.text)
    asked = Asked(SourceRecord({'prompt': prompt}, 'x:1'), Prompt(prompt, None, {}, ''))
    told = ask_critique(templates[0], asked, f' {one.summary}', principle)
    assert told.fields == {'prompt': critique['prompt']}
    told = ask_revision(
        templates, asked, f' {one.summary}', critique['completion'], principle
    )
    assert told.fields == {'prompt': revision['prompt']}


def test_inventions_and_facts_are_counted():
    rng = np.random.default_rng(3)
    article = tiny_world.make_article(rng)
    prompt, facts = tiny_tldr.make_prompt(article.text), article.main.facts
    wrong = next(w for w in tiny_world.LEXICON['where'] if w != facts['where'])
    texts = [f' {facts["who"]} in {wrong}.', f' {facts["who"]} in {facts["where"]}.']
    assert tiny_tldr.invented([prompt] * 2, texts).tolist() == [1.0, 0.0]
    assert tiny_tldr.covered([prompt] * 2, texts).tolist() == [1.0, 2.0]


def test_of_two_summaries_the_one_with_fewer_wrong_facts_is_chosen():
    rows = tiny_critiques.comparisons('test')
    assert len(rows) == tiny_critiques.SIZES['test']
    for row in rows:
        wrong = [
            tiny_world.gold_parts(row['prompt'], row[side]).invented
            for side in ('chosen', 'rejected')
        ]
        assert wrong[0] < wrong[1]
    others = tiny_critiques.comparisons('train')
    assert not {row['prompt'] for row in rows} & {row['prompt'] for row in others}


def test_a_judge_goes_through_every_fact_of_both():
    rows = tiny_critiques.comparisons('test')[:50]
    columns = [[row[name] for row in rows] for name in ('prompt', 'chosen', 'rejected')]
    words = {*tiny_tldr.WORDS.read_text(encoding='utf-8').split()}
    for row, text in zip(rows, tiny_critiques.reason(*columns)):
        for said, side in zip(text.split('.'), ('chosen', 'rejected')):
            parts = tiny_world.gold_parts(row['prompt'], row[side])
            assert said.count(' right') == parts.covered
            assert said.count(' wrong') == parts.invented
        assert {*tiny_tldr.tokenizer().tokenize(text)} <= words
    prompt = rows[0]['prompt']
    assert tiny_critiques.reason([prompt], [' He did.'], [' In']) == [
        ' something. something.'
    ]
