"""Steps compiled for accelerators that are not here: nothing runs, all of XLA does.

For TPUs, where libtpu of the version that jax pins is installed; one process at a time:

    pip install -e '.[tpu-compile]' && pytest -n 0 tests/test_accelerators.py

For H100s, with 5 GB of wheels in a folder of their own, DIR (jax 0.10.2, say):

    pip install --target DIR --no-deps jax-cuda12-pjrt==0.10.2 \\
        jax-cuda12-plugin==0.10.2 nvidia-{cublas,cudnn,cuda-nvcc,cuda-runtime}-cu12 \\
        nvidia-{cufft,cusolver,cusparse,nccl,nvjitlink,cuda-nvrtc,nvshmem}-cu12 \\
        nvidia-cuda-cupti-cu12
    CUDA_WHEELS=DIR PYTHONPATH=DIR \\
        LD_LIBRARY_PATH=$(ls -d DIR/nvidia/*/lib | paste -sd:) \\
        pytest -n 0 -s -m gpu_compile tests/test_accelerators.py

``-s`` shows the memory of a device.
"""

import functools
import importlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from rlhf_jax.algos.ppo import ActorCritic, PPOHParams, ppo_step, prepare
from rlhf_jax.algos.rm import RMHParams, rm_step
from rlhf_jax.algos.sft import SFTHParams, sft_step
from rlhf_jax.generate import generate, sampling
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import CausalLM, ScalarModel, in_compute_dtype
from rlhf_jax.optim import OptimConfig, make_optimizer
from rlhf_jax.sharding import ParallelConfig, compile_step, make_mesh
from rlhf_jax.types import (
    Generation,
    JudgedBatch,
    PPOState,
    Rollout,
    Scores,
    TokenBatch,
    TrainState,
)

# A prompt as long as its response, in tokens; the kernels of TPUs want 128.
ROWS, LENGTH, RESPONSE = 16, 128, 64
CONFIG = TransformerConfig(
    vocab_size=512,
    num_layers=2,
    width=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=512,
    max_positions=LENGTH,
    dtype='bfloat16',
)
POLICY, SCALAR = CausalLM(CONFIG), ScalarModel(CONFIG)
TX = make_optimizer(OptimConfig(learning_rate=1e-5), 100)
# Of what XLA asks about a GPU; the numbers are those of the data sheet.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def places(dtype, *shape):
    return jax.ShapeDtypeStruct((ROWS, *shape), dtype)


def start(model):
    tokens = jnp.zeros((1, 2), jnp.int32)
    return model.init(jax.random.PRNGKey(0), tokens, tokens == 0)['params']


def train_state(of, params, **fields):
    def begin(params):
        fields_of = {'step': jnp.int32(0), 'rng': jax.random.PRNGKey(0), **fields}
        return of(**fields_of, params=params, opt_state=TX.init(params))

    return jax.eval_shape(begin, params)


