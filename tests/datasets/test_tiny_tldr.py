"""The embedded data set: its world, its gold reward by hand, its people, its files."""

import hashlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import formats
from rlhf_jax.data.sources import read
from rlhf_jax.data.tokenizer import learn_words
from rlhf_jax.datasets import tiny_people, tiny_tldr, tiny_world
from rlhf_jax.datasets.tiny_world import LEXICON, SLOT_OF

ARTICLE = (
    'News of Anna. Tom, a pilot, sold boats in Rome. Due to rain, Anna found lamps. '
    'They did so last May. Anna served as a baker around Paris. Leo lost bells.'
)
FACTS = {
    'who': 'Anna',
    'job': 'baker',
    'what': 'lamps',
    'where': 'Paris',
    'when': 'May',
    'why': 'rain',
}


def articles(count, seed=0):
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        yield tiny_world.make_article(rng), rng


@pytest.fixture(scope='module')
def judgements():
    return [tiny_people.make_judgement(article, rng) for article, rng in articles(5000)]


# -------------------------------------------------------------------------------- world


def test_a_word_tells_its_slot():
    words = [word for values in LEXICON.values() for word in values]
    assert len(words) == len(set(words)) == len(SLOT_OF)
    assert all(word.isalpha() for word in words)
    assert not any(job[0] in 'aeiou' for job in LEXICON['job'])  # "a {job}"
    main_events = math.prod(map(len, LEXICON.values())) * len(tiny_world.VERBS)
    assert main_events >= 1e8


def test_facts_by_hand():
    assert tiny_world.facts(ARTICLE) == FACTS
    assert tiny_world.facts(tiny_tldr.make_prompt(ARTICLE)) == FACTS
    assert tiny_world.facts(f'{ARTICLE}\n\nFacts: Anna the pilot.') == FACTS


def test_facts_agree_with_the_generator():
    for article, rng in articles(3000):
        assert tiny_world.facts(article.text) == article.main.facts
        restated = tiny_world.make_restatements(article, 6, rng)
        assert tiny_world.facts(f'{article.text}\n\n{restated}') == article.main.facts


def test_strangers_share_no_value_with_the_main_event():
    for article, _ in articles(500):
        main = set(article.main.facts.values())
        assert 1 <= len(article.others) <= 2
        for other in article.others:
            assert len(other.facts) >= 3
            assert not main & set(other.facts.values())
            assert all(word in article.text for word in other.facts.values())


def test_restatements_are_true_and_no_summaries():
    for article, rng in articles(300):
        events = {e.facts['who']: e for e in (article.main, *article.others)}
        restated = tiny_world.make_restatements(article, 6, rng)
        for sentence in restated.removeprefix('Facts: ').replace('?', '').split('.'):
            values = [w for w in tiny_world.words_of(sentence) if w in SLOT_OF]
            if values:
                (name,) = [value for value in values if SLOT_OF[value] == 'who']
                assert set(values) <= set(events[name].facts.values())
                assert len(values) <= 4  # the name and three facts


def test_checks_call_a_fact_right_and_an_invention_wrong():
    verdicts = []
    for article, rng in articles(300):
        for event in (article.main, *article.others):
            checks = tiny_world.make_checks(event, article, 4, rng)
            for said in checks.removeprefix('Checks: ').removesuffix('.').split(', '):
                *stated, verdict = said.split()
                (value,) = [word for word in stated if word in SLOT_OF]
                is_right = event.facts.get(SLOT_OF[value]) == value
                assert verdict == ('right' if is_right else 'wrong')
                verdicts.append(is_right)
    assert 0.45 < np.mean(verdicts) < 0.55


def test_a_drill_says_whatever_it_calls_right():
    for article, rng in articles(300):
        told, checks = tiny_world.make_drill(article, 8, rng).split(' Checks: ')
        for said in checks.removesuffix('.').split(', '):
            *stated, verdict = said.split()
            assert verdict == ('right' if stated[-1] in told else 'wrong')


def test_a_foreign_text_has_no_facts():
    with pytest.raises(ValueError, match='no who, job, what.*Once upon a time'):
        tiny_world.facts('Once upon a time.')
    with pytest.raises(ValueError, match='no why in the article'):
        tiny_world.facts(ARTICLE.replace('Due to rain, ', ''))


# --------------------------------------------------------------------------------- gold


