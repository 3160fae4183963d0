"""What a finished stage gives away: Hugging Face directories and samples."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from rlhf_jax import hf
from rlhf_jax.export import export
from rlhf_jax.files import write_checksums
from rlhf_jax.ops.rows import pad_left
from rlhf_jax.sample import load_part, sample
from tests.small_config import ROOT
from tests.test_main import command

PARTS = [
    ('pretrain', 'policy', 'LlamaForCausalLM'),
    ('sft', 'policy', 'LlamaForCausalLM'),
    ('rm', 'reward', 'LlamaForSequenceClassification'),
    ('ppo', 'policy', 'LlamaForCausalLM'),
    ('ppo', 'critic', 'LlamaForSequenceClassification'),
]


@pytest.mark.parametrize(('stage', 'part', 'architecture'), PARTS)
def test_export_and_import_again(finished, tmp_path, stage, part, architecture):
    out = tmp_path / 'out'
    export(finished, stage, out, part)
    assert architecture in (out / 'config.json').read_text()
    model, params = load_part(finished, stage, part)
    config = hf.load_config(out)
    assert config.vocab_size == model.config.vocab_size
    head = 'lm' if part == 'policy' else 'scalar'
    again = hf.load_params(out, config, head=head)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    ours = AutoTokenizer.from_pretrained(finished / 'tokenizer')
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs.encode('the mayor') == ours.encode('the mayor')
    assert theirs.eos_token_id == ours.eos_token_id


def test_all_ids_that_end_a_response_are_exported(finished, tmp_path):
    for part in ('sft', 'tokenizer'):
        shutil.copytree(finished / part, tmp_path / 'run' / part)
    shutil.copy(finished / 'config.json', tmp_path / 'run')
    ours = AutoTokenizer.from_pretrained(finished / 'tokenizer').eos_token_id
    listed = json.dumps({'eos_token_id': [ours, 7]})
    (tmp_path / 'run/tokenizer/generation_config.json').write_text(listed)
    write_checksums(tmp_path / 'run/tokenizer', 'tokenizer')
    export(tmp_path / 'run', 'sft', tmp_path / 'out')
    written = json.loads((tmp_path / 'out/generation_config.json').read_text())
    assert written['eos_token_id'] == [ours, 7]


def test_the_part_that_is_there_is_the_default(finished, tmp_path):
    export(finished, 'rm', tmp_path / 'rm')
    assert 'SequenceClassification' in (tmp_path / 'rm' / 'config.json').read_text()


def test_an_exported_score_is_not_shifted_away(finished, tmp_path):
    """The bias that centres the reward travels beside the weights."""
    export(finished, 'rm', tmp_path / 'rm')
    again = hf.load_params(
        tmp_path / 'rm', hf.load_config(tmp_path / 'rm'), head='scalar'
    )
    assert float(again['head']['bias']) != 0


def test_mistakes(finished, tmp_path):
    with pytest.raises(ValueError, match='no finished stage'):
        export(finished, 'dpo', tmp_path / 'out')
    with pytest.raises(ValueError, match="no 'critic'; it holds reward"):
        export(finished, 'rm', tmp_path / 'out', 'critic')
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine.txt').write_text('keep me')
    with pytest.raises(ValueError, match='exists already'):
        export(finished, 'rm', tmp_path / 'out')
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['mine.txt']


def test_the_commands(finished, tmp_path):
    place = ['--workdir', str(finished), '--stage', 'ppo']
    out = tmp_path / 'critic'
    code, text = command(
        *place, '--part=critic', '--out', str(out), module='rlhf_jax.export'
    )
    assert code == 0 and str(out) in text, text
    assert (out / 'model.safetensors').exists() and (out / 'tokenizer.json').exists()
    code, text = command(
        *place,
        '--num=2',
        '--max_new_tokens=4',
        '--prompt=a [bold] mayor',
        module='rlhf_jax.sample',
    )
    assert code == 0 and 'a [bold] mayor' in text, text
    assert len(re.findall(r'rm [+-]\d', text)) == 2


def test_sample(finished):
    prompt = 'the mayor opened a bridge\n\nTL;DR:'
    rows = sample(finished, 'sft', prompt, num=3, max_new_tokens=6, seed=1)
    assert len(rows) == 3
    for text, ended, scores in rows:
        assert isinstance(text, str) and isinstance(ended, bool)
        assert scores.keys() == {'rm'} and np.isfinite(scores['rm'])
    assert rows == sample(finished, 'sft', prompt, num=3, max_new_tokens=6, seed=1)
    assert rows != sample(finished, 'sft', prompt, num=3, max_new_tokens=6, seed=2)
    greedy = sample(finished, 'sft', prompt, num=2, max_new_tokens=6, temperature=0)
    assert greedy[0] == greedy[1]


def test_a_sample_does_not_depend_on_its_padding(finished, monkeypatch):
    prompt, how = 'the mayor opened a bridge', dict(num=2, max_new_tokens=6, seed=1)
    rows = sample(finished, 'sft', prompt, **how)
    monkeypatch.setattr(
        'rlhf_jax.sample.pad_left', lambda rows, length: pad_left(rows)
    )  # as long as it is
    for one, other in zip(rows, sample(finished, 'sft', prompt, **how)):
        assert one.text == other.text
        assert one.scores['rm'] == pytest.approx(other.scores['rm'], abs=1e-4)


def test_a_file_of_prompts_becomes_a_file_of_responses(finished, tmp_path):
    path, out = tmp_path / 'p.jsonl', tmp_path / 'out.jsonl'
    path.write_text('{"prompt": "the mayor"}\n{"prompt": "a bridge"}\n')
    place = ['--workdir', str(finished), '--max_new_tokens=4', '--num=2']
    how = [f'--prompts=jsonl:{path}', f'--out={out}']
    code, text = command(*place, *how, module='rlhf_jax.sample')
    assert code == 0 and 'wrote 4 responses' in text, text
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row['prompt'] for row in rows] == ['the mayor'] * 2 + ['a bridge'] * 2
    assert all(row['by'] == 'ppo' and 'score_rm' in row for row in rows)
    code, text = command(*place, *how, '--prompt=x', module='rlhf_jax.sample')
    assert code == 1 and 'give one of --prompt' in text
    code, text = command(*place, '--message=hi', module='rlhf_jax.sample')
    assert code == 1 and 'chat template' in text


@pytest.mark.parametrize(
    ('stage', 'prompt', 'message'),
    [
        ('ppo', 'the ' * 1020, r'prompt tokens and 48 new ones exceed the 1024'),
        ('ppo', '', 'the prompt is empty'),
        ('rm', 'the', "no 'policy'; it holds reward"),
        ('dpo', 'the', 'no finished stage'),
    ],
)
def test_what_cannot_be_sampled(finished, stage, prompt, message):
    with pytest.raises(ValueError, match=message):
        sample(finished, stage, prompt)


def test_without_a_reward_model_there_is_no_score(finished, tmp_path):
    for name in ('sft', 'tokenizer'):
        (tmp_path / name).symlink_to(finished / name)
    [(_, _, scores)] = sample(tmp_path, 'sft', 'the mayor', num=1, max_new_tokens=2)
    assert scores == {}


@pytest.mark.parametrize('module', ['main', 'sample', 'export'])
def test_a_console_without_utf_8_ends_no_command(module):
    """What the encoding lacks is shown by its code."""
    script = (
        f'from absl import app; from rlhf_jax import {module}; '
        f"app.run = lambda *_, **__: print('a → b'); {module}.run()"
    )
    result = subprocess.run(
        [sys.executable, '-c', script],
        env={**os.environ, 'PYTHONIOENCODING': 'ascii', 'JAX_PLATFORMS': 'cpu'},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == 'a \\u2192 b\n'


def test_a_prompt_in_a_locale_without_utf_8(finished, monkeypatch):
    for name, value in (
        ('LC_ALL', 'C'),
        ('PYTHONUTF8', '0'),
        ('PYTHONCOERCECLOCALE', '0'),
    ):
        monkeypatch.setenv(name, value)
    code, text = command(
        *('--workdir', str(finished), '--stage', 'sft', '--num=1'),
        *('--max_new_tokens=2', '--prompt=the → mayor'),
        module='rlhf_jax.sample',
    )
    assert code == 0 and 'the \\u2192 mayor' in text, text
