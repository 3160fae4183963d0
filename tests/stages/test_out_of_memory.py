"""Memory that runs out: what asked for how much, and which settings ask for less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax.main import launch
from rlhf_jax.stages import out_of_memory
from tests.small_config import get_config

CONFIG = ConfigDict(
    {
        'model': {'remat': False, 'dtype': 'float32'},
        'sft': {'batch_size': 64, 'buckets': (128,), 'num_microbatches': 1},
    }
)


def error_of(work, doing='training'):
    with (
        pytest.raises(ValueError) as caught,
        out_of_memory.told(CONFIG, 'sft', doing),
    ):
        work()
    return str(caught.value)


def test_a_device():
    error = error_of(lambda: jnp.ones((2**42,)).block_until_ready())
    assert error == (
        'sft: out of device memory (training): 16,384.00 GiB were asked for; raise '
        'config.sft.num_microbatches=1, lower config.sft.batch_size=64 or '
        'config.sft.buckets=(128,), set config.model.remat=True (and scan_unroll=1), '
        "set config.model.dtype='bfloat16', or split the model over more devices by "
        'config.parallel.fsdp'
    )


def test_the_host():
    error = error_of(lambda: np.ones(2**45), 'reading')
    start = (
        'sft: out of host memory (reading): 262,144.00 GiB were asked for; read less'
    )
    assert error.startswith(start)
    assert 'an allocation failed' in error_of(lambda: bytearray(2**60))


@pytest.mark.parametrize(
    ('message', 'amount'),
    [
        ('Out of memory while trying to allocate 137438953472 bytes.', '128.00 GiB'),
        ('Allocator (GPU_0_bfc) ran out trying to allocate 32.00GiB (rounded', '32.00'),
        ('Ran out of memory in memory space hbm. Used 20.22G of 15.48G hbm.', '20.22'),
        ('Attempting to reserve 8.50G at the bottom of memory.', '8.50 GiB'),
        ('Something else.', 'RESOURCE_EXHAUSTED: Something else.'),
    ],
)
def test_what_xla_says(message, amount):
    def fail():
        raise jax.errors.JaxRuntimeError(f'RESOURCE_EXHAUSTED: {message}')

    assert f': {amount}' in error_of(fail)


def test_other_errors_stay_what_they_are():
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'),
        out_of_memory.told(CONFIG, 'sft', 'training'),
    ):
        raise jax.errors.JaxRuntimeError('INTERNAL: a bug')


def test_the_step_is_said():
    step = out_of_memory.naming_step(lambda state, done: jnp.ones((2**42,)))
    assert 'out of device memory (training, step 8): ' in error_of(lambda: step(0, 7))


def test_a_batch_that_no_machine_could_hold(tmp_path):
    config = get_config('3')
    config.stages = ('pretrain',)
    config.pretrain.batch_size = 2**40
    with pytest.raises(ValueError) as caught:
        launch(config, tmp_path)
    message = str(caught.value)
    assert message.startswith('pretrain: out of host memory (training): ')
    assert 'config.pretrain.batch_size=1099511627776' in message
