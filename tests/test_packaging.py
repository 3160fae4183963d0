"""The distribution: what a wheel holds, its commands, and one version everywhere."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.small_config import ROOT

PACKAGE = ROOT / 'rlhf_jax'
COMMANDS = ('rlhf-jax',)
COMMANDS += tuple(f'rlhf-jax-{x}' for x in ('sample', 'export', 'label', 'agreement'))


def _setup(name):
    """A literal argument of ``setup``."""
    tree = ast.parse((ROOT / 'setup.py').read_text(encoding='utf-8'))
    [call] = [
        n for n in tree.body if isinstance(n, ast.Expr) and hasattr(n.value, 'keywords')
    ]
    return ast.literal_eval(next(k.value for k in call.value.keywords if k.arg == name))


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the source tree."""
    pytest.importorskip('setuptools', minversion='77')
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    for name in ('setup.py', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(PACKAGE, source / 'rlhf_jax', ignore=ignored)
    build = ['wheel', '--no-deps', '--no-build-isolation', '-q', '-w', str(out), '.']
    _pip(*build, cwd=source)
    [path] = out.glob('*.whl')
    return path


def _pip(*arguments, **how):
    command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', *arguments]
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wheel_holds_every_file_of_the_package(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }
    assert {'rlhf_jax/py.typed', 'rlhf_jax/report.html'} <= ours
    assert 'rlhf_jax/datasets/tiny_base/model.safetensors' in ours
    assert ours <= held, sorted(ours - held)
    rest = {name for name in held - ours if '.dist-info/' not in name}
    assert not rest
    assert any(name.endswith('licenses/LICENSE') for name in held)


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp('installed')
    _pip('install', '-q', '--no-deps', '--target', str(folder), str(wheel))
    return folder


def _call(installed, name, *arguments, cwd):
    environment = {**os.environ, 'PYTHONPATH': str(installed)}
    return subprocess.run(
        [installed / 'bin' / name, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


@pytest.mark.parametrize('name', COMMANDS)
def test_an_installed_command_tells_its_flags(installed, tmp_path, name):
    recipe = tmp_path / 'mine.py'
    recipe.write_text(
        'from ml_collections import ConfigDict\nget_config = ConfigDict\n'
    )
    more = ['--config', str(recipe)] if name == 'rlhf-jax' else []
    done = _call(installed, name, *more, '--help', cwd=tmp_path)
    flag = '--items' if name == 'rlhf-jax-agreement' else '--workdir'
    assert flag in done.stdout, done.stdout + done.stderr


def test_an_installed_command_finds_modules_of_the_folder_it_is_called_in(
    installed, tmp_path
):
    """A recipe's neighbour, as with ``python -m``; a mistake is told in a line."""
    (tmp_path / 'neighbour.py').write_text("STAGES = ('no_such_stage',)\n")
    (tmp_path / 'recipe.py').write_text(
        'from ml_collections import ConfigDict\n'
        'from neighbour import STAGES\n\n\n'
        'def get_config():\n'
        '    return ConfigDict({"seed": 0, "stages": STAGES})\n'
    )
    done = _call(
        installed, 'rlhf-jax', '--config', 'recipe.py', '--workdir', 'run', cwd=tmp_path
    )
    assert done.returncode == 1 and done.stderr.startswith('error: ')
    assert 'Traceback' not in done.stderr and 'config.tokenizer' in done.stderr


def test_one_version_and_one_licence():
    version = _setup('version')
    citation = (ROOT / 'CITATION.cff').read_text(encoding='utf-8')
    assert re.search(rf'^version: {re.escape(version)}$', citation, re.M)
    assert f'license: {_setup("license")}\n' in citation
    changes = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.findall(r'^## (\S+)', changes, re.M)[0] == version
    licence = (ROOT / 'LICENSE').read_text(encoding='utf-8')
    assert 'Apache License' in licence and 'Version 2.0, January 2004' in licence
    assert licence.rstrip().endswith('limitations under the License.')
