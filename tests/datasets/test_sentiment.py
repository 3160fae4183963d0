"""The sentiment task: who sees which text, how pairs are matched, what the judge is."""

import pathlib
import urllib.parse

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rlhf_jax.data.sources import read
from rlhf_jax.datasets import sentiment
from tests.small_config import config_file

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'
KINDS = ('demonstrations', 'pairs', 'prompts')
GOOD, BAD = ('lovely', 'great', 'happy'), ('awful', 'poor', 'sad')


def story(i):
    return (
        f'Once a dog of number {i} ran out. It ran to the wood. It saw '
        f'a bird number {i}!" Then it went home and slept there.'
    )


def labelled(i, positive):
    """A sentence of 20 to 25 characters."""
    word = (GOOD if positive else BAD)[i % 3]
    return f'The thing {i} was {word}{"." * (i % 2)}'


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / 'stories.txt'
    path.write_text('<|endoftext|>'.join(map(story, range(400))), encoding='utf-8')
    return f'text:{path}'


@pytest.fixture
def labels(tmp_path):
    return write_labels(tmp_path / 'labels', 900)


def write_labels(folder, count, flipped=lambda text: False):
    """Both kinds of file; the label of a text that ``flipped`` picks is a lie."""
    rows = [(labelled(i, p), p) for i in range(count) for p in (True, False)]
    rows = [(text, p ^ flipped(text)) for text, p in rows]
    for name in ('uci_sentiment', 'goemotions'):
        (folder / name).mkdir(parents=True)
    half = len(rows) // 2
    reviews = ''.join(f'{text}\t{int(p)}\n' for text, p in rows[:half])
    comments = ''.join(f'{text}\t{3 if p else 1}\tid\n' for text, p in rows[half:])
    comments += 'An unclear comment here\t1,3\tid\nA neutral comment here\t2\tid\n'
    comments += 'An ambiguous comment\t0\tid\n'
    (folder / 'uci_sentiment' / 'yelp_labelled.txt').write_text(reviews)
    (folder / 'goemotions' / 'train.tsv').write_text(comments)
    return str(folder)


def test_a_story_is_cut_between_sentences_and_opens_one_kind_of_record(stories):
    seen = []
    for kind in ('demonstrations', 'prompts'):
        for part in ('train', 'test'):
            records = list(getattr(sentiment, kind)(stories, part))
            seen += [record['prompt'] for record in records]
            for record in records:
                i = int(record['prompt'].split()[5])
                # The first sentence alone is too short to be an opening.
                opening = f'Once a dog of number {i} ran out. It ran to the wood.\n'
                assert record['prompt'] == opening
                answer = f'It saw a bird number {i}!"'
                assert answer in record.values()
    openings = set(seen)
    assert len(seen) == len(openings) > 250
    assert list(sentiment.prompts(stories, 'test')) == list(
        sentiment.prompts(stories, 'test')
    )


def test_pairs_are_of_one_source_and_of_similar_length(stories, labels):
    trained = list(sentiment.pairs(stories, labels, 'train'))
    held_out = list(sentiment.pairs(stories, labels, 'test'))
    assert len(trained) > 150 and len(held_out) > 30
    others = {
        record['prompt']
        for kind in ('demonstrations', 'prompts')
        for part in ('train', 'test')
        for record in getattr(sentiment, kind)(stories, part)
    }
    for record in trained + held_out:
        assert any(word in record['chosen'] for word in GOOD)
        assert any(word in record['rejected'] for word in BAD)
        lengths = len(record['chosen']), len(record['rejected'])
        assert abs(lengths[0] - lengths[1]) < sentiment.SIMILAR
        number = int(record['chosen'].split()[2])
        assert (record['source'] == 'goemotions') == (number >= 450)
        assert (int(record['rejected'].split()[2]) >= 450) == (number >= 450)
        assert record['prompt'] not in others
    texts = [
        {r[k] for r in half for k in ('chosen', 'rejected')}
        for half in (trained, held_out)
    ]
    assert not texts[0] & texts[1]


