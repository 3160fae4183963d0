"""PPO of a GPT-2-like policy against a BERT-like reward model with another tokenizer,
from directories that transformers wrote, and out to such directories again.
"""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import hf
from rlhf_jax.config import section
from rlhf_jax.export import export
from rlhf_jax.main import launch
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.rewards import reward_model_scores
from rlhf_jax.stages.settings import RewardSource
from tests.small_config import get_config
from tests.stages.test_scoring import WORDS, encoder_tokenizer, words

pytestmark = pytest.mark.usefixtures('one_device')

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / 'hf' / 'fixtures'


@pytest.fixture
def directories(tmp_path):
    """A policy and a reward model with their tokenizers, and a file of prompts."""
    pieces = ['[UNK]', '<bos>', '</s>', *WORDS]
    tokenizer = words(pieces, '$A', eos_token='</s>', pad_token='[UNK]')
    for name, its in (('gpt2', tokenizer), ('bert', encoder_tokenizer())):
        shutil.copytree(FIXTURES / name, tmp_path / name)
        its.save_pretrained(tmp_path / name)
    rng = np.random.default_rng(0)
    with (tmp_path / 'prompts.jsonl').open('w') as file:
        for _ in range(32):
            print(json.dumps({'prompt': ' '.join(rng.choice(WORDS, 5))}), file=file)
    return tmp_path


def test_a_bert_scores_a_gpt2_in_ppo(directories):
    policy, reward = str(directories / 'gpt2'), str(directories / 'bert')
    prompts = f'jsonl:{directories}/prompts.jsonl'
    config = get_config('2')
    config.stages = ('ppo',)
    config.tokenizer = policy
    config.ppo.init = config.ppo.critic = policy
    config.ppo.prompts = config.ppo.eval_prompts = prompts
    with config.ppo.ignore_type():
        config.ppo.gold = None
    config.ppo.rewards = {'bert': section(RewardSource, model=reward)}
    config.ppo.base = policy
    config.ppo.prompt_buckets = (8,)
    config.ppo.max_new_tokens = 6
    workdir = directories / 'run'
    launch(config, workdir)

    model = ScalarModel(hf.load_config(reward))
    params = hf.load_params(reward, model.config, head='scalar')
    tokenizer = encoder_tokenizer()
    lines = list(map(json.loads, (workdir / 'ppo' / 'samples.jsonl').open()))
    assert len({line['after'] for line in lines}) > 1
    for line in lines[:4]:
        ids = tokenizer.encode(f'{line["prompt"]} {line["after"]}')
        # A response that did not end gets no [SEP].
        scores = [
            reward_model_scores(
                params, jnp.array([row]), jnp.ones((1, len(row)), bool), model=model
            )[0]
            for row in (ids, ids[:-1])
        ]
        given = line['rewards_after']['bert']
        assert min(abs(given - score) for score in scores) < 1e-4

    result = json.loads((workdir / 'ppo' / 'eval.json').read_text())
    # The base is the reference here, and the temperature 1.
    for when in ('before', 'after'):
        same = result[f'base_logprob_{when}']
        assert (
            same == pytest.approx(result[f'ref_logprob_{when}'], abs=1e-5) and same < 0
        )
    assert 'under the base model' in (workdir / 'report.html').read_text()

    export(workdir, 'ppo', directories / 'policy')
    assert hf.load_head(directories / 'policy') == 'lm'
    entries = json.loads((directories / 'policy' / 'config.json').read_text())
    assert entries['architectures'] == ['GPT2LMHeadModel']
    export(workdir, 'ppo', directories / 'critic', part='critic')
    entries = json.loads((directories / 'critic' / 'config.json').read_text())
    assert entries['architectures'] == ['GPT2ForSequenceClassification']


def test_a_reward_model_starts_from_a_bert(directories):
    """rm trains an encoder on pairs, read at its first token, and exports it."""
    rng = np.random.default_rng(1)
    with (directories / 'pairs.jsonl').open('w') as file:
        for _ in range(64):
            chosen, rejected = f'cat {rng.choice(WORDS)}', f'dog {rng.choice(WORDS)}'
            record = {'prompt': ' '.join(rng.choice(WORDS[:3], 3))}
            record |= {'chosen': chosen, 'rejected': rejected}
            print(json.dumps(record), file=file)
    config = get_config('40')
    config.stages = ('rm',)
    config.tokenizer = str(directories / 'gpt2')
    config.rm.tokenizer = config.rm.init = str(directories / 'bert')
    config.rm.train = config.rm.eval = f'jsonl:{directories}/pairs.jsonl'
    with config.rm.ignore_type():
        config.rm.references = None
    config.rm.buckets = (12,)
    workdir = directories / 'rm-run'
    launch(config, workdir)
    result = json.loads((workdir / 'rm' / 'eval.json').read_text())
    assert result['accuracy'] > 0.9
    export(workdir, 'rm', directories / 'out')
    entries = json.loads((directories / 'out' / 'config.json').read_text())
    assert entries['architectures'] == ['BertForSequenceClassification']
    again = hf.load_config(directories / 'out')
    assert again == hf.load_config(directories / 'bert')


def test_an_encoder_is_no_policy(directories):
    config = get_config('1')
    config.stages = ('ppo',)
    config.tokenizer = str(directories / 'gpt2')
    config.ppo.init = str(directories / 'bert')
    config.ppo.critic = str(directories / 'gpt2')
    config.ppo.rewards.rm.model = str(directories / 'bert')
    prompts = f'jsonl:{directories}/prompts.jsonl'
    config.ppo.prompts = config.ppo.eval_prompts = prompts
    config.ppo.prompt_buckets = (8,)
    config.ppo.max_new_tokens = 6
    with pytest.raises(ValueError, match='ppo.init=.*bert. is no language model'):
        launch(config, directories / 'run')