@pytest.mark.parametrize(
    ('summary', 'expected'),
    [
        # 12 words, 6 facts: 6 + 1
        ('Anna the baker found lamps in Paris last May because of rain.', 7.0),
        (' Anna, a baker, found lamps.', 3.0 + 1),
        # Tom and boats belong to a stranger, Oslo to nobody
        ('Tom found boats in Oslo last May.', 1.0 - 3 + 1),
        ('Anna was in Paris, in Paris, in Paris.', 2.0 + 1),  # said thrice, counts once
        ('Anna found lamps', 2.0 - 1),  # no end
        ('Anna found lamps. Anna found lamps.', 2.0 - 1),  # two sentences
        ('Anna found lamps..', 2.0 - 1),
        ('Anna ' * 20 + 'Anna.', 1.0 - 0.15 * 7 + 1),  # 21 words, 7 over the budget
        ('ANNA found lamp.', 0.0 + 1),  # whole words, case and all
        ('.', -1.0),
        ('', -1.0),
    ],
)
def test_gold_by_hand(summary, expected):
    assert tiny_world.gold_reward(ARTICLE, summary) == pytest.approx(expected)
    prompt = tiny_tldr.make_prompt(ARTICLE)
    gold = tiny_tldr.gold([prompt, prompt], [summary, 'Anna.'])
    assert gold.dtype == np.float64
    np.testing.assert_allclose(gold, [expected, 2.0])


def test_gold_parts_by_hand():
    parts = tiny_world.gold_parts(
        ARTICLE, 'Tom the baker was seen near Paris and Oslo.'
    )
    assert parts == tiny_world.GoldParts(
        covered=2, invented=2, words=9, well_formed=True
    )


def test_gold_wants_one_response_per_prompt():
    with pytest.raises(ValueError, match='1 prompts and 2 responses'):
        tiny_tldr.gold([ARTICLE], ['a', 'b'])


# ------------------------------------------------------------------------------- people


def test_demonstrations_leave_room():
    demonstrated, perfect = [], []
    for article, rng in articles(3000):
        summary = tiny_people.make_demonstration(article, rng)
        demonstrated.append(tiny_world.gold_reward(article.text, summary))
        summary = tiny_people.perfect_summary(article, rng)
        perfect.append(tiny_world.gold_reward(article.text, summary))
    assert set(perfect) == {tiny_world.PERFECT_GOLD}
    assert 3.8 < np.mean(demonstrated) < 4.8
    assert np.mean(np.array(demonstrated) < tiny_world.PERFECT_GOLD) > 0.9


def test_preference_by_hand():
    annotator = tiny_people.Annotator(temperature=2.0, length_bias=0.1)
    # σ(1 / 2 + 0.1 · 5) = σ(1) = 1 / (1 + e^−1)
    assert tiny_people.preference(annotator, 1.0, 5) == pytest.approx(0.7310586)
    assert tiny_people.preference(annotator, -1.0, -5) == pytest.approx(0.2689414)


def test_annotators_like_length_less_than_facts():
    """A word of padding pays a little, also beyond the budget, and a fact far more: the
    trap for an unanchored policy, and the way up for an anchored one.
    """
    people = tiny_people.ANNOTATORS
    taste = np.mean([a.length_bias for a in people])
    cost = np.mean([tiny_world.WORD_COST / a.temperature for a in people])
    fact = np.mean([tiny_world.COVERED_REWARD / a.temperature for a in people])
    assert 0.02 < taste - cost < 0.2
    assert fact > 5 * taste


def test_annotators_with_another_taste_for_length_judge_the_same_pairs():
    def judged(taste):
        return [
            tiny_people.make_judgement(article, rng, taste)
            for article, rng in articles(2000)
        ]

    def longer_wins(judgements):
        pairs = [
            [len(tiny_world.words_of(t)) for t in (j.chosen, j.rejected)]
            for j in judgements
        ]
        return np.mean([chosen > rejected for chosen, rejected in pairs])

    none, usual, strong = judged(0.0), judged(1.0), judged(2.0)
    for one, other in zip(usual, strong):
        assert {one.chosen, one.rejected} == {other.chosen, other.rejected}
    assert longer_wins(none) < longer_wins(usual) - 0.05 < longer_wins(strong) - 0.1


def test_labels_follow_gold_more_than_length(judgements):
    gold_gap = np.array([j.gold_chosen - j.gold_rejected for j in judgements])
    words = [
        [len(tiny_world.words_of(text)) for text in (j.chosen, j.rejected)]
        for j in judgements
    ]
    word_gap = np.array([chosen - rejected for chosen, rejected in words])

    def accuracy(gap):
        return np.mean((gap > 0) + 0.5 * (gap == 0))

    assert 0.78 < accuracy(gold_gap) < 0.88
    assert 0.52 < accuracy(word_gap) < accuracy(gold_gap) - 0.1
    # Where nothing but truth differs, labels err by the annotators' mistakes alone.
    twins = np.array([j.kind == 'twins' for j in judgements])
    assert accuracy(gold_gap[twins]) > 0.9


