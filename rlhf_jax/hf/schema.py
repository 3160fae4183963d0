"""What a table in ``families.py`` is made of, and how config.json is read by one.

``reader.py`` and ``writer.py`` go by these tables and know no family by name. Read
``families.py`` next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.models.config import TransformerConfig

REQUIRED = object()  # default of an entry that config.json must have
# How a model runs, and with which tokenizer: not part of what it is.
RUNTIME = ('dtype', 'remat', 'scan_unroll', 'num_tokens')
Entries = Mapping[str, Any]  # config.json

# Entries that change what a model computes and leave no trace in its weights, with the
# values that change nothing. A family that has one reads it; in others it is refused.
CHANGING: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        'logit_scale': (1,),
        'logits_scaling': (1,),
        'final_logit_softcapping': (0,),
        'attn_logit_softcapping': (0,),
        'query_pre_attn_scalar': (),
        'attention_multiplier': (),
        'residual_multiplier': (1,),
        'embedding_multiplier': (1,),
        'lm_head_multiplier': (1,),
        'scale_emb': (1,),
        'scale_depth': (),
        'dim_model_base': (),
        'clip_qkv': (),
        'alibi': (False,),
        'use_alibi': (False,),
        'no_rope_layers': ([],),
        'attention_chunk_size': (),
        'use_bidirectional_attention': (False,),
        'use_parallel_residual': (False,),
        'parallel_attn': (False,),
        'scale_attn_weights': (True,),
        'scale_attn_by_inverse_layer_idx': (False,),
        'partial_rotary_factor': (1,),
        'rotary_pct': (1,),
        'rope_scaling': ({},),
        'rope_local_base_freq': (),
        'is_encoder_decoder': (False,),
        'add_cross_attention': (False,),
        'pruned_heads': ({},),
    }
)

ACTIVATIONS = MappingProxyType(
    {  # Hugging Face → ours; of two spellings the first is written
        'silu': 'silu',
        'swish': 'silu',
        'gelu': 'gelu',
        'gelu_new': 'gelu_tanh',
        'gelu_pytorch_tanh': 'gelu_tanh',
        'relu': 'relu',
    }
)


# ------------------------------------------------------------------------------ weights


class Layout(NamedTuple):
    """How one tensor is laid out there and here; both ways lose nothing.

    ``read`` takes their array and our shapes and gives our arrays, ``write`` takes our
    arrays and gives theirs: several of ours where they keep them in one.
    """

    read: Callable[[Any, Sequence[tuple[int, ...]]], Sequence[Any]]
    write: Callable[[Sequence[Any]], Any]


def _single(read: Callable[..., Any], write: Callable[..., Any]) -> Layout:
    return Layout(lambda x, shapes: (read(x, shapes[0]),), lambda ours: write(*ours))


def _split_columns(x: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    parts = np.split(x, len(shapes), axis=-1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes)]


def _join_columns(ours: Sequence[Any]) -> Any:
    lead = ours[0].shape[:-2]
    return np.concatenate([x.reshape(*lead, -1) for x in ours], axis=-1)


def _split_heads(x: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    heads, size = shapes[0][-2:]
    x = x.reshape(heads, len(shapes), size, *x.shape[1:])  # [H, 3, h] or [H, 3, h, D]
    return [np.moveaxis(part, -1, 0) if part.ndim == 3 else part
            for part in (x[:, i] for i in range(len(shapes)))]  # fmt: skip


def _join_heads(ours: Sequence[Any]) -> Any:
    parts = [np.moveaxis(x, 0, -1) if x.ndim == 3 else x for x in ours]
    joined = np.stack(parts, axis=1)
    return joined.reshape(-1, *joined.shape[3:])


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        'copy': _single(lambda x, shape: x, lambda x: x),
        'transpose': _single(lambda x, shape: x.T, lambda x: x.T),  # [F, D] ↔ [D, F]
        'reshape': _single(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1)),
        'heads_in': _single(  # [H·h, D] ↔ [D, H, h]
            lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(x.shape[0], -1).T
        ),
        'heads_out': _single(  # [D, H·h] ↔ [H, h, D]
            lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T
        ),
        'rows': _single(  # [H·h, D] ↔ [H, h, D]
            lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1, x.shape[-1])
        ),
        'row': _single(  # [1, D] ↔ [D], or [H, D] ↔ [D, H]
            lambda x, shape: x.T.reshape(shape), lambda x: x.T.reshape(-1, x.shape[0])
        ),
        'scalar': _single(  # [1] ↔ [], or [H] ↔ [H]
            lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1)
        ),
        # [D, 3·H·h] ↔ 3 × [D, H, h], and [3·H·h] ↔ 3 × [H, h]
        'columns': Layout(_split_columns, _join_columns),
        # [H·3·h, D] ↔ 3 × [D, H, h], and [H·3·h] ↔ 3 × [H, h]
        'interleaved': Layout(_split_heads, _join_heads),
    }
)


@dataclasses.dataclass(frozen=True)
class Weight:
    """Parameter paths here and a tensor name there; ``{layer}`` stands for the layer.

    Whether a model has the weight (biases, an untied head) follows from its config.
    """

    paths: tuple[str, ...]
    name: str
    layout: str = 'copy'


def table(prefix: str, layer: str, text: str) -> tuple[Weight, ...]:
    """The weights of a body: a line for each module, of our name, theirs, and its kind.

    'layers/attention/query  self_attn.q_proj  heads_in' stands for the kernel, laid out
    as the kind says, and for the bias. Kinds: a layout of a kernel, 'norm' (scale and
    bias), 'table' (an embedding). 'query,key,value' are three of ours in one of theirs.

    Args:
        prefix: of all their names.
        layer: of the names of one layer, behind the prefix.
        text: the lines.
    """
    weights = []
    for line in text.strip().splitlines():
        ours, theirs, kind = line.split()
        folder, _, names = ours.rpartition('/')
        ours = [
            f'backbone/{folder}/{name}'.replace('//', '/') for name in names.split(',')
        ]
        theirs = prefix + (layer if folder.startswith('layers') else '') + theirs
        if kind == 'table':
            weights.append(Weight(tuple(ours), f'{theirs}.weight'))
            continue
        first, second = ('/scale', '/bias') if kind == 'norm' else ('_kernel', '_bias')
        layout = 'reshape' if kind == 'norm' else kind
        bias = kind if kind in ('columns', 'interleaved') else 'reshape'
        weights.append(
            Weight(tuple(x + first for x in ours), f'{theirs}.weight', layout)
        )
        weights.append(Weight(tuple(x + second for x in ours), f'{theirs}.bias', bias))
    return tuple(weights)


# ------------------------------------------------------------------------------ configs


@dataclasses.dataclass(frozen=True)
class Field:
    """An entry of config.json and the fields of ``TransformerConfig`` that it sets."""

    name: str
    ours: tuple[str, ...]  # may be empty: then only the ``values`` are checked
    default: Any = REQUIRED  # or a value, or a function of config.json: may be absent
    values: Mapping[Any, Any] | None = None  # their value → ours; None: the same


class Codec(NamedTuple):
    """Fields that several entries of config.json describe together."""

    read: Callable[[Entries], dict[str, Any]]  # config.json → fields
    write: Callable[[TransformerConfig], dict[str, Any]]  # config → entries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that sets one family of models apart."""

    model_type: str
    # 'lm', 'scalar', or 'base' (a body to start a scalar model from) → class names in
    # transformers, of which the first is written.
    architectures: Mapping[str, str]
    fixed: Mapping[str, Any]  # fields of TransformerConfig that all members share
    fields: tuple[Field, ...]
    codecs: tuple[Codec, ...] = ()
    weights: tuple[Weight, ...]
    ignored: tuple[str, ...] = ()  # patterns of buffers that files may carry
    prefix: str = ''  # of names, which files of the bare body lack


