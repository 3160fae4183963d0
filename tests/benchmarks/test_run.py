"""The command and its workers: turns, refusals, and the whole thing on a tiny model."""

import json
import sys

import pytest

from benchmarks import run, workers
from benchmarks.sizes import MODELS, WORKS, Work
from benchmarks.workers import ROOT, Plan, System, Worker, WorkerError

TINY = MODELS['tiny']
PLAN = Plan(device='cpu', threads=1, rounds=3, steps=2, warmup=1, limit=20.0)
WORK = Work(kind='sft', batch=1, length=2)
FAKE = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT / 'benchmarks' / 'peers')!r})
import gate
name, diary, parameters = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
def work(g):
    print('what a library prints is no answer, on cores', len(os.sched_getaffinity(0)))
    g.end()  # before the first step nothing ends
    g.ready(parameters=dict(policy=parameters))
    for step in range(10**6):
        g.begin()
        open(diary, 'a').write(name)
        g.mark('write')
        if name == 'f' and step == 1:
            raise RuntimeError('the peer broke')
        if name == 'k' and step == 1:
            os.kill(os.getpid(), 9)
        if name == 's' and step == 1:
            time.sleep(60)
        g.end()
gate.serve(work)
"""


def fake(name, diary, parameters=TINY.policy):
    """A system of which every step writes its name down."""
    command = (sys.executable, '-c', FAKE, name, str(diary), str(parameters))
    return System(name, command)


@pytest.fixture
def diary(tmp_path):
    path = tmp_path / 'diary'
    path.touch()
    return path


def probe_of(tmp_path, diary):
    spec = workers.specification(TINY, WORK, 'cpu', 1)
    return Worker(fake('m', diary), spec, tmp_path / 'm.log', 20.0)


def test_systems_run_in_turns(tmp_path, diary):
    probe = probe_of(tmp_path, diary)
    systems = [fake('a', diary), fake('b', diary)]
    results = workers.measure(systems, probe, TINY, WORK, PLAN, tmp_path)
    probe.close()
    # A step of each to warm up; then, thrice, three of the machine and two of each.
    assert diary.read_text() == 'ab' + 3 * 'mmmaabb'
    assert [len(x['seconds']) for x in results['a']['rounds']] == [2, 2, 2]
    assert len(results['b']['warm']) == 1
    assert len(results['machine']['rounds']) == 3
    [first, *_] = results['a']['rounds']
    assert 0 < first['phases']['write'][0] <= first['seconds'][0]
    assert first['memory']['peak_bytes'] >= first['memory']['now_bytes'] > 10**6
    log = (tmp_path / 'a.log').read_text()
    assert 'what a library prints is no answer, on cores 1' in log


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('f', 'f: RuntimeError: the peer broke; see .*f.log'),
        ('k', 'k: ended without an answer'),
        ('s', 's: did not answer in 2 seconds'),
    ],
)
def test_one_that_fails_leaves_the_others_alone(tmp_path, diary, name, message):
    probe = probe_of(tmp_path, diary)
    systems = [fake(name, diary), fake('b', diary)]
    plan = Plan(device='cpu', threads=1, rounds=2, steps=2, warmup=1, limit=2.0)
    results = workers.measure(systems, probe, TINY, WORK, plan, tmp_path)
    probe.close()
    assert results[name].keys() == {'error'}
    with pytest.raises(WorkerError, match=message):
        raise WorkerError(results[name]['error'])
    assert len(results['b']['rounds']) == 2
    # Its first step warmed up; of the second it made one step and no other.
    assert diary.read_text() == f'{name}bmmm{name}bbmmmbb'


def test_another_model_is_not_the_same_work(tmp_path, diary):
    probe = probe_of(tmp_path, diary)
    systems = [fake('a', diary, TINY.policy + 1)]
    results = workers.measure(systems, probe, TINY, WORK, PLAN, tmp_path)
    probe.close()
    assert 'policy has 28,833 parameters, not 28,832' in results['a']['error']
    score = TINY.backbone + TINY.width
    workers.check_parameters('a', TINY, {'critic': score, 'reward_model': score + 1})
    with pytest.raises(WorkerError, match='critic'):
        workers.check_parameters('a', TINY, {'critic': score + 2})


def test_what_a_peer_lacks_is_no_error(tmp_path, diary):
    probe = probe_of(tmp_path, diary)
    work = Work(kind='rm', batch=1, length=2)
    system = System('tunix', ('no such program',))
    results = workers.measure([system], probe, TINY, work, PLAN, tmp_path)
    probe.close()
    assert results['tunix'] == {'lacks': 'no trainer of reward models'}


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--peers', 'trl'], r'there is no .*peer_trl/bin/python; make it by '
         r'`benchmarks/peers/setup.sh .* trl`'),
        (['--peers', 'trx'], '--peers=trx: no such peer; known are trl, tunix'),
        (['--size', 'huge'], '--size=huge is unknown; use tiny'),
        (['--size', 'tiny', '--work', 'sft_256'], 'not among the works of --size=tiny'),
        (['--rounds', '0'], '--rounds=0: use at least 1'),
        (['--isa', 'avx2', '--device', 'gpu'], '--isa=avx2 is for --device=cpu'),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_refused(tmp_path, argv, message):
    out = ['--out', str(tmp_path / 'out'), '--peers_dir', str(tmp_path)]
    with pytest.raises(ValueError, match=message):
        run.main([*argv, *out])
    assert not (tmp_path / 'out').exists()


def test_the_works_of_a_size_are_those_of_ours():
    from benchmarks import ours

    kinds = {work.kind for works in WORKS.values() for work in works.values()}
    assert kinds == ours.WORKS.keys()


def test_without_avx512_every_system_is_told(tmp_path, monkeypatch):
    told = []

    def environment(pythons, directory):
        told.extend(pythons)
        return {'ATEN_CPU_CAPABILITY': str(directory)}

    monkeypatch.setattr(run.avx2, 'environment', environment)
    args = run.parse(['--isa', 'avx2'])
    systems = run.systems_of(args, tmp_path)
    assert [system.name for system in systems] == ['machine', 'rlhf_jax']
    assert told == [sys.executable] * 2
    for system in systems:
        assert system.environment == {'ATEN_CPU_CAPABILITY': str(tmp_path)}
    assert not any(each.environment for each in run.systems_of(run.parse([]), tmp_path))


def test_a_system_has_its_environment(tmp_path, diary):
    say = 'import os, gate; gate.serve(lambda g: g.ready(said=os.environ["SAID"]))'
    gate = f'import sys; sys.path.insert(0, {str(ROOT / "benchmarks" / "peers")!r})\n'
    system = System('a', (sys.executable, '-c', gate + say), {'SAID': 'so'})
    spec = workers.specification(TINY, WORK, 'cpu', 1)
    worker = Worker(system, spec, tmp_path / 'a.log', 20.0)
    worker.close()
    assert worker.facts['said'] == 'so'


def test_scaling_varies_one_thing_at_a_time():
    args = run.parse(['--size', 'tiny', '--scaling'])
    by_place = {place: (model, work) for place, model, work in run.jobs_of(args)}
    places = {place[1] for place in by_place}
    assert places == {'batch', 'length', 'depth', 'vocabulary', 'response'}
    model, work = by_place['tiny', 'depth', '28']
    assert (model.layers, model.width, work.kind) == (28, TINY.width, 'sft')
    model, work = by_place['tiny', 'response', '16']
    assert (model, work.kind, work.response) == (TINY, 'generate', 16)


@pytest.mark.parametrize(
    ('lines', 'name'),
    [
        ('model name\t: AMD EPYC\ncpu family\t: 26\nmodel\t\t: 2\nflags\t\t: fpu: x',
         'AMD EPYC (family 26, model 2)'),
        ('model name\t: ARMv8 Processor\nCPU part\t: 0xd0c', 'ARMv8 Processor'),
    ],
)  # fmt: skip
def test_a_processor_is_known_by_its_generation(tmp_path, lines, name):
    (tmp_path / 'cpuinfo').write_text(f'processor\t: 0\n{lines}\n\nprocessor\t: 1\n')
    assert run.processor(tmp_path / 'cpuinfo') == name


def test_the_command_on_a_tiny_model(tmp_path, capsys):
    argv = '--size tiny --work generate --rounds 2 --steps 2 --warmup 1 --out'
    run.main([*argv.split(), str(tmp_path)])
    report = json.loads((tmp_path / 'results.json').read_text())
    [(label, results)] = report['works']['tiny'].items()
    assert label == 'generate'
    assert results['rlhf_jax']['facts']['parameters'] == {'policy': TINY.policy}
    assert len(results['rlhf_jax']['rounds']) == 2
    assert report['peak'].keys() == {'flops', 'bandwidth'}
    said = report['circumstances']['arguments']
    assert said['rounds'] == 2 and said['work'] == ['generate']
    assert str(tmp_path) not in json.dumps(report)  # where it lay tells nobody anything
    table = (tmp_path / 'tables.md').read_text()
    assert '## tiny' in table and '| generate |' in table
    assert table in capsys.readouterr().out
