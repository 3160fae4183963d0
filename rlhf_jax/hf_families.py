"""Tables that say how each Hugging Face model family spells its config and weights.

A family is data: adding one is adding a :class:`Family` to ``FAMILIES``. ``hf.py``
reads and writes directories by these tables and knows no family by name. Read it next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from rlhf_jax.models.transformer import TransformerConfig

REQUIRED = object()  # default of an entry that config.json must have
RUNTIME = ('dtype', 'remat', 'scan_unroll')  # how a model runs: not part of what it is

ACTIVATIONS = MappingProxyType(
    {  # Hugging Face → ours; of two spellings the first is written
        'silu': 'silu',
        'swish': 'silu',
        'gelu': 'gelu',
        'gelu_pytorch_tanh': 'gelu_tanh',
        'gelu_new': 'gelu_tanh',
        'relu': 'relu',
    }
)


class Layout(NamedTuple):
    """How one tensor is laid out there and here; both ways lose nothing."""

    read: Callable[[Any, tuple[int, ...]], Any]  # their array, our shape → our array
    write: Callable[[Any], Any]  # our array → their array


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        'copy': Layout(lambda x, shape: x, lambda x: x),
        'transpose': Layout(lambda x, shape: x.T, lambda x: x.T),  # [F, D] ↔ [D, F]
        'heads_in': Layout(  # [H·h, D] ↔ [D, H, h]
            lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(x.shape[0], -1).T
        ),
        'heads_out': Layout(  # [D, H·h] ↔ [H, h, D]
            lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T
        ),
        'heads_bias': Layout(  # [H·h] ↔ [H, h]
            lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1)
        ),
        'row': Layout(lambda x, shape: x[0], lambda x: x[None]),  # [1, D] ↔ [D]
    }
)


@dataclasses.dataclass(frozen=True)
class Field:
    """An entry of config.json and the fields of ``TransformerConfig`` that it sets."""

    name: str
    ours: tuple[str, ...]
    default: Any = REQUIRED  # or a value, or a function of config.json: may be absent
    values: Mapping[Any, Any] | None = None  # their value → ours; None: the same


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter path here and a tensor name there; ``{layer}`` stands for the layer.

    Whether a model has the weight (biases, an untied head) follows from its config.
    """

    path: str
    name: str
    layout: str = 'copy'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that sets one family of models apart."""

    model_type: str
    architectures: Mapping[str, str]  # 'lm' and 'scalar' → class name in transformers
    fixed: Mapping[str, Any]  # fields of TransformerConfig that all members share
    fields: tuple[Field, ...]
    weights: tuple[Weight, ...]
    ignored: tuple[str, ...] = ()  # patterns of buffers that older files carry


def read_config(family: Family, entries: Mapping[str, Any]) -> TransformerConfig:
    """The ``TransformerConfig`` that the entries of a config.json describe.

    Raises:
        ValueError: an entry that is missing, or whose value is not supported.
    """
    settings = dict(family.fixed)
    for field in family.fields:
        value = entries.get(field.name)
        if value is None:  # absent and null mean the same to transformers
            if field.default is REQUIRED:
                raise ValueError(f'config.json has no {field.name!r}')
            value = field.default(entries) if callable(field.default) else field.default
        if field.values is not None:
            if value not in field.values:
                raise ValueError(
                    f'{field.name}={value!r} is not supported; '
                    f'supported are {", ".join(map(str, field.values))}'
                )
            value = field.values[value]
        settings.update(dict.fromkeys(field.ours, value))
    if settings['position'] == 'rope':
        settings['rope_theta'] = _rope_theta(entries)
    return TransformerConfig(**settings)


def write_config(family: Family, config: TransformerConfig) -> dict[str, Any]:
    """The entries of config.json that describe ``config``, as far as the family can."""
    entries: dict[str, Any] = {'model_type': family.model_type}
    for field in family.fields:
        value = getattr(config, field.ours[0])
        if field.values is not None:
            theirs = (hf for hf, ours in field.values.items() if ours == value)
            value = next(theirs, None)  # None: the family cannot say it
        entries[field.name] = value
    if config.position == 'rope':
        # transformers 5 reads the first spelling, transformers 4 the second.
        entries['rope_parameters'] = {
            'rope_theta': config.rope_theta,
            'rope_type': 'default',
        }
        entries['rope_theta'] = config.rope_theta
    return entries


def family_of(architecture: str) -> tuple[Family, str]:
    """The family and head ('lm' or 'scalar') of a class name in transformers.

    Raises:
        ValueError: no family has it, listing those supported.
    """
    for family in FAMILIES:
        for head, name in family.architectures.items():
            if name == architecture:
                return family, head
    known = [name for family in FAMILIES for name in family.architectures.values()]
    raise ValueError(
        f'architecture {architecture!r} is not supported; '
        f'supported are {", ".join(known)}'
    )


def family_for(config: TransformerConfig) -> Family:
    """The first family whose config.json, read back, gives ``config`` again.

    Raises:
        ValueError: no family does, naming the fields that each one would change.
    """
    reasons = []
    for family in FAMILIES:
        again = read_config(family, write_config(family, config))
        lost = [
            f'{field.name}={getattr(config, field.name)!r}'
            for field in dataclasses.fields(config)
            if field.name not in RUNTIME
            and getattr(config, field.name) != getattr(again, field.name)
        ]
        if not lost:
            return family
        reasons.append(f'{family.model_type} has no {", ".join(lost)}')
    raise ValueError(
        f'no Hugging Face family can hold this model: {"; ".join(reasons)}'
    )


def _rope_theta(entries: Mapping[str, Any]) -> float:
    rope = {
        **(entries.get('rope_scaling') or {}),  # transformers 4
        **(entries.get('rope_parameters') or {}),  # transformers 5
    }
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind != 'default':
        raise ValueError(f"rope_type={kind!r} is not supported; supported is 'default'")
    fraction = rope.get('partial_rotary_factor') or entries.get('partial_rotary_factor')
    if fraction not in (None, 1):
        raise ValueError(
            f'partial_rotary_factor={fraction} is not supported; only 1 is'
        )
    return float(rope.get('rope_theta', entries.get('rope_theta', 10_000.0)))


LLAMA = Family(
    model_type='llama',
    architectures={
        'lm': 'LlamaForCausalLM',
        'scalar': 'LlamaForSequenceClassification',
    },
    fixed={'norm': 'rms', 'gated_mlp': True, 'position': 'rope'},
    fields=(
        Field('vocab_size', ('vocab_size',)),
        Field('num_hidden_layers', ('num_layers',)),
        Field('hidden_size', ('width',)),
        Field('num_attention_heads', ('num_heads',)),
        Field(
            'num_key_value_heads',
            ('num_kv_heads',),
            lambda hf: hf['num_attention_heads'],
        ),
        Field(
            'head_dim',
            ('head_dim',),
            lambda hf: hf['hidden_size'] // hf['num_attention_heads'],
        ),
        Field('intermediate_size', ('mlp_width',)),
        Field('max_position_embeddings', ('max_positions',), 2048),
        Field('rms_norm_eps', ('norm_eps',), 1e-6),
        Field('hidden_act', ('activation',), 'silu', ACTIVATIONS),
        Field('tie_word_embeddings', ('tied_embeddings',), False),
        Field('attention_bias', ('attention_bias', 'attention_out_bias'), False),
        Field('mlp_bias', ('mlp_bias',), False),
        Field('initializer_range', ('init_std',), 0.02),
    ),
    weights=(
        Weight('backbone/embed/tokens', 'model.embed_tokens.weight'),
        Weight(
            'backbone/layers/attention_norm/scale',
            'model.layers.{layer}.input_layernorm.weight',
        ),
        *(
            weight
            for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v'))
            for weight in (
                Weight(
                    f'backbone/layers/attention/{ours}_kernel',
                    f'model.layers.{{layer}}.self_attn.{theirs}_proj.weight',
                    'heads_in',
                ),
                Weight(
                    f'backbone/layers/attention/{ours}_bias',
                    f'model.layers.{{layer}}.self_attn.{theirs}_proj.bias',
                    'heads_bias',
                ),
            )
        ),
        Weight(
            'backbone/layers/attention/out_kernel',
            'model.layers.{layer}.self_attn.o_proj.weight',
            'heads_out',
        ),
        Weight(
            'backbone/layers/attention/out_bias',
            'model.layers.{layer}.self_attn.o_proj.bias',
        ),
        Weight(
            'backbone/layers/mlp_norm/scale',
            'model.layers.{layer}.post_attention_layernorm.weight',
        ),
        *(
            weight
            for part in ('gate', 'up', 'down')
            for weight in (
                Weight(
                    f'backbone/layers/mlp/{part}_kernel',
                    f'model.layers.{{layer}}.mlp.{part}_proj.weight',
                    'transpose',
                ),
                Weight(
                    f'backbone/layers/mlp/{part}_bias',
                    f'model.layers.{{layer}}.mlp.{part}_proj.bias',
                ),
            )
        ),
        Weight('backbone/final_norm/scale', 'model.norm.weight'),
        Weight('lm_head', 'lm_head.weight', 'transpose'),
        Weight('head/kernel', 'score.weight', 'row'),
    ),
    ignored=(r'.*\.rotary_emb\.inv_freq',),
)

FAMILIES = (LLAMA,)
