"""The shape of the package, read from its syntax trees: imports, sizes, docstrings."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'rlhf_jax'
FILES = sorted(PACKAGE.rglob('*.py'))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

# The ladder: a layer imports what stands to its left, and its own files.
LADDER = [
    'types named ranges',
    'ops',
    'preference reward_losses',
    'models',
    'generate rewards',
    'continuous_batching responses',
    'algos',
    'evals',
]
PURE = {word for layer in LADDER[:-1] for word in layer.split()}
# What stands beside the ladder, and everything that it may import.
BESIDE = {
    'config': {'ranges'},
    'files': set(),
    'verify': set(),
    'data': {'config', 'files', 'ops', 'ranges', 'types', 'verify'},
    'datasets': {'config', 'data', 'files', 'labels', 'ops', 'types', 'verify'},
    'labels': {'config', 'data', 'files', 'ranges', 'types'},
    'pages': {'responses'},
    'report': {'evaluators', 'files', 'pages', 'stages'},
    'metrics': {'config', 'files', 'types'},
    'optim': {'types', 'ranges'},
    'sharding': {'optim', 'ops', 'types'},
    'checkpoint': {'files', 'models', 'types'},
    'hf': {'files', 'models', 'types'},
}


def _allowed():
    table, below = {}, set()
    for layer in LADDER:
        names = set(layer.split())
        for name in names:
            table[name] = below | {name}
        below |= names
    for name, may in BESIDE.items():
        table[name] = may | {name}
    table['evaluators'] = below | {'evaluators', 'pages'}
    # The only ones that see both the ladder and what stands beside it.
    everything = below | set(BESIDE) | {'evaluators', 'stages'}
    table['stages'] = everything
    commands = {'main', 'sample', 'export', 'label', 'agreement', 'scripts'}
    commands |= {'workdir', 'command_line'}
    for entry_point in commands:
        table[entry_point] = everything | commands
    table['__init__'] = PURE  # the public names
    return table


ALLOWED = _allowed()


def _part(path):
    """'rlhf_jax/ops/kl.py' → 'ops', 'rlhf_jax/generate.py' → 'generate'."""
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def _tree(path):
    return ast.parse(path.read_text(encoding='utf-8'))


def _imports(path):
    """(dotted name, line) of every import, those inside functions included."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}:{node.lineno} imports relatively'
            # In 'from rlhf_jax import plots' the part is the name imported.
            yield from ((f'{node.module}.{a.name}', node.lineno) for a in node.names)


def test_every_part_of_the_package_has_its_place():
    assert {_part(path) for path in FILES} <= ALLOWED.keys()


@pytest.mark.parametrize('path', FILES, ids=NAMES)
def test_imports_point_down(path):
    for name, line in _imports(path):
        top, *rest = name.split('.')
        assert top not in ('tests', 'configs', 'experiments', 'benchmarks')
        if top == 'rlhf_jax':
            may = ALLOWED[_part(path)]
            assert rest[0] in may, (
                f'{path}:{line} imports {name}; {_part(path)} may import {sorted(may)}'
            )


TRAINING = 'loop offline reward_function rollouts sampler scoring sources watching'


@pytest.mark.parametrize('name', TRAINING.split())
def test_training_knows_nothing_of_evaluation_and_report(name):
    for found, line in _imports(PACKAGE / 'stages' / f'{name}.py'):
        for other in ('evals', 'evaluators', 'pages', 'report', 'stages.evaluation'):
            place = f'{name}.py:{line} imports {found}'
            assert not found.startswith(f'rlhf_jax.{other}'), place


def _kinds():
    """The files of ``stages`` that are a kind."""
    for path in (PACKAGE / 'stages').glob('*.py'):
        if any(
            getattr(target, 'id', None) == 'SETTINGS'
            for node in _tree(path).body
            for target in getattr(node, 'targets', ())
        ):
            yield path.stem


KINDS = sorted(_kinds())
SHARED = [PACKAGE / f'{name}.py' for name in ('main', 'report', 'sample', 'export')] + [
    path for path in (PACKAGE / 'stages').glob('*.py') if path.stem not in KINDS
]


def test_there_are_kinds():
    assert {'sft', 'reward_model', 'preference', 'ppo'} <= {*KINDS}


