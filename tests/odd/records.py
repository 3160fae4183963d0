"""Odd data: records of every kind, in files of every kind, and specs that name them."""

import copy
import datetime
import decimal
import functools
import gzip
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from rlhf_jax.data import pipeline
from rlhf_jax.data.examples import collate
from rlhf_jax.data.loading import Limits
from rlhf_jax.data.reward_data import Wanted, load_judgements
from tests.data.test_chat import CHATML, MARKED, made
from tests.odd.cases import Case, as_json, changed, damaged, odd_value, paths_in, write

LENGTH = 300
ASK, SAY = {'role': 'user', 'content': 'so'}, {'role': 'assistant', 'content': 'it is'}
CALL = {'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 1}}}
TALK = [ASK, SAY, {'role': 'user', 'content': 'all'}, {**SAY, 'content': 'right'}]
RECORDS: dict[str, list[dict[str, Any]]] = {
    'demonstrations': [
        {'prompt': 'so', 'completion': ' it is'},
        {'messages': TALK},
        {'prompt': [ASK], 'completion': 'it is', 'chat_template_kwargs': {}},
        {'prompt': [ASK, {**SAY, 'content': 'it'}], 'completion': ' is'},
        {'messages': [ASK, {**SAY, 'tool_calls': [CALL]}], 'tools': [CALL]},
    ],
    'comparisons': [
        {'prompt': 'so', 'chosen': ' it is', 'rejected': ' all', 'margin': 0.5},
        {'chosen': TALK, 'rejected': [*TALK[:3], {**SAY, 'content': 'no'}]},
        {'prompt': 'so', 'chosen': ' it', 'rejected': ' is', 'probability': 0.7},
        {'prompt': 'so', 'chosen': ' is', 'rejected': ' it', 'tie': True},
        {'prompt': [ASK], 'chosen': 'it', 'rejected': 'is', 'gold_chosen': 1},
    ],
    'verdicts': [
        {'prompt': 'so', 'completion': ' it is', 'label': True},
        {'prompt': [ASK], 'completion': 'all', 'label': 0},
    ],
    'prompts': [
        {'prompt': 'so', 'reference': 'it is', 'answer': '7', 'more': [1, {'x': 2}]},
        {'prompt': [ASK], 'tools': []},
        {'messages': TALK},
        {'prompt': [ASK, SAY], 'completion': 'all right'},
    ],
    'rankings': [
        {
            'prompt': 'so',
            'completions': [' it', ' is', ' all'],
            'ranks': [1, 2, 2],
            'gold': [3, 2, 1],
        },
        {'prompt': [ASK], 'completions': ['a', None, 'b'], 'ranks': [1, 2, 3]},
    ],
    'heads': [
        {'prompt': 'so', 'completions': ['a', 'b'], 'ranks': {'x': [1, 2], 'y': None}},
        {'prompt': 'so', 'chosen': ' it', 'rejected': ' all', 'dimension': 'y'},
    ],
    'ratings': [
        {'prompt': 'so', 'completion': ' it is', 'rating': 3},
        {'prompt': [ASK], 'completion': 'all', 'rating': 0.5},
    ],
    'steps': [
        {'prompt': 'so', 'completions': [' it', ' is'], 'labels': [True, False]},
        {'prompt': [ASK], 'completions': ['it', 'is'], 'labels': [1, 0]},
    ],
    'texts': [{'text': 'so it is all right'}, {'text': 'user model'}],
}
GIVEN: list[Any] = []  # what the function below gives


def given() -> list[Any]:
    """What ``python:`` specs of these tests name."""
    return GIVEN


@functools.cache
def tokenizer(style: str) -> Any:
    """A tokenizer by the name of its template."""
    return made({'chatml': CHATML, 'marked': MARKED, 'none': None}[style])


def read(spec: str, kind: str, style: str, how: dict[str, Any]) -> None:
    """Reads data of a kind as a stage would, and makes a batch of it."""
    limits = {**how, 'max_length': LENGTH}
    own = tokenizer(style)
    if kind == 'demonstrations':
        data = pipeline.load_demonstrations(spec, own, **limits)
    elif kind == 'conversations':
        data = pipeline.load_demonstrations(spec, own, loss_on='assistant', **limits)
    elif kind == 'comparisons':
        data = pipeline.load_comparisons(spec, own, **limits)
    elif kind in ('pairs', 'verdicts'):
        what = 'unpaired' if kind == 'verdicts' else 'pairs'
        data = pipeline.load_preferences(
            spec, own, kind=what, wanted_by='this', **limits
        )
    elif kind == 'prompts':
        data = pipeline.load_prompts(spec, own, max_prompt_length=LENGTH, **how)
    elif kind == 'texts':
        data = pipeline.load_texts(spec, own, max_length=LENGTH)
    else:
        wanted = Wanted(
            kind='pairs' if kind in ('rankings', 'heads') else kind,
            by='this',
            heads=('x', 'y') if kind == 'heads' else (),
            rating_range=(0, 4) if kind == 'ratings' else None,
            rating_unit='given',
            step_separator='\n',
        )
        more = how.get('on_bad', 'error'), how.get('control_tokens')
        overlong = how.get('overlong', 'drop')
        data = load_judgements(spec, own, wanted, Limits(LENGTH, overlong, *more))
    collate(data.examples, data.columns, range(len(data.examples)), LENGTH)


def _setting(rng: random.Random) -> dict[str, Any]:
    how = {
        'on_bad': rng.choice(('error', 'skip')),
        'overlong': rng.choice(('drop', 'truncate')),
        'control_tokens': rng.choice((None, 'refuse', 'escape', 'allow')),
    }
    return {name: how[name] for name in how if rng.random() < 0.5}


def odd_records(rng: random.Random, folder: Path) -> Case:
    """A few good records and one with something odd in it."""
    kind = rng.choice((*RECORDS, 'conversations', 'pairs'))
    source = {'conversations': 'demonstrations', 'pairs': 'comparisons'}.get(kind, kind)
    rows = copy.deepcopy(RECORDS[source])
    place = rng.randrange(len(rows))
    about, rows[place] = changed(rng, rows[place])
    if rng.random() < 0.3:
        more, rows[place] = changed(rng, rows[place])
        about += f' and {more}'
    how = _setting(rng)
    style = rng.choice(('chatml', 'chatml', 'marked', 'none'))
    spec, where = _written(rng, rows, folder)
    return Case(
        f'{kind} as {spec.partition(":")[0]} with {about}, {how}, {style}',
        lambda: read(spec, kind, style, how),
        (where, 'tokenizer', 'overlong='),
    )


def _written(rng: random.Random, rows: list[Any], folder: Path) -> tuple[str, str]:
    """(spec, place) of records in a file, or in a function."""
    kind = rng.choice(('jsonl', 'gz', 'hh', 'parquet', 'python'))
    if kind == 'python':
        GIVEN[:] = _objects(rng, rows)
        return 'python:tests.odd.records:given', 'tests.odd.records:given'
    path = folder / f'data.{kind}'
    if kind == 'parquet':
        try:
            parquet.write_table(pa.Table.from_pylist(rows), path)
            return f'parquet:{path}', str(path)
        except (
            pa.ArrowException,
            TypeError,
            ValueError,
            OverflowError,
            AttributeError,
        ):
            path, kind = folder / 'data.jsonl', 'jsonl'  # no table
    text = ''.join(f'{as_json(row)}\n' for row in rows).encode()
    write(path, gzip.compress(text) if kind == 'gz' else text)
    return f'{"hh" if kind == "hh" else "jsonl"}:{path}', str(path)


def _objects(rng: random.Random, rows: list[Any]) -> list[Any]:
    """Rows with something that only Python can say."""
    loop: list[Any] = []
    loop.append(loop)
    odd = (
        b'bytes',
        np.float32(0.5),
        np.int64(3),
        np.bool_(True),
        np.str_('so'),
        np.arange(3),
        np.array(['a'], object),
        float('nan'),
        {1: 2},
        {None: 'x'},
        {'a', 'b'},
        ('a', 'b'),
        object(),
        len,
        datetime.date(2025, 1, 31),
        decimal.Decimal('0.1'),
        10**5000,
        loop,
        Path('x'),
        1j,
    )
    rows = copy.deepcopy(rows)
    if rng.random() < 0.6:
        row = rng.randrange(len(rows))
        places = paths_in(rows[row])
        if not places:
            return rows
        *above, last = rng.choice(places)
        inside = rows[row]
        for name in above:
            inside = inside[name]
        inside[last] = rng.choice(odd)
        if rng.random() < 0.1 and isinstance(inside, dict):
            inside[7] = 'x'
    return rows


def odd_files(rng: random.Random, folder: Path) -> Case:
    """A good file, damaged."""
    kind = rng.choice(list(RECORDS))
    rows = RECORDS[kind]
    form = rng.choice(('jsonl', 'gz', 'gz inside', 'hh', 'parquet', 'text'))
    path = folder / ('data.jsonl.gz' if form.startswith('gz') else f'data.{form}')
    text = ''.join(f'{as_json(row)}\n' for row in rows * 3).encode()
    if form == 'parquet':
        how = {
            'compression': rng.choice(('none', 'snappy', 'gzip', 'zstd')),
            'use_dictionary': rng.random() < 0.5,
            'write_page_checksum': rng.random() < 0.3,
        }
        # Text alone: a damaged one is often still of the kind that it was.
        table = pa.table({'prompt': ['so'] * 50, 'completion': ['it is'] * 50})
        if kind not in ('demonstrations', 'prompts'):
            kind = 'demonstrations'
        parquet.write_table(table, path, **how)
        text = path.read_bytes()
    if form == 'gz':
        text = gzip.compress(text)
    about, text = damaged(rng, text)
    if rng.random() < 0.3:
        more, text = damaged(rng, text)
        about += f', {more}'
    write(path, gzip.compress(text) if form == 'gz inside' else text)
    spec = f'{form if form in ("hh", "parquet", "text") else "jsonl"}:{path}'
    if form == 'text':
        kind = 'texts'
    return Case(
        f'{kind} in {form}, {about}',
        lambda: read(spec, kind, 'chatml', {}),
        (str(path), 'tokenizer'),
    )


KINDS = ('jsonl', 'hh', 'parquet', 'text', 'python', 'tfds', 'json', '', 'JSONL')
ENDS = (
    '',
    '[:3]',
    '[3:]',
    '[:50%]',
    '[:0]',
    '[9:2]',
    '[',
    ']',
    '[:]',
    '[-1:]',
    '[a:b]',
)
MORE_ENDS = ('[:999%]', '[:99999999999999999999]', '[1]', '[:1][:1]', '?x=1', '?', ':x')


def odd_specs(rng: random.Random, folder: Path) -> Case:
    """Specs that name something odd."""
    path = write(folder / 'data.jsonl', '{"prompt": "so", "completion": "it"}\n' * 4)
    name = rng.choice(
        (
            str(path),
            str(folder),
            f'{folder}/none',
            f'{path}/below',
            'tests.odd.records:given',
            'tests.odd.records:GIVEN',
            'tests.odd.records',
            'tests.odd.none:x',
            'os:getcwd',
            'tiny_tldr/demonstrations:train',
            'tiny_tldr/none:train',
            'tiny_tldr',
            'none/none:none',
            'owner/name/file',
            'x',
            *map(str, (odd_value(rng),)),
        )
    )
    spec = f'{rng.choice(KINDS)}:{name}{rng.choice(ENDS + MORE_ENDS)}'
    if rng.random() < 0.1:
        spec = str(odd_value(rng))
    GIVEN[:] = [{'prompt': 'so', 'completion': 'it'}] * 4
    parts = [spec[:150], repr(spec)[1:150], name[:150], repr(name)[1:150]]
    return Case(
        f'spec {spec[:100]!r}',
        lambda: read(spec, 'demonstrations', 'chatml', {}),
        parts,
    )
