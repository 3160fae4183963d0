"""Eight virtual CPU devices for every test, and small models and batches to share."""

import dataclasses
import functools
import os
import types
from importlib import metadata
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Compiling is most of the time here: XLA's costly passes are left out, and where it
# still has older emitters they write the loops, which spares another fifth to third of
# the time. XLA ends at once where it does not know a flag.
# JAX_DISABLE_MOST_OPTIMIZATIONS=false tests the programs that users run; .ci/run has it
# for the parity tests.
flags = os.environ.get('XLA_FLAGS', '')
if os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true') == 'true':
    if metadata.version('jaxlib').startswith('0.10.'):
        flags = f'--xla_cpu_use_fusion_emitters=false {flags}'
if 'xla_force_host_platform_device_count' not in flags:
    flags = f'--xla_force_host_platform_device_count=8 {flags}'
os.environ['XLA_FLAGS'] = flags.strip()
# Compiled programs are kept between the many processes that compile the same ones, and
# between runs of the tests; `pytest --cache-clear` removes them. What is kept is found
# by the program, the flags and the version of XLA: a changed program is compiled.
COMPILED = Path(__file__).resolve().parents[1] / '.pytest_cache' / 'd' / 'xla'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(COMPILED))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

# Token ids of large data sets likewise, and not in the user's own cache.
os.environ['XDG_CACHE_HOME'] = str(COMPILED.with_name('cache'))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filelock import FileLock
from jax._src import compiler

from rlhf_jax import sharding
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import CausalLM, ScalarModel
from rlhf_jax.models.transformer import KVCache
from rlhf_jax.types import Generation, JudgedBatch, TokenBatch
from tests import small_config

VOCABULARY = 64

# A program of several CPU devices that is read back loses the order of its collectives,
# and its devices wait for each other for ever (seen with JAX 0.10.2). Such programs are
# compiled anew; JAX has no setting that keeps those of one device alone.
_strategy = compiler._resolve_compilation_strategy


def _one_device_is_kept(computation, devices, *rest):
    key, options = _strategy(computation, devices, *rest)
    return (key if devices.size == 1 else None), options


compiler._resolve_compilation_strategy = _one_device_is_kept


def pytest_collection_modifyitems(items):
    """Whole runs first, single functions last: a file is the work of one process, and
    a long one begun at the end would leave the others idle.
    """
    tests = Path(__file__).parent
    runs = {tests / 'stages': 0, tests: 1}
    items.sort(key=lambda item: runs.get(item.path.parent, 2))


@pytest.fixture(scope='module', autouse=True)
def _programs_of_a_module():
    """Lets the programs of a module go. Each takes about a hundred mappings of memory,
    and Linux gives a process 65,530: the likely cause of crashes late in the suite.
    """
    yield
    jax.clear_caches()


_make_mesh = sharding.make_mesh


@pytest.fixture(scope='module')
def one_device():
    """Runs of this module take one device, whose programs are kept, unless a test or a
    fixture asks for all. That a step on eight gives the same is tested in
    tests/test_sharding.py and tests/algos.
    """
    alone = functools.partial(_make_mesh, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, 'make_mesh', alone)
        yield


@pytest.fixture
def all_devices(monkeypatch):
    """A test of such a module whose runs take them all."""
    monkeypatch.setattr(sharding, 'make_mesh', _make_mesh)


@pytest.fixture(scope='session')
def launch_on_all():
    """``launch`` for fixtures whose run takes them all."""
    from rlhf_jax.main import launch

    def launched(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding, 'make_mesh', _make_mesh)
            return launch(*args)

    return launched


@pytest.fixture(scope='session')
def config() -> TransformerConfig:
    """A two-layer decoder with grouped queries, small enough for any test."""
    return TransformerConfig(
        vocab_size=VOCABULARY,
        num_layers=2,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=64,
        max_positions=64,
        init_std=0.2,
    )


@pytest.fixture(scope='session')
def policy(config):
    return CausalLM(config)


@pytest.fixture(scope='session')
def unrolled(config):
    """The policy with its layers unrolled; of these the last can be run by itself."""
    return CausalLM(dataclasses.replace(config, scan_unroll=config.num_layers))


@pytest.fixture(scope='session')
def reward_model(config):
    return ScalarModel(config)


@pytest.fixture(scope='session')
def policy_params(policy):
    return _init(policy, 0)


@pytest.fixture(scope='session')
def reward_params(reward_model):
    return _init(reward_model, 1)


def _init(model, seed):
    tokens = np.zeros((1, 4), np.int32)
    return jax.jit(model.init)(jax.random.PRNGKey(seed), tokens, tokens == 0)['params']


