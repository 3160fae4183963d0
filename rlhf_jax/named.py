"""Modules that a setting names: a file of one of our packages, or the user's own.

``'ipo'`` is a file, ``'my_package.my_loss'`` is imported as it stands, so that adding
one needs no registry. Read ``preference/__init__.py`` next.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType


def load_module(
    package: str, name: str, *, where: str, what: str, needed: tuple[str, ...]
) -> ModuleType:
    """The module of a name.

    Args:
        package: whose files have short names, if they have what is needed.
        name: of a file of ``package``, or a dotted one.
        where: how the user knows the setting, e.g. ``'config.preference.name'``.
        what: what such a module is, e.g. ``'preference loss'``.
        needed: names that it must have.

    Raises:
        ValueError: no such module, or one that lacks a name.
    """

    def missing(module: ModuleType) -> list[str]:
        return [part for part in needed if not hasattr(module, part)]

    if not isinstance(name, str):
        raise ValueError(f'{where}={name!r} is no name of a {what}')
    if '.' not in name:
        path = importlib.import_module(package).__path__
        files = [file.name for file in pkgutil.iter_modules(path)]
        if name in files:
            module = importlib.import_module(f'{package}.{name}')
            if not missing(module):
                return module
        modules = {file: importlib.import_module(f'{package}.{file}') for file in files}
        known = [file for file, module in modules.items() if not missing(module)]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f'did you mean {close[0]!r}?' if close else f'use {sorted(known)},'
        raise ValueError(
            f'{where}={name!r} is no {what}; {hint} or package.module for one of your '
            'own'
        )
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f'{where}={name!r} cannot be imported ({error})') from error
    except Exception as error:  # whatever the user's own module raises
        raise ValueError(
            f'{where}={name!r} cannot be imported ({type(error).__name__}: {error})'
        ) from error
    if missing(module):
        raise ValueError(
            f'{where}={name!r} has no {", ".join(missing(module))}; a {what} is a '
            f'module with {", ".join(needed)} (see {package})'
        )
    return module
