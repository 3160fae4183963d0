"""Prints how far labellers agree, and whom to trust.

    python -m rlhf_jax.agreement runs/a/label/labels.jsonl
    python -m rlhf_jax.agreement labels.jsonl --items items.jsonl --json agreement.json

``items.jsonl`` beside the labels is read where it is there: it says which items are
gold, and how long the completions are. ``docs/agreement.md`` says what the numbers are;
``labels/agreement.py`` computes them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from rlhf_jax import files
from rlhf_jax.files import named_path

ITEMS = 'items.jsonl'
# Name, what it is called, what it says.
LINES = (
    ('agreement', 'percent agreement', 'of two labels of the same question'),
    ('cohen_kappa', "Cohen's κ", 'of two labellers; mean over all pairs of them'),
    ('fleiss_kappa', "Fleiss' κ", 'whoever gave which label'),
    ('alpha_nominal', "Krippendorff's α, nominal", 'all differences alike'),
    ('alpha_ordinal', "Krippendorff's α, ordinal", 'a tie is nearer than the opposite'),
    ('ceiling', 'ceiling', 'largest accuracy on single labels, pairs equally hard'),
    ('ceiling_least', 'ceiling, at least', 'pairs clear to all or to nobody'),
    ('ceiling_dawid_skene', 'ceiling, Dawid–Skene', 'labellers of different quality'),
    ('gold', 'right on gold items', ''),
    ('self', 'same answer when asked again', ''),
    ('first_shown', 'the first shown was chosen', '½ where the side does not matter'),
    ('longer', 'the longer was chosen', ''),
)
COLUMNS = (
    ('gold', 'gold'),
    ('others', 'others'),
    ('self', 'themselves'),
    ('first_shown', 'first shown'),
    ('longer', 'longer'),
)


def agreement(path: Path, items: Path | None = None) -> dict[str, Any]:
    """The report of a file of labels.

    Args:
        path: of the labels.
        items: of the items; None for ``items.jsonl`` beside the labels, if it is there.

    Raises:
        ValueError: no such file, or no labels in it; or whatever is wrong with them.
    """
    from rlhf_jax.labels.agreement import report
    from rlhf_jax.labels.records import read_items, read_labels

    labels = read_labels(path)
    beside = path.parent / ITEMS
    if items is None and beside.exists() and beside != path:
        items = beside
    asked = None if items is None else read_items(items)
    try:
        return report(asked, labels)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text.

    Args:
        report: from :func:`rlhf_jax.labels.agreement.report`.
    """
    text = [
        '{labels} labels by {labellers} labellers of {items} items, {items_shared} of '
        'them by two or more; {skipped} skipped, {bad} called bad, {flagged} '
        'flagged'.format(**report)
    ]
    if report['labellers'] == 1:
        text.append('one labeller: agreement needs two')
    text.append('')
    for name, title, about in LINES:
        if report[name] is None:
            continue
        shown = f'{report[name]:.3f}'
        if report.get(f'{name}_interval') is not None:
            shown += ' [{:.3f}, {:.3f}]'.format(*report[f'{name}_interval'])
        text.append(f'{title:<30}{shown:<24}{about}'.rstrip())
    rows = report['by_labeller']
    width = max(len('labeller'), *(len(row['labeller']) for row in rows)) + 2
    shares = {k: v for k, v in COLUMNS if any(row[k] is not None for row in rows)}
    head = ''.join(f'{title:<22}' for title in shares.values())
    text += ['', f'{"labeller":<{width}}{"labels":<8}{head}'.rstrip()]
    for row in rows:
        cells = ''.join(f'{_cell(row, name):<22}' for name in shares)
        text.append(f'{row["labeller"]:<{width}}{row["labels"]:<8}{cells}'.rstrip())
    for name, about in (
        ('never_agree', 'never agrees with the others'),
        ('near_chance', 'agrees with the others no more than by chance'),
    ):
        text += [f'{labeller} {about}' for labeller in report[name]]
    return text


def _cell(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return '–'
    low, high = row[f'{name}_interval']
    return f'{row[name]:.2f} [{low:.2f}, {high:.2f}]'


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    if len(argv) != 2:
        raise app.UsageError('one file of labels is needed, e.g. label/labels.jsonl')
    values = flags.FLAGS
    try:
        items = None if values.items is None else named_path(values.items)
        found = agreement(named_path(argv[1]), items)
        if values.json is not None:
            files.write_json(named_path(values.json), found)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(1)
    print('\n'.join(lines(found)))


def run() -> None:
    """Entry point; defines the flags, so that an import of this file defines none."""
    # A console without UTF-8 shows other characters by their code.
    sys.stdout.reconfigure(errors='backslashreplace')
    flags.DEFINE_string('items', None, 'items, where they are not beside the labels')
    flags.DEFINE_string('json', None, 'also write the numbers to this file')
    app.run(main)


if __name__ == '__main__':
    run()
