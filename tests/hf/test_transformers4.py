"""Exported directories in transformers 4, which is not installed beside version 5.

python -m venv V4 && V4/bin/pip install torch==2.13.0 transformers==4.57.6 numpy
TRANSFORMERS4_PYTHON=V4/bin/python pytest -m parity tests/hf/test_transformers4.py
"""

import json
import os
import pathlib
import subprocess
from dataclasses import replace

import jax
import numpy as np
import pytest

from rlhf_jax import hf
from rlhf_jax.models.config import RopeScaling
from rlhf_jax.models.heads import CausalLM, ScalarModel
from rlhf_jax.ops.logprobs import logits_of
from rlhf_jax.rewards import reward_model_scores
from tests.hf.scored_texts import TOKENIZERS, export_scorer
from tests.hf.small_families import ENCODERS, FAMILIES
from tests.hf.small_tokenizers import TEXTS
from tests.hf.test_directories import make_config, make_params

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
SIDE = pathlib.Path(__file__).parent / 'transformers4_side.py'
PYTHON = os.environ.get('TRANSFORMERS4_PYTHON')
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(PYTHON is None, reason='TRANSFORMERS4_PYTHON is not set'),
]


def rows(seed=3):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 37, size).tolist() for size in (13, 7, 2)]


def configs():
    """Every family, and those whose fixture is not stretched with that too."""
    known = {name: hf.load_config(FIXTURES / name) for name in FAMILIES}
    linear = RopeScaling(kind='linear', factor=3.0)
    for name in ('olmo2', 'qwen2', 'qwen3', 'gpt_neox'):
        known[f'{name}_linear'] = replace(known[name], rope_scaling=linear)
    return known


def heads(name):
    if name in ENCODERS:
        return ('scalar',)
    # transformers 4 has no sequence classifier of OLMo 2.
    return ('lm',) if name.startswith('olmo2') else ('lm', 'scalar')


def outputs(root):
    """The answers of transformers 4 by directory."""
    done = subprocess.run(
        [PYTHON, str(SIDE), str(root)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].startswith('4.'), done.stdout
    return {
        path.parent.name: json.loads(path.read_text())
        for path in root.glob('*/outputs.json')
    }


def test_every_family_gives_the_same_logits_and_scores(tmp_path):
    expected = {}
    for name, config in configs().items():
        for head in heads(name):
            params = make_params(config, head)
            out = tmp_path / f'{name}-{head}'
            pad = 1 if name == 'roberta' else 0
            hf.save(out, params, config, head=head, eos_token_id=2, pad_token_id=pad)
            inputs = {'head': head, 'tokens': rows()}
            (out / 'inputs.json').write_text(json.dumps(inputs))
            expected[out.name] = ours(config, params, head, name)
    theirs = outputs(tmp_path)
    assert theirs.keys() == expected.keys()
    wrong = {}
    for name, given in theirs.items():
        if any(given['info'].values()):
            wrong[name] = given['info']
        for mine, logits in zip(expected[name], given['logits'], strict=True):
            error = np.abs(np.asarray(logits) - mine).max()
            if not error <= 1e-4:
                wrong[name] = float(error)
    assert not wrong


def test_texts_without_a_pad_token_get_the_same_scores(tmp_path):
    expected = {}
    for name, tokenizer in TOKENIZERS.items():
        config = replace(make_config(), vocab_size=len(tokenizer))
        expected[name] = export_scorer(tmp_path / name, config, tokenizer)
        inputs = {'head': 'scalar', 'texts': TEXTS}
        (tmp_path / name / 'inputs.json').write_text(json.dumps(inputs))
    theirs = outputs(tmp_path)
    assert theirs.keys() == expected.keys()
    for name, given in theirs.items():
        assert given['class'] == 'PreTrainedTokenizerFast'
        assert given['ids'] == TOKENIZERS[name](TEXTS)['input_ids']
        for way in ('batch', 'pipeline'):
            np.testing.assert_allclose(given[way], expected[name], rtol=0, atol=1e-4)


def ours(config, params, head, name):
    if head == 'scalar':
        model = ScalarModel(config)
        bias = 0 if name in ENCODERS else params['head']['bias']
        return [
            reward_model_scores(
                params, np.array([row]), np.ones((1, len(row)), bool), model=model
            )
            - bias
            for row in rows()
        ]
    model, result = CausalLM(config), []
    for row in rows():
        hidden = model.apply(
            {'params': params}, np.array([row]), np.ones((1, len(row)), bool)
        )
        unembedding = model.unembedding(params)
        result.append(logits_of(hidden, unembedding, config.logit_softcap)[0])
    return jax.tree.map(np.asarray, result)
