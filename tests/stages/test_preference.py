"""The preference stage: its losses by name, its reference, its resume, its results."""

import dataclasses
import json
import math
import pkgutil
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rlhf_jax import preference
from rlhf_jax.data.pipeline import load_comparisons
from rlhf_jax.datasets.tiny_tldr import tokenizer
from rlhf_jax.export import export
from rlhf_jax.main import launch
from rlhf_jax.sample import sample
from rlhf_jax.stages import offline
from rlhf_jax.stages import preference as stage_of_preference
from tests.small_config import config_file
from tests.stages.kills import killed_behind
from tests.test_main import command, fails, never_compiled  # noqa: F401

pytestmark = pytest.mark.usefixtures('one_device')


def get_config(**values):
    """Six updates of a small fresh policy, on a few comparisons."""
    result = config_file('preference').get_config(
        f'smoke,loss={values.pop("loss", "dpo")}'
    )
    result.stages = ('preference',)
    stage = result.preference
    stage.init = 'scratch'
    stage.train, stage.eval = (
        f'tfds:tiny_tldr/comparisons:{split}[:32]' for split in ('train', 'test')
    )
    stage.eval_prompts = 'tfds:tiny_tldr/prompts:test[:16]'
    stage.eval_batch_size, stage.max_new_tokens = 16, 8
    stage.num_steps = 6
    stage.loop.update(log_every_steps=1, save_every_steps=2, eval_every_steps=3)
    for name, value in values.items():
        with stage.ignore_type():
            stage[name] = value
    return result


def rows(workdir):
    lines = (workdir / 'preference' / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]


def params(workdir, stage='preference'):
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(workdir / stage / 'params')


@pytest.fixture(scope='module')
def held():
    """How many arrays of the shape of the embeddings there are in each step of dpo."""
    return []


@pytest.fixture(scope='module')
def dpo(tmp_path_factory, held):
    """A finished run and what its report says of it."""
    workdir, run_loop = tmp_path_factory.mktemp('runs') / 'dpo', offline.run_loop

    def counting(folder, state, num_steps, one_step, **how):
        def counted(state, done):
            shape = state.params['backbone']['embed']['tokens'].shape
            held.append(sum(x.shape == shape for x in jax.live_arrays()))
            return one_step(state, done)

        return run_loop(folder, state, num_steps, counted, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, 'run_loop', counting)
        return workdir, launch(get_config(), workdir)['stages']['preference']


def test_training_holds_the_policy_and_its_moments_alone(dpo, held):
    # Neither where it began, which the reference was asked of before, nor a judge. The
    # second step ends in a checkpoint, which shares a CPU's memory while it is written.
    assert held[:2] == [3, 3] and len(held) == 6


# ----------------------------------------------------------------------- what it leaves


def test_the_first_loss_is_that_of_a_policy_that_is_its_reference(dpo):
    table = [row for row in rows(dpo[0]) if 'train/loss' in row]
    assert [row['step'] for row in table] == [1, 2, 3, 4, 5, 6]
    assert table[0]['train/loss'] == pytest.approx(math.log(2), abs=1e-5)
    assert table[0]['train/rewards/chosen'] == pytest.approx(0, abs=1e-5)
    assert table[-1]['train/loss'] != pytest.approx(math.log(2), abs=1e-3)


WHEN = ('before', 'after')


def test_the_first_loss_in_bfloat16_is_the_same(tmp_path):
    """The reference pass has whole batches, training microbatches and a gradient."""
    config = get_config(num_steps=1, num_microbatches=2, eval_every_steps=None)
    config.model.dtype = 'bfloat16'
    launch(config, tmp_path / 'run')
    (first,) = [row for row in rows(tmp_path / 'run') if 'train/loss' in row]
    assert first['train/loss'] == pytest.approx(math.log(2), abs=1e-5)
    assert first['train/rewards/chosen'] == pytest.approx(0, abs=1e-5)


