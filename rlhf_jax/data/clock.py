"""The date that chat templates write: that on which the run was begun.

A template may ask for the time (``strftime_now('%d %b %Y')``, as that of Llama 3.2
does). A run that is resumed on another day has to train on the same tokens: the date is
kept beside the tokenizer that the run saves, and is put into the template as text.
Read ``chat.py`` next.
"""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

FILE = 'begun.json'

# strftime_now('%d %b %Y'): group 2 is the format.
CALL = re.compile(r"""\bstrftime_now\(\s*(['"])((?:(?!\1)[^\\])*)\1\s*\)""")
ASKED = re.compile(r'\bstrftime_now\s+is\s+(?:not\s+)?defined\b')


def begin(tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets the date that a tokenizer's chat template writes to now."""
    tokenizer.begun = datetime.datetime.now()


def begun(tokenizer: PreTrainedTokenizerBase) -> datetime.datetime:
    """The date that a tokenizer's chat template writes; now, where none was set, and
    the same from then on.
    """
    if 'begun' not in vars(tokenizer):
        begin(tokenizer)
    return tokenizer.begun


def same_date(tokenizer: PreTrainedTokenizerBase, run: PreTrainedTokenizerBase) -> None:
    """Gives a tokenizer the date of a run's."""
    tokenizer.begun = begun(run)


def save_date(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the date beside a saved tokenizer."""
    text = json.dumps({'begun': begun(tokenizer).isoformat()}) + '\n'
    (folder / FILE).write_text(text, encoding='utf-8')


def restore_date(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Sets the date to the one beside a saved tokenizer, if there is one.

    Raises:
        ValueError: the file holds no date.
    """
    path = folder / FILE
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding='utf-8'))['begun']
        tokenizer.begun = datetime.datetime.fromisoformat(found)
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise ValueError(
            f'{path} holds no date ({error}); it should read '
            '{"begun": "2025-01-31T12:00:00"}, the time at which the run was begun'
        ) from error


def without_clock(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template with the date in the place of every question for the time.

    Raises:
        ValueError: it asks with a format that is no text.
    """
    if 'strftime_now' not in template:
        return template
    fixed = CALL.sub(
        lambda match: json.dumps(begun(tokenizer).strftime(match[2])), template
    )
    if 'strftime_now' in ASKED.sub('', fixed):
        raise ValueError(
            f'the chat template of {tokenizer.name_or_path!r} calls strftime_now with '
            'something else than a format in quotes, so that the date of the run '
            "cannot be put there; write the format out: strftime_now('%d %b %Y')"
        )
    return fixed