def test_kinds_of_pairs(judgements):
    kinds = [j.kind for j in judgements]
    for kind, share in tiny_people.PAIRS.items():
        assert np.mean([k == kind for k in kinds]) == pytest.approx(share, abs=0.02)
    for j in judgements:
        assert j.chosen != j.rejected
        lengths = [len(tiny_world.words_of(text)) for text in (j.chosen, j.rejected)]
        assert max(lengths) <= tiny_people.MAX_WORDS
        if j.kind == 'twins':
            assert lengths[0] == lengths[1]
            assert j.gold_chosen != j.gold_rejected


# ---------------------------------------------------------------------------- tokenizer


def test_the_words_that_are_kept_are_those_of_the_texts():
    kept = tiny_tldr.WORDS.read_text(encoding='utf-8')
    learned = learn_words(tiny_tldr.corpus())
    assert kept == ''.join(f'{word}\n' for word in learned)


def test_tokenizer_takes_whole_words():
    tokenizer = tiny_tldr.tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) <= 512
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.bos_token_id is None
    assert tokenizer.unk_token_id is None
    for word in SLOT_OF:
        assert len(tokenizer(' ' + word)['input_ids']) == 1
    for article, rng in articles(300):
        judged = tiny_people.make_judgement(article, rng)
        restated = tiny_world.make_restatements(article, 6, rng)
        pair = [' ' + judged.chosen, ' ' + judged.rejected]
        for text in (article.text, restated, *pair):
            pieces = tokenizer.tokenize(text)
            assert {p for p in pieces if len(p) == 1} <= set('.,?:Ġ')  # 'Ġ.' is a pair
    prompt = tokenizer.tokenize(tiny_tldr.make_prompt('News of Anna.'))
    assert prompt == ['News', 'Ġof', 'ĠAnna', '.', 'Ċ', 'Ċ', 'TL', ';', 'DR', ':']


@pytest.mark.parametrize(
    'text',
    [
        ARTICLE,
        tiny_tldr.make_prompt(ARTICLE) + ' Anna , was  seen .',
        'ünïcode 日本語 🙂\t\r\n\x00 tail  ',
        "Paris' Parisian didn't un Annabel",
        ' ',
        '',
    ],
)
def test_tokenizer_loses_nothing(text, tmp_path):
    tokenizer = tiny_tldr.tokenizer()
    ids = tokenizer(text)['input_ids']
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded(text)['input_ids'] == ids
    assert loaded.decode(ids) == text
    assert loaded.eos_token_id == tokenizer.eos_token_id


# ----------------------------------------------------------------------------- data set


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def test_no_article_in_two_splits():
    seen = [
        tiny_world.make_article(
            np.random.default_rng((tiny_tldr.SEED, config.number, i))
        ).text
        for config in tiny_tldr.CONFIGS
        for i in range(config.train + config.test)
    ]
    assert len(set(seen)) == len(seen) == 52_000


def test_examples_stay_as_they_are():
    """If this fails and the data changed on purpose: raise ``TinyTldr.VERSION``."""
    examples = [
        tiny_tldr.make_example(config, i)
        for config in tiny_tldr.CONFIGS
        for i in range(50)
    ]
    vocabulary = tiny_tldr.tokenizer().get_vocab()
    found = (str(tiny_tldr.TinyTldr.VERSION), digest(examples), digest(vocabulary))
    assert found == ('1.5.0', '8504263ae68f49c9', 'b09a83dd77505d5f')


WRITER = """
import sys
import tensorflow_datasets as tfds
import rlhf_jax.datasets.tiny_tldr
builder = tfds.builder(
    'tiny_tldr/prompts', data_dir=sys.argv[1], file_format='array_record'
)
builder.download_and_prepare()
source = builder.as_data_source('test')
assert 'tensorflow' not in sys.modules
print(len(source), source[0]['reference'].decode())
"""


