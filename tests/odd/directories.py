"""Odd model directories, chat templates and stop strings."""

import functools
import json
import random
import shutil
from pathlib import Path
from typing import Any

from rlhf_jax import hf
from rlhf_jax.data import chat
from rlhf_jax.data.stops import eos_ids, token_bytes
from rlhf_jax.data.tokenizer import encode, load_tokenizer
from rlhf_jax.stages.sampler import stops_of
from tests.data.test_chat import CHATML, GEMMA, LLAMA2, LLAMA3, MARKED, ZEPHYR, made
from tests.hf.small_tokenizers import byte_tokenizer
from tests.odd.cases import TEXTS, Case, changed, damaged, odd_value, write
from tests.odd.records import TALK

FIXTURES = Path(__file__).parents[1] / 'hf' / 'fixtures'
CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
INDEX = 'model.safetensors.index.json'
# Entries of other models, and of none.
FOREIGN = (
    'logit_scale',
    'rope_scaling',
    'rope_parameters',
    'quantization_config',
    'sliding_window',
    'layer_types',
    'num_labels',
    'id2label',
    'rlhf_jax',
    'rotary_pct',
    'auto_map',
    'architectures',
    'torch_dtype',
)


@functools.cache
def families() -> list[Path]:
    """Small models of every family."""
    return sorted(path for path in FIXTURES.iterdir() if (path / CONFIG).exists())


def _load(folder: Path, with_weights: bool) -> None:
    config = hf.load_config(folder)
    source = hf.load_head(folder)
    hf.load_score_names(folder)
    if with_weights:
        head = 'lm' if source == 'lm' else 'scalar'
        hf.load_params(folder, config, head=head)


def odd_configs(rng: random.Random, folder: Path) -> Case:
    """A config.json with something odd in it."""
    family = rng.choice(families())
    entries = json.loads((family / CONFIG).read_text())
    shutil.copy(family / WEIGHTS, folder)
    if rng.random() < 0.3:
        name = rng.choice(FOREIGN)
        entries[name] = odd_value(rng)
        about = f'{name}={str(entries[name])[:50]}'
    else:
        about, entries = changed(rng, entries)
    text = json.dumps(entries).encode()
    if rng.random() < 0.1:
        about, text = damaged(rng, text)
    write(folder / CONFIG, text)
    # Shapes take a tenth of a second: only now and then.
    whole = rng.random() < 0.15
    return Case(
        f'{family.name}/config.json {about}',
        lambda: _load(folder, whole),
        (str(folder),),
    )


def odd_weights(rng: random.Random, folder: Path) -> Case:
    """A safetensors file or an index that is damaged."""
    family = rng.choice(families())
    shutil.copy(family / CONFIG, folder)
    data = (family / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], 'little')
    header, numbers = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(4)
    if kind == 0:
        about, data = damaged(rng, data)
    elif kind == 1:
        about, entries = changed(rng, json.loads(header))
        header = json.dumps(entries).encode()
        data = len(header).to_bytes(8, 'little') + header + numbers
    elif kind == 2:
        about, header = damaged(rng, header)
        data = len(header).to_bytes(8, 'little') + header + numbers
    else:
        names = [name for name in json.loads(header) if name != '__metadata__']
        index: Any = {'metadata': {}, 'weight_map': dict.fromkeys(names, WEIGHTS)}
        about, index = changed(rng, index)
        text = json.dumps(index).encode()
        if rng.random() < 0.3:
            about, text = damaged(rng, text)
        write(folder / INDEX, text)
        about = f'index {about}'
    write(folder / WEIGHTS, data)
    return Case(
        f'{family.name}/{WEIGHTS} {about}',
        lambda: _load(folder, True),
        (str(folder),),
    )


