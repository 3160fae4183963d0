"""Files of a work directory that are damaged or missing: each is named with what mends
it, before anything trains; and the command named does mend it.
"""

import json
import shutil
import subprocess

import jax
import numpy as np
import pytest

from rlhf_jax import files
from rlhf_jax.main import launch
from rlhf_jax.metrics import JsonlWriter
from rlhf_jax.sample import load_part
from tests.small_config import get_config
from tests.test_main import never_compiled  # noqa: F401

pytestmark = pytest.mark.usefixtures('one_device')


def small():
    """A stage of four steps that can be trained anew in no time."""
    config = get_config()
    config.stages = ('sft',)
    config.sft.init = 'scratch'
    config.sft.loop.save_every_steps = 2
    return config


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    """A finished run of one stage."""
    workdir = tmp_path_factory.mktemp('runs') / 'done'
    launch(small(), workdir)
    return workdir


@pytest.fixture
def workdir(done, tmp_path):
    """A copy of it, whose report is still to be written: its files are read again."""
    copy = shutil.copytree(done, tmp_path / 'run')
    (copy / 'report.json').unlink()
    return copy


def mend(message):
    """Runs the command that stands in an error, which is a single line."""
    assert '\n' not in message
    subprocess.run(message.split('`')[1], shell=True, check=True)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b'')


def no_text(path):
    path.write_bytes(b'\xff\xfe{}')


def a_list(path):
    path.write_text('[1, 2]\n')


def remove(path):
    path.unlink()


KINDS = (cut, empty, no_text, a_list)


def told(workdir, path, config=None):
    """The error of the command, which names a file."""
    with pytest.raises(ValueError) as caught:
        launch(config or small(), workdir)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('harm', [*KINDS, remove], ids=lambda harm: harm.__name__)
def test_config(workdir, harm, never_compiled):  # noqa: F811
    harm(workdir / 'config.json')
    mend(told(workdir, workdir / 'config.json'))
    launch(small(), workdir)
    assert files.read_json(workdir / 'config.json', '')['config']['stages'] == ['sft']


def test_a_config_of_another_shape(workdir, never_compiled):  # noqa: F811
    (workdir / 'config.json').write_text('{"versions": {}}')
    mend(told(workdir, 'config.json holds no config'))
    launch(small(), workdir)


@pytest.mark.parametrize('harm', KINDS, ids=lambda harm: harm.__name__)
def test_a_damaged_report_is_written_anew(workdir, done, harm, capsys):
    report = launch(small(), workdir)
    harm(workdir / 'report.json')
    assert launch(small(), workdir) == report
    out = capsys.readouterr().out
    assert f'{workdir / "report.json"}' in out and 'written anew' in out


@pytest.mark.parametrize('harm', [*KINDS, remove], ids=lambda harm: harm.__name__)
def test_the_evaluation_of_a_finished_stage(workdir, done, harm):
    path = workdir / 'sft' / 'eval.json'
    harm(path)
    mend(told(workdir, path))
    launch(small(), workdir)  # from its last state: nothing is trained
    for name in ('eval.json', 'model.json', 'metrics.jsonl'):
        ours, theirs = (w / 'sft' / name for w in (workdir, done))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize('harm', KINDS, ids=lambda harm: harm.__name__)
def test_what_a_stage_took(workdir, harm, never_compiled):  # noqa: F811
    harm(workdir / 'sft' / 'done.json')
    assert 'rm -rf' in told(workdir, workdir / 'sft' / 'done.json')


@pytest.mark.parametrize('name', ['metrics.jsonl', 'samples.jsonl'])
@pytest.mark.parametrize('line', [b'{"st', b'\xff', b'[1]', b'{"a": 1}', b'\0\0\0'])
def test_rows(workdir, name, line, never_compiled):  # noqa: F811
    path = workdir / 'sft' / name
    rows = {'metrics.jsonl': b'{"step": 1}'}
    row = rows.get(name, b'{"prompt": "a", "response": "b"}')
    path.write_bytes(row + b'\n' + line + b'\n' + row + b'\n')
    message = told(workdir, f'{path}:2')
    assert f'sed -i 2d {path}' in message
    mend(message)
    launch(small(), workdir)


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('metrics.jsonl', '{"step": 1, "train/loss": "low"}\n'),
        ('metrics.jsonl', '{"step": true}\n'),
        ('done.json', '{"steps": "x", "seconds": {}}'),
        ('done.json', '{"steps": 1, "seconds": {"train": [1]}}'),
        ('done.json', '{"steps": 1, "seconds": 3}'),
        ('eval.json', '{"loss": "x", "loss_before": [], "tokens": {}}'),
    ],
)
def test_what_is_no_number(workdir, name, text, never_compiled):  # noqa: F811
    (workdir / 'report.html').unlink(missing_ok=True)
    (workdir / 'sft' / name).write_text(text)
    told(workdir, workdir / 'sft' / name)