def test_two_processes_write_the_data_set_without_tensorflow(tmp_path):
    writers = [
        subprocess.Popen(
            [sys.executable, '-c', WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    config = tiny_tldr.TinyTldr.builder_configs['prompts']
    wanted = [tiny_tldr.make_example(config, i) for i in range(5000)]
    for writer in writers:
        output, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
        last_line = output.splitlines()[-1]  # TFDS prints above it
        assert last_line == f'1000 {wanted[4000]["reference"]}'
    assert not list(tmp_path.glob('**/*incomplete*'))

    def texts(source):
        return [{k: v.decode() for k, v in record.items()} for record in source]

    builder = tiny_tldr.prepare('prompts', tmp_path)
    assert texts(builder.as_data_source('train')) == wanted[:4000]
    source = tfds.data_source('tiny_tldr/prompts', split='test', data_dir=tmp_path)
    assert texts(source) == wanted[4000:]


def test_comparisons_keep_their_numbers(tmp_path, monkeypatch):
    config = tiny_tldr.TinyTldr.builder_configs['comparisons']
    monkeypatch.setattr(config, 'train', 20)
    monkeypatch.setattr(config, 'test', 5)
    source = tiny_tldr.prepare('comparisons', tmp_path).as_data_source('test')
    for i, record in enumerate(source):
        wanted = tiny_tldr.make_example(config, 20 + i)
        assert record.keys() == wanted.keys()
        for name, value in wanted.items():
            text = isinstance(value, str)
            assert record[name] == (value.encode() if text else pytest.approx(value))
        texts = [wanted['chosen'], wanted['rejected']]
        gold = tiny_tldr.gold([wanted['prompt']] * 2, texts)
        assert list(gold) == [wanted['gold_chosen'], wanted['gold_rejected']]
        assert all(text.startswith(' ') for text in texts)


SOURCE = 'python:rlhf_jax.datasets.tiny_tldr:comparisons?split=test'


def test_comparisons_with_a_share_of_the_labels_flipped():
    clean = [record.fields for record in read('tfds:tiny_tldr/comparisons:test')]
    some, more, none = (
        [record.fields for record in read(f'{SOURCE}&flipped_percent={percent}')]
        for percent in (10, 25, 0)
    )
    assert [record.pop('flipped') for record in none] == [0] * len(clean)
    for record, wanted in zip(none, clean):
        assert record == {
            k: v if isinstance(v, str) else pytest.approx(v) for k, v in wanted.items()
        }
    turned = {i for i, record in enumerate(more) if record['flipped']}
    assert len(turned) == len(clean) // 4
    fewer = {i for i, record in enumerate(some) if record['flipped']}
    assert len(fewer) == len(clean) // 10 and fewer < turned
    sides = ('chosen', 'rejected', 'gold_chosen', 'gold_rejected')
    for i, (record, wanted) in enumerate(zip(more, none)):
        assert record.pop('flipped') == (i in turned)
        if i in turned:
            order = ('rejected', 'chosen', 'gold_rejected', 'gold_chosen')
            wanted = wanted | {side: wanted[other] for side, other in zip(sides, order)}
        assert record == wanted
    [record] = read(f'{SOURCE}&flipped_percent=25[{min(turned)}:{min(turned) + 1}]')
    pair = formats.to_comparison(record, tiny_tldr.tokenizer())
    assert pair.meta['flipped'] == 1


def test_comparisons_by_annotators_who_like_length_more():
    def longer_wins(records):
        sides = [
            [len(tiny_world.words_of(r.fields[k])) for k in ('chosen', 'rejected')]
            for r in records
        ]
        return np.mean([chosen > rejected for chosen, rejected in sides])

    usual, strong = (read(f'{SOURCE}&length_taste={taste}') for taste in (1, 3))
    assert longer_wins(strong) > longer_wins(usual) + 0.05
    for one, other in zip(usual, strong):
        sides = [{r.fields['chosen'], r.fields['rejected']} for r in (one, other)]
        assert sides[0] == sides[1]


@pytest.mark.parametrize(
    'mistake',
    ['split=eval', 'flipped_percent=101', 'flipped_percent=x', 'length_taste=-1'],
)
def test_mistakes_in_comparisons(mistake):
    with pytest.raises(ValueError, match="use 'train' or 'test', 0 or more, and 0 to"):
        read(f'python:rlhf_jax.datasets.tiny_tldr:comparisons?{mistake}')


def test_more_articles_are_none_of_the_splits():
    more = read('python:rlhf_jax.datasets.tiny_tldr:more_articles?count=20')
    config = tiny_tldr.TinyTldr.builder_configs['articles']
    wanted = tiny_tldr.make_example(config, config.train + config.test)
    assert len(more) == 20 and more[0].fields == wanted
    with pytest.raises(ValueError, match="count='0'; use a whole number above 0"):
        read('python:rlhf_jax.datasets.tiny_tldr:more_articles?count=0')


def test_an_unknown_config_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="no config 'summaries'; choose one of articles"
    ):
        tiny_tldr.prepare('summaries', tmp_path)
