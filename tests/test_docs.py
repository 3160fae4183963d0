"""The documentation: every algorithm has its page, pages name their source, links lead
somewhere.
"""

import ast
import pathlib
import re

import pytest

import rlhf_jax
from rlhf_jax.stages.settings import RewardSource

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ROOT / 'docs' / 'algorithms'
ALGORITHMS = sorted(path for path in PAGES.glob('*.md') if path.name != 'README.md')
TEXTS = [
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
    ROOT / 'CHANGELOG.md',
    ROOT / 'benchmarks' / 'README.md',
    *sorted((ROOT / 'docs').rglob('*.md')),
]
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
PACKAGES = 'rlhf_jax configs experiments benchmarks examples'.split()
SOURCES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob('*.py'))]
REPOSITORY = [
    *ROOT.glob('*'),
    *(
        path
        for name in (*PACKAGES, 'docs', 'tests')
        for path in (ROOT / name).rglob('*')
    ),
]
# Names that stand for others, and pages that a program writes.
PLACEHOLDERS = {'NAME.py', 'NAME.md', 'X.py', 'file.py'}
PLACEHOLDERS |= {'phases.md', 'tables.md', 'compare.md'}
SOURCE = re.compile(r'arXiv\s\d{4}\.\d{4,5}')
CODE = re.compile(r'^```.*?^```|^ {4}.*?$|`[^`\n]*`', re.M | re.S)
PYTHON = re.compile(r'^```python\n(.*?)^```', re.M | re.S)
NAMED = re.compile(r'(?<![\w./:{}=-])((?:\w+/)*\w+\.(?:py|md))\b(?!:\w)')
LINK = re.compile(r'\]\(([^)\s]+)\)')


def _text(path):
    return path.read_text(encoding='utf-8')


def _preference_losses():
    """Modules that ``config.preference.name`` can name, by what a loss module has."""
    for path in sorted((ROOT / 'rlhf_jax' / 'preference').glob('*.py')):
        assigned = {
            target.id
            for node in ast.parse(_text(path)).body
            for target in getattr(node, 'targets', [])
            if isinstance(target, ast.Name)
        }
        if {'DATA', 'REFERENCE'} <= assigned:
            yield path.stem


def _estimators():
    folder = ROOT / 'rlhf_jax' / 'algos' / 'estimators'
    return [path.stem for path in folder.glob('*.py') if path.stem != '__init__']


def _anchors(path):
    """What a link to a heading of a page can name, as GitHub writes it."""
    for line in re.sub(r'^```.*?^```', '', _text(path), flags=re.M | re.S).splitlines():
        if line.startswith('#'):
            words = line.lstrip('#').strip().lower()
            yield re.sub(r'[^\w\- ]', '', words).replace(' ', '-')


@pytest.mark.parametrize('name', [*_preference_losses(), *_estimators()])
def test_an_algorithm_has_its_page(name):
    page = PAGES / f'{name}.md'
    assert page.is_file(), f'{name} has no {page.relative_to(ROOT)}'
    assert f'({name}.md)' in _text(PAGES / 'README.md'), f'the index lacks {name}'


@pytest.mark.parametrize('name', list(_preference_losses()))
def test_the_page_of_a_loss_has_its_settings_and_its_command(name):
    page = _text(PAGES / f'{name}.md')
    assert f'configs/preference.py:loss={name},' in page
    module = ast.parse(_text(ROOT / 'rlhf_jax' / 'preference' / f'{name}.py'))
    [hparams] = [node for node in module.body if getattr(node, 'name', '') == 'HParams']
    for node in hparams.body:
        if isinstance(node, ast.AnnAssign):
            row = re.search(rf'^\|[^|]*`{node.target.id}`.*$', page, re.M)
            assert row, f'{name}.md has no row of {node.target.id}'
            default = ast.literal_eval(node.value)
            told = {default if isinstance(default, str) else f'{default:g}'}
            cells = set(re.findall(r'[\w.]+', row.group().split('|')[2]))
            assert told <= cells, f'{name}.md: {node.target.id} is {default}'


