"""A stage's folder with items and a plan, for the tests of the labelling of people."""

import json


def items(count, **fields):
    """Comparisons of ``'good 3'`` with ``'poor 3'``."""
    return [
        {
            'item': f'pair-{i}',
            'prompt': f'question {i}',
            'completions': [f'good {i}', f'poor {i}'],
            **fields,
        }
        for i in range(count)
    ]


def gold(count):
    return [
        row | {'item': f'gold-{i}', 'purpose': 'gold', 'known': {'probability': 1.0}}
        for i, row in enumerate(items(count))
    ]


def training(count, why='The first one is good.'):
    known = {'probability': 1.0, 'strength': 2}
    more = {'purpose': 'training', 'known': known, 'why': why}
    return [
        row | more | {'item': f'training-{i}'} for i, row in enumerate(items(count))
    ]


def write(folder, rows, **plan):
    """Writes both files and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    (folder / 'items.jsonl').write_text(lines, encoding='utf-8')
    plan = {'labellers': ['ann', 'bob'], **plan}
    (folder / 'label.json').write_text(json.dumps(plan), encoding='utf-8')
    return folder
