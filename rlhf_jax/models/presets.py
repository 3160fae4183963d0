"""Named model sizes, for runs that start from nothing.

Models that start from a Hugging Face directory take their size from there (``hf/``).
Read ``models/heads.py`` next.
"""

from __future__ import annotations

import difflib

from rlhf_jax.models.config import TransformerConfig

SIZES = ('nano', 'micro', 'small', '1b')


def preset(name: str, vocab_size: int) -> TransformerConfig:
    """The decoder of a named size: the Llama family with tied embeddings.

    Parameters without the embeddings: 'nano' (tests and smoke runs) 74 thousand,
    'micro' 0.7 million, 'small' 4.2 million, '1b' 0.97 billion. '1b' has the shape of
    Llama 3.2 1B (Meta 2024), without the stretched frequencies of its rotary positions.

    Args:
        name: one of ``SIZES``.
        vocab_size: number of token ids.

    Raises:
        ValueError: an unknown name, with the nearest right one.
    """
    shapes = {
        'nano': dict(
            num_layers=2, width=64, num_heads=4, num_kv_heads=2, mlp_width=128
        ),
        'micro': dict(
            num_layers=4, width=128, num_heads=4, num_kv_heads=2, mlp_width=344
        ),
        'small': dict(
            num_layers=4, width=256, num_heads=4, num_kv_heads=4, mlp_width=1024
        ),
        '1b': dict(
            num_layers=16,
            width=2048,
            num_heads=32,
            num_kv_heads=8,
            mlp_width=8192,
            max_positions=131_072,
            rope_theta=500_000.0,
        ),
    }
    if name not in shapes:
        close = difflib.get_close_matches(name, shapes, n=1)
        hint = (
            f'did you mean {close[0]!r}?' if close else f'known are {", ".join(SIZES)}'
        )
        raise ValueError(f'model size {name!r} is unknown; {hint}')
    shape = {'max_positions': 1024, **shapes[name]}
    head_dim = shape['width'] // shape['num_heads']
    # 1/√width: the usual 0.02 is small for narrow models.
    return TransformerConfig(
        vocab_size=vocab_size,
        head_dim=head_dim,
        init_std=shape['width'] ** -0.5,
        **shape,
    )