def test_it_is_measured_as_ppo_is_and_on_held_out_comparisons(dpo, finished):
    workdir, report = dpo
    assert report['finished'] and report['steps'] == 6
    ppo = json.loads((finished / 'ppo' / 'eval.json').read_text())
    # There is no reward model here: the proxy is all that is missing.
    missing = {f'proxy_{x}_{when}' for x in ('reward', 'range') for when in WHEN}
    assert ppo.keys() - report.keys() == missing
    assert report['prompts'] == 16 and report['kl'] > 0
    assert 0 <= report['win_rate'] <= 1
    assert report['pairs'] == 32 and report['accuracy_ceiling'] > 0.5
    held_out = [row for row in rows(workdir) if 'eval/accuracy' in row]
    assert [row['step'] for row in held_out] == [3, 6]
    assert held_out[-1]['eval/accuracy'] == pytest.approx(report['accuracy'])
    assert held_out[-1]['eval/margin'] == pytest.approx(report['margin'])
    samples = (workdir / 'preference' / 'samples.jsonl').read_text().splitlines()
    assert len(samples) == 16
    assert {'before', 'after', 'gold_after'} <= json.loads(samples[0]).keys()
    assert 'proxy_after' not in json.loads(samples[0])
    page = (workdir / 'report.html').read_text()
    for part in ('preference-accuracy', 'preference-panels', 'preference-bars'):
        assert part in page
    assert 'Responses before and after' in page


def test_its_policy_is_sampled_exported_and_started_from(dpo, tmp_path):
    workdir, _ = dpo
    [(text, *_)] = sample(workdir, 'preference', 'The mayor', num=1, max_new_tokens=4)
    assert isinstance(text, str)
    export(workdir, 'preference', tmp_path / 'exported')
    assert (tmp_path / 'exported' / 'model.safetensors').exists()
    later = config_file('quickstart').get_config('smoke')
    ppo = later.ppo
    ppo.rewards = {'length': dict(fn='tests.stages.test_preference:length')}
    later = get_config()
    later.stages, later.ppo = ('preference', 'ppo'), ppo
    ppo.init = ppo.critic = 'preference'
    ppo.num_rollouts, ppo.max_new_tokens, ppo.batch_size = 1, 8, 16
    ppo.eval_prompts = 'tfds:tiny_tldr/prompts:test[:16]'
    ppo.eval_batch_size = 16
    ppo.gold = None
    report = launch(later, tmp_path / 'run')['stages']['ppo']
    assert report['finished'] and abs(report['kl']) < 20


def length(prompts, responses):
    """A reward to train on."""
    return [float(len(response)) for response in responses]


# ------------------------------------------------------------------------ the reference


def test_a_resumed_run_is_bit_identical_and_computes_no_reference(
    dpo, tmp_path, monkeypatch
):
    with killed_behind(4):
        launch(get_config(), tmp_path)

    def refuse(*_):
        raise AssertionError('the reference was computed again')

    monkeypatch.setattr('rlhf_jax.stages.preference._reference', refuse)
    report = launch(get_config(), tmp_path)['stages']['preference']
    workdir, undisturbed = dpo
    assert report == undisturbed
    jax.tree.map(np.testing.assert_array_equal, params(tmp_path), params(workdir))
    times = ('seconds', 'train/tokens_per_second')
    both = (
        [{k: v for k, v in row.items() if k not in times} for row in rows(place)]
        for place in (tmp_path, workdir)
    )
    assert next(both) == next(both)


@pytest.mark.parametrize('change', ['data', 'model'])
def test_a_stale_reference_is_an_error(dpo, tmp_path, monkeypatch, change):
    stage = tmp_path / 'preference'
    stage.mkdir()
    (stage / 'reference.npz').write_bytes(
        (dpo[0] / 'preference' / 'reference.npz').read_bytes()
    )
    values = get_config()
    if change == 'data':
        values.preference.train = values.preference.train.replace('[:32]', '[1:33]')
    else:
        values.seed = 1  # another start from scratch
    fails(values, tmp_path, str(stage / 'reference.npz'), 'another model, other data')


def test_the_reference_is_what_the_start_says(dpo):
    with np.load(dpo[0] / 'preference' / 'reference.npz') as file:
        assert file['train.ref_logps'].shape == (32, 2)
        assert file['eval.ref_shared_logps'].shape == (32, 2)
        assert (file['train.ref_logps'] < -1).all()


