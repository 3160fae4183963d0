"""Records flow between stages: sampled, labelled, learned from, and measured."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax.data import pipeline
from rlhf_jax.data.tokenizer import word_tokenizer
from rlhf_jax.main import launch
from rlhf_jax.sharding import ParallelConfig, make_mesh
from rlhf_jax.stages import batches, sample
from rlhf_jax.stages.kinds import stage
from rlhf_jax.stages.run import Run, load_run_tokenizer
from rlhf_jax.stages.sources import resolve
from tests.small_config import get_config
from tests.test_main import fails, never_compiled  # noqa: F401

pytestmark = pytest.mark.usefixtures('one_device')

DATA = 'tfds:tiny_tldr'


def rows(path):
    return [json.loads(line) for line in path.open(encoding='utf-8')]


def config_below(finished):
    """Sampling, labels, a reward model and measurements, behind a finished run."""
    config = get_config()
    run = str(finished)
    config.stages = ('drawn', 'labelled', 'second', 'ppo', 'ranked')
    config.drawn = stage(
        'sample',
        policy=f'{run}/ppo',
        prompts=f'{DATA}/prompts:train[:20]',
        num_samples=3,
        batch_size=8,
        prompt_buckets=(56,),
        max_new_tokens=8,
        rewards={
            'rm': dict(model=f'{run}/rm'),
            'gold': dict(fn='rlhf_jax.datasets.tiny_tldr:gold', weight=0.0),
        },
    )
    config.labelled = stage(
        'label',
        responses='stage:drawn',
        fn='rlhf_jax.datasets.tiny_tldr:annotate',
        per_prompt=2,
    )
    config.second = stage(
        'reward_model',
        init=f'{run}/sft',
        train='stage:labelled',
        eval='stage:labelled[:16]',
        num_steps=2,
        batch_size=8,
        buckets=(88,),
    )
    config.ppo = stage(
        'evaluate',
        policy=f'{run}/ppo',
        reference=f'{run}/sft',
        eval_prompts=f'{DATA}/prompts:test[:16]',
        gold=dict(fn='rlhf_jax.datasets.tiny_tldr:gold'),
        eval_batch_size=16,
        prompt_buckets=(56,),
        max_new_tokens=28,
        rewards={'rm': dict(model=f'{run}/rm')},
        evaluators=('length_controlled',),
        comparisons=f'{DATA}/comparisons:test[:16]',
        batch_size=8,
        buckets=(88,),
    )
    config.ranked = stage(
        'evaluate',
        reward_model='second',
        comparisons='stage:labelled',
        batch_size=8,
        buckets=(88,),
    )
    return config


@pytest.fixture(scope='module')
def done(finished, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('records')
    return workdir, launch(config_below(finished), workdir)


def test_sampled_records_say_where_they_came_from(done, finished):
    workdir, report = done
    found = rows(workdir / 'drawn' / 'records.jsonl')
    assert report['stages']['drawn']['records'] == len(found) <= 60
    assert {row['sample'] for row in found} == {0, 1, 2}
    assert len({row['prompt'] for row in found}) == 20
    for row in found:
        assert row['by'] == f'{finished}/ppo' and row['temperature'] == 1.0
        assert row['logprob'] < 0 and 1 <= row['tokens'] <= 8
        assert row['reward'] == pytest.approx(row['score_rm'], rel=1e-6)
    assert len({tuple(row['key']) for row in found}) == 3  # batches
    assert not (workdir / 'drawn' / batches.ROWS).exists()


def test_a_killed_stage_goes_on_and_writes_the_same(done, finished, tmp_path):
    """Killed while the second batch was being written."""
    config = config_below(finished)
    config.stages = ('drawn',)
    real, seen = sample._batches, []

    def killed(run, job, start):
        for number, found in enumerate(real(run, job, start), start):
            if number == 1 and 'killed' not in seen:
                path = run.stage_dir('drawn') / batches.ROWS
                with path.open('ab') as file:
                    file.write(b'{"half a')
                seen.append('killed')
                raise KeyboardInterrupt
            seen.append(number)
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, '_batches', killed)
        with pytest.raises(KeyboardInterrupt):
            launch(config, tmp_path)
        launch(config, tmp_path)
    assert seen == [0, 'killed', 1, 2]
    one, other = (path / 'drawn' / 'records.jsonl' for path in (done[0], tmp_path))
    assert one.read_bytes() == other.read_bytes()


def test_a_run_goes_on_behind_stages_that_leave_no_model(done, finished, tmp_path):
    shutil.copytree(done[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / 'ranked' / 'done.json').unlink()
    launch(config_below(finished), tmp_path)
    assert (tmp_path / 'ranked' / 'done.json').exists()
    (tmp_path / 'ranked' / 'done.json').unlink()
    path = tmp_path / 'labelled' / 'records.jsonl'
    path.write_text(path.read_text().replace('prompt', 'Prompt', 1))
    with pytest.raises(ValueError, match='labelled is damaged: records.jsonl'):
        launch(config_below(finished), tmp_path)


def test_what_was_labelled_is_what_was_sampled(done):
    workdir, report = done
    texts = {
        (row['prompt'], row['completion']): row['score_gold']
        for row in rows(workdir / 'drawn' / 'records.jsonl')
    }
    found = rows(workdir / 'labelled' / 'records.jsonl')
    assert report['stages']['labelled']['records'] == len(found) > 20
    for row in found:
        for side in ('chosen', 'rejected'):
            assert texts[row['prompt'], row[side]] == row[f'gold_{side}']
    assert 0.2 < report['stages']['labelled']['first_chosen'] < 0.8
    assert list(report['stages']) == list(config_below(workdir).stages)


def test_measured_without_training(done, finished):
    """The numbers of the end of training: of the stage's name are the keys."""
    workdir, report = done
    measured = report['stages']['ppo']
    trained = json.loads((finished / 'ppo' / 'eval.json').read_text())
    for name in ('kl', 'win_rate', 'gold_reward_after', 'proxy_reward_before'):
        assert measured[name] == pytest.approx(trained[name], rel=1e-5), name
    one, other = (rows(path / 'ppo' / 'samples.jsonl') for path in (workdir, finished))
    for name in ('before', 'after', 'gold_after'):
        assert [row[name] for row in one] == [row[name] for row in other]
    assert 0 < measured['lc_win_rate'] < 1
    page = (workdir / 'report.html').read_text()
    assert 'Wins over before at equal length' in page and 'Winning by length' in page
    assert measured['pairs'] == 16 and measured['is_implicit']
    assert 0 <= measured['accuracy'] <= 1
    ranked, second = report['stages']['ranked'], report['stages']['second']
    assert ranked['pairs'] > second['pairs'] == 16
    assert ranked['verdict'] in ('pass', 'fail')