@pytest.fixture
def token_batch() -> TokenBatch:
    """Sixteen right-padded rows of 4 to 12 tokens; the first half of each is the
    prompt.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 13, size=16)
    place = np.arange(12)
    mask = place < lengths[:, None]
    tokens = rng.integers(0, VOCABULARY, size=(16, 12)).astype(np.int32)
    return TokenBatch(
        tokens=tokens, mask=mask, loss_mask=mask & (place >= lengths[:, None] // 2)
    )


@pytest.fixture
def pair_batch() -> JudgedBatch:
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 11, size=(16, 2))
    mask = np.arange(10) < lengths[..., None]
    tokens = rng.integers(0, VOCABULARY, size=(16, 2, 10)).astype(np.int32)
    weight = np.ones(16, np.float32)
    weight[5] = 0
    margin = rng.uniform(0, 1, 16).astype(np.float32)
    return JudgedBatch(tokens=tokens, mask=mask, margin=margin, weight=weight)


@pytest.fixture
def generation() -> Generation:
    """Sixteen left-padded prompts with right-padded responses of 1 to 6 tokens."""
    rng = np.random.default_rng(2)
    prompts, responses = rng.integers(1, 6, size=16), rng.integers(1, 7, size=16)
    prompt_mask = np.arange(5) >= 5 - prompts[:, None]
    response_mask = np.arange(6) < responses[:, None]
    off = np.zeros_like(prompt_mask)
    response = np.concatenate([off, response_mask], 1)
    return Generation(
        tokens=rng.integers(0, VOCABULARY, size=(16, 11)).astype(np.int32),
        mask=np.concatenate([prompt_mask, response_mask], 1),
        response_mask=response,
        logprobs=np.where(response, rng.normal(-4, 0.3, size=(16, 11)), 0).astype(
            np.float32
        ),
        ended=rng.uniform(size=16) > 0.3,
    )


class _Bigram:
    """A policy whose next-token logits are a row of a table: params ``{'table': [V,
    V]}``.

    It has the interface of ``CausalLM``, compiles in no time, and every number that
    comes out of it can be worked out in NumPy.
    """

    config = types.SimpleNamespace(
        logit_softcap=None,
        num_tokens=None,
        is_unrolled=False,
        check_length=lambda length: None,
    )

    def apply(self, variables, tokens, *rest, method='__call__'):
        size = variables['params']['table'].shape[0]
        hidden = jax.nn.one_hot(tokens, size)
        if method == '__call__':
            return hidden
        if method == 'decode':
            return hidden, rest[-1]
        rows = tokens.shape[0]
        nothing = jnp.zeros((1, rows, 1, 0, 1))
        return hidden, KVCache(
            keys=nothing,
            values=nothing,
            mask=jnp.zeros((rows, 0), bool),
            places=jnp.zeros((rows, 0), jnp.int32),
            slot=jnp.int32(0),
            positions=jnp.zeros(rows, jnp.int32),
        )

    def unembedding(self, params):
        return params['table']


class _Counted:
    """A policy that reports every decoding step to the host."""

    def __init__(self, policy, calls):
        self.policy, self.calls, self.config = policy, calls, policy.config

    def apply(self, variables, tokens, *rest, method='__call__'):
        if method == 'decode':
            jax.debug.callback(lambda: self.calls.append(1))
        return self.policy.apply(variables, tokens, *rest, method=method)

    def unembedding(self, params):
        return self.policy.unembedding(params)


class _TokenScores:
    """A scalar model that looks a token's number up: params ``{'table': [V]}``, and
    beside it ``'backbone': {'layers': {}}`` where layers are taken apart.
    """

    def __init__(self, config, last=None):
        self.config, self.last = config, last

    def clone(self, **changes):
        return _TokenScores(**{'config': self.config, 'last': self.last, **changes})

    def apply(self, variables, tokens, mask):
        scores = jnp.where(mask, variables['params']['table'][tokens], 0)
        return scores if self.last is None else scores[:, -self.last :]


@pytest.fixture(scope='session')
def bigram():
    return _Bigram()


@pytest.fixture
def counted(bigram):
    """The bigram policy, and a list that grows by one with every decoding step."""
    calls = []
    return _Counted(bigram, calls), calls


@pytest.fixture(scope='session')
def token_scores(config):
    return _TokenScores(config)


@pytest.fixture(scope='session')
def finished(tmp_path_factory, worker_id, launch_on_all) -> Path:
    """The work directory of a small run of all four stages on all devices; one for all
    processes of the tests. Where another has made it, the launch returns at once.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == 'master' else folder.parent
    with FileLock(folder / 'small.lock'):
        launch_on_all(small_config.get_config(), folder / 'small')
    return folder / 'small'
