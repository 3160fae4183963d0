"""What a Transformer is made of: a model family is a value of ``TransformerConfig``.

``hf/families.py`` says which value stands for which Hugging Face family. Read
``models/layers.py`` next.
"""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the pretrained.

    'linear' divides every frequency by ``factor``. 'llama3' divides those whose
    wavelength exceeds ``original_positions / low_freq_factor``, keeps those below
    ``original_positions / high_freq_factor``, and interpolates between.
    Source: Chen et al. 2023, arXiv 2306.15595; Llama 3.1 (Meta 2024, arXiv 2407.21783).
    """

    kind: Literal['linear', 'llama3']
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Everything that sets one Transformer apart from another."""

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    # Where the norms stand, f being attention or MLP:
    #   pre    x + f(norm(x))          parallel  x + attention(n₁(x)) + mlp(n₂(x))
    #   post   x + norm(f(x))          both      x + norm(f(norm(x)))
    #   outer  norm(x + f(x))
    residual: Literal['pre', 'parallel', 'post', 'both', 'outer'] = 'pre'
    norm: Literal['rms', 'layer'] = 'rms'
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to the stored scale
    activation: Literal['silu', 'gelu', 'gelu_tanh', 'relu'] = 'silu'
    gated_mlp: bool = True
    mlp_bias: bool = False
    attention: Literal['causal', 'bidirectional'] = 'causal'
    attention_bias: bool = False  # of query, key and value
    attention_out_bias: bool = False
    attention_softcap: float | None = None  # c·tanh(score / c)
    query_scalar: float | None = None  # scores are divided by its root; None: head_dim
    # RMSNorm of queries and keys: over each head, or over all heads at once.
    qk_norm: Literal['head', 'all'] | None = None
    sliding_window: int | None = None  # tokens that a windowed layer sees, itself too
    windowed: tuple[bool, ...] = ()  # per layer; empty where no window is set
    position: Literal['rope', 'learned'] = 'rope'
    position_offset: int = 0  # learned: the row of the first position
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0  # of every head that is rotated
    rope_scaling: RopeScaling | None = None
    window_rope_theta: float | None = None  # of windowed layers, unscaled; None: as all
    scale_embeddings: bool = False  # by √width
    embed_norm: bool = False  # a norm over the embeddings
    token_types: int = 0  # rows of a type table, whose first is added to every token
    tied_embeddings: bool = True
    logit_softcap: float | None = None
    # Ids that the tokenizer has: those from here on, which only fill the embeddings up,
    # have probability 0. None: all of the vocabulary.
    num_tokens: int | None = None
    init_std: float = 0.02
    dtype: str = 'float32'  # of activations and matrix products; parameters are float32
    remat: bool = False  # recompute each layer in the backward pass; not if unrolled
    scan_unroll: int = 1  # layers per iteration of the scan
    # The first so many layers have stacked parameters, None for all; the others are
    # unstacked, see models.heads.unstack_layers.
    num_stacked: int | None = None
    # Fused projections: one kernel for queries, keys and values, and one for gate and
    # up, see models.heads.fuse_projections.
    fused: bool = False

    def __post_init__(self) -> None:
        # A config that comes back from JSON holds lists and dicts.
        object.__setattr__(self, 'windowed', tuple(self.windowed))
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, 'rope_scaling', RopeScaling(**self.rope_scaling))
        if self.remat and self.scan_unroll > 1:
            raise ValueError(
                f'remat=True with scan_unroll={self.scan_unroll} saves no memory: what '
                'unrolled layers would compute anew, XLA keeps; use scan_unroll=1 '
                '(config.model.scan_unroll), or remat=False'
            )
        if self.head_dim < 1:
            raise ValueError(
                f'head_dim={self.head_dim} must be at least 1: width={self.width} for '
                f'num_heads={self.num_heads}'
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f'num_heads={self.num_heads} is not divisible by '
                f'num_kv_heads={self.num_kv_heads}'
            )
        if self.position == 'rope' and self.rotary_dim % 2:
            raise ValueError(
                f'head_dim={self.head_dim} · rope_fraction={self.rope_fraction} must '
                'be even for rotary positions'
            )
        expected = 0 if self.sliding_window is None else self.num_layers
        if len(self.windowed) != expected:
            raise ValueError(
                f'windowed has {len(self.windowed)} entries, not {expected}: one per '
                'layer with a sliding_window, none without'
            )

    def check_length(self, length: int) -> None:
        """Refuses sequences for whose last tokens a learned table has no position.

        Args:
            length: of the sequences, in tokens, with their padding.

        Raises:
            ValueError: the table is shorter.
        """
        if self.position == 'learned' and length > self.max_positions:
            raise ValueError(
                f'sequences of {length} tokens exceed the {self.max_positions} learned '
                'positions of the model; shorten prompts, responses or padding'
            )

    @property
    def rotary_dim(self) -> int:
        """Entries of a head that are rotated."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def is_unrolled(self) -> bool:
        """Whether no scan is left: every layer is compiled by itself."""
        return self.scan_unroll >= self.num_layers

    @property
    def mixes_windows(self) -> bool:
        """Whether some layers see a window and others everything."""
        return len(set(self.windowed)) > 1