@pytest.mark.parametrize(
    ('keep', 'what'), [('best', 'completion'), ('best_and_worst', 'chosen')]
)
def test_the_rows_that_are_kept(done, finished, tmp_path, keep, what):
    config = config_below(finished)
    config.stages = ('drawn',)
    config.drawn.keep = keep
    launch(config, tmp_path)
    groups = {}
    for row in rows(done[0] / 'drawn' / 'records.jsonl'):
        groups.setdefault(row['prompt'], []).append(row)
    found = rows(tmp_path / 'drawn' / 'records.jsonl')
    assert len(found) >= 15
    for row in found:
        rewards = [r['reward'] for r in groups[row['prompt']]]
        assert row['reward'] == max(rewards)
        assert row[what] in [r['completion'] for r in groups[row['prompt']]]
        if keep == 'best_and_worst':
            assert row['reward_rejected'] == min(rewards) < row['reward']


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'second.train': 'stage:drawn'}, ['takes comparisons', 'writes demonstr']),
        ({'second.train': 'stage:ranked'}, ['does not come before second']),
        ({'labelled.responses': 'stage:nothing'}, ["'stage:nothing'", 'no stage']),
        ({'ranked.comparisons': 'stage:second'}, ['second writes no records']),
        ({'drawn.policy': 'labelled'}, ['does not come before drawn']),
        ({'ranked.reward_model': 'labelled'}, ['makes no model']),
        ({'drawn.keep': 'best', 'drawn.rewards': {}}, ['chooses by rewards']),
        ({'drawn.policy': 'RUN/rm'}, ['no language model']),
        ({'ranked.reward_model': 'RUN/ppo'}, ['no trained score']),
        ({'ppo.reference': None}, ['measured against a reference']),
        ({'ppo.reference': 'scratch'}, ['different shapes']),
        ({'labelled.fn': 'tests.nowhere:fn'}, ['cannot be imported']),
    ],
)
def test_mistakes_are_told_before_anything_compiles(
    finished,
    tmp_path,
    never_compiled,  # noqa: F811
    changes,
    words,
):
    config = config_below(finished)
    config.model.preset = 'micro'
    for key, value in changes.items():
        section, name = key.split('.')
        with config.ignore_type():
            if isinstance(value, str):
                value = value.replace('RUN', str(finished))
            config[section][name] = value
    fails(config, tmp_path, *words)


def test_what_was_left_out_is_counted(done):
    workdir, report = done
    drawn, labelled = report['stages']['drawn'], report['stages']['labelled']
    assert drawn['records'] + drawn['left_out'] == drawn['responses'] == 60
    found = rows(workdir / 'drawn' / 'records.jsonl')
    different = {(row['prompt'], row['completion']) for row in found}
    assert labelled['repeated'] == len(found) - len(different)


def test_a_reward_model_ranks_by_its_own_tokenizer(finished, tmp_path, monkeypatch):
    """Not by the run's, whose ids mean nothing to it."""
    config = config_below(finished)
    config.ranked.comparisons = f'{DATA}/comparisons:test[:8]'
    config.ranked.reward_model = f'{finished}/rm'
    run = Run(
        tmp_path,
        config,
        make_mesh(ParallelConfig(), jax.devices()[:1]),
        load_run_tokenizer(config),
    )
    own = word_tokenizer(['mayor'])
    assert own.get_vocab() != run.tokenizer.get_vocab()
    resolved = dataclasses.replace(
        resolve(run, f'{finished}/rm'), read_tokenizer=lambda: own
    )
    monkeypatch.setattr('rlhf_jax.stages.evaluate.resolve', lambda *_: resolved)
    how = {'max_length': 88, 'overlong': 'truncate'}
    config.ranked.overlong = 'truncate'
    data = run.kind('ranked').load(run, 'ranked', *run.settings('ranked')).comparisons
    wanted = pipeline.load_comparisons(config.ranked.comparisons, own, **how)
    assert len(data.examples) == len(wanted.examples) == 6  # two are cut to the same
    for one, other in zip(data.examples, wanted.examples):
        np.testing.assert_array_equal(one.prompt, other.prompt)
        for mine, theirs in zip(one.answers, other.answers, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_every_response_has_its_own_key(done):
    """No two responses to a prompt are the same sample twice."""
    groups = {}
    for row in rows(done[0] / 'drawn' / 'records.jsonl'):
        groups.setdefault(row['prompt'], set()).add(row['completion'])
    assert np.mean([len(texts) for texts in groups.values()]) > 2
    assert jax.process_count() == 1
