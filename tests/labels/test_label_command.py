"""The command: links, mistakes in a line, files in and out."""

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from rlhf_jax.labels.records import Label, to_row
from rlhf_jax.labels.store import labels_of
from tests.labels import folder as made
from tests.labels.serving import Serving
from tests.small_config import ROOT

pytest.importorskip('starlette')
pytest.importorskip('uvicorn')


def _call(url, token, path, value=None):
    data = None if value is None else json.dumps(value).encode()
    headers = {'Authorization': f'Bearer {token}'}
    request = urllib.request.Request(f'{url}{path}', data, headers)
    with urllib.request.urlopen(request, timeout=10) as reply:
        return json.load(reply)


def _run(*flags):
    command = [sys.executable, '-m', 'rlhf_jax.label', *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_a_killed_server_goes_on_with_the_same_links_and_answers(tmp_path):
    folder = made.write(tmp_path / 'people', made.items(2))
    serving = Serving(folder, '--port=0')
    links = serving.links()
    assert list(links) == ['ann', 'bob'] and 'ssh -L' in serving.text
    url, token = links['ann'].split('#')
    assert url.startswith('http://127.0.0.1:')
    shown = _call(url, token, 'state')['task']
    with pytest.raises(urllib.error.HTTPError, match='403'):
        _call(url, 'wrong', 'state')
    serving.wait_for(r'refused a wrong token from 127.0.0.1 \(1 so far\)')
    serving.end(signal.SIGKILL)

    port = url.rstrip('/').rpartition(':')[2]
    serving = Serving(folder, f'--port={port}')
    assert serving.links() == links
    assert 'wrong token so far: 1' in serving.text
    said = {'verdict': 'judged', 'place': 0, 'strength': 1}
    sent = {'id': 'a', 'key': shown['key'], 'said': said, 'seconds': 1}
    assert _call(url, token, 'answer', sent)['answered'] == 1
    serving.wait_for('1 of 2 items have 1 label; labels of ann 1, bob 0')

    second = Serving(folder, f'--port={port}')  # the port is in use
    second.wait_for('^error: .*another --port')
    assert second.process.wait(timeout=30) == 1 and 'Traceback' not in second.text

    assert serving.end(signal.SIGINT) == 0
    assert 'stopped; the same command goes on' in serving.text
    assert 'Traceback' not in serving.text
    assert [x.item for x in labels_of(folder / 'labels.db')] == ['pair-0']


def test_an_address_of_another_machine_is_told(tmp_path):
    folder = made.write(tmp_path / 'people', made.items(1))
    flags = ['--workdir', tmp_path, '--stage', folder.name]
    done = _run(*flags, '--host=192.0.2.1')
    assert done.returncode == 1 and 'an address of this machine' in done.stderr
    assert done.stderr.startswith('error: ') and 'Traceback' not in done.stderr


def test_on_other_addresses_the_links_name_the_host_and_a_warning_stands_below(
    tmp_path,
):
    folder = made.write(tmp_path / 'people', made.items(1))
    serving = Serving(folder, '--host=0.0.0.0', '--port=0')
    assert f'http://{socket.gethostname()}:' in serving.links()['ann']
    assert 'unencrypted' in serving.text
    serving.end(signal.SIGKILL)


def test_a_stage_that_is_finished_or_has_not_begun_is_told(tmp_path):
    done = _run('--workdir', tmp_path, '--stage', 'people')
    assert done.returncode == 1 and 'command of the run first' in done.stderr
    folder = made.write(tmp_path / 'people', made.items(1))
    (folder / 'done.json').write_text('{}')
    done = _run('--workdir', tmp_path, '--stage', 'people')
    assert done.returncode == 1 and 'is finished' in done.stderr


def test_a_server_that_is_open_when_the_run_finishes_says_so(tmp_path):
    folder = made.write(tmp_path / 'people', made.items(1))
    serving = Serving(folder, '--port=0')
    url, token = serving.links()['ann'].split('#')
    (folder / 'done.json').write_text('{}')
    with pytest.raises(urllib.error.HTTPError, match='409'):
        _call(url, token, 'state')
    serving.wait_for('^no more answers are taken: this stage is finished.*Ctrl-C')
    assert serving.end(signal.SIGINT) == 0 and 'Traceback' not in serving.text


def test_labels_go_in_and_out(tmp_path):
    folder = made.write(tmp_path / 'people', made.items(2))
    given, out = tmp_path / 'given.jsonl', tmp_path / 'out.jsonl'
    label = Label(item='pair-1', labeller='eve', probability=0.0)
    given.write_text(json.dumps(to_row(label)) + '\n')
    flags = ['--workdir', tmp_path, '--stage', folder.name]
    done = _run(*flags, '--import', given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        'added 1 labels; 0 were there already',
        '1 of 2 items have 1 label; labels of ann 0, bob 0, eve 1',
    ]
    pairs = tmp_path / 'pairs.jsonl'
    done = _run(*flags, '--export', out, '--comparisons', pairs)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == to_row(label)
    row = json.loads(pairs.read_text())
    assert (row['chosen'], row['rejected']) == ('poor 1', 'good 1')


def test_comparisons_of_ratings_are_refused(tmp_path):
    rows = made.items(1, form='rating', completions=['one'])
    folder = made.write(tmp_path / 'people', rows, form='rating')
    place = [f'--workdir={folder.parent}', f'--stage={folder.name}']
    out = tmp_path / 'out'
    done = _run(*place, f'--export={out}', f'--comparisons={tmp_path / "pairs"}')
    assert done.returncode == 1 and 'use --export' in done.stderr
    assert 'people asks for ratings' in done.stderr and not out.exists()
    assert _run(*place, f'--export={out}').returncode == 0 and out.exists()


def test_import_is_given_apart_from_export(tmp_path):
    folder = made.write(tmp_path / 'people', made.items(2))
    place = [f'--workdir={folder.parent}', f'--stage={folder.name}']
    done = _run(*place, f'--export={tmp_path / "out"}', f'--import={tmp_path / "in"}')
    assert done.returncode == 1 and 'give them apart' in done.stderr
    assert not (tmp_path / 'out').exists()


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    folder = made.write(tmp_path / 'people', made.items(2))
    place = [f'--workdir={folder.parent}', f'--stage={folder.name}']
    done = _run(*place, f'--comparisons={tmp_path / "nowhere" / "out"}')
    assert done.returncode == 1 and 'out cannot be written (No such' in done.stderr