def test_missing_rows_of_a_finished_stage(workdir, never_compiled):  # noqa: F811
    path = workdir / 'sft' / 'metrics.jsonl'
    path.unlink()
    mend(told(workdir, path))
    launch(small(), workdir)


def test_rows_of_a_stage_that_goes_on(tmp_path, capsys):
    path = tmp_path / 'metrics.jsonl'
    with pytest.raises(ValueError, match=f'{path} is missing.*touch'):
        JsonlWriter(path, 3)
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    JsonlWriter(path, 3).close()
    assert path.read_text() == '{"step": 1}\n'
    assert f'{path}:2 was cut' in capsys.readouterr().out
    path.write_text('{"step": 1}\n\0\0\n{"step": 2}\n')
    with pytest.raises(ValueError, match='metrics.jsonl:2 is no metrics row') as caught:
        JsonlWriter(path, 3)
    mend(str(caught.value))
    JsonlWriter(path, 3).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def unfinished(workdir):
    for name in ('done.json', 'eval.json', 'model.json', files.CHECKSUMS):
        (workdir / 'sft' / name).unlink()


def test_a_run_goes_on_from_the_last_whole_checkpoint(workdir, done, capsys):
    unfinished(workdir)
    [path] = (workdir / 'sft' / 'checkpoints' / '4' / 'default' / 'd').iterdir()
    cut(path)
    launch(small(), workdir)
    out = capsys.readouterr().out
    assert 'checkpoints/4 is damaged' in out and 'goes on from step 2' in out
    results = (load_part(where, 'sft', 'policy')[1] for where in (workdir, done))
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize('harm', [*KINDS, remove], ids=lambda harm: harm.__name__)
def test_the_tokenizer(workdir, harm, never_compiled):  # noqa: F811
    unfinished(workdir)
    harm(workdir / 'tokenizer' / 'tokenizer.json')
    message = told(workdir, workdir / 'tokenizer')
    assert 'tokenizer.json' in message and 'write it anew with `' in message


def test_a_missing_tokenizer_is_written_anew_by_the_command_named(workdir):
    unfinished(workdir)
    shutil.rmtree(workdir / 'tokenizer')
    mend(told(workdir, workdir / 'tokenizer'))
    launch(small(), workdir)


@pytest.mark.parametrize('name', ['params/manifest.ocdbt', 'params', 'model.json'])
def test_a_source_is_checked_before_anything_trains(
    workdir,
    done,
    name,
    never_compiled,  # noqa: F811
):
    config = get_config()
    config.stages = ('sft', 'rm')
    config.sft = small().sft
    path = workdir / 'sft' / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    described = json.loads((workdir / 'config.json').read_text())
    described['config'] = json.loads(config.to_json_best_effort())
    files.write_json(workdir / 'config.json', described)
    message = told(workdir, name, config)
    assert f'rm -rf {workdir}/sft/params {workdir}/sft/*.json' in message


# ----------------------------------------------------------- arrays of the reference


def flip_a_shape(path):
    """In the header of an array, whose checksum is looked at no more where less is
    read.
    """
    data = path.read_bytes()
    path.write_bytes(data.replace(b"'shape': (100,)", b"'shape': (000,)"))


@pytest.mark.parametrize('harm', [cut, empty, no_text, a_list, flip_a_shape])
def test_arrays_are_whole_or_named(tmp_path, harm):
    path = tmp_path / 'reference.npz'
    files.write_arrays(path, {'a': np.arange(100.0), 'b': np.ones(3)})
    assert files.read_arrays(path, '').keys() == {'a', 'b'}
    harm(path)
    with pytest.raises(ValueError, match='reference.npz cannot be read .*; rm it'):
        files.read_arrays(path, 'rm it')


def test_no_flipped_bit_of_an_array_is_read_silently(tmp_path):
    path, values = tmp_path / 'reference.npz', {'a': np.arange(5.0), 'b': np.ones(2)}
    files.write_arrays(path, values)
    data = path.read_bytes()
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            read = files.read_arrays(path, '')
        except ValueError:
            continue
        assert read.keys() == values.keys()  # a date or the like
        assert all((read[name] == values[name]).all() for name in values)