LARGEST = 2**31 - 1  # of what is counted; indices are int32


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """``value``, which must be an integer, at least ``least``; ``name`` is its entry.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or not least <= value <= LARGEST:
        raise ValueError(
            f'{name}={value!r} must be a whole number ≥ {least} and ≤ {LARGEST}'
        )
    return value


def real_number(name: str, value: Any, *, zero: bool = False) -> int | float:
    """``value``, which must be a finite number above 0, or with ``zero`` 0 itself.

    Raises:
        ValueError: it is something else.
    """
    # Comparing, unlike isfinite, takes integers of any size.
    is_number = type(value) in (int, float) and -1e300 <= value <= 1e300
    if not is_number or value < 0 or (value == 0 and not zero):
        raise ValueError(
            f'{name}={value!r} must be a finite number {"≥" if zero else ">"} 0'
        )
    return value


def true_or_false(name: str, value: Any) -> bool:
    """``value``, which must be a bool.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, bool):
        raise ValueError(f'{name}={value!r} must be true or false')
    return value


def entry(entries: Entries, name: str, default: Any) -> Any:
    """An entry of config.json; absent and null mean the same to transformers."""
    value = entries.get(name)
    return default if value is None else value


def mapping(entries: Entries, name: str) -> Entries:
    """An entry that is an object, {} where it is absent.

    Raises:
        ValueError: it is something else.
    """
    value = entry(entries, name, {})
    if not isinstance(value, Mapping):
        raise ValueError(f'{name}={value!r} must be an object')
    return value