# --------------------------------------------------------------------------- the losses


@pytest.mark.parametrize('data', ['comparisons', 'verdicts'])
def test_kto_learns_from_single_responses(all_devices, tmp_path, data):
    values = get_config(loss='kto')
    if data == 'verdicts':
        path = tmp_path / 'a.jsonl'
        records = [
            {'prompt': f'p {i}', 'completion': ' yes' * (i % 3 + 1), 'label': i % 4 > 0}
            for i in range(24)
        ]
        path.write_text(''.join(json.dumps(r) + '\n' for r in records))
        values.preference.train = values.preference.eval = f'jsonl:{path}'
    report = launch(values, tmp_path / 'run')['stages']['preference']
    # Of 24 responses 6 are undesirable: each meets one other.
    assert report['pairs'] == (32 if data == 'comparisons' else 6)
    assert ('accuracy_ceiling' in report) == (data == 'comparisons')
    table = rows(tmp_path / 'run')
    assert table[0]['train/kl'] == 0 and table[-2]['train/rewards/chosen'] != 0
    with np.load(tmp_path / 'run' / 'preference' / 'reference.npz') as file:
        assert 'train.ref_mismatched_logps' in file


def test_a_loss_on_tokens_runs_the_reference_in_every_step(all_devices, tmp_path):
    config = get_config(loss='tdpo', num_steps=3, num_microbatches=2, batch_size=16)
    config.preference.alpha = 2.0
    report = launch(config, tmp_path)['stages']['preference']
    table = [row for row in rows(tmp_path) if 'train/loss' in row]
    assert table[0]['train/loss'] == pytest.approx(math.log(2), abs=1e-5)
    assert table[0]['train/rewards/chosen'] == pytest.approx(0, abs=1e-5)
    assert table[-1]['train/loss'] != pytest.approx(math.log(2), abs=1e-4)
    assert not (tmp_path / 'preference' / 'reference.npz').exists()
    assert report['pairs'] == 32 and report['loss_settings']['alpha'] == 2.0
    assert report['margin'] != 0 and report['kl'] > 0


def test_a_loss_of_ones_own_named_over_that_of_the_config(tmp_path):
    report = launch(get_config(name='tests.own_loss', beta=3.0), tmp_path)
    told = report['stages']['preference']['loss_settings']
    # What was set holds; what the config had laid out for dpo and left alone does not.
    assert told == {'name': 'tests.own_loss', 'beta': 3.0, 'target': 0.5}
    assert not (tmp_path / 'preference' / 'reference.npz').exists()
    assert rows(tmp_path)[0]['train/loss'] > 0.1


def test_a_loss_of_ones_own_on_the_command_line(tmp_path):
    arguments = ['--config', 'configs/preference.py:smoke', '--workdir', str(tmp_path)]
    arguments += ["--config.stages=('preference',)", '--config.preference.init=scratch']
    arguments += ['--config.preference.name=tests.own_loss']
    arguments += ['--config.preference.num_steps=1']
    arguments += ['--config.preference.train=tfds:tiny_tldr/comparisons:train[:8]']
    code, text = command(*arguments, '--config.preference.divergence=js')
    assert code == 1 and "config.preference.divergence='js' is no setting" in text
    assert "config.preference.name='tests.own_loss'" in text
    code, text = command(*arguments)
    assert code == 0, text
    told = json.loads((tmp_path / 'preference' / 'eval.json').read_text())
    assert told['loss_settings']['beta'] == 7.0  # its own default, not that of dpo


