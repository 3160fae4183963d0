"""The installed commands: ``rlhf-jax``, ``rlhf-jax-sample`` and so on.

They are ``python -m rlhf_jax.main``, ``….sample`` and so on. Like these they
find modules of the folder that they are called in, so that a setting can name one
(``my_rewards:short``), and a recipe its neighbours.
"""

from __future__ import annotations

import os
import runpy
import sys


def train() -> None:
    """``rlhf-jax``: see ``rlhf_jax/main.py``."""
    _run('main')


def sample() -> None:
    """``rlhf-jax-sample``: see ``rlhf_jax/sample.py``."""
    _run('sample')


def export() -> None:
    """``rlhf-jax-export``: see ``rlhf_jax/export.py``."""
    _run('export')


def label() -> None:
    """``rlhf-jax-label``: see ``rlhf_jax/label.py``."""
    _run('label')


def agreement() -> None:
    """``rlhf-jax-agreement``: see ``rlhf_jax/agreement.py``."""
    _run('agreement')


def _run(name: str) -> None:
    sys.path.insert(0, os.getcwd())
    runpy.run_module(f'rlhf_jax.{name}', run_name='__main__', alter_sys=True)