@functools.cache
def tokenizer_files() -> dict[str, str]:
    """Name → text of the files of a tokenizer and of what stands beside it."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        own = byte_tokenizer(special=('<|im_start|>', '<|im_end|>'))
        own.chat_template = CHATML
        own.save_pretrained(folder)
        (folder / 'generation_config.json').write_text('{"eos_token_id": [256, 258]}')
        (folder / 'begun.json').write_text('{"begun": "2025-01-31T12:00:00"}')
        return {path.name: path.read_text() for path in folder.iterdir()}


def _use(folder: Path) -> None:
    own = load_tokenizer(str(folder))
    eos_ids(own)
    encode(own, ['so it is', ' all right'])
    own.decode([1, 2, 3])
    token_bytes(own)
    chat.split(TALK, own)


def odd_tokenizers(rng: random.Random, folder: Path) -> Case:
    """A directory of a tokenizer with a file that is odd."""
    files = dict(tokenizer_files())
    name = rng.choice(list(files))
    if name.endswith('.json') and rng.random() < 0.8:
        entries = json.loads(files[name])
        if name == 'tokenizer.json':  # its vocabulary has most of the places
            vocabulary = entries['model'].pop('vocab')
            about, entries = changed(rng, entries)
            if isinstance(entries.get('model'), dict):
                if rng.random() < 0.2:
                    about, vocabulary = changed(rng, vocabulary)
                entries['model']['vocab'] = vocabulary
        else:
            about, entries = changed(rng, entries)
        files[name] = json.dumps(entries)
        data = files[name].encode()
    else:
        about, data = damaged(rng, files[name].encode())
    for other, text in files.items():
        write(folder / other, data if other == name else text)
    if rng.random() < 0.1:
        (folder / name).unlink()
        about = 'missing'
    return Case(f'{name} {about}', lambda: _use(folder), (str(folder), 'chat template'))


# --------------------------------------------------------------------------- templates

TEMPLATES = (CHATML, MARKED, LLAMA2, LLAMA3, ZEPHYR, GEMMA)
PIECES = (
    '{{ 1 // 0 }}',
    '{{ 1 % 0 }}',
    '{{ messages[99] }}',
    '{{ messages[0].x.y }}',
    '{{ messages | length }}',
    '{{ messages | tojson }}',
    '{{ none.x }}',
    '{{ x() }}',
    '{{ messages[0].content[0] + 1 }}',
    '{{ "a" + 1 }}',
    '{{ messages | map(attribute="x") | list }}',
    '{{ messages | sum }}',
    '{{ raise_exception("no") }}',
    '{{ strftime_now("%Y") }}',
    '{{ range(10) | list }}',
    '{{ range(1000000) }}',
    '{{ "x" * 99999 }}',
    '{{ "x" * 9999999999 }}',
    '{{ 2 ** 9 }}',
    '{{ "%s" | format(1) }}',
    '{{ "%d" | format("x") }}',
    '{{ "{0.__class__}".format(1) }}',
    '{{ "".__class__.__mro__ }}',
    '{{ [].append(1) }}',
    '{{ messages.clear() }}',
    '{{ messages.pop() }}',
    '{{ "\\ud800" }}',
    '{{ "a".encode("x") }}',
    '{{ "a" | int("x", 99) }}',
    '{{ messages | batch(0) | list }}',
    '{{ messages | slice(0) | list }}',
    '{{ messages | random }}',
    '{{ messages | groupby("role") }}',
    '{{ messages | sort }}',
    '{{ {} | dictsort(by=3) }}',
    '{{ "a" | wordwrap(0) }}',
    '{{ "a" | indent("x") }}',
    '{{ loop.index }}',
    '{{ self.x() }}',
    '{{ super() }}',
    '{{ caller() }}',
    '{{ varargs }}',
    '{{ cycler() }}',
    '{{ lipsum(n=2) }}',
    '{{ namespace(1) }}',
    '{% set messages = 3 %}',
    '{% set x.y = 3 %}',
    '{% break %}',
    '{% continue %}',
    '{% if %}',
    '{% endif %}',
    '{% for m in messages %}',
    '{% endfor %}',
    '{% for a, b, c in messages %}{% endfor %}',
    '{% for m in 7 %}{% endfor %}',
    '{% for a in range(9) recursive %}{{ loop([a]) }}{% endfor %}',
    '{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}',
    '{% include "x" %}',
    '{% import "x" as y %}',
    '{% extends "x" %}',
    '{% block a %}{% endblock %}',
    '{% generation %}',
    '{% endgeneration %}',
    '{% generation %}{% endgeneration %}',
    '{% raw %}',
    '{#',
    '{{',
    '}}',
    '%}',
    '{% filter upper %}a{% endfilter %}',
    '{% call f() %}{% endcall %}',
    '{% with %}{% endwith %}',
    '{% autoescape true %}{% endautoescape %}',
    '{% trans %}{% endtrans %}',
    '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}',
    '{% set n = namespace(x="abcdefgh") %}{% for a in range(60) %}'
    '{% set n.x = n.x ~ n.x %}{% endfor %}',
    '{{ ' + '(' * 300 + ')' * 300 + ' }}',
    '{{ ' + '[' * 200 + ']' * 200 + ' }}',
    '{% if 1 %}' * 120 + '{% endif %}' * 120,
    '{% for a in [1] %}' * 30 + '{% endfor %}' * 30,
)


def odd_templates(rng: random.Random, folder: Path) -> Case:
    """A chat template with something odd in it."""
    text = rng.choice(TEMPLATES)
    kind = rng.randrange(4)
    if kind == 0:
        pieces = [rng.choice(PIECES) for _ in range(rng.randrange(1, 4))]
        place = rng.choice((0, len(text), rng.randrange(len(text))))
        text = text[:place] + ''.join(pieces) + text[place:]
        about = f'{pieces!s:.120} at {place}'
    elif kind == 1:
        about = 'words exchanged'
        words = text.split(' ')
        first, second = rng.randrange(len(words)), rng.randrange(len(words))
        words[first], words[second] = words[second], words[first]
        text = ' '.join(words)
    elif kind == 2:
        text = ''.join(rng.choice(PIECES) for _ in range(rng.randrange(1, 4)))
        about = f'{text:.120}'
    else:
        about, data = damaged(rng, text.encode())
        text = data.decode('latin1')
    return Case(f'template {about}', lambda: _render(text), ('tokenizer', 'template'))


def _render(text: str) -> None:
    own = made(text)
    own.name_or_path = ''
    for write_it in (chat.split, chat.assistant_spans):
        write_it(TALK, own)


def odd_stops(rng: random.Random, folder: Path) -> Case:
    """Stop strings."""
    stops = []
    for _ in range(rng.randrange(4)):
        kind = rng.randrange(3)
        if kind == 0:
            stops.append(rng.choice(TEXTS))
        elif kind == 1:
            letters = [rng.choice('ab\n \0é👩') for _ in range(rng.randrange(40))]
            stops.append(''.join(letters))
        else:
            stops.append(str(odd_value(rng))[:200])
    own = made(CHATML)
    return Case(
        f'stops {stops!s:.200}',
        lambda: stops_of(own, 'config.ppo', stops),
        ('config.ppo.stop_sequences',),
    )
