"""What is measured: models, and the works done with them.

A ``Model`` and a ``Work`` together are all that a worker is told, as JSON, so that
every system does the same. Read ``flops.py`` next.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Kind = Literal['sft', 'rm', 'dpo', 'generate', 'grpo', 'rloo', 'ppo']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder of the Llama family. Parameters and optimizer are float32."""

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    tied: bool = False
    dtype: str = 'float32'  # of matrix products
    theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def layer_matrices(self) -> int:
        """Parameters in the matrices of all layers."""
        attention = 2 * self.heads + 2 * self.kv_heads
        per_layer = self.width * (attention * self.head_dim + 3 * self.mlp)
        return self.layers * per_layer

    @property
    def key_value_matrices(self) -> int:
        """Parameters in the matrices of the keys and values of one layer."""
        return 2 * self.width * self.kv_heads * self.head_dim

    @property
    def head(self) -> int:
        """Parameters in the matrix from hidden states to logits."""
        return self.width * self.vocab

    @property
    def backbone(self) -> int:
        """Everything below a head: embeddings, layers, norms."""
        norms = (2 * self.layers + 1) * self.width
        return self.head + self.layer_matrices + norms

    @property
    def policy(self) -> int:
        """Parameters of the language model."""
        return self.backbone + (0 if self.tied else self.head)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One thing that is timed.

    ``batch`` counts sequences, of ``rm`` and ``dpo`` pairs. What is not sampled has
    ``length`` tokens, of ``dpo`` half of them prompt; what is sampled has ``prompt``
    and then exactly ``response`` tokens: nothing stops early.
    """

    kind: Kind
    batch: int
    length: int = 0
    prompt: int = 0
    response: int = 0
    top_p: float = 1.0
    epochs: int = 1
    group: int = 1  # samples per prompt
    microbatches: int = 1  # gradient accumulation

    @property
    def tokens(self) -> int:
        """Tokens of a sequence."""
        return self.length or self.prompt + self.response


def _small(vocab: int, layers: int = 4) -> Model:
    return Model(vocab=vocab, layers=layers, width=256, heads=4, kv_heads=4, mlp=1024)


MODELS = {
    'tiny': Model(vocab=128, layers=2, width=32, heads=2, kv_heads=2, mlp=64),
    'small': _small(512),
    'small_32k': _small(32_768),
    # The shape of Llama 3.2 1B (Meta 2024): 1.24 billion parameters.
    '1b': Model(
        vocab=128_256,
        layers=16,
        width=2048,
        heads=32,
        kv_heads=8,
        mlp=8192,
        tied=True,
        dtype='bfloat16',
        theta=500_000.0,
    ),
}

_SMALL = {
    'sft_128': Work(kind='sft', batch=8, length=128),
    'sft_256': Work(kind='sft', batch=8, length=256),
    'rm': Work(kind='rm', batch=8, length=128),
    'dpo': Work(kind='dpo', batch=8, length=128),
    'generate': Work(kind='generate', batch=8, prompt=64, response=64),
    'generate_top_p': Work(kind='generate', batch=8, prompt=64, response=64, top_p=0.9),
    'rloo': Work(kind='rloo', batch=8, prompt=64, response=64, group=4),
    'grpo': Work(kind='grpo', batch=8, prompt=64, response=64, group=4),
    'ppo': Work(kind='ppo', batch=8, prompt=64, response=64, epochs=4),
}

WORKS = {
    'tiny': {
        name: dataclasses.replace(
            work,
            length=min(work.length, 16),
            prompt=min(work.prompt, 8),
            response=min(work.response, 8),
        )
        for name, work in _SMALL.items()
        if name != 'sft_256'
    },
    'small': _SMALL,
    'small_32k': _SMALL,
    '1b': {
        'sft_2048': Work(kind='sft', batch=8, length=2048, microbatches=4),
        'rm': Work(kind='rm', batch=8, length=1024, microbatches=4),
        'dpo': Work(kind='dpo', batch=8, length=1024, microbatches=4),
        'generate_64': Work(kind='generate', batch=64, prompt=256, response=256),
        'generate_512': Work(kind='generate', batch=512, prompt=256, response=256),
        'generate_64_top_p': Work(
            kind='generate', batch=64, prompt=256, response=256, top_p=0.9
        ),
        'grpo': Work(
            kind='grpo', batch=64, prompt=256, response=256, group=8, microbatches=8
        ),
        'ppo': Work(
            kind='ppo', batch=256, prompt=256, response=256, epochs=2, microbatches=32
        ),
    },
}

SIZES_OF_DEVICE = {'cpu': ('small', 'small_32k'), 'gpu': ('1b',)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """What the machine itself is asked for: a product of square matrices and a copy."""

    side: int  # of the matrices
    dtype: str
    copied: int  # bytes read, and as many written


PROBES = {
    'tiny': Probe(side=256, dtype='float32', copied=2**22),
    'cpu': Probe(side=2048, dtype='float32', copied=2**28),
    'gpu': Probe(side=8192, dtype='bfloat16', copied=2**32),
}


# What varies in ``--scaling``, by the table's name: label → (model, work).
def scaling(model: Model) -> dict[str, dict[int, tuple[Model, Work]]]:
    """Variations of a model and of an SFT step, or of generation, one at a time."""
    sft = Work(kind='sft', batch=8, length=128)
    write = Work(kind='generate', batch=8, prompt=64, response=64)
    replace = dataclasses.replace
    return {
        'batch': {n: (model, replace(sft, batch=n)) for n in (2, 4, 8, 16)},
        'length': {n: (model, replace(sft, length=n)) for n in (64, 128, 256, 512)},
        'depth': {n: (replace(model, layers=n), sft) for n in (2, 4, 8, 16, 28)},
        'vocabulary': {
            n: (replace(model, vocab=n), sft) for n in (512, 2048, 8192, 32_768)
        },
        'response': {n: (model, replace(write, response=n)) for n in (16, 32, 64, 128)},
    }