def step_of(name):
    """(function, shapes of its arguments, their kinds, kinds of the results)."""
    policy, scalar = (
        jax.eval_shape(functools.partial(start, m)) for m in (POLICY, SCALAR)
    )
    tokens, mask = places(jnp.int32, LENGTH), places(bool, LENGTH)
    numbers = places(jnp.float32, LENGTH)
    train = ('params', 'batch'), ('params', 'replicated')
    if name == 'sft':
        batch = TokenBatch(tokens=tokens, mask=mask, loss_mask=mask)
        fn = functools.partial(sft_step, model=POLICY, tx=TX, hp=SFTHParams())
        return fn, (train_state(TrainState, policy), batch), *train
    if name == 'rm':
        pair, row = places(jnp.int32, 2, LENGTH), places(jnp.float32)
        real = places(bool, 2, LENGTH)
        batch = JudgedBatch(tokens=pair, mask=real, margin=row, weight=row)
        fn = functools.partial(rm_step, model=SCALAR, tx=TX, hp=RMHParams())
        return fn, (train_state(TrainState, scalar), batch), *train
    if name == 'generate':
        fn = functools.partial(generate, model=POLICY, max_new_tokens=8)
        how = jax.eval_shape(lambda: sampling(eos_ids=[2]))
        key = jax.ShapeDtypeStruct((2,), jnp.uint32)
        args = policy, tokens, mask, places(jnp.int32), key, how
        kinds = 'params', 'batch', 'batch', 'batch', 'replicated', 'replicated'
        return fn, args, kinds, ('batch',)
    models = {'model': ActorCritic(POLICY, SCALAR)}
    state = train_state(
        PPOState, {'policy': policy, 'critic': scalar}, kl_coef=jnp.float32(0.1)
    )
    common = {'tokens': tokens, 'mask': mask, 'response_mask': mask}
    common['response_length'] = RESPONSE
    hp = PPOHParams(num_epochs=2, num_minibatches=2)
    if name == 'prepare':
        reference = jax.eval_shape(
            functools.partial(in_compute_dtype, config=CONFIG), policy
        )
        written = Generation(**common, logprobs=numbers, ended=places(bool))
        args = state, reference, written, Scores(places(jnp.float32))
        kinds = ('params', 'params', 'batch', 'batch'), ('batch', 'replicated')
        return functools.partial(prepare, **models, hp=hp), args, *kinds
    names = 'old_logprobs', 'ref_logprobs', 'advantages', 'old_values', 'returns'
    rollout = Rollout(**common, value_mask=mask, **dict.fromkeys(names, numbers))
    fn = functools.partial(ppo_step, **models, tx=TX, hp=hp)
    return fn, (state, rollout), *train


def compiled(name, devices, shape, options=None):
    """A step for a mesh of described devices."""
    data, fsdp, tensor = shape
    mesh = make_mesh(ParallelConfig(data=data, fsdp=fsdp, tensor=tensor), devices)
    fn, args, inputs, outputs = step_of(name)
    kinds = {'inputs': inputs, 'outputs': outputs, 'donate': ()}
    lowered = compile_step(fn, mesh=mesh, **kinds).lower(*args)
    program = lowered.compile(compiler_options=options)
    memory = program.memory_analysis()
    print(
        name,
        shape,
        f'arguments {memory.argument_size_in_bytes / 2**20:.1f} MiB,',
        f'temporary {memory.temp_size_in_bytes / 2**20:.1f} MiB',
    )
    return program.as_text()


def test_a_tpu_mesh_runs_the_splash_kernel():
    """Forward, of the queries, of keys and values."""
    pytest.importorskip('libtpu', reason="needs the 'tpu-compile' extra")
    described = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')
    text = compiled('sft', list(described.devices), (1, 2, 2))
    assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.fixture(scope='module')
def h100s():
    """Eight of them, and where the compiler finds its parts."""
    wheels = os.environ.get('CUDA_WHEELS')
    if wheels is None:
        pytest.skip('CUDA_WHEELS names no folder; see the head of this file')
    jax.devices()
    importlib.import_module('jax_plugins.xla_cuda12')
    library = f'{wheels}/jax_plugins/xla_cuda12/xla_cuda_plugin.so'
    client = importlib.import_module('jax._src.lib').xla_client
    if not client.pjrt_plugin_loaded('cuda'):
        client.load_pjrt_plugin_dynamically('cuda', library)
    described = topologies.get_topology_desc(
        '', 'cuda', target_config=H100, topology='1x1x8'
    )
    options = {
        'xla_gpu_autotune_level': 0,  # which needs a device
        'xla_gpu_cuda_data_dir': f'{wheels}/nvidia/cuda_nvcc',
    }
    return list(np.asarray(described.devices).flat), options


@pytest.mark.gpu_compile
@pytest.mark.parametrize('shape', [(1, 8, 1), (2, 2, 2), (8, 1, 1)])
@pytest.mark.parametrize('name', ['sft', 'rm', 'prepare', 'ppo', 'generate'])
def test_a_gpu_mesh_runs_cudnns_attention(h100s, name, shape):
    devices, options = h100s
    text = compiled(name, devices, shape, options)
    assert '__cudnn$fmhaScaleBiasSoftmax' in text
    backward = name in ('sft', 'rm', 'ppo')
    assert ('__cudnn$fmhaScaleBiasSoftmaxBackward' in text) == backward