def test_the_judge_learns_from_its_own_half_alone(stories, labels, tmp_path):
    """Lies in the reward model's half change its pairs and leave the judge alone."""
    rewarded = {
        record[side]
        for part in ('train', 'test')
        for record in sentiment.pairs(stories, labels, part)
        for side in ('chosen', 'rejected')
    }
    lies = write_labels(tmp_path / 'lies', 900, lambda text: text in rewarded)
    assert any(BAD[0] in r['chosen'] for r in sentiment.pairs(stories, lies, 'train'))
    texts = [f'It was {word}.' for word in GOOD + BAD]
    expected = [1, 1, 1, 0, 0, 0]
    for folder in (labels, lies):
        said = sentiment.judge([''] * 6, texts, labels=folder)
        np.testing.assert_array_equal(said, expected)
    accuracy, count = sentiment.judge_accuracy(labels)
    assert accuracy == 1 and count > 60
    # All texts are lies, the judge's too: it learns the opposite.
    all_lies = write_labels(tmp_path / 'all_lies', 900, lambda text: True)
    said = sentiment.judge(texts, texts, labels=all_lies)
    np.testing.assert_array_equal(said, 1 - np.array(expected))


def test_the_judge_looks_at_responses_alone(labels):
    said = sentiment.judge(['It was awful.', 'It was great.'], ['x', ''], labels=labels)
    assert said[1] == 0  # no evidence is not positive
    pair = ['It was great.', 'It was sad.']
    np.testing.assert_array_equal(
        sentiment.judge(pair[::-1], pair, labels=labels), [1, 0]
    )


def test_naive_bayes_by_hand(tmp_path, monkeypatch):
    monkeypatch.setitem(sentiment.LABEL_PARTS, 'judge train', (0, 100))
    (tmp_path / 'goemotions').mkdir()
    file = tmp_path / 'goemotions' / 'train.tsv'
    file.write_text('good good film\t3\tid\nwhat a bad film\t1\tid\n')
    weights = sentiment._judge_weights(str(tmp_path))
    # positive: good, film, 'good good', 'good film'; negative: what, a, bad, film,
    # 'what a', 'a bad', 'bad film'. Ten features in all, so the totals are 14 and 17.
    assert set(weights) >= {'good', 'good film', 'what a'} and len(weights) == 10
    assert weights['good'] == pytest.approx(np.log(2 / 14) - np.log(1 / 17))
    assert weights['film'] == pytest.approx(np.log(2 / 14) - np.log(2 / 17))
    assert weights['bad film'] == pytest.approx(np.log(1 / 14) - np.log(2 / 17))


def test_long_texts_are_labelled_by_their_end_and_opened_by_whole_sentences(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sentiment.LABEL_PARTS, 'train', (0, 100))
    monkeypatch.setitem(sentiment.STORY_PARTS, 'pairs train', (0, 100))
    start = 'I saw this film<br />with all of my friends in the town, a while ago. '
    rows = ''.join(
        f'{{"text": "{text}", "label": {label}}}\n'
        for text, label in (
            (story(1).replace('"', ''), 0),
            (start + 'It is a good film. See it!', 1),
            (start + 'It is a dull film. Flee it.', 0),
            ('word ' * 40 + 'without any end', 1),
            ('word ' * 40 + 'and an end. This one is behind it.', 1),
        )
    )
    (tmp_path / 'x.jsonl').write_text(rows)
    spec = f'jsonl:{tmp_path}/x.jsonl'
    (record,) = sentiment.pairs(spec, spec, 'train')
    assert record['chosen'] == 'It is a good film. See it!'
    assert record['rejected'] == 'It is a dull film. Flee it.'
    monkeypatch.setitem(sentiment.STORY_PARTS, 'prompts train', (0, 100))
    openings = [r['prompt'][:20] for r in sentiment.prompts(spec, 'train')]
    # The fifth opens with a sentence beyond the limit.
    assert openings == ['Once a dog of number', *['I saw this film with'] * 2]