@pytest.mark.parametrize('path', SHARED, ids=[path.stem for path in SHARED])
def test_what_all_kinds_share_names_none(path):
    """Neither by a name in a text, nor by an import."""
    stages = {*KINDS, 'pretrain', 'rm', 'cost'}
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Constant):
            assert node.value not in stages, f'{path}:{node.lineno}'
    for found, line in _imports(path):
        assert found.removeprefix('rlhf_jax.stages.').split('.')[0] not in KINDS, line


def test_the_public_names_come_from_the_pure_parts():
    for name, line in _imports(PACKAGE / '__init__.py'):
        if name.startswith('rlhf_jax.'):
            assert name.split('.')[1] in PURE, f'line {line}: {name}'


@pytest.mark.parametrize(
    'path',
    [path for path in FILES if _part(path) in PURE],
    ids=[name for path, name in zip(FILES, NAMES) if _part(path) in PURE],
)
def test_the_pure_parts_read_no_config_and_touch_no_disk(path):
    """Nothing in ``algos`` or below logs, opens a file or asks which process it is."""
    banned = {'logging', 'absl', 'os', 'sys', 'json', 'pathlib', 'io', 'ml_collections'}
    for name, line in _imports(path):
        assert name.split('.')[0] not in banned, f'{path}:{line} imports {name}'
    calls = {
        'default_backend',
        'open',
        'print',
        'process_index',
        'process_count',
        'local_devices',
        'devices',
    }
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call):
            called = getattr(node.func, 'id', getattr(node.func, 'attr', ''))
            assert called not in calls, f'{path}:{node.lineno} calls {called}'
            if called == 'get_backend':  # where no mesh says it
                assert path == PACKAGE / 'ops/layout.py', f'{path}:{node.lineno}'


def test_one_file_has_what_is_for_cpus_alone():
    """Nothing else in a program asks whether it is for one."""
    door = PACKAGE / 'ops/cpu.py', PACKAGE / 'ops/layout.py'  # layout.platform says it
    programs = [path for path in FILES if _part(path) in PURE | {'sharding'}]
    for path in {*programs} - {*door}:
        for node in ast.walk(_tree(path)):
            is_asked = isinstance(node, ast.Constant) and node.value == 'cpu'
            assert not is_asked, f'{path}:{node.lineno}; see ops/cpu.py'


@pytest.mark.parametrize('path', FILES, ids=NAMES)
def test_files_and_functions_are_short(path):
    lines = path.read_text(encoding='utf-8').count('\n')
    assert lines <= 500, f'{path} has {lines} lines'
    for node in ast.walk(_tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f'{path}:{node.lineno} {node.name} has {length} lines'


@pytest.mark.parametrize('path', FILES, ids=NAMES)
def test_what_is_public_is_documented(path):
    """Modules, and their public functions and classes."""
    tree = _tree(path)
    assert ast.get_docstring(tree), f'{path} has no docstring'
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            documented = node.name.startswith('_') or ast.get_docstring(node)
            assert documented, f'{path}:{node.lineno} {node.name} has no docstring'


@pytest.mark.parametrize('path', FILES, ids=NAMES)
def test_settings_have_one_default_and_functions_named_arguments(path):
    """No ``config.get(name, default)``; no ``**kwargs`` and no utils module."""
    assert path.stem not in ('utils', 'util', 'helpers', 'common', 'misc')
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'get':
            receiver = ast.unparse(node.func.value)
            assert not receiver.endswith(('config', 'cfg')), (
                f'{path}:{node.lineno} {ast.unparse(node)}: use a dataclass default'
            )
        if isinstance(node, ast.FunctionDef) and node.args.kwarg:
            name = node.args.kwarg.arg
            assert name != 'kwargs', f'{path}:{node.lineno} {node.name}(**kwargs)'


@pytest.mark.parametrize('path', FILES, ids=NAMES)
def test_no_module_level_state(path):
    """Module level holds constants: nothing lower-case is assigned or global."""
    tree = _tree(path)
    for node in tree.body:
        for target in getattr(node, 'targets', []):
            if isinstance(target, ast.Name):
                name = target.id
                assert not name.islower() or name.startswith('__'), (
                    f'{path}:{node.lineno} assigns {name} at module level'
                )
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f'{path}:{node.lineno} says global'
