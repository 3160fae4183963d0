"""Which platform a program is for: what the mesh says, whatever machine this is."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from rlhf_jax.ops.layout import platform
from rlhf_jax.sharding import ParallelConfig, compile_step, make_mesh


@pytest.mark.parametrize(
    ('name', 'kind', 'expected'),
    [
        ('gpu', 'NVIDIA H100 80GB HBM3', 'cuda'),
        ('gpu', 'AMD Instinct MI300X', 'rocm'),
        ('tpu', 'TPU v5 lite', 'tpu'),
        ('cpu', 'cpu', 'cpu'),
    ],
)
def test_the_mesh_says_the_platform(name, kind, expected):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=name)
    mesh = AbstractMesh((2, 2, 2), ('data', 'fsdp', 'tensor'), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == expected


@pytest.mark.parametrize('backend', ['jit', 'pmap'])
def test_a_compiled_step_asks_its_mesh_and_no_backend(backend, monkeypatch):
    monkeypatch.setattr('rlhf_jax.ops.layout.get_backend', None)
    seen = []

    def step(x):
        seen.append(platform())
        return x

    kinds = {'inputs': ('batch',), 'outputs': ('batch',), 'donate': ()}
    compile_step(step, mesh=make_mesh(ParallelConfig()), backend=backend, **kinds)(
        jnp.ones(8)
    )
    assert set(seen) == {'cpu'}


def test_without_a_mesh_it_is_that_of_jax():
    assert platform() == jax.default_backend()
