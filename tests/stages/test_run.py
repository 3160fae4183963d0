"""Which model a stage gets, and with which tokens."""

from ml_collections import ConfigDict

from rlhf_jax import checkpoint, hf, sharding
from rlhf_jax.config import section
from rlhf_jax.data.tokenizer import word_tokenizer
from rlhf_jax.sharding import ParallelConfig
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import ModelSettings
from rlhf_jax.stages.sources import resolve


def test_a_model_knows_which_of_its_ids_have_tokens(tmp_path, config, policy_params):
    hf.save(tmp_path / 'model', policy_params, config, head='lm', eos_token_id=1)
    settings = ConfigDict({'stages': ('ppo',), 'model': section(ModelSettings)})
    mesh = sharding.make_mesh(ParallelConfig())
    tokenizer = word_tokenizer([])  # 256 bytes and two special tokens
    run = Run(tmp_path, settings, mesh, tokenizer)
    assert len(tokenizer) > config.vocab_size
    assert resolve(run, str(tmp_path / 'model')).config().num_tokens is None
    tokenizer.get_vocab = lambda: {'a': 0, 'b': 41}  # 42 of the 64 ids
    found = resolve(run, str(tmp_path / 'model')).config()
    assert found.num_tokens == 42
    # It goes along with the model, and not into what others read.
    checkpoint.save_params(
        tmp_path / 'ppo', {'policy': policy_params}, {'policy': found}
    )
    assert checkpoint.load_model_configs(tmp_path / 'ppo')['policy'].num_tokens == 42
    hf.save(tmp_path / 'out', policy_params, found, head='lm', eos_token_id=1)
    assert 'num_tokens' not in (tmp_path / 'out' / 'config.json').read_text()