def test_bad_input_is_named(tmp_path, stories, labels):
    def fails(call, *parts):
        with pytest.raises(ValueError) as caught:
            call()
        for part in parts:
            assert part in str(caught.value), str(caught.value)

    fails(lambda: list(sentiment.prompts(stories, 'tset')), "'prompts test'?")
    fails(lambda: sentiment.judge([], [], labels=str(tmp_path)), 'holds neither')
    file = pathlib.Path(labels) / 'goemotions' / 'train.tsv'
    file.write_text(file.read_text() + 'no label\n')
    lines = file.read_text().count('\n')
    fails(lambda: list(sentiment.pairs(stories, labels, 'train')), f'{file}:{lines}:')
    path = tmp_path / 'x.jsonl'
    path.write_text('{"text": "So good a film.", "label": "pos"}\n')
    fails(
        lambda: list(sentiment.pairs(stories, f'jsonl:{path}', 'train')),
        ":1: label is 'pos'",
    )
    path.write_text('{"label": 1}\n')
    fails(
        lambda: list(sentiment.prompts(f'jsonl:{path}', 'train')),
        ":1: the field 'text'",
    )


class ReviewsStandIn(tfds.core.GeneratorBasedBuilder):
    """Records like those of imdb_reviews/plain_text."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        label = tfds.features.ClassLabel(names=['neg', 'pos'])
        features = {'text': tfds.features.Text(), 'label': label}
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i in range(800):
            text = f'{story(i)}<br /><br />{labelled(i, i % 2 == 1)}.'
            yield i, {'text': text, 'label': i % 2}


def test_the_default_of_the_config_reads_imdb_reviews(tmp_path, monkeypatch):
    """Its data set cannot be downloaded in a test; one with the same fields stands
    in.
    """

    def builder(name, file_format):
        assert name == 'imdb_reviews/plain_text'
        return ReviewsStandIn(data_dir=str(tmp_path), file_format=file_format)

    monkeypatch.setattr(tfds, 'builder', builder)
    config = config_file('sentiment').get_config()
    for stage, names in {
        'sft': ('train', 'eval'),
        'rm': ('train', 'eval', 'references'),
        'ppo': ('prompts', 'eval_prompts'),
    }.items():
        for name in names:
            spec = config[stage][name]
            records = [record.fields for record in read(spec)]
            assert len(records) > 10 and all(r['prompt'] for r in records), spec
            if (stage, name) in (('rm', 'train'), ('rm', 'eval')):
                assert all(
                    r['rejected'][-4:-1] in ('ful', 'oor', 'sad') for r in records
                )
    (gold,) = [config.ppo.gold.to_dict()]
    said = sentiment.judge([''] * 2, ['So lovely', 'So awful'], **gold['args'])
    np.testing.assert_array_equal(said, [1, 0])


def test_real_labels():
    if not (SHARED / 'goemotions').exists():
        pytest.skip(f'{SHARED}/goemotions is not here')
    stories = f'text:{SHARED}/tinystories/tinystories_sample.txt'
    pairs = {
        part: list(sentiment.pairs(stories, str(SHARED), part))
        for part in ('train', 'test')
    }
    assert len(pairs['train']) > 3000 and len(pairs['test']) > 700
    sources = {record['source'] for record in pairs['test']}
    assert len(sources) == 4
    longer = [len(r['chosen']) > len(r['rejected']) for r in pairs['train']]
    shorter = [len(r['chosen']) < len(r['rejected']) for r in pairs['train']]
    assert abs(np.mean(longer) - np.mean(shorter)) < 0.1
    accuracy, count = sentiment.judge_accuracy(str(SHARED))
    assert accuracy > 0.75 and count > 1500
    query = urllib.parse.urlencode({'stories': stories, 'part': 'test'})
    records = read(f'python:rlhf_jax.datasets.sentiment:prompts?{query}[:20]')
    assert [r.fields['prompt'] for r in records] == [
        r['prompt'] for r in list(sentiment.prompts(stories, 'test'))[:20]
    ]
