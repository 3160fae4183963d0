"""Systems that do not see AVX-512, on a processor that has it.

With AVX-512 the libraries' products lie further apart than without, and so do ratios
with them (``docs/performance.md``). ``--isa avx2`` of the benchmark measures the other
kind of processor on this one. PyTorch and its libraries have settings for that. XLA has
one for the code that it generates, but none for its library of products, which asks the
processor itself: so JAX runs from a copy of jaxlib that has the answer in it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jaxlib

# xor ecx, ecx; xgetbv: the registers that the operating system saves, in eax.
QUESTION = bytes.fromhex('31 c9 0f 01 d0')
# mov eax, 7: those of x87, SSE and AVX; bits 5 to 7 are those of AVX-512 (Intel,
# Software Developer's Manual, volume 1, section 13.3). It is as long.
ANSWER = bytes.fromhex('b8 07 00 00 00')
LIBRARY = 'libjax_common.so'
SETTINGS = {  # MKL, oneDNN and PyTorch's own kernels
    'MKL_ENABLE_INSTRUCTIONS': 'AVX2',
    'ONEDNN_MAX_CPU_ISA': 'AVX2',
    'ATEN_CPU_CAPABILITY': 'avx2',
}
VERSION = """
import importlib.metadata as m
print(*[each.version for each in m.distributions(name='jaxlib')][:1])
"""


def copied(package: Path, directory: Path) -> None:
    """Copies jaxlib to ``directory/jaxlib`` and has it see no AVX-512.

    Raises:
        ValueError: the library does not ask in the way that is known.
    """
    copy = Path(shutil.copytree(package, directory / 'jaxlib')) / LIBRARY
    program = copy.read_bytes() if copy.exists() else b''
    if QUESTION not in program:
        raise ValueError(
            f'--isa avx2: {package / LIBRARY} has no xgetbv behind xor ecx, ecx: it is '
            'not for x86-64, or of another compiler; measure without --isa'
        )
    copy.write_bytes(program.replace(QUESTION, ANSWER))


def environment(pythons: Sequence[str], directory: Path) -> dict[str, str]:
    """What systems are to have in their environment.

    Args:
        pythons: their interpreters.
        directory: an empty one, where the copy of jaxlib is made.

    Raises:
        ValueError: an interpreter has another jaxlib than this one, or see
            :func:`copied`.
    """
    for python in pythons:
        command = [python, '-c', VERSION]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        version = found.stdout.strip()
        if version not in ('', jaxlib.__version__):
            raise ValueError(
                f'--isa avx2: {python} has jaxlib {version} and would run with a copy '
                f'of {jaxlib.__version__}; install the same one in both'
            )
    copied(Path(jaxlib.__file__).parent, directory)
    return {'PYTHONPATH': str(directory), **SETTINGS}
