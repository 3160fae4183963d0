"""How a model is asked for a critique of a response, and for a revision: prompt files.

A prompt file is plain text with ``{prompt}``, ``{response}``, ``{critique_request}``
and, to ask for a revision, ``{critique}`` and ``{revision_request}`` in it. Texts of
models are put in as they were written, with the white space that they begin with. A
prompt in messages is asked in a further turn of the user, behind the response: its
prompt file has no ``{prompt}``.

Source: Bai et al. 2022, arXiv 2212.08073, §3.1. Read ``records.py`` next.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from rlhf_jax.files import named_path

CRITIQUE = Path(__file__).with_name('critique.txt')
REVISION = Path(__file__).with_name('revision.txt')
PLACES = ('prompt', 'response', 'critique_request', 'critique', 'revision_request')
_PLACE = re.compile('{(' + '|'.join(PLACES) + ')}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestPrompt:
    """A prompt file, or what the package has in its place; None where it has none."""

    text: str | None  # for prompts in text
    turn: str | None  # for prompts in messages: the user's further turn
    where: str


def critique_prompt(path: str | Path | None = None) -> RequestPrompt:
    """The prompt that asks for a critique.

    Args:
        path: of a text file in UTF-8, whose last line breaks do not count; None for the
            one of the package, which in messages is the critique request alone.

    Raises:
        ValueError: it cannot be read or lacks a place, or one has no value yet.
    """
    known = ('prompt', 'response', 'critique_request')
    return _read(path, CRITIQUE, ('prompt', 'response'), 'critique_request', known)


def revision_prompt(path: str | Path | None = None) -> RequestPrompt:
    """The prompt that asks for a revision; see :func:`critique_prompt`."""
    needed = ('prompt', 'response', 'critique')
    return _read(path, REVISION, needed, 'revision_request', PLACES)


def fill(template: str, **values: str) -> str:
    """The text with its places filled; no text that is filled in is searched for
    further places.
    """
    return _PLACE.sub(lambda match: values[match[1]], template)


def _read(
    path: str | Path | None,
    own: Path,
    needed: tuple[str, ...],
    request: str,
    known: tuple[str, ...],
) -> RequestPrompt:
    """Args: ``needed`` in a text, ``request`` in a turn, ``known`` in both."""
    file = own if path is None else named_path(path)
    try:
        text = file.read_text(encoding='utf-8').rstrip('\r\n')
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'{file} cannot be read ({error})') from error
    found = {match[1] for match in _PLACE.finditer(text)}
    for name in sorted(found - {*known}):
        raise ValueError(
            f'{file}: {{{name}}} has no value when this is asked; use '
            + ', '.join(f'{{{name}}}' for name in known)
        )
    is_turn = 'prompt' not in found
    missing = [
        name for name in ((request,) if is_turn else needed) if name not in found
    ]
    if missing:
        raise ValueError(
            f'{file}: {{{missing[0]}}} stands nowhere; it needs '
            + ', '.join(f'{{{name}}}' for name in needed)
            + f', or for prompts in messages {{{request}}} and no {{prompt}}'
        )
    if path is None:
        return RequestPrompt(text=text, turn=f'{{{request}}}', where=str(file))
    texts = {'text': None, 'turn': text} if is_turn else {'text': text, 'turn': None}
    return RequestPrompt(**texts, where=str(file))