KINDS = {field.name: field.type for field in dataclasses.fields(TransformerConfig)}
MAY_BE_ZERO = ('init_std', 'norm_eps')


def _checked(field: Field, value: Any) -> Any:
    """A value that stands for itself, if it is what ``TransformerConfig`` wants."""
    kind, *optional = KINDS[field.ours[0]].split(' | ')
    if value is None and optional:
        return None
    if kind == 'int':
        return whole_number(field.name, value)
    if kind == 'float':
        return real_number(field.name, value, zero=field.ours[0] in MAY_BE_ZERO)
    return true_or_false(field.name, value)


class _Recorded(dict):
    """A config.json that knows which entries were asked for."""

    def __init__(self, entries: Entries):
        super().__init__(entries)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)


def _check_unread(family: Family, entries: _Recorded) -> None:
    for name, harmless in CHANGING.items():
        value = dict.get(entries, name)
        if name not in entries.asked and value is not None and value not in harmless:
            raise ValueError(
                f'{name}={value!r} is not supported: it changes what a model computes, '
                f'and {family.model_type} models do not have it here'
            )


def read_config(family: Family, entries: Entries) -> TransformerConfig:
    """The ``TransformerConfig`` that the entries of a config.json describe.

    Raises:
        ValueError: an entry that is missing, of the wrong type, or whose value is not
            supported.
    """
    if (quantized := entries.get('quantization_config')) is not None:
        raise ValueError(
            f'quantization_config={quantized!r} is not supported: the weights would be '
            'read without their scales; give the model in bfloat16 or float32'
        )
    entries = _Recorded(entries)
    settings = dict(family.fixed)
    for field in family.fields:
        value = entry(entries, field.name, field.default)
        if value is REQUIRED:
            raise ValueError(f'config.json has no {field.name!r}')
        value = value(entries) if callable(value) else value
        if field.values is None:
            value = _checked(field, value)
        else:
            if not any(value == theirs for theirs in field.values):
                raise ValueError(
                    f'{field.name}={value!r} is not supported; '
                    f'supported are {", ".join(map(str, field.values))}'
                )
            value = field.values[value]
        settings.update(dict.fromkeys(field.ours, value))
    for codec in family.codecs:
        settings.update(codec.read(entries))
    _check_unread(family, entries)
    return TransformerConfig(**settings)


def write_config(family: Family, config: TransformerConfig) -> dict[str, Any]:
    """The entries of config.json that describe ``config``, as far as the family can."""
    entries: dict[str, Any] = {'model_type': family.model_type}
    for field in family.fields:
        value = getattr(config, field.ours[0]) if field.ours else None
        if field.values is not None:
            theirs = (hf for hf, ours in field.values.items() if ours == value)
            value = next(theirs, None)  # None: the family cannot say it
        entries[field.name] = value
    for codec in family.codecs:
        entries.update(codec.write(config))
    return entries
