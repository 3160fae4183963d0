"""The package as a library: its public names, and the scripts in ``examples``."""

import math
import re
import runpy
import subprocess
import sys

import jax
import numpy as np

import rlhf_jax
from examples import ppo_in_one_file
from rlhf_jax import CausalLM, TransformerConfig, hf
from tests.small_config import ROOT


def test_every_public_name_is_there():
    assert len(set(rlhf_jax.__all__)) == len(rlhf_jax.__all__)
    for name in rlhf_jax.__all__:
        assert getattr(rlhf_jax, name).__doc__, name


def test_importing_takes_no_heavy_package_along():
    heavy = 'scipy', 'matplotlib', 'orbax', 'transformers', 'grain', 'tensorflow'
    script = f'import sys, rlhf_jax; print({set(heavy)} & set(sys.modules))'
    shown = subprocess.run(
        [sys.executable, '-c', script], check=True, capture_output=True, text=True
    )
    assert shown.stdout.strip() == 'set()'


def test_the_script_of_the_calls_runs(tmp_path, monkeypatch, capsys):
    config = TransformerConfig(
        vocab_size=64,
        num_layers=1,
        width=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=32,
        max_positions=64,
    )
    tokens = np.zeros((1, 2), np.int32)
    params = CausalLM(config).init(jax.random.PRNGKey(0), tokens, tokens == 0)['params']
    hf.save(tmp_path / 'llama', params, config, head='lm', eos_token_id=2)
    out = tmp_path / 'out'
    monkeypatch.setattr(sys, 'argv', ['script', str(tmp_path / 'llama'), str(out)])
    runpy.run_path(str(ROOT / 'examples' / 'library.py'), run_name='__main__')
    printed = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r'sft loss (\S+)', printed)]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert len(re.findall('rm loss', printed)) == 5
    assert len(re.findall('ppo reward', printed)) == 3
    numbers = re.findall(r'(?:loss|accuracy|reward|kl) (\S+)', printed)
    assert len(numbers) == 5 + 10 + 6
    assert all(math.isfinite(float(number)) for number in numbers)
    trained = hf.load_params(out, hf.load_config(out), head='lm')
    moved = jax.tree.map(lambda a, b: np.array_equal(a, b), trained, params)
    assert not all(jax.tree.leaves(moved))


def test_ppo_in_one_file_runs_and_is_short(capsys):
    """A few steps of each part; that it learns is for whoever has five minutes."""
    source = (ROOT / 'examples' / 'ppo_in_one_file.py').read_text(encoding='utf-8')
    assert len(source.splitlines()) <= 250 and 'stages' not in re.sub(
        r'^""".*?"""', '', source, flags=re.S
    )
    small = '--sft_steps=2 --rm_steps=2 --rollouts=2 --batch_size=8 --rollout_size=16'
    result = ppo_in_one_file.main([*small.split(), '--eval_prompts=20'])
    printed = capsys.readouterr().out
    for part in ('sft step 2: loss', 'rm step 2: loss', 'ppo rollout 2: score'):
        assert part in printed
    assert 'of 20 prompts' in printed
    assert 0 <= result['win_rate'] <= 1 and math.isfinite(result['kl'])
    assert result['gold_after'] != result['gold_before']
