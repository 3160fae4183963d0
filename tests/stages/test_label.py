"""Who says which response is better: functions, simulated people, a model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_jax import files
from rlhf_jax.data import sources
from rlhf_jax.data.tokenizer import encode
from rlhf_jax.labels import judge
from rlhf_jax.labels.exchange import add_labels
from rlhf_jax.labels.judge import demonstrations, read_prompt
from rlhf_jax.labels.records import Label, read_items, read_labels
from rlhf_jax.labels.store import DATABASE, open_store, read_stage
from rlhf_jax.main import launch
from rlhf_jax.stages import batches, judging, rating
from rlhf_jax.stages.kinds import stage
from rlhf_jax.stages.labellers import crowd, model
from rlhf_jax.stages.run import load_run_tokenizer
from rlhf_jax.stages.settings import RatingSettings
from tests.small_config import get_config
from tests.test_main import fails, never_compiled  # noqa: F401

pytestmark = pytest.mark.usefixtures('one_device')

PAIRS = 'tfds:tiny_tldr/comparisons:test[:12]'


def rows(path):
    return [json.loads(line) for line in path.open(encoding='utf-8')]


def labelled(**settings):
    """A run of one label stage, named ``said``."""
    config = get_config()
    config.stages = ('said',)
    config.said = stage('label', **{'responses': PAIRS, **settings})
    return config


def sure(prompts, firsts, seconds, rng, by=1.0):
    """The longer one by ``by``, else a tie."""
    gaps = np.asarray([len(a) - len(b) for a, b in zip(firsts, seconds)])
    return np.clip(0.5 + np.sign(gaps) * by / 2, 0, 1)


def wrong_shape(prompts, firsts, seconds, rng):
    return [0.5]


def no_probability(prompts, firsts, seconds, rng):
    return np.full(len(prompts), 1.5)


HERE = 'tests.stages.test_label'


def test_comparisons_are_labelled_anew_softly(tmp_path):
    report = launch(labelled(fn=f'{HERE}:sure', args={'by': 0.5}), tmp_path)
    found = rows(tmp_path / 'said' / 'records.jsonl')
    assert len(found) == 12
    before = [record.fields for record in sources.read(PAIRS)]
    golds = [{row['gold_chosen'], row['gold_rejected']} for row in before]
    for row in found:
        longer = len(row['chosen']) - len(row['rejected'])
        assert longer >= 0 and row.get('tie', False) == (not longer)
        assert row.get('probability', 0.5) == (0.75 if longer else 0.5)
        assert isinstance(row['was_chosen'], bool)
        assert {row['gold_chosen'], row['gold_rejected']} in golds
    said = report['stages']['said']
    sided = [row for row in found if 'tie' not in row]
    assert said['known_agreement'] == np.mean([row['was_chosen'] for row in sided])
    assert said['longer_chosen'] == 1.0 and said['ties'] == 12 - len(sided)
    apart = [r for r in sided if r['gold_chosen'] != r['gold_rejected']]
    right = [r['gold_chosen'] > r['gold_rejected'] for r in apart]
    assert said['gold_agreement'] == pytest.approx(np.mean(right))
    # Which response stands first is drawn, not what was chosen before.
    firsts = {
        item.facts[0]['known'] for item in read_items(tmp_path / 'said/items.jsonl')
    }
    assert firsts == {True, False}


def test_labels_are_labelled_anew_by_what_they_say(tmp_path):
    path = tmp_path / 'pairs.jsonl'
    pair = {'prompt': 'p', 'chosen': ' long', 'rejected': ' x', 'gold_chosen': 2.0}
    pair |= {'gold_rejected': 1.0, 'first_chosen': False, 'was_chosen': True}
    how = [{}, {'probability': 0.9}, {'probability': 0.2}, {'tie': True}]
    pairs = [pair | {'prompt': f'p{i}'} | more for i, more in enumerate(how)]
    files.write_rows(path, pairs)
    config = labelled(responses=f'jsonl:{path}', fn=f'{HERE}:sure')
    report = launch(config, tmp_path / 'run')['stages']['said']
    found = {row['prompt']: row for row in rows(tmp_path / 'run/said/records.jsonl')}
    known = [found[f'p{i}'].get('was_chosen') for i in range(4)]
    assert known == [True, True, False, None]
    assert report['known_agreement'] == pytest.approx(2 / 3)
    for row in found.values():
        assert row['chosen'] == ' long' and row['gold_chosen'] == 2.0
        (item,) = [
            x
            for x in read_items(tmp_path / 'run/said/items.jsonl')
            if x.prompt == row['prompt']
        ]
        assert row['first_chosen'] == (item.completions[0] == ' long')
        assert not {'first_rejected', 'was_rejected'} & {*row}


def test_bad_records_are_an_error_or_left_out_and_counted(tmp_path, capsys):
    path = tmp_path / 'pairs.jsonl'
    pair = {'prompt': 'p', 'chosen': ' long', 'rejected': ' x'}
    bad = [{'chosen': ' '}, {'rejected': 3}, {'probability': 2}]
    files.write_rows(path, [pair, *(pair | more for more in bad)])
    settings = dict(responses=f'jsonl:{path}', fn=f'{HERE}:sure')
    with pytest.raises(
        ValueError, match="pairs.jsonl:2: 'chosen' is empty; mend .*on_"
    ):
        launch(labelled(**settings), tmp_path / 'error')
    report = launch(labelled(on_bad='skip', **settings), tmp_path / 'skip')
    assert report['stages']['said']['records'] == 1
    assert report['stages']['said']['bad_records'] == 3
    assert f'said: 3 records of jsonl:{path} are bad' in capsys.readouterr().out


def test_known_items_are_as_sure_as_their_comparisons(tmp_path):
    path = tmp_path / 'gold.jsonl'
    pair = {'prompt': 'p', 'chosen': 'a', 'rejected': 'b'}
    how = [{}, {'probability': 0.9}, {'tie': True}, {'dimension': 'brief'}]
    tokenizer = load_run_tokenizer(labelled())
    text = {'prompt': f'{tokenizer.eos_token} p', 'templated': True}
    files.write_rows(path, [pair | more for more in [*how, text]])
    run = SimpleNamespace(tokenizer=tokenizer)
    found = crowd.known_items(run, f'jsonl:{path}', 'config.said.gold', 'gold')
    assert [item.known['probability'] for item in found] == [
        1.0,
        pytest.approx(0.1),  # turned round
        0.5,
        0.0,
        1.0,
    ]
    assert [item.known.get('dimension') for item in found[2:4]] == [None, 'brief']
    assert found[4].readable == ' p' and found[0].readable is None


def test_simulated_people_answer_each_for_themselves(tmp_path):
    config = labelled(
        by='simulated',
        fn='rlhf_jax.datasets.tiny_tldr:answer_as',
        labellers=('ann', 'bob', 'cat', 'coin'),
        args={'random': (3,)},
        overlap=2,
        repeats=0.25,
        gold='tfds:tiny_tldr/comparisons:test[100:104]',
        responses='tfds:tiny_tldr/comparisons:test[:40]',
    )
    config.stages = ('said', 'learned')
    config.learned = config.rm
    config.learned.init, config.learned.references = 'scratch', None
    config.learned.train = config.learned.eval = 'stage:said'
    report = launch(config, tmp_path)['stages']
    folder = tmp_path / 'said'
    labels, items = (
        read_labels(folder / 'labels.jsonl'),
        read_items(folder / 'items.jsonl'),
    )
    purposes = [item.purpose for item in items]
    assert purposes == ['main'] * 40 + ['gold'] * 4
    assert all(item.known['probability'] in (0.0, 1.0) for item in items[40:])
    main = [x for x in labels if not x.item.startswith('gold') and not x.repeat]
    assert len(main) == 80 and sum(x.repeat for x in labels) == 20
    counts = [sum(x.labeller == name for x in main) for name in config.said.labellers]
    assert max(counts) - min(counts) <= 1
    for item in items[:40]:
        who = [x.labeller for x in main if x.item == item.item]
        assert len(who) == len(set(who)) == 2
    together = {
        tuple(sorted(x.labeller for x in main if x.item == item.item)) for item in items
    }
    assert len(together - {()}) == 6  # all meet all
    assert {x.order for x in labels} == {(0, 1), (1, 0)}
    # Who was asked with the sides turned still speaks of the item's first completion.
    golds = {item.item: item for item in items[40:]}
    careful = [x for x in labels if x.item in golds and x.labeller != 'coin']
    agree = [x.probability == golds[x.item].known['probability'] for x in careful]
    assert np.mean(agree) > 0.6
    # The report is that of the labels, and the reward model's card has their ceiling.
    said = report['said']
    assert said['labels'] == len(labels) and said['labellers'] == 4
    assert {row['labeller'] for row in said['by_labeller']} == {*config.said.labellers}
    assert report['learned']['labellers_ceiling'] == said['ceiling']
    page = (tmp_path / 'report.html').read_text()
    assert 'Ceiling by the labellers' in page and 'said-labellers' in page


@pytest.fixture(scope='module')
def judged(finished, tmp_path_factory):
    """Judged by an untrained judge, in both orders."""
    workdir = tmp_path_factory.mktemp('judged')
    config = labelled(
        by='model',
        judge=f'{finished}/sft',
        labels=(' right', ' wrong'),
        judge_buckets=(256, 512),
        judge_batch_size=8,
    )
    return workdir, launch(config, workdir), config


def test_a_judge_gives_soft_labels_without_a_place(judged, finished):
    workdir, report, config = judged
    said = report['stages']['said']
    labels = read_labels(workdir / 'said' / 'labels.jsonl')
    assert all(0 < x.probability < 1 for x in labels) and len(labels) == 12
    assert said['judge_calls'] == 24
    template, read = read_prompt(judge.COMPARE, ('prompt', 'first', 'second')), 0
    for item in read_items(workdir / 'said' / 'items.jsonl'):
        for first, second in (item.completions, item.completions[::-1]):
            text = template.fill(prompt=item.prompt, first=first, second=second)
            read += len(encode(load_run_tokenizer(config), [text])[0]) + 1
    assert said['judge_tokens'] == read
    # The judge prefers a place by far, which the average takes out.
    assert abs(said['judge_first_probability'] - 0.5) > 0.02
    spread = np.asarray([x.probability for x in labels])
    assert abs(spread.mean() - 0.5) < 0.02
    for row in rows(workdir / 'said' / 'records.jsonl'):
        assert 0.5 <= row['probability'] < 1


def test_a_judge_is_the_softmax_of_the_labels_by_hand(judged, finished):
    """Against a plain forward pass of one item, without batches or padding."""
    import jax
    import jax.numpy as jnp

    from rlhf_jax.sharding import ParallelConfig, make_mesh
    from rlhf_jax.stages.run import Run
    from rlhf_jax.stages.sources import load_policy

    workdir, _, config = judged
    tokenizer = load_run_tokenizer(config)
    run = Run(workdir, config, make_mesh(ParallelConfig(data=1)), tokenizer)
    model, params = load_policy(run, f'{finished}/sft', jax.random.PRNGKey(0))
    item = read_items(workdir / 'said' / 'items.jsonl')[0]
    template = read_prompt(judge.COMPARE, ('prompt', 'first', 'second'))

    def first_probability(first, second):
        text = template.fill(prompt=item.prompt, first=first, second=second)
        (ids,) = encode(tokenizer, [text])
        ends = [encode(tokenizer, [label])[0] for label in (' right', ' wrong')]
        assert all(len(end) == 1 for end in ends)
        tokens = jnp.asarray([ids])
        mask = jnp.ones_like(tokens, bool)
        hidden = model.apply({'params': params}, tokens, mask)
        logits = hidden[0, -1] @ model.unembedding(params)
        one, other = (float(logits[end[0]]) for end in ends)
        return 1 / (1 + np.exp(other - one))

    a, b = item.completions
    wanted = (first_probability(a, b) + 1 - first_probability(b, a)) / 2
    (label,) = [
        x for x in read_labels(workdir / 'said' / 'labels.jsonl') if x.item == item.item
    ]
    assert label.probability == pytest.approx(wanted, abs=1e-5)


def test_reasoning_is_written_and_then_read(finished, tmp_path):
    path = tmp_path / 'judge.txt'
    path.write_text('{prompt} {first}\nReport: {second}\n{reasoning}\nIt is\n')
    config = labelled(
        by='model',
        judge=f'{finished}/sft',
        prompt_file=str(path),
        labels=(' right', ' wrong'),
        judge_buckets=(128,),
        judge_batch_size=8,
        max_reasoning_tokens=6,
        clamp=(0.45, 0.55),
    )
    report = launch(config, tmp_path / 'run')
    labels = read_labels(tmp_path / 'run' / 'said' / 'labels.jsonl')
    assert all(0.45 <= x.probability <= 0.55 for x in labels)
    assert all('\n---\n' in x.note for x in labels)
    assert report['stages']['said']['judge_reasoning_characters'] > 0
    shown, noted = rows(tmp_path / 'run' / 'said' / 'samples.jsonl'), labels[0].note
    assert shown[0]['response'].endswith(f'/sft notes: {noted.strip()}')


def test_a_killed_judge_goes_on_and_says_the_same(finished, tmp_path):
    """Killed in front of the second of three batches, with reasoning, which draws."""
    path = tmp_path / 'judge.txt'
    path.write_text('{prompt} {first}\nReport: {second}\n{reasoning}\nIt is\n')
    pairs = tmp_path / 'pairs.jsonl'
    files.write_rows(pairs, [record.fields for record in sources.read(PAIRS)])
    assert 'Anna' in pairs.read_text()
    config = labelled(
        responses=f'jsonl:{pairs}',
        by='model',
        judge=f'{finished}/sft',
        prompt_file=str(path),
        labels=(' right', ' wrong'),
        judge_buckets=(128,),
        judge_batch_size=4,
        max_reasoning_tokens=6,
    )
    launch(config, tmp_path / 'whole')
    real, begun = model._batches, []

    def killed(asked, questions, start):
        begun.append(start)
        for batch in real(asked, questions, start):
            yield batch
            if len(begun) == 1:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, '_batches', killed)
        with pytest.raises(KeyboardInterrupt):
            launch(config, tmp_path / 'killed')
        launch(config, tmp_path / 'killed')
        assert begun == [0, 1]
        begun.clear()
        with pytest.raises(KeyboardInterrupt):
            launch(config, tmp_path / 'changed')
    for name in ('labels.jsonl', 'records.jsonl', 'eval.json'):
        one, other = (tmp_path / run / 'said' / name for run in ('whole', 'killed'))
        assert one.read_bytes() == other.read_bytes()
    assert not (tmp_path / 'killed' / 'said' / batches.ROWS).exists()
    was = path.read_text()
    path.write_text(was.replace('is', 'was'))
    with pytest.raises(ValueError, match='the prompt file .*judge.txt has changed'):
        launch(config, tmp_path / 'changed')
    path.write_text(was)
    pairs.write_text(pairs.read_text().replace('Anna', 'Ben'))
    with pytest.raises(ValueError, match='what config.said.responses gives has chang'):
        launch(config, tmp_path / 'changed')


def test_what_follows_the_reasoning_is_counted_before_it_is_asked(finished, tmp_path):
    """Untrained, the judge writes as much as it may."""
    path = tmp_path / 'judge.txt'
    path.write_text('{prompt} {first} {second}{reasoning} It is the last part of it')
    settings = dict(
        by='model',
        judge=f'{finished}/sft',
        prompt_file=str(path),
        labels=(' right', ' wrong'),
        judge_batch_size=8,
        max_reasoning_tokens=3,
    )
    launch(labelled(judge_buckets=(128,), **settings), tmp_path / 'all')
    tokenizer, lengths = load_run_tokenizer(labelled()), []
    for item in read_items(tmp_path / 'all' / 'said' / 'items.jsonl'):
        text = f'{item.prompt} {" ".join(text.strip() for text in item.completions)}'
        lengths.append(len(encode(tokenizer, [text])[0]) + 8)  # 7 words and the label
    limit = sorted(lengths)[5]
    short = sum(length <= limit for length in lengths)
    report = launch(labelled(judge_buckets=(limit,), **settings), tmp_path / 'short')
    assert report['stages']['said']['records'] == short < 12


def test_a_judge_goes_by_principles_of_a_constitution(finished, tmp_path):
    path = tmp_path / 'constitution.md'
    sections = [f'## {name}\nPreference question: Which is {name}?' for name in 'ab']
    path.write_text('\n\n'.join(sections))
    settings = dict(
        by='model',
        judge=f'{finished}/sft',
        constitution=str(path),
        judge_batch_size=8,
        labels=(' right', ' wrong'),
    )
    launch(labelled(**settings), tmp_path / 'run')
    items = read_items(tmp_path / 'run' / 'said' / 'items.jsonl')
    assert {item.why for item in items} == {'a', 'b'}
    again = dict(settings, prompt_file=str(judge.COMPARE))
    with pytest.raises(ValueError, match='no place {principle}; use both or neither'):
        launch(labelled(**again), tmp_path / 'again')
    path.write_text('')
    with pytest.raises(ValueError, match='constitution.md'):
        launch(labelled(**settings), tmp_path / 'empty')


def test_items_that_are_too_long_for_the_judge_are_left_out_and_counted(
    finished, judged, tmp_path, capsys
):
    workdir, _, config = judged
    lengths = []
    tokenizer = load_run_tokenizer(config)
    template = read_prompt(judge.COMPARE, ('prompt', 'first', 'second'))
    for item in read_items(workdir / 'said' / 'items.jsonl'):
        one, other = item.completions
        filled = template.fill(prompt=item.prompt, first=one, second=other)
        lengths.append(len(encode(tokenizer, [filled])[0]) + 1)
    limit = sorted(lengths)[-3]  # two are longer, if no others are as long
    longer = sum(length > limit for length in lengths)
    assert longer
    config = labelled(
        by='model',
        judge=f'{finished}/sft',
        labels=(' right', ' wrong'),
        judge_buckets=(limit,),
        judge_batch_size=8,
    )
    report = launch(config, tmp_path)['stages']['said']
    assert report['judge_too_long'] == report['unused'] == longer
    assert report['records'] == 12 - longer
    assert f'said: {longer} of 12 items are longer' in capsys.readouterr().out
    before, now = (
        {x.item: x.probability for x in read_labels(d / 'said' / 'labels.jsonl')}
        for d in (workdir, tmp_path)
    )
    for name, probability in now.items():
        if probability is not None:
            assert probability == pytest.approx(before[name], abs=1e-5)


def test_labellers_read_templated_prompts_without_control_tokens(tmp_path, finished):
    path = tmp_path / 'pairs.jsonl'
    pair = {'chosen': ' Anna', 'rejected': ' Ben'}
    judge = dict(by='model', judge=f'{finished}/sft', judge_batch_size=8)
    config = labelled(responses=f'jsonl:{path}', labels=(' right', ' wrong'), **judge)
    tokenizer = load_run_tokenizer(config)
    pair['prompt'] = f'{tokenizer.eos_token} News'
    files.write_rows(path, [pair, pair | {'templated': True}])
    launch(config, tmp_path / 'run')
    plain, item = read_items(tmp_path / 'run' / 'said' / 'items.jsonl')
    assert plain.readable is None and item.readable == ' News'
    one, other = model._both_orders(item, {})
    first, second = item.completions
    assert one == {'prompt': ' News', 'first': first, 'second': second}
    assert other == {'prompt': ' News', 'first': second, 'second': first}
    shown = rows(tmp_path / 'run' / 'said' / 'records.jsonl')
    assert all(row['prompt'] == item.prompt for row in shown)


def test_text_that_looks_like_a_place_is_no_place(tmp_path):
    path = tmp_path / 'judge.txt'
    path.write_text('{prompt}|{first}|{second}|{"a": 1} {principle}\n\n')
    template = read_prompt(path, ('prompt', 'first', 'second'))
    filled = template.fill(prompt='{second}', first=' {first} ', second='{reasoning}')
    assert filled == '{second}|{first}|{reasoning}|{"a": 1} {principle}'
    assert template.asks_principle and template.after is None


def test_comparisons_teach_a_judge(tmp_path):
    path = tmp_path / 'pairs.jsonl'
    pairs = [
        {'prompt': f'p{i}', 'chosen': 'good', 'rejected': 'bad'} for i in range(49)
    ]
    turned = {'chosen': 'bad', 'rejected': 'good', 'probability': 0.1}
    tie = {'prompt': 'tie', 'chosen': 'a', 'rejected': 'b', 'tie': True}
    files.write_rows(path, [*pairs, {'prompt': 'p49', **turned}, tie])
    prompt = tmp_path / 'prompt.txt'
    prompt.write_text('{prompt}:{first}/{second}=')
    found = demonstrations(f'jsonl:{path}', str(prompt), '["A", "B"]')
    assert len(found) == 50
    for i, row in enumerate(found):
        order = 'good/bad' if row['completion'] == 'A' else 'bad/good'
        assert row['prompt'] == f'p{i}:{order}='
    assert {row['completion'] for row in found} == {'A', 'B'}


def shouted(prompts, firsts, seconds):
    return [f' {a.upper()}, {b.upper()}.' for a, b in zip(firsts, seconds)]


def test_comparisons_teach_a_judge_that_reasons_by_a_principle(tmp_path):
    path, prompt = tmp_path / 'pairs.jsonl', tmp_path / 'prompt.txt'
    files.write_rows(path, [{'prompt': 'p', 'chosen': 'a', 'rejected': 'b'}])
    prompt.write_text('{prompt}:{first}/{second} {principle}{reasoning} It is')
    told = [f'jsonl:{path}', str(prompt), '[" 1", " 2"]']
    first, then = demonstrations(
        *told, reason=f'{HERE}:shouted', principle='Which?', seed='1'
    )
    is_first = then['completion'] == ' 1'
    asked = 'p:a/b Which?' if is_first else 'p:b/a Which?'
    thought = ' A, B.' if is_first else ' B, A.'
    assert first == {'prompt': asked, 'completion': thought}
    assert then['prompt'] == f'{asked}{thought} It is'
    with pytest.raises(ValueError, match='reason=None, .*place {reasoning}; use both'):
        demonstrations(*told, principle='Which?')
    prompt.write_text('{prompt}:{first}/{second}')
    with pytest.raises(ValueError, match='has no place {principle}; use both or neit'):
        demonstrations(*told, principle='Which?')


@pytest.mark.parametrize(
    'settings, words',
    [
        ({'by': 'nobody'}, ["by='nobody' is no labeller", 'simulated']),
        ({'fn': f'{HERE}:wrong_shape'}, ['of shape [1] for 12 pairs']),
        ({'fn': f'{HERE}:no_probability'}, ['gave 1.5, which is no probability']),
        ({'fn': f'{HERE}:sure', 'rule': 'near'}, ["rule='near' and score=None"]),
        (
            {'by': 'simulated', 'fn': f'{HERE}:sure', 'labellers': ('a', 'a')},
            ['every labeller needs a name of its own'],
        ),
        (
            {
                'by': 'simulated',
                'fn': f'{HERE}:sure',
                'labellers': ('a',),
                'overlap': 2,
            },
            ['overlap=2 labellers per item, and there are 1'],
        ),
        (
            {'by': 'model', 'judge': 'tiny', 'labels': ('a', 'a')},
            ['does not tell the labels apart'],
        ),
        ({'by': 'model', 'judge': 'tiny', 'labels': ('a',)}, ['two are needed']),
        (
            {'by': 'model', 'judge': 'tiny', 'prompt_format': 'chat'},
            ['has no chat template'],
        ),
        (
            {'by': 'model', 'judge': 'tiny', 'judge_buckets': (2000,)},
            ['exceed the 1024 positions'],
        ),
        (
            {'by': 'model', 'judge': 'tiny', 'judge_buckets': (32,)},
            ['no comparison came of 12 labels of 12 items'],
        ),
        (
            {'by': 'model', 'judge': 'tiny', 'prompt_file': '/nowhere.txt'},
            ['/nowhere.txt cannot be read'],
        ),
    ],
)
def test_bad_settings_are_told(settings, words, tmp_path):
    with pytest.raises(ValueError) as error:
        launch(labelled(**settings), tmp_path)
    for word in words:
        assert word in str(error.value)


def test_a_prompt_file_that_lacks_a_place_is_told(tmp_path):
    path = tmp_path / 'judge.txt'
    path.write_text('{prompt} {first}')
    with pytest.raises(ValueError, match='{second} stands nowhere'):
        read_prompt(path, ('prompt', 'first', 'second'))
    path.write_text('{prompt} {reasoning} {reasoning}')
    with pytest.raises(ValueError, match='stands there 2 times'):
        read_prompt(path, ('prompt',))


def test_what_is_said_of_1_does_not_include_10():
    # p(1…) = 0.5, of which 0.2 go on to 10; p(2) = 0.3; the rest is something else.
    logps = np.log([[0.5, 0.3, 0.2]])
    shares = judging._shares(logps, [[7], [8], [7, 9]])
    np.testing.assert_allclose(shares, [[0.375, 0.375, 0.25]])
    np.testing.assert_allclose(
        judging._shares(logps, [[7], [8], [9]]), [[0.5, 0.3, 0.2]]
    )


def test_a_language_model_rates_as_a_reward(finished, tmp_path):
    config = get_config()
    config.stages = ('drawn', 'ppo')
    rewards = {
        'ai': dict(
            model=f'{finished}/sft', rating=dict(judge_buckets=(512,), highest=5)
        )
    }
    config.drawn = stage(
        'sample',
        policy=f'{finished}/sft',
        prompts='tfds:tiny_tldr/prompts:train[:8]',
        num_samples=2,
        batch_size=8,
        prompt_buckets=(56,),
        max_new_tokens=8,
        rewards=rewards,
    )
    ppo = {
        k: v for k, v in config.ppo.to_dict().items() if k not in ('kind', 'rewards')
    }
    ppo |= {'init': f'{finished}/sft', 'critic': f'{finished}/rm', 'num_rollouts': 2}
    config.ppo = stage('ppo', **ppo, rewards=rewards)
    launch(config, tmp_path)
    scores = [row['score_ai'] for row in rows(tmp_path / 'drawn' / 'records.jsonl')]
    assert all(1 < score < 5 for score in scores) and len(set(scores)) > 4
    found = rows(tmp_path / 'ppo' / 'metrics.jsonl')
    assert any('reward/ai' in row for row in found)


@pytest.mark.parametrize('settings, scale', [({}, '1 10'), ({'highest': 5}, '1 5')])
def test_the_question_names_the_scale_of_the_rating(settings, scale, monkeypatch):
    low, high = scale.split()
    prompt = read_prompt(judge.RATE, ('prompt', 'response'))
    how = RatingSettings(**settings)
    labels = [f' {n}' for n in range(int(low), int(high) + 1)]
    rater = judging.Judge('config.x', 'tiny', how, prompt, None, tuple(labels))
    asked = []

    def load(run, judge, key):
        def ask(questions, key):
            asked.extend(judge.prompt.fill(**question) for question in questions)
            return np.full((len(questions), len(labels)), 1 / len(labels)), None

        return ask

    monkeypatch.setattr(rating, 'load_judge', load)
    run = SimpleNamespace(key=lambda name: None, tokenizer=None)
    responses = SimpleNamespace(
        prompts=['p {highest}'], templated=[False], texts=[' r'], spread=np.asarray
    )
    scored = rating.make_rater(run, rater)(responses)
    assert scored.scores.tolist() == [(int(low) + int(high)) / 2]
    (text,) = asked
    assert f'Rate from {low} (useless or wrong) to {high} (perfect)' in text
    assert text.endswith(f'The rating from {low} to {high} is')
    assert 'p {highest}' in text  # what is filled in is no place


@pytest.mark.parametrize(
    'source, words',
    [
        ({'rating': dict(highest=1)}, ['highest=1 is not above lowest=1']),
        ({'rating': {}, 'heads': {'a': 1.0}}, ['has rating and heads']),
        ({'rating': dict(judge_buckets=(64,))}, ['use a last bucket of ']),
        ({'rating': dict(prompt_file='/nowhere')}, ['/nowhere cannot be read']),
    ],
)
def test_bad_ratings_are_told(source, words, tmp_path):
    config = get_config()
    config.stages = ('drawn',)
    config.drawn = stage(
        'sample',
        policy='tiny',
        prompts='tfds:tiny_tldr/prompts:train[:8]',
        rewards={'ai': dict(model='tiny', **source)},
    )
    with pytest.raises(ValueError) as error:
        launch(config, tmp_path)
    for word in words:
        assert word in str(error.value)


def people(form='comparison', **settings):
    return labelled(
        by='people', form=form, labellers=('ann', 'bob'), overlap=2, **settings
    )


def answered(folder, make):
    """Labels by both of every item that is written down, ``make(item, labeller)``."""
    items, plan = read_stage(folder)
    labels = [
        Label(item=item.item, labeller=name, **said)
        for item in items
        for name in plan.labellers
        for said in make(item, name)
    ]
    store = open_store(folder / DATABASE)
    store.claim(items)
    return add_labels(store, labels)


def test_a_run_waits_for_people_and_goes_on(tmp_path, capsys):
    guideline = tmp_path / 'guide.md'
    guideline.write_text('# What is better')
    config = people(
        aggregate='majority',
        guidelines={'helpful': str(guideline)},
        gold='tfds:tiny_tldr/comparisons:test[100:102]',
        training='tfds:tiny_tldr/comparisons:test[200:201]',
    )
    config.seed = 3
    config.stages = ('said', 'learned')
    config.learned = config.rm
    config.learned.init, config.learned.train = 'scratch', 'stage:said'
    config.learned.eval, config.learned.batch_size = 'stage:said', 4
    config.learned.references = None
    workdir = tmp_path / 'run'
    with pytest.raises(SystemExit) as stop:
        launch(config, workdir)
    assert stop.value.code == 75
    told = capsys.readouterr().out
    assert 'said: 0 of 12 items have 2 labels' in told
    assert f'python -m rlhf_jax.label --workdir {workdir} --stage said' in told
    purposes = [item.purpose for item in read_items(workdir / 'said' / 'items.jsonl')]
    assert purposes == ['main'] * 12 + ['training'] + ['gold'] * 2
    assert read_stage(workdir / 'said')[1].seed == 3  # of sides and repeats

    def half(item, name):
        return [{'probability': 1.0}] if name == 'ann' else []

    answered(workdir / 'said', half)
    with pytest.raises(SystemExit):
        launch(config, workdir)
    assert 'ann 12, bob 0' in capsys.readouterr().out

    def rest(item, name):
        number = int(item.item) if item.purpose == 'main' else 0
        if name == 'ann':
            return []
        if number == 3:
            return [{'verdict': 'bad'}]
        return [{'probability': float(number % 2), 'strength': 1 + number % 4}]

    answered(workdir / 'said', rest)
    launch(config, workdir)
    found = rows(workdir / 'said' / 'records.jsonl')
    assert [row['item'] for row in found] == [str(i) for i in range(12)]
    assert [row.get('tie', False) for row in found] == [
        i % 2 == 0 for i in range(12)
    ]  # ann says 1, bob 0; of the odd ones both say 1, or ann alone
    assert found[3]['labeller'] == 'ann' and found[5]['strength'] == 2
    assert (workdir / 'learned' / 'done.json').exists()


def test_people_rate_by_dimension_and_rank(tmp_path):
    responses = tmp_path / 'responses.jsonl'
    rows_ = [
        {'prompt': [{'role': 'user', 'content': f'p{i}'}], 'completion': f' c{j}'}
        for i in range(2)
        for j in range(3)
    ]
    files.write_rows(responses, rows_)
    for name in ('helpful', 'brief'):
        (tmp_path / f'{name}.md').write_text(name)
    guidelines = {n: str(tmp_path / f'{n}.md') for n in ('helpful', 'brief')}
    spec = f'jsonl:{responses}'
    config = people('rating', responses=spec, guidelines=guidelines, per_prompt=3)
    with pytest.raises(SystemExit):
        launch(config, tmp_path / 'rated')

    def rate(item, name):
        value = int(item.completions[0][-1]) + (name == 'bob')
        return [
            {'dimension': 'helpful', 'rating': 1 + value},
            {'dimension': 'brief', 'rating': 2},
        ]

    answered(tmp_path / 'rated' / 'said', rate)
    launch(config, tmp_path / 'rated')
    found = rows(tmp_path / 'rated' / 'said' / 'records.jsonl')
    assert len(found) == 6 and found[0]['prompt'] == [{'role': 'user', 'content': 'p0'}]
    for row in found:
        helpful = int(row['completion'][-1]) + 1.5
        assert row['ratings'] == {'helpful': helpful, 'brief': 2.0}

    config = people('ranking', responses=spec, ranked=3)
    with pytest.raises(SystemExit):
        launch(config, tmp_path / 'ranked')
    answered(tmp_path / 'ranked' / 'said', lambda item, name: [{'ranks': (1, 2, 2)}])
    launch(config, tmp_path / 'ranked')
    found = rows(tmp_path / 'ranked' / 'said' / 'records.jsonl')
    assert len(found) == 4 and {row['labeller'] for row in found} == {'ann', 'bob'}
    assert all(len(row['completions']) == 3 for row in found)
    assert all(row['ranks'] == [1, 2, 2] for row in found)
