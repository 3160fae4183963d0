"""A labeller of a user's own, ``tests/own_labeller.py``, and what the page on labels
says of it and of the settings of the kind ``label``.
"""

import dataclasses
import json
import re
import typing

import pytest

from rlhf_jax import files
from rlhf_jax.labels.aggregation import METHODS
from rlhf_jax.labels.pairs import Rule
from rlhf_jax.main import launch
from rlhf_jax.stages.kinds import kind_of, read_settings, stage
from rlhf_jax.stages.label import LabelSettings
from rlhf_jax.stages.labellers import people
from tests.small_config import ROOT, get_config
from tests.test_main import fails, never_compiled  # noqa: F401

pytestmark = pytest.mark.usefixtures('one_device')

PAGE = (ROOT / 'docs' / 'labelling.md').read_text(encoding='utf-8')


def labelled(folder, **settings):
    """A run of one label stage by the module, on responses of a file."""
    texts = ['red fox', 'red', 'blue'], ['a', 'b', 'c']
    found = [
        {'prompt': f'the red fox {i}', 'completion': text}
        for i, responses in enumerate(texts)
        for text in responses
    ]
    files.write_rows(folder / 'responses.jsonl', found)
    config = get_config()
    config.stages = ('said',)
    spec = f'jsonl:{folder / "responses.jsonl"}'
    config.said = stage(
        'label', by='tests.own_labeller', responses=spec, per_prompt=3, **settings
    )
    return config


@pytest.mark.parametrize('margin, chosen', [(None, 3), (2, 1)])
def test_it_labels(margin, chosen, tmp_path):
    launch(labelled(tmp_path, margin=margin), tmp_path / 'run')
    text = (tmp_path / 'run' / 'said' / 'records.jsonl').read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    sure = [(row['chosen'], row['rejected']) for row in rows if 'tie' not in row]
    # Words of the prompt: 2, 1 and 0 of the first one, none of the second.
    assert len(rows) == 6 and len(sure) == chosen and ('red fox', 'blue') in sure
    assert {row['labeller'] for row in rows} == {'overlap'}


def test_what_it_refuses_is_told_before_anything_compiles(
    tmp_path,
    never_compiled,  # noqa: F811
):
    config = labelled(tmp_path, margin=0)
    fails(config, tmp_path / 'run', 'config.said.margin=0; use 1 or more')


def test_it_is_short_and_stands_in_the_documentation():
    code = (ROOT / 'tests' / 'own_labeller.py').read_text()
    assert len(code.splitlines()) <= 40 and code in PAGE


@pytest.mark.parametrize('cls', [LabelSettings, people.HParams])
def test_the_page_has_every_setting_with_its_default(cls):
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        told = '–' if default is dataclasses.MISSING else repr(default)
        told = f'{default:g}' if isinstance(default, float) else told
        row = re.search(rf'^\| `{field.name}` \| (.*?) \|', PAGE, re.M)
        assert row, f'labelling.md has no row of {field.name}'
        assert row[1].strip('`') == told, f'labelling.md: {field.name} is {told}'


@pytest.mark.parametrize('values', [typing.get_args(Rule), METHODS])
def test_the_page_has_every_value(values):
    assert all(re.search(rf'^\| `{value}` \| ', PAGE, re.M) for value in values)


def test_the_stages_of_the_page_are_complete():
    names = {}
    for block in re.findall(r'^```python\n(.*?)^```', PAGE, re.M | re.S):
        exec(block, names)
    config = names['get_config']('smoke')
    for name in config.stages:
        read_settings(kind_of(config, name), config[name], f'config.{name}')
    for name in ('by_function', 'by_simulated'):
        config = {name: names[name]}
        read_settings(kind_of(config, name), config[name], f'config.{name}')
