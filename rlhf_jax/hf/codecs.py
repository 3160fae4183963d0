"""Settings that several entries of a Hugging Face config.json describe together:
rotary positions, windows, learned positions, head sizes.

Used by the tables in ``families.py``; read that next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.hf.schema import (
    Codec,
    Entries,
    entry,
    mapping,
    real_number,
    true_or_false,
    whole_number,
)
from rlhf_jax.models.config import RopeScaling, TransformerConfig


def rope_codec(
    theta: float = 10_000.0, fraction: float | None = None, kind: str = 'rope_type'
) -> Codec:
    """Rotary positions, in the spellings of transformers 4 and 5.

    Args:
        theta: the family's default base.
        fraction: the family's default share of a head that is rotated; None for the
            whole head, always.
        kind: what the family's ``rope_scaling`` calls the kind in transformers 4.
    """

    def read(entries: Entries) -> dict[str, Any]:
        parameters = mapping(entries, 'rope_parameters')
        return _read_rope(entries, parameters, theta, fraction)

    def write(config: TransformerConfig) -> dict[str, Any]:
        entries = _write_rope(config, fraction)
        return {**entries, **_old_scaling(config.rope_scaling, kind)}

    return Codec(read, write)


ROPE_NAMES = (
    'rope_theta',
    'rope_type',
    'partial_rotary_factor',
    'factor',
    'low_freq_factor',
    'high_freq_factor',
    'original_max_position_embeddings',
)
# Entries of config.json, outside of any object, that say what one of ROPE_NAMES does.
FLAT = {name: name for name in ('rope_theta', 'partial_rotary_factor')}
FLAT_OF_NEOX = {'rotary_emb_base': 'rope_theta', 'rotary_pct': 'partial_rotary_factor'}


def _read_rope(
    entries: Entries, parameters: Entries, theta: float, fraction: float | None
) -> dict[str, Any]:
    flat = FLAT if fraction is None else {**FLAT, **FLAT_OF_NEOX}
    rope = _rope_entries(entries, parameters, flat)
    base = entry(rope, 'rope_theta', theta)
    part = entry(rope, 'partial_rotary_factor', fraction or 1)
    part = real_number('partial_rotary_factor', part)
    if part > 1 or (fraction is None and part != 1):
        only = 'only 1 is' if fraction is None else 'at most 1 is'
        raise ValueError(f'partial_rotary_factor={part} is not supported; {only}')
    return {
        'rope_theta': float(real_number('rope_theta', base)),
        'rope_fraction': float(part),
        'rope_scaling': _scaling(rope),
    }


def _rope_entries(
    entries: Entries, parameters: Entries, flat: Mapping[str, str]
) -> dict[str, Any]:
    """What config.json says in the spelling of transformers 4, and in that of
    transformers 5 (``parameters``), by the names of the latter; where both are there
    they must say the same.
    """
    said = [(name, ours, entries.get(name)) for name, ours in flat.items()]
    both = {
        'rope_scaling': mapping(entries, 'rope_scaling'),
        'rope_parameters': parameters,
    }
    for place, given in both.items():
        part = dict(given)
        kinds = [part[n] for n in ('rope_type', 'type') if part.get(n) is not None]
        if kinds[1:] and kinds[0] != kinds[1]:
            raise ValueError(f'{place}={part!r} has two types that differ')
        part.pop('type', None)
        if part:
            part['rope_type'] = kinds[0] if kinds else 'default'
        for name, value in part.items():
            if name not in ROPE_NAMES and value is not None:
                raise ValueError(f'{place} has {name}={value!r}, which is not read')
            said.append((f'{place}.{name}', name, value))
    result, places = {}, {}
    for place, name, value in said:
        if value is None:
            continue
        if name in result and result[name] != value:
            raise ValueError(
                f'{places[name]} is {result[name]!r}, and {place} is {value!r}: two '
                'spellings of the same that differ; remove the one that is wrong'
            )
        result[name], places[name] = value, place
    return result


def _scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get('rope_type', 'default')
    if kind == 'default':
        return None
    if kind not in ('linear', 'llama3'):
        raise ValueError(
            f'rope_type={kind!r} is not supported; supported are default, linear, '
            'llama3'
        )
    names = {'factor': 'factor'}
    if kind == 'llama3':
        names |= {
            'low_freq_factor': 'low_freq_factor',
            'high_freq_factor': 'high_freq_factor',
            'original_max_position_embeddings': 'original_positions',
        }
    if missing := [name for name in names if rope.get(name) is None]:
        raise ValueError(
            f'rope_type={kind!r} lacks {", ".join(sorted(missing))} in config.json'
        )
    numbers = {ours: real_number(hf, rope[hf]) for hf, ours in names.items()}
    return RopeScaling(kind=kind, **{**numbers, 'factor': float(numbers['factor'])})


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """The entries of ``rope_parameters`` that describe a scaling."""
    if scaling is None:
        return {'rope_type': 'default'}
    if scaling.kind == 'linear':
        return {'rope_type': 'linear', 'factor': scaling.factor}
    return {
        'rope_type': 'llama3',
        'factor': scaling.factor,
        'low_freq_factor': scaling.low_freq_factor,
        'high_freq_factor': scaling.high_freq_factor,
        'original_max_position_embeddings': scaling.original_positions,
    }


def _old_scaling(scaling: RopeScaling | None, kind: str) -> dict[str, Any]:
    """The entry of transformers 4, which is absent where nothing is stretched."""
    if scaling is None:
        return {}
    entries = _write_scaling(scaling)
    return {'rope_scaling': {kind: entries.pop('rope_type'), **entries}}


def _write_rope(config: TransformerConfig, fraction: float | None) -> dict[str, Any]:
    """Base and rotated share for both versions, scaling for transformers 5."""
    rope = {'rope_theta': config.rope_theta, **_write_scaling(config.rope_scaling)}
    if fraction is None:
        return {'rope_parameters': rope, 'rope_theta': config.rope_theta}
    rope['partial_rotary_factor'] = config.rope_fraction
    return {
        'rope_parameters': rope,
        'rotary_pct': config.rope_fraction,
        'rotary_emb_base': config.rope_theta,
    }


LAYER_TYPES = ('full_attention', 'sliding_attention')


def _window(entries: Entries) -> int | None:
    """Of this entry alone null is not absence: it means no window."""
    size = entries.get('sliding_window', 4096)
    return None if size is None else whole_number('sliding_window', size)


def layer_windows(
    default: Callable[[Entries], list[bool]], switch: str | None = None
) -> Codec:
    """``sliding_window`` and ``layer_types``; beside them ``sliding_window_pattern`` of
    transformers 4 where every n-th layer, and no other, has no window.

    Args:
        default: config.json → which layers are windowed where it has no layer_types.
        switch: an entry that must be true for any window to count.
    """

    def read(entries: Entries) -> dict[str, Any]:
        on = switch is None or true_or_false(switch, entry(entries, switch, False))
        size = _window(entries) if on else None
        kinds, layers = entries.get('layer_types'), entries['num_hidden_layers']
        if kinds is None:
            windowed = default(entries)
        elif not isinstance(kinds, list) or any(k not in LAYER_TYPES for k in kinds):
            raise ValueError(
                f'layer_types={kinds!r} must be a list of {" and ".join(LAYER_TYPES)}'
            )
        elif len(kinds) != layers:
            raise ValueError(
                f'layer_types has {len(kinds)} entries, num_hidden_layers is {layers}'
            )
        else:
            windowed = [kind == LAYER_TYPES[1] for kind in kinds]
        if size is None or not any(windowed):
            size, windowed = None, ()
        return {'sliding_window': size, 'windowed': tuple(windowed)}

    def write(config: TransformerConfig) -> dict[str, Any]:
        windowed = config.windowed or (False,) * config.num_layers
        entries = {
            'sliding_window': config.sliding_window,
            'layer_types': [LAYER_TYPES[there] for there in windowed],
        }
        if switch is not None and config.sliding_window is not None:
            entries[switch] = True
            entries['max_window_layers'] = windowed.index(True)
        if switch is None and (period := _period(windowed)) is not None:
            entries['sliding_window_pattern'] = period
        return entries

    return Codec(read, write)


def _period(windowed: Sequence[bool]) -> int | None:
    """n where every n-th layer, and no other, has no window; None without such an n."""
    for n in range(1, len(windowed) + 2):
        if list(windowed) == [bool((i + 1) % n) for i in range(len(windowed))]:
            return n
    return None


def from_layer(entries: Entries) -> list[bool]:
    """Windows from layer ``max_window_layers`` on: the default of Qwen."""
    start = entry(entries, 'max_window_layers', 28)
    whole_number('max_window_layers', start, least=0)
    return [layer >= start for layer in range(entries['num_hidden_layers'])]


def all_but_every(default: int) -> Callable[[Entries], list[bool]]:
    """Windows but in every n-th layer: the default of Gemma."""

    def windowed(entries: Entries) -> list[bool]:
        period = entry(entries, 'sliding_window_pattern', default)
        whole_number('sliding_window_pattern', period)
        return [bool((i + 1) % period) for i in range(entries['num_hidden_layers'])]

    return windowed


def one_window() -> Codec:
    """A window in every layer, or none; no layer_types."""

    def read(entries: Entries) -> dict[str, Any]:
        size = _window(entries)
        layers = 0 if size is None else entries['num_hidden_layers']
        return {'sliding_window': size, 'windowed': (True,) * layers}

    return Codec(read, lambda config: {'sliding_window': config.sliding_window})


def rope_per_kind() -> Codec:
    """Windowed layers have a base of their own, and no stretching."""
    theta = 1_000_000.0

    def read(entries: Entries) -> dict[str, Any]:
        both = mapping(entries, 'rope_parameters')
        if both.keys() - set(LAYER_TYPES):
            raise ValueError(
                f'rope_parameters={dict(both)!r} must have {" and ".join(LAYER_TYPES)}'
            )
        full = mapping(both, LAYER_TYPES[0])
        inside = mapping(both, LAYER_TYPES[1])
        local = {'rope_local_base_freq': entries.get('rope_local_base_freq')}
        flat = {'rope_local_base_freq': 'rope_theta'}
        windowed = _rope_entries(local, inside, flat)
        if _scaling(windowed) is not None or windowed.get('partial_rotary_factor'):
            raise ValueError(
                f'rope_parameters: {LAYER_TYPES[1]}={dict(inside)!r} is not supported; '
                'windowed layers have a rope_theta alone'
            )
        local = entry(windowed, 'rope_theta', 10_000.0)
        real_number('rope_local_base_freq', local)
        settings = _read_rope(entries, full, theta, None)
        return {**settings, 'window_rope_theta': float(local)}

    def write(config: TransformerConfig) -> dict[str, Any]:
        full = {'rope_theta': config.rope_theta, **_write_scaling(config.rope_scaling)}
        local = {'rope_theta': config.window_rope_theta, 'rope_type': 'default'}
        both = {'full_attention': full, 'sliding_attention': local}
        return {
            'rope_parameters': both,
            'rope_theta': config.rope_theta,
            'rope_local_base_freq': config.window_rope_theta,
            **_old_scaling(config.rope_scaling, 'rope_type'),
        }

    return Codec(read, write)


def derived_head_dim(width: str, heads: str) -> Codec:
    """The head size, which these families do not write down."""
    return Codec(lambda hf: {'head_dim': hf[width] // hf[heads]}, lambda config: {})


def padded_positions() -> Codec:
    """The table begins behind the row of the padding id."""

    def read(entries: Entries) -> dict[str, Any]:
        pad = whole_number('pad_token_id', entry(entries, 'pad_token_id', 1), least=0)
        offset, name = pad + 1, 'max_position_embeddings'
        rows = whole_number(name, entry(entries, name, 512), least=offset + 1)
        return {'position_offset': offset, 'max_positions': rows - offset}

    def write(config: TransformerConfig) -> dict[str, Any]:
        rows = config.max_positions + config.position_offset
        pad = config.position_offset - 1
        return {'pad_token_id': pad, 'max_position_embeddings': rows}

    return Codec(read, write)
