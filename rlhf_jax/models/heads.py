"""What stands on a Transformer: a language-model head, or a scalar head.

``CausalLM`` returns *hidden states*; whoever needs log-probabilities multiplies by
``unembedding(params)`` in ``ops.logprobs``, which never holds more logits than it must.
The policy, the reward model and the critic share parameter paths below ``backbone``, so
one starts from another by copying that subtree. Read ``generate.py`` next.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from rlhf_jax.models import transformer
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.transformer import KVCache, Transformer
from rlhf_jax.types import Array, Params


class CausalLM(nn.Module):
    """A decoder with a language-model head.

    Parameters: ``backbone/…`` and, unless the embeddings are tied, ``lm_head`` [D, V].
    """

    config: TransformerConfig
    last: int | None = None  # see :func:`apply_to_last`

    def setup(self) -> None:
        cfg = self.config
        self.backbone = Transformer(cfg, self.last)
        if not cfg.tied_embeddings:
            init = nn.initializers.normal(cfg.init_std)
            self.lm_head = self.param('lm_head', init, (cfg.width, cfg.vocab_size))

    def __call__(
        self, tokens: Array, mask: Array, segments: Array | None = None
    ) -> Array:
        """Hidden states after the final norm, [B, T] → [B, T, D].

        ``segments`` [B, T] tells the documents of a packed row apart.
        """
        return transformer.forward(self.backbone, tokens, mask, segments)

    def prefill(
        self, tokens: Array, mask: Array, cache_length: int
    ) -> tuple[Array, KVCache]:
        """See :func:`rlhf_jax.models.transformer.prefill`."""
        return transformer.prefill(self.backbone, tokens, mask, cache_length)

    def decode(
        self, tokens: Array, real: Array, cache: KVCache
    ) -> tuple[Array, KVCache]:
        """See :func:`rlhf_jax.models.transformer.decode`."""
        return transformer.decode(self.backbone, tokens, real, cache)

    def unembedding(self, params: Params) -> Array:
        """The matrix [D, V] from hidden states to logits; a plain function of the
        parameters.
        """
        if self.config.tied_embeddings:
            return params['backbone']['embed']['tokens'].T
        return params['lm_head']


class ScalarModel(nn.Module):
    """A Transformer with a scalar head: the reward model and the critic.

    Parameters: ``backbone/…`` and ``head/kernel`` [D], ``head/bias`` []; with named
    ``heads``, of which each is a score of its own, [D, H] and [H]. The kernel starts
    from N(0, 1/√(D+1)) and the bias from 0. Source: openai/lm-human-preferences; Huang
    et al. 2024, arXiv 2403.17031.

    An encoder (``attention='bidirectional'``) is read at its first token, through the
    dense layer with tanh that BERT has there: ``head/dense_kernel`` [D, D] and
    ``head/dense_bias`` [D]. Source: Devlin et al. 2019, arXiv 1810.04805.
    """

    config: TransformerConfig
    heads: tuple[str, ...] = ()  # e.g. ('helpfulness', 'safety'); () for the one score
    last: int | None = None  # see :func:`apply_to_last`

    @nn.compact
    def __call__(self, tokens: Array, mask: Array) -> Array:
        """A number at every token, [B, T] → [B, T] float32 ([B, T, H] of named heads);
        the caller picks where to read.
        """
        cfg = self.config
        backbone = Transformer(cfg, self.last, name='backbone')
        hidden = transformer.forward(backbone, tokens, mask)
        return ScalarHead(cfg, self.heads, name='head')(hidden)


class ScalarHead(nn.Module):
    """A float32 map to one number, or one by name, behind a dense layer with tanh for
    an encoder.
    """

    config: TransformerConfig
    heads: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        width = self.config.width
        hidden = hidden.astype(jnp.float32)
        if self.config.attention == 'bidirectional':
            init = nn.initializers.normal(self.config.init_std)
            dense = self.param('dense_kernel', init, (width, width))
            offset = self.param('dense_bias', nn.initializers.zeros, (width,))
            hidden = jnp.tanh(hidden @ dense + offset)
        init = nn.initializers.normal((width + 1) ** -0.5)
        shape = (len(self.heads),) if self.heads else ()
        kernel = self.param('kernel', init, (width, *shape))
        bias = self.param('bias', nn.initializers.zeros, shape)
        return jnp.tensordot(hidden, kernel, axes=1) + bias


Model = TypeVar('Model', CausalLM, ScalarModel)


def unstack_layers(
    model: Model, params: Params, num_stacked: int
) -> tuple[Model, Params]:
    """The same model with its last layers unstacked: each has parameters of its own.

    Decoding uses it, because slicing a layer's weights out of the stack copies them at
    every token. :func:`apply_to_last` uses it, to run the last layer for fewer tokens
    than the others.

    Args:
        model: with all layers stacked.
        params: of ``model``.
        num_stacked: the first so many layers stay stacked.

    Returns:
        (model, its parameters: ``backbone/layers_<i>`` beside ``backbone/layers``).
    """
    backbone = dict(params['backbone'])
    stack = backbone.pop('layers')
    if num_stacked:
        backbone['layers'] = jax.tree.map(lambda x: x[:num_stacked], stack)
    for i in range(num_stacked, model.config.num_layers):
        backbone[f'layers_{i}'] = jax.tree.map(operator.itemgetter(i), stack)
    config = dataclasses.replace(model.config, num_stacked=num_stacked)
    return model.clone(config=config), {**params, 'backbone': backbone}


def fuse_projections(model: Model, params: Params) -> tuple[Model, Params]:
    """The same model with fused projections: one matrix product for queries, keys and
    values, and one for gate and up.

    Decoding uses it: for few rows, one wide product is faster than several narrow ones.

    Args:
        model: with all layers unstacked (:func:`unstack_layers`).
        params: of ``model``.

    Returns:
        (model, its parameters: ``query_key_value_kernel`` [D, N + 2·K, H] and
        ``gate_up_kernel`` [D, 2·F] in place of their parts; biases likewise).
    """

    def fuse(part: Params, names: tuple[str, ...], axis: int) -> Params:
        part = dict(part)
        for kind in ('kernel', 'bias'):
            if f'{names[0]}_{kind}' in part:
                several = [part.pop(f'{name}_{kind}') for name in names]
                part['_'.join((*names, kind))] = jnp.concatenate(several, axis)
        return part

    backbone = dict(params['backbone'])
    for i in range(model.config.num_layers):
        layer = dict(backbone[f'layers_{i}'])
        layer['attention'] = fuse(layer['attention'], ('query', 'key', 'value'), -2)
        if model.config.gated_mlp:
            layer['mlp'] = fuse(layer['mlp'], ('gate', 'up'), -1)
        backbone[f'layers_{i}'] = layer
    config = dataclasses.replace(model.config, fused=True)
    return model.clone(config=config), {**params, 'backbone': backbone}


def apply_to_last(
    model: Model, params: Params, tokens: Array, mask: Array, last: int | None
) -> Array:
    """The outputs of a model at the last places of sequences, [B, T] → [B, last, …].

    The head is run for these places alone. So is the last layer where layers are
    unrolled; where they are scanned, slicing it out of the stack would copy them all.

    Args:
        model: a decoder.
        params: of ``model``.
        tokens: [B, T] int32.
        mask: [B, T] bool.
        last: ≥ 1, static; None for all T.
    """
    if last is None or last >= tokens.shape[1]:
        return model.apply({'params': params}, tokens, mask)
    if not model.config.is_unrolled:
        return model.clone(last=last).apply({'params': params}, tokens, mask)
    model, params = unstack_layers(model, params, model.config.num_layers - 1)
    # cuDNN has attention of even numbers of queries, and is not asked for a single one.
    more = last + last % 2 if last > 1 else last
    out = model.clone(last=more).apply({'params': params}, tokens, mask)
    return out[:, -last:]


def in_compute_dtype(params: Params, config: TransformerConfig) -> Params:
    """Parameters that nobody trains, in ``config.dtype`` where every use would round
    them to it: half the memory in bfloat16, and what the model says is the same.

    Those are the kernels and biases of the layers, the unembedding and, unless
    something is computed with them in float32 first, the embeddings. Norms and scalar
    heads stay as they are, and in float32 everything does.

    Args:
        params: of a ``CausalLM`` or a ``ScalarModel``, or of several, stacked.
        config: of the model.
    """
    plain = not (
        config.scale_embeddings
        or config.embed_norm
        or config.token_types
        or config.position == 'learned'
    )

    def is_rounded(path: tuple[str, ...]) -> bool:
        if path[-2:] == ('embed', 'tokens'):
            return plain
        in_layer = path[-2:-1] in (('attention',), ('mlp',))
        return path[-1] == 'lm_head' or (
            in_layer and path[-1].endswith(('_kernel', '_bias'))
        )

    return traverse_util.path_aware_map(
        lambda path, x: x.astype(config.dtype) if is_rounded(path) else x, params
    )


def start_from(params: Params, source: Params) -> Params:
    """``params`` with the backbone of ``source``: how a reward model starts from a
    policy.

    Raises:
        ValueError: backbones of different shapes, naming the first difference.
    """
    have = traverse_util.flatten_dict(params['backbone'], sep='/')
    offered = traverse_util.flatten_dict(source['backbone'], sep='/')
    for path in sorted(have.keys() | offered.keys()):
        ours, theirs = (
            list(tree[path].shape) if path in tree else 'absent'
            for tree in (have, offered)
        )
        if ours != theirs:
            raise ValueError(
                f'backbone/{path} is {theirs} in the source but {ours} in this model; '
                'give both the same model config'
            )
    return {**params, 'backbone': source['backbone']}