@pytest.mark.parametrize('path', CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_page_that_a_config_names_is_there(path):
    docstring = ast.get_docstring(ast.parse(_text(path)))
    for name in re.findall(r'docs/[\w/]+\.md', docstring):
        assert (ROOT / name).exists(), f'{path.name} names {name}'


def _named_files(path):
    """Python files and pages that a text names, with or without their folders."""
    names = set(NAMED.findall(_text(path)))
    return {name for name in names if name.split('/')[-1] not in PLACEHOLDERS}


def test_files_that_pages_and_docstrings_name_are_there():
    there = [path for path in REPOSITORY if path.suffix in ('.py', '.md')]
    there = {f'/{path.relative_to(ROOT)}' for path in there}
    found = {path: _named_files(path) for path in [*TEXTS, *SOURCES]}
    assert sum(map(len, found.values())) > 400
    missing = [
        f'{path.relative_to(ROOT)} names {name}'
        for path, names in found.items()
        for name in names
        if not any(file.endswith(f'/{name}') for file in there)
    ]
    assert not missing


def test_contributing_names_files_that_are_there():
    text = _text(ROOT / 'CONTRIBUTING.md')
    names = set(re.findall(r'`((?:rlhf_jax|tests|configs|docs|\.ci)/[\w/.]*)`', text))
    assert len(names) > 15
    for name in names:
        file = ROOT / name
        file = file.parent if file.stem == 'NAME' else file
        assert file.exists(), f'CONTRIBUTING.md names {name}'


WITH_PYTHON = [path for path in TEXTS if PYTHON.search(path.read_text('utf-8'))]


@pytest.mark.parametrize(
    'path', WITH_PYTHON, ids=[str(path.relative_to(ROOT)) for path in WITH_PYTHON]
)
def test_python_in_a_page_runs_when_pasted(path, tmp_path, monkeypatch):
    """All blocks of a page, one after the other; settings of rewards are built too."""
    monkeypatch.chdir(tmp_path)
    names = {'__name__': '__main__'}
    for block in PYTHON.findall(_text(path)):
        exec(compile(block, str(path.relative_to(ROOT)), 'exec'), names)
    for reward in [*names.get('rewards', {}).values(), names.get('gold')]:
        if reward is not None:
            settings = RewardSource(**reward)
            assert (settings.model is None) != (settings.fn is None)


def test_every_public_name_is_in_the_page_of_the_library():
    told = set(re.findall(r'`(\w+)`', _text(ROOT / 'docs' / 'library.md')))
    assert set(rlhf_jax.__all__) <= told


@pytest.mark.parametrize('path', ALGORITHMS, ids=[path.stem for path in ALGORITHMS])
def test_a_page_names_its_source(path):
    assert SOURCE.search(_text(path)), f'{path.name} names no arXiv id'


@pytest.mark.parametrize(
    'path', TEXTS, ids=[str(path.relative_to(ROOT)) for path in TEXTS]
)
def test_links_lead_somewhere(path):
    for link in LINK.findall(CODE.sub('', _text(path))):
        if '://' in link:
            continue
        name, _, anchor = link.partition('#')
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f'{path.relative_to(ROOT)} links to {link}'
        if anchor:
            assert anchor in _anchors(target), f'{path.name}: no heading {anchor}'


def test_the_tree_of_the_readme_is_that_of_the_package():
    tree = _text(ROOT / 'README.md').split('## The tree')[1]
    paths = [*(ROOT / 'rlhf_jax').iterdir(), *(ROOT / 'rlhf_jax' / 'stages').iterdir()]
    names = {path.stem for path in paths} - {'__init__', '__pycache__', 'py'}
    quiet = {'console', 'out_of_memory', 'profiling', 'watching'}  # what is said
    missing = {name for name in names - quiet if not re.search(rf'\b{name}\b', tree)}
    assert not missing
    for name in re.findall(r'^ {6}(\w+(?:/|\.py)) ', tree, re.M):
        assert (ROOT / 'rlhf_jax' / name).exists(), f'the tree names {name}'
