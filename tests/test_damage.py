"""Damage to what a run has written: found, named, and never resumed or loaded silently.

A thousand random bit flips take some minutes and are left out by default:

    python -m pytest -n 1 -m slow tests/test_damage.py
"""

import json
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoint, files
from rlhf_jax.types import TrainState


def state(step, width=64):
    """What a stage saves: parameters, moments, a key; every number tells the step."""
    params = {
        'layers': {'kernel': jnp.full((width, 8), step + 0.25), 'bias': jnp.ones(8)},
        'embedding': jnp.arange(4.0 * width).reshape(width, 4) + step,
    }
    return TrainState(
        step=jnp.int32(step),
        rng=jax.random.PRNGKey(step),
        params=params,
        opt_state=(jax.tree.map(lambda x: x / 2, params), jnp.int32(step)),
    )


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """A stage with the checkpoints of steps 6 and 7."""
    stage = tmp_path_factory.mktemp('run') / 'sft'
    with checkpoint.open_checkpoints(stage, 2) as manager:
        for step in (5, 6, 7):
            checkpoint.save_state(manager, step, state(step), {'train': float(step)})
    return stage


@pytest.fixture
def stage(written, tmp_path):
    return shutil.copytree(written, tmp_path / 'sft')


def resume(stage):
    """The step that is resumed from, after a check that it is what was saved."""
    with checkpoint.open_checkpoints(stage, 2) as manager:
        restored = checkpoint.restore_state(manager, state(0))
        seconds = checkpoint.saved_seconds(manager)
    step = int(restored.step)
    jax.tree.map(np.testing.assert_array_equal, restored, state(step))
    assert seconds == {'train': float(step)}
    return step


# The files of an Orbax checkpoint, as patterns: names of data files are random.
FILES = (
    'checksums.json',
    '_CHECKPOINT_METADATA',
    'commit_success.txt',
    'default/_METADATA',
    'default/_sharding',
    'default/manifest.ocdbt',
    'default/array_metadatas/process_0',
    'default/d/*',
    'default/ocdbt.process_0/manifest.ocdbt',
    'default/ocdbt.process_0/d/*',
)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b'')


def remove(path):
    path.unlink()


def zeros(path):
    """What a file system may leave after a power cut."""
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def append(path):
    path.write_bytes(path.read_bytes() + b'garbage')


def make_folder(path):
    path.unlink()
    path.mkdir()


ON_FILES = (truncate, empty, remove, zeros, flip, append, make_folder)


def names_of(stage):
    return {p.name for p in (stage / 'checkpoints').iterdir()}


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('harm', ON_FILES, ids=lambda harm: harm.__name__)
def test_the_whole_one_is_used_and_the_damaged_file_named(stage, capsys, harm, name):
    folder = stage / 'checkpoints' / '7'
    path = sorted(folder.glob(name))[0]
    harm(path)
    assert resume(stage) == 6
    line, *more = capsys.readouterr().out.splitlines()
    assert not more and line.startswith('[sft] checkpoint ')
    assert f'{folder} is damaged (' in line and 'goes on from step 6' in line
    # A changed checksum is told by the file that it was of.
    assert path.relative_to(folder).as_posix() in line or name == files.CHECKSUMS
    assert (stage / 'damaged' / '7-1').is_dir() and names_of(stage) == {'6'}
    # Later saves work, of the damaged step too, and nothing more is said.
    with checkpoint.open_checkpoints(stage, 2) as manager:
        checkpoint.save_state(manager, 7, state(7), {'train': 7.0})
    assert resume(stage) == 7 and capsys.readouterr().out == ''


