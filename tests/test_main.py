"""The command: finished directories, other configs, and what it says of mistakes."""

import json
import os
import subprocess
import sys
import time

import jax
import pytest

from rlhf_jax.main import launch
from tests.small_config import ROOT, config_file, get_config


def command(*arguments, module='rlhf_jax.main'):
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    result = subprocess.run(
        [sys.executable, '-m', module, *arguments],
        env={**env, 'PYTHONPATH': str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def never_compiled(monkeypatch):
    """A mistake must be found before anything is compiled or initialised."""

    def refuse(*_, **__):
        raise AssertionError('compiled before the mistake was found')

    monkeypatch.setattr('rlhf_jax.stages.run.compile_step', refuse)
    monkeypatch.setattr('rlhf_jax.stages.sources.init_sharded', refuse)


def fails(config, workdir, *parts):
    with pytest.raises(ValueError) as caught:
        launch(config, workdir)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


# ---------------------------------------------------------------- the work directory


def test_a_finished_directory_returns_at_once(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob('*')}
    began = time.monotonic()
    report = launch(get_config(), finished)
    assert time.monotonic() - began < 1
    assert report == json.loads((finished / 'report.json').read_text())
    after = {p: p.stat().st_mtime_ns for p in finished.rglob('*')}
    assert after == before


def test_another_config_names_the_keys_that_differ(finished):
    config = get_config()
    config.ppo.clip_eps = 0.1
    before, config.rm.optim.learning_rate = config.rm.optim.learning_rate, 0.5
    fails(
        config,
        finished,
        str(finished),
        'ppo.clip_eps: 0.2 there, 0.1 now',
        f'rm.optim.learning_rate: {before} there, 0.5 now',
    )


def test_a_mistake_does_not_claim_the_directory(tmp_path):
    config = get_config('1')
    config.stages = ('pretrain',)
    config.pretrain.train = f'text:{tmp_path}/missing.txt'
    fails(config, tmp_path / 'run', 'missing.txt')
    assert not (tmp_path / 'run' / 'config.json').exists()


def test_a_directory_that_cannot_be_written(tmp_path):
    file = tmp_path / 'file'
    file.write_text('')
    for workdir in (file, file / 'below'):
        fails(get_config(), workdir, str(workdir), 'cannot be written')


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('pathlib.Path.write_bytes', full)
    fails(get_config(), tmp_path, 'No space left on device', 'make room')


# ------------------------------------------------------------------ mistakes in configs


@pytest.mark.parametrize(
    ('key', 'value', 'parts'),
    [
        ('pppo', {}, ['config.pppo.kind', 'no kind of stage', "did you mean 'ppo'"]),
        ('sede', 3, ['config.sede=3 is no setting', "did you mean 'seed'"]),
        ('stages', ('sft', 'rn'), ["names 'rn', but config.rn is not set", 'rm, sft']),
        ('stages', ('rm', 'sft'), ["config.rm.init='sft' does not come before rm"]),
        ('stages', (), ['config.stages is empty', "'ppo'"]),
        ('stages', ('sft',), ["sft.init='pretrain'", 'neither among', 'nor finished']),
        ('sft.init', 'sft', ["config.sft.init='sft'", 'does not come before']),
        ('sft.init', '~nouser/x', ['config.sft.init', 'cannot be looked up']),
        ('sft.init', 'x' * 999, ['config.sft.init', 'File name too long']),
        ('sft.init', 'a\0b', ['config.sft.init', 'zero byte']),
        ('sft.init', '', ["config.sft.init='' is empty"]),
        ('tokenizer', '~nouser/x', ['tokenizer', 'cannot be looked up']),
        ('tokenizer', 'os:getcwd', ["tokenizer='os:getcwd' gives a str"]),
        ('tokenizer', 'os:chdir', ["tokenizer='os:chdir' fails: TypeError"]),
        ('ppo.num_minibatches', 10**40, ['config.ppo.num_minibatches', '±2⁶³']),
        ('ppo.kl_coef', 10**400, ['config.ppo.kl_coef', 'beyond ±2⁶³']),
        ('ppo.extra_eos_ids', 7, ['config.ppo.extra_eos_ids=7: use a tuple']),
        ('ppo.stop_sequences', ('',), ['config.ppo.stop_sequences', 'empty']),
        ('rm.loss', 7, ['config.rm.loss=7 is no name']),
        ('metrics', 'jsonl', ["config.metrics='jsonl': it should be a tuple"]),
        ('parallel', None, ['config.parallel=None: it should be a section']),
        ('sft', 3, ['the settings of a stage are a section']),
        ('sft.init', 'rm', ["config.sft.init='rm'", 'does not come before']),
        ('sft.init', 'pretrian', ['pretrian']),
        ('ppo.rewards.rm.model', 'sft', ['config.ppo.rewards.rm', 'no trained score']),
        ('ppo.gold', {'model': 'sft'}, ['config.ppo.gold', 'no trained score']),
        ('ppo.base', 'ppo', ["config.ppo.base='ppo'", 'does not come before ppo']),
        ('ppo.base', 'cost', ["'cost' is no stage of this run"]),
        ('ppo.base', 'rm', ["config.ppo.base='rm'", 'is no language model']),
        ('ppo.clip_epz', 0.1, ['config.ppo.clip_epz is unknown', "'clip_eps'"]),
        ('sft.num_microbatches', 0, ['config.sft.num_microbatches=0', '1 or more']),
        ('sft.batch_sise', 8, ['config.sft.batch_sise', "'batch_size'"]),
        ('rm.optim.learnin_rate', 1, ['config.rm.optim.learnin_rate', 'learning_rate']),
        ('sft.batch_size', 30, ['config.sft.batch_size=30', '8 devices', '24 or 32']),
        ('ppo.batch_size', 20, ['config.ppo.batch_size=20', '8 devices', '16 or 32']),
        ('ppo.eval_batch_size', 20, ['config.ppo.eval_batch_size=20', '16 or 24']),
        ('sft.num_epochs', 1.0, ['config.sft', 'either num_steps or num_epochs']),
        ('sft.train', 'jsonl:/nowhere/a.jsonl', ['/nowhere/a.jsonl']),
        ('sft.train', 'jsnl:a.jsonl', ['jsnl', 'jsonl']),
        ('model.preset', 'nanno', ["'nanno' is unknown", "'nano'"]),
        ('sft.buckets', (4096,), ['config.sft.buckets', '4096', '1024 positions']),
        ('ppo.max_new_tokens', 2000, ['config.ppo', '2056', '1024 positions']),
        ('ppo.gold.fn', 'no.such:thing', ['config.ppo.gold.fn', 'no.such:thing']),
        ('ppo.ptx_coef', 0.5, ['config.ppo.ptx_coef=0.5', 'config.ppo.ptx']),
        ('ppo.temperature', 0.0, ['config.ppo.temperature=0.0: use above 0']),
        ('ppo.kl_coef', -0.1, ['config.ppo.kl_coef=-0.1: use 0 or more']),
        ('ppo.clip_eps', -0.2, ['config.ppo.clip_eps=-0.2: use above 0']),
        ('ppo.dual_clip', 0.5, ['config.ppo.dual_clip=0.5 bounds ratios of 1']),
        ('ppo.gamma', 1.01, ['config.ppo.gamma=1.01: use a number in [0, 1]']),
        ('ppo.lam', -0.5, ['config.ppo.lam=-0.5: use a number in [0, 1]']),
        ('ppo.lam', float('nan'), ['config.ppo.lam=nan is not finite']),
        ('ppo.rewards.rm.weight', float('inf'), ['config.ppo.rewards.rm.weight=inf']),
        ('ppo.max_new_tokens', 0, ['config.ppo.max_new_tokens=0: use 1 or more']),
        ('ppo.prompt_buckets', (), ['config.ppo.prompt_buckets=(): use numbers that']),
        ('ppo.prompt_buckets', (64, 32), ['config.ppo.prompt_buckets=(64, 32)']),
        ('ppo.extra_eos_ids', (-1,), ['config.ppo.extra_eos_ids=(-1,): -1 is no id']),
        ('ppo.extra_eos_ids', (5000,), ['extra_eos_ids=(5000,)', 'has the ids 0 to']),
        ('sft.batch_size', 0, ['config.sft.batch_size=0: use 1 or more']),
        ('sft.optim.learning_rate', -1e-3, ['config.sft.optim.learning_rate=-0.001']),
        ('sft.loop.log_every_steps', 0, ['config.sft.loop.log_every_steps=0: use 1']),
        ('seed', -1, ['config.seed=-1: use a whole number from 0']),
        ('ppo.optim.schedule', 'cosin', ['cosin', 'cosine']),
        ('parallel.data', 3, ['(3, 1, 1)', '8 devices']),
        ('parallel.backend', 'pmapp', ['pmapp', 'pmap']),
        ('tokenizer', '/nowhere', ['/nowhere', 'cannot be loaded']),
        ('pretrain.on_bad', 'skp', ['on_bad', 'skp', 'skip']),
        ('sft.packing', 'first', ["config.sft.packing='first'", "'best_fit'"]),
        ('rm.packing', 'best_fit', ["config.rm.packing='best_fit'", 'is no setting']),
        ('rm.sort_batches', 1, ['config.rm.sort_batches=1', 'use 2 or more']),
    ],
)
def test_mistakes_are_named_before_compilation(
    tmp_path, never_compiled, key, value, parts
):
    config = get_config()
    *path, last = key.split('.')
    section = config
    for name in path:
        section = section[name]
    with config.unlocked(), config.ignore_type():
        section[last] = value
    fails(config, tmp_path, *parts)


def test_a_policy_of_this_run_is_no_reward_before_it_has_run(tmp_path, never_compiled):
    config = get_config()
    recipe = config_file('policy_gradient').get_config('smoke')
    config.policy_gradient = recipe.policy_gradient
    config.stages = ('pretrain', 'sft', 'rm', 'policy_gradient', 'ppo')
    config.ppo.rewards.rm.model = 'policy_gradient'
    place = "config.ppo.rewards.rm: model='policy_gradient'"
    fails(config, tmp_path, place, 'no trained score')


def test_a_critic_is_no_reward_model(finished, tmp_path, never_compiled):
    config = get_config()
    config.ppo.rewards.rm.model = str(finished / 'ppo')  # its policy and its critic
    fails(config, tmp_path, 'config.ppo.rewards.rm', 'no trained score')


@pytest.mark.parametrize(
    ('line', 'parts'),
    [
        ('{"prompt": "a", "completion": ', ['bad.jsonl:2']),
        ('{"prompt": "", "completion": " b"}', ['bad.jsonl:2', 'prompt']),
        ('{"prompt": "a", "completion": ""}', ['bad.jsonl:2', 'completion']),
        ('{"promt": "a", "completion": " b"}', ['bad.jsonl:2', 'promt']),
    ],
)
def test_a_malformed_record_is_named(tmp_path, never_compiled, line, parts):
    path = tmp_path / 'bad.jsonl'
    path.write_text('{"prompt": "a", "completion": " b"}\n' + line + '\n')
    config = get_config()
    config.sft.train = f'jsonl:{path}'
    fails(config, tmp_path / 'run', *parts)


def test_a_prompt_longer_than_the_bucket_is_counted(tmp_path, never_compiled):
    path = tmp_path / 'long.jsonl'
    path.write_text(json.dumps({'prompt': 'the mayor ' * 200}) + '\n')
    config = get_config()
    config.ppo.prompts = f'jsonl:{path}'
    limit = config.ppo.prompt_buckets[-1]
    fails(config, tmp_path / 'run', str(path), f'longer than {limit} tokens')


def test_a_model_with_too_few_embeddings(finished, tmp_path, never_compiled):
    stage = tmp_path / 'other'
    stage.mkdir()
    table = json.loads((finished / 'sft' / 'model.json').read_text())
    table['policy']['vocab_size'] = 50
    (stage / 'model.json').write_text(json.dumps(table))
    config = get_config()
    config.rm.init = str(stage)
    fails(config, tmp_path / 'run', 'has id', 'the model has 50 embeddings')


def test_a_checkpoint_of_another_model(finished, tmp_path):
    table = json.loads((finished / 'sft' / 'model.json').read_text())
    table['policy']['mlp_width'] *= 2
    stage = tmp_path / 'other'
    stage.mkdir()
    (stage / 'model.json').write_text(json.dumps(table))
    os.symlink(finished / 'sft' / 'params', stage / 'params')
    config = get_config()
    config.stages = ('rm',)
    config.rm.init = str(stage)
    fails(config, tmp_path / 'run', str(stage), 'another model')


def test_a_diverging_run_stops_and_keeps_its_checkpoint(tmp_path):
    from rlhf_jax import checkpoint

    config = get_config('8')
    config.stages = ('pretrain',)
    config.pretrain.optim.learning_rate = 1e30
    config.pretrain.loop.save_every_steps = 1
    fails(config, tmp_path, 'pretrain: ', 'train/loss', 'not finite at step', 'Lower')
    stage = tmp_path / 'pretrain'
    assert not (stage / 'done.json').exists()
    rows = [json.loads(r) for r in (stage / 'metrics.jsonl').read_text().splitlines()]
    assert all(row['train/loss'] is not None for row in rows)
    with checkpoint.open_checkpoints(stage, 2) as manager:
        last = manager.latest_step() or 0
    # What is kept, if anything, is known to be good by the step that was made from it.
    assert last + 1 == rows[-1]['step']


def test_a_disk_that_fills_up_in_a_stage(tmp_path, monkeypatch):
    config = get_config('1')
    config.stages = ('pretrain',)
    for error in (
        OSError(28, 'No space left on device'),
        ValueError("RESOURCE_EXHAUSTED: Failed [os_error_code='28'] [a page of this]"),
    ):

        def full(*_, error=error):
            raise error

        monkeypatch.setattr('rlhf_jax.stages.sft.train', full)
        stage = str(tmp_path / 'pretrain')
        fails(config, tmp_path, stage, 'No space left on device); make room')
    monkeypatch.undo()
    # Also here: what an earlier process took is in the durations.
    earlier = {'setup': 100.0, 'train': 1000.0, 'eval': 0.0}
    monkeypatch.setattr('rlhf_jax.checkpoint.saved_seconds', lambda _: dict(earlier))
    launch(config, tmp_path)
    seconds = json.loads((tmp_path / 'pretrain' / 'done.json').read_text())['seconds']
    assert 100 < seconds['setup'] < 1000 < seconds['train'] and 0 < seconds['eval'] < 99


def test_a_run_goes_on_with_its_own_tokenizer(tmp_path, never_compiled):
    from rlhf_jax import files
    from rlhf_jax.data.tokenizer import load_tokenizer, save_tokenizer

    config = get_config()
    tokenizer = load_tokenizer(config.tokenizer)
    tokenizer.chat_template = '{{ messages }}'
    save_tokenizer(tokenizer, tmp_path / 'tokenizer')
    resolved = json.loads(config.to_json_best_effort())
    files.write_json(tmp_path / 'config.json', {'config': resolved})
    fails(config, tmp_path, str(tmp_path / 'tokenizer'), 'differ in chat template')


# --------------------------------------------------------------------- the command line


def test_help_and_a_missing_workdir():
    code, text = command('--help')
    assert '--config' in text and '--workdir' in text and 'resumes' in text
    code, text = command()
    assert code != 0 and '--workdir is needed' in text


@pytest.mark.parametrize(
    ('flag', 'line'),
    [
        ('--config.ppo.clip_epz=0.1', "no 'clip_epz'; did you mean 'clip_eps'?"),
        ('--config.pppo.clip_eps=0.1', "no 'pppo'; did you mean 'ppo'?"),
        ('--config.ppo.clip_eps=abc', "could not convert string to float: 'abc'"),
        ('--config=configs/quickstart.py:smke', "did you mean 'smoke'?"),
        ('--config=configs/quickstat.py', "No such file or directory: 'configs/quicks"),
    ],
)
def test_a_mistyped_flag_is_told_in_one_line(tmp_path, flag, line):
    code, text = command('--workdir', str(tmp_path), flag)
    first, second = text.splitlines()
    assert code == 1 and first.startswith('error: ') and line in first
    assert 'RLHF_JAX_TRACEBACK' in second


def test_an_error_is_one_line_without_a_traceback(tmp_path):
    code, text = command(
        '--workdir',
        str(tmp_path),
        '--config',
        'configs/quickstart.py:smoke',
        '--config.sft.batch_size=8',
        '--config.sft.train=jsonl:/nowhere/a.jsonl',
        "--config.stages=('sft',)",
    )
    assert code == 1
    assert 'error: ' in text and '/nowhere/a.jsonl' in text
    assert 'Traceback' not in text and 'RLHF_JAX_TRACEBACK' in text


def test_devices_of_the_tests():
    assert len(jax.devices()) == 8  # the messages above name them
