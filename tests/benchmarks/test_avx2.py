"""Systems that do not see AVX-512: a changed copy of jaxlib, and what XLA then does."""

import os
import platform
import subprocess
import sys

import jaxlib
import pytest

from benchmarks import avx2
from benchmarks.avx2 import LIBRARY

PROGRAM = """
import jax, jax.numpy as jnp, jaxlib
from jax.experimental.serialize_executable import serialize
double = jax.jit(lambda x: 2 * x).lower(jnp.ones(8)).compile()
print(jaxlib.__file__, double(jnp.arange(8.0)).sum())
compiled_for = serialize(double)[0]
print(b'+avx2' in compiled_for, b'+avx512' in compiled_for)
"""


def package(directory, program):
    directory.mkdir()
    (directory / LIBRARY).write_bytes(program)
    (directory / 'version.py').write_text('other files are as they were')
    return directory


def test_the_question_is_answered_in_a_copy(tmp_path):
    program = b'\x75\x08\x31\xc9\x0f\x01\xd0\x89\xc1'
    source = package(tmp_path / 'jaxlib', program)
    (tmp_path / 'copy').mkdir()
    avx2.copied(source, tmp_path / 'copy')
    copy = tmp_path / 'copy' / 'jaxlib'
    assert (copy / LIBRARY).read_bytes() == b'\x75\x08\xb8\x07\x00\x00\x00\x89\xc1'
    assert (copy / 'version.py').read_text() == 'other files are as they were'
    assert (source / LIBRARY).read_bytes() == program


def test_a_library_that_asks_in_another_way_is_refused(tmp_path):
    source = package(tmp_path / 'jaxlib', b'\x31\xd2\x0f\x01\xd0')
    (tmp_path / 'copy').mkdir()
    with pytest.raises(ValueError, match='has no xgetbv .* measure without --isa'):
        avx2.copied(source, tmp_path / 'copy')


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='AVX is of x86-64')
def test_xla_computes_without_avx512(tmp_path):
    limited = avx2.environment([sys.executable], tmp_path)
    environment = {**os.environ, **limited, 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    command = [sys.executable, '-c', PROGRAM]
    said = subprocess.run(command, env=environment, capture_output=True, text=True)
    [where, *computed] = said.stdout.split()
    assert where == f'{tmp_path}/jaxlib/__init__.py'
    assert computed == ['56.0', 'True', 'False']


def test_another_jaxlib_is_not_replaced(tmp_path):
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\necho 0.4.1\n')
    python.chmod(0o755)
    message = f'{python} has jaxlib 0.4.1 and would run with a copy of '
    with pytest.raises(ValueError, match=message + jaxlib.__version__):
        avx2.environment([str(python)], tmp_path / 'copy')
    assert not (tmp_path / 'copy').exists()


def test_an_interpreter_without_jax_is_none_of_its_business(tmp_path, monkeypatch):
    source = package(tmp_path / 'jaxlib', avx2.QUESTION)
    monkeypatch.setattr(jaxlib, '__file__', str(source / '__init__.py'))
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\necho\n')
    python.chmod(0o755)
    limited = avx2.environment([str(python)], tmp_path / 'copy')
    assert limited['PYTHONPATH'] == str(tmp_path / 'copy')
    assert limited['ATEN_CPU_CAPABILITY'] == 'avx2'
    assert (tmp_path / 'copy' / 'jaxlib' / LIBRARY).read_bytes() == avx2.ANSWER
