"""``--profile``: what it leaves behind, and which steps a trace is of."""

import gzip
import json

import jax
import pytest

from rlhf_jax import main
from rlhf_jax.main import launch
from rlhf_jax.stages.profiling import tracing, write_phases
from tests.small_config import get_config


def test_a_profiled_run_leaves_a_trace_and_its_phases(tmp_path):
    config = get_config()
    config.stages = ('sft',)
    config.sft.init, config.sft.packing = 'scratch', 'best_fit'
    launch(config, tmp_path, profile=True)
    folder = tmp_path / 'sft' / 'profile'
    (path,) = folder.rglob('perfetto_trace.json.gz')
    events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
    assert any('Execute' in event.get('name', '') for event in events)
    rows = (folder / 'phases.md').read_text(encoding='utf-8').splitlines()[2:]
    done = json.loads((tmp_path / 'sft' / 'done.json').read_text(encoding='utf-8'))
    assert {row.split(' | ')[0][2:] for row in rows} <= done['seconds'].keys()
    assert 'packed into' in done['data']['train']
    assert sum(int(row.split('|')[3].strip(' %')) for row in rows) == pytest.approx(
        100, abs=len(rows)
    )


@pytest.mark.parametrize('steps, traced', [(10, [5, 6, 7]), (6, [5])])
def test_the_steps_behind_the_warm_up_are_traced(tmp_path, monkeypatch, steps, traced):
    state = {'on': False}
    monkeypatch.setattr(
        jax.profiler, 'start_trace', lambda *_, **__: state.update(on=True)
    )
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: state.update(on=False))
    seen = []
    with tracing(tmp_path, 3) as before:
        for step in range(3, steps):
            before(step, None)
            if state['on']:
                seen.append(step)
    assert seen == traced and not state['on']


def test_phases_by_hand(tmp_path, capsys):
    write_phases(tmp_path / 'profile', {'score': 1.0, 'generate': 3.0})
    text = '| phase | seconds | share |\n|---|---|---|\n'
    text += '| generate | 3.0 | 75% |\n| score | 1.0 | 25% |\n'
    assert (tmp_path / 'profile' / 'phases.md').read_text(encoding='utf-8') == text
    assert capsys.readouterr().out == text


@pytest.fixture
def cache_setting():
    """Gives back the tests' own place for compiled programs."""
    names = 'jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs'
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_where_the_user_says(
    tmp_path, monkeypatch, cache_setting
):
    jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'mine'))
    main._keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'mine')
    jax.config.update('jax_compilation_cache_dir', None)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    main._keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None  # several devices of a CPU
    monkeypatch.setattr(jax, 'local_device_count', lambda: 1)
    main._keep_compiled()
    expected = str(tmp_path / 'rlhf_jax' / 'xla')
    assert jax.config.jax_compilation_cache_dir == expected