def swap(folder):
    """Step 6 stands in the place of 7, whole as it is."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name('6'), folder)


def swap_data(folder):
    shutil.rmtree(folder / 'default')
    shutil.copytree(folder.with_name('6') / 'default', folder / 'default')


def swap_two_files(folder):
    first, second = sorted((folder / 'default/ocdbt.process_0/d').iterdir())[:2]
    aside = first.rename(first.with_name('aside'))
    second.rename(first)
    aside.rename(second)


def half_copied(folder):
    for path in sorted((folder / 'default').rglob('*'))[4:]:
        if path.is_file():
            path.unlink()


def one_file(folder):
    shutil.rmtree(folder)
    folder.write_bytes(b'7')


def nothing_in_it(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def no_data(folder):
    shutil.rmtree(folder / 'default')


def another_process(folder):
    source = folder / 'default' / 'array_metadatas' / 'process_0'
    shutil.copy(source, source.with_name('process_1'))


def renamed(folder):
    (folder / 'default').rename(folder / 'state')


def checksums_of_another(folder):
    shutil.copy(folder.with_name('6') / files.CHECKSUMS, folder / files.CHECKSUMS)


def checksums_of_nothing(folder):
    text = json.dumps({'about': 'step 7', 'files': {}})
    (folder / files.CHECKSUMS).write_text(text)


def checksums_of_a_list(folder):
    (folder / files.CHECKSUMS).write_text('[]')


def dangling_link(folder):
    path = next((folder / 'default' / 'd').iterdir())
    path.unlink()
    path.symlink_to('/nowhere/at/all')


def pipe(folder):
    path = next((folder / 'default' / 'd').iterdir())
    path.unlink()
    os.mkfifo(path)


def saved_halfway(folder):
    """As a kill leaves it that comes before the checksums are written."""
    (folder / files.CHECKSUMS).rename(folder / f'{files.CHECKSUMS}.partial')


ON_FOLDERS = (
    swap,
    swap_data,
    swap_two_files,
    half_copied,
    one_file,
    nothing_in_it,
    no_data,
    another_process,
    renamed,
    checksums_of_another,
    checksums_of_nothing,
    checksums_of_a_list,
    dangling_link,
    pipe,
    saved_halfway,
)


@pytest.mark.parametrize('harm', ON_FOLDERS, ids=lambda harm: harm.__name__)
def test_the_whole_one_is_used_and_the_damaged_folder_named(stage, capsys, harm):
    folder = stage / 'checkpoints' / '7'
    harm(folder)
    assert resume(stage) == 6
    [line] = capsys.readouterr().out.splitlines()
    assert f'{folder} is damaged (' in line and 'goes on from step 6' in line
    assert names_of(stage) == {'6'}


def test_a_removed_checkpoint_leaves_the_one_before(stage, capsys):
    shutil.rmtree(stage / 'checkpoints' / '7')
    assert resume(stage) == 6 and capsys.readouterr().out == ''


def test_hidden_files_of_other_programs_are_no_damage(stage, capsys):
    (stage / 'checkpoints' / '7' / 'default' / '.DS_Store').write_bytes(b'x')
    assert resume(stage) == 7 and capsys.readouterr().out == ''


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
@pytest.mark.parametrize(
    'name', ['default/_METADATA', 'default', '.', 'checksums.json']
)
def test_what_may_not_be_read_is_an_error_and_stays(stage, name):
    path = stage / 'checkpoints' / '7' / name
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with pytest.raises(ValueError, match='permission denied.*chmod'):
            resume(stage)
    finally:
        path.chmod(mode)
    assert names_of(stage) == {'6', '7'} and resume(stage) == 7


def test_where_no_whole_one_is_left_the_error_says_how_to_begin_anew(stage):
    for step in ('6', '7'):
        flip(stage / 'checkpoints' / step / 'default' / '_METADATA')
    for _ in range(2):  # asked again, it does not begin anew by itself
        with pytest.raises(ValueError, match='no whole checkpoint') as caught:
            resume(stage)
        text = str(caught.value)
        assert 'step 7: default/_METADATA' in text and 'step 6: ' in text
        assert f'`rm -r {stage / "checkpoints"}`' in text and '\n' not in text
    shutil.rmtree(stage / 'checkpoints')
    with checkpoint.open_checkpoints(stage, 2) as manager:
        assert checkpoint.restore_state(manager, state(0)) is None


def without_checksums(stage):
    for path in stage.rglob(files.CHECKSUMS):
        path.unlink()


def test_checkpoints_of_an_earlier_version_are_used_with_a_warning(stage):
    without_checksums(stage)
    with pytest.warns(UserWarning, match='7 has no checksums.json .* unchecked'):
        assert resume(stage) == 7


@pytest.mark.parametrize('name', FILES[3:])
@pytest.mark.parametrize('harm', [truncate, empty, remove], ids=lambda h: h.__name__)
def test_damage_without_checksums_is_never_taken_for_another_model(stage, harm, name):
    without_checksums(stage)
    harm(sorted((stage / 'checkpoints' / '7').glob(name))[0])
    try:
        with pytest.warns(UserWarning, match='unchecked'):
            assert resume(stage) == 7  # of some files Orbax needs nothing
    except ValueError as error:
        assert 'another model' not in str(error) and 'cannot be read' in str(error)
        assert f'`rm -r {stage / "checkpoints" / "7"}`' in str(error)


def test_another_model_is_told_by_the_array_that_differs(stage):
    with checkpoint.open_checkpoints(stage, 2) as manager:
        with pytest.raises(ValueError, match='another model or optimizer') as caught:
            checkpoint.restore_state(manager, state(0, width=32))
    assert 'embedding is (64, 4) there, and (32, 4) now' in str(caught.value)


# ------------------------------------------------------------------ result of a stage


@pytest.fixture(scope='module')
def finished_stage(tmp_path_factory, config, policy_params):
    folder = tmp_path_factory.mktemp('result') / 'sft'
    folder.mkdir()
    checkpoint.save_params(folder, {'policy': policy_params}, {'policy': config})
    return folder


@pytest.fixture
def result(finished_stage, tmp_path):
    return shutil.copytree(finished_stage, tmp_path / 'sft')


RESULT = (
    'model.json',
    'checksums.json',
    'params/_METADATA',
    'params/_CHECKPOINT_METADATA',
    'params/manifest.ocdbt',
    'params/d/*',
    'params/ocdbt.process_0/d/*',
)


@pytest.mark.parametrize('name', RESULT)
@pytest.mark.parametrize('harm', ON_FILES, ids=lambda harm: harm.__name__)
def test_a_damaged_result_is_named_with_what_mends_it(
    result, policy_params, harm, name
):
    path = sorted(result.glob(name))[0]
    harm(path)
    if harm is remove and name == 'checksums.json':
        with pytest.warns(UserWarning, match='has no checksums.json'):
            checkpoint.load_params(result, 'policy', policy_params)
        return
    with pytest.raises(ValueError) as caught:
        checkpoint.load_params(result, 'policy', policy_params)
    text = str(caught.value)
    assert str(result) in text and '\n' not in text
    # A changed checksum is told by the file that it was of.
    assert path.relative_to(result).as_posix() in text or name == files.CHECKSUMS
    if harm is remove and name == 'model.json':  # looks as if it had not finished
        assert 'holds no finished stage' in text
    else:
        assert f'rm -rf {result}/params {result}/*.json' in text


# ------------------------------------------------------------------------- bit flips


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_all_told(
    written, finished_stage, policy_params, tmp_path, capsys
):
    """Every second one in the newest checkpoint, the others in a stage's result."""
    draw = random.Random(0)
    silent = []
    for i in range(1000):
        source, folder = (
            (written, 'checkpoints/7') if i % 2 else (finished_stage, 'params')
        )
        copy = shutil.copytree(source, tmp_path / 'sft')
        paths = sorted(p for p in (copy / folder).rglob('*') if p.is_file())
        # Half of them by files, which finds the small ones, half by bytes.
        sizes = [1 if i % 4 < 2 else p.stat().st_size for p in paths]
        [path] = draw.choices(paths, sizes)
        data = bytearray(path.read_bytes())
        place = draw.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        told = False
        try:
            if i % 2:
                told = resume(copy) == 6
                told &= f'{copy / folder} is damaged' in capsys.readouterr().out
            else:
                checkpoint.load_params(copy, 'policy', policy_params)
        except ValueError as error:
            told = str(copy) in str(error) and 'rm -rf' in str(error)
        if not told:
            silent.append((path, place))
        shutil.rmtree(copy)
    assert silent == []