@pytest.mark.parametrize(
    ('changes', 'parts'),
    [
        ({'name': 'dppo'}, ["config.preference.name='dppo'", "did you mean 'dpo'"]),
        ({'name': 'no.such'}, ["config.preference.name='no.such'", 'imported']),
        ({'name': 'ipo', 'label_smoothing': 0.1}, ['label_smoothing=0.1', "='ipo'"]),
        ({'betta': 0.1}, ['config.preference.betta=0.1', "did you mean 'beta'"]),
        ({'label_smoothing': 0.7}, ['label_smoothing=0.7']),
        ({'beta': 'much'}, ["config.preference.beta='much'", 'float']),
        ({'batch_size': 12}, ['config.preference.batch_size=12', '8 devices']),
        ({'eval_batch_size': 12}, ['config.preference.eval_batch_size=12', 'use 8']),
        ({'max_new_tokens': 2000}, ['config.preference.init', '1024 positions']),
        (
            {'tokenizer': 'gpt2'},
            ["config.preference.tokenizer='gpt2'", 'is no setting'],
        ),
        ({'gold': {'fn': 'no.such:fn'}}, ['config.preference.gold.fn', 'no.such']),
        ({'init': 'rm'}, ['rm']),
    ],
)
def test_mistakes_are_named_before_compilation(
    tmp_path,
    never_compiled,  # noqa: F811
    all_devices,
    changes,
    parts,
):
    values = get_config()
    with values.unlocked(), values.ignore_type():
        for name, value in changes.items():
            values.preference[name] = value
    fails(values, tmp_path, *parts)


def test_unpaired_data_and_a_loss_on_pairs(tmp_path, never_compiled):  # noqa: F811
    path = tmp_path / 'a.jsonl'
    path.write_text('{"prompt": "a", "completion": " b", "label": true}\n' * 2)
    values = get_config(train=f'jsonl:{path}')
    fails(values, tmp_path / 'run', str(path), "config.preference.name='dpo'", "'kto'")


def soft_file(path, **last):
    """Comparisons, most of them uncertain, one a tie."""
    rows = [
        {'prompt': f'p {i} ', 'chosen': f' a {i}', 'rejected': ' b c', 'probability': p}
        for i, p in enumerate(np.linspace(0, 1, 16).round(2).tolist())
    ]
    rows[3] |= {'probability': None, 'tie': True}
    rows[-1] |= last
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return f'jsonl:{path}'


def test_soft_labels_train_and_are_measured(tmp_path):
    data = soft_file(tmp_path / 'a.jsonl')
    values = get_config(train=data, eval=data, num_steps=2, batch_size=8)
    values.preference.loop.update(save_every_steps=2, eval_every_steps=2)
    launch(values, tmp_path / 'run')
    report = json.loads((tmp_path / 'run/preference/eval.json').read_text())
    assert report['pairs'] == 15 and report['ties'] == pytest.approx(1 / 16)
    p = np.delete(np.linspace(0, 1, 16).round(2), 3)
    assert report['label_ceiling'] == pytest.approx(np.maximum(p, 1 - p).mean())
    assert report['accuracy'] <= report['label_ceiling']
    first = rows(tmp_path / 'run')[0]
    assert first['train/loss'] == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    ('loss', 'why'),
    [
        ('aot', 'compares the pairs of a batch'),
        ('kto', 'needs responses that are good or bad for certain'),
    ],
)
def test_losses_that_need_certain_labels(tmp_path, never_compiled, loss, why):  # noqa: F811
    data = soft_file(tmp_path / 'a.jsonl')
    values = get_config(loss=loss, train=data)
    fails(
        values, tmp_path / 'run', f'{data}: 15 of 16', f'name={loss!r} {why}', "'dpo'"
    )


def test_a_reference_belongs_to_its_labels(tmp_path):
    def mark(**last):
        spec = soft_file(tmp_path / 'a.jsonl', **last)
        data = load_comparisons(spec, tokenizer(), max_length=32)
        model = SimpleNamespace(config='config')
        return stage_of_preference._fingerprint(model, {}, {'train': data})

    assert mark() == mark() != mark(probability=0.5)


LOSSES = [m.name for m in pkgutil.iter_modules(preference.__path__)]


@pytest.mark.parametrize('name', LOSSES)
def test_every_loss_can_be_configured(name):
    values = config_file('preference').get_config(f'loss={name}').preference
    hp = preference.load(name, 'name').HParams()
    for field in dataclasses.fields(hp):  # of the type that it has
        assert values[field.name] is None
        values[field.name] = getattr(hp, field.name)
