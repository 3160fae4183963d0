"""Ten thousand odd inputs: each is accepted, or refused by an error with its place.

They take about ten minutes on two cores, and are left out unless named:

    python -m pytest -n 2 --dist load -m odd tests/odd

One chunk of every kind is run by itself with ``python -m tests.odd --kind KIND --chunk
N``, which prints what went wrong and how many were told, accepted, …
"""

import random

import pytest
from huggingface_hub import constants

from rlhf_jax.data import template_limits
from tests.odd.cases import Case, Hang, outcome
from tests.odd.running import CHUNKS, SIZE, makers, run_chunk

JOBS = [(kind, chunk) for kind, count in CHUNKS.items() for chunk in range(count)]


@pytest.mark.odd
@pytest.mark.parametrize(('kind', 'chunk'), JOBS)
def test_no_traceback_no_hang_and_every_error_with_its_place(kind, chunk, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(template_limits, 'SECONDS', 0.5)
    monkeypatch.setattr(template_limits, 'MEMORY', 2**27)
    counts, failures = run_chunk(kind, chunk)
    assert not failures, '\n'.join(failures)
    assert counts.total() == SIZE and counts['told'] > 0


def test_there_are_ten_thousand():
    assert sum(CHUNKS.values()) * SIZE == 10_000 and CHUNKS.keys() == makers().keys()


@pytest.mark.parametrize('kind', ['records', 'files', 'templates', 'flags'])
def test_the_same_inputs_at_every_call(kind, tmp_path):
    def about(folder):
        folder.mkdir()
        return [makers()[kind](random.Random(i), folder).about for i in range(20)]

    names = about(tmp_path / 'a'), about(tmp_path / 'b')
    first, second = (str(x).replace(str(tmp_path), '') for x in names)
    assert first.replace('/a', '/b') == second and len(set(names[0])) > 10


def fail(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ('call', 'expected'),
    [
        (lambda: None, 'accepted'),
        (fail(ValueError('data.jsonl:3: is odd')), 'told'),
        (fail(ValueError('is odd')), 'no place: x: is odd'),
        (fail(ValueError('data.jsonl' + 'x' * 9999)), 'too long: x: '),
        (fail(KeyError('a')), "traceback: x: KeyError: 'a'"),
        (fail(OSError(36, 'File name too long')), 'traceback: x: OSError'),
        (fail(Hang()), 'hang: x'),
    ],
)
def test_the_judge_sees_every_kind_of_failure(call, expected):
    assert outcome(Case('x', call, ('data.jsonl',))).startswith(expected)


def test_a_hang_is_ended(monkeypatch):
    monkeypatch.setattr('tests.odd.cases.SECONDS', 1)

    def forever():
        while True:
            pass

    assert outcome(Case('x', forever, ())) == 'hang: x'
