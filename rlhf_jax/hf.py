"""Hugging Face directories ↔ parameters, both ways and bit for bit.

The loops in ``stages`` start from a directory by :func:`load_config` and
:func:`load_params` and leave one by :func:`save`: a policy as a causal language model,
a reward model or a critic as a sequence classifier with one label. Only safetensors are
read, one tensor at a time. What a family calls its weights stands in
``hf_families.py``; read that next.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_jax import hf_families
from rlhf_jax.hf_families import LAYOUTS, Family, Weight
from rlhf_jax.models.heads import CausalLM, ScalarModel
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.types import Array, Params

if TYPE_CHECKING:  # slow to import, and only named here
    from transformers import PreTrainedTokenizerBase

Head = Literal['lm', 'scalar']
Place = Callable[[tuple[str, ...], np.ndarray], Array]

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
DOWNLOADS = ('*.json', '*.safetensors', 'tokenizer*', '*.model', '*.txt')
READABLE = ('F64', 'F32', 'F16', 'BF16')


# ------------------------------------------------------------------------------- import


def resolve(spec: str | Path) -> Path:
    """The local directory of a model: itself, or the snapshot of a hub name.

    Raises:
        ValueError: it is neither a directory nor a name that the hub, or its cache when
            offline, can give.
    """
    directory = Path(spec).expanduser()
    if directory.is_dir():
        return directory
    try:
        return Path(
            huggingface_hub.snapshot_download(str(spec), allow_patterns=list(DOWNLOADS))
        )
    except (OSError, ValueError) as error:  # every error of the hub and of the network
        raise ValueError(
            f'{str(spec)!r} is no directory, and as a Hugging Face hub name it could '
            f'not be fetched ({type(error).__name__}: {error}); download it where '
            'there is a network, and give the directory'
        ) from error


def load_config(spec: str | Path) -> TransformerConfig:
    """The model in a directory or under a hub name, computing in float32.

    Raises:
        ValueError: no config.json, an architecture or a setting that is not supported.
    """
    directory = resolve(spec)
    entries = _read_json(directory / 'config.json')
    family, _ = _family(directory, entries)
    try:
        return hf_families.read_config(family, entries)
    except ValueError as error:
        raise ValueError(f'{directory / "config.json"}: {error}') from error


def load_head(spec: str | Path) -> Head:
    """What stands on the model of a directory: 'lm', or 'scalar' for a classifier.

    Raises:
        ValueError: no config.json, or an architecture that is not supported.
    """
    directory = resolve(spec)
    return _family(directory, _read_json(directory / 'config.json'))[1]


def load_params(
    spec: str | Path,
    config: TransformerConfig,
    *,
    head: Head,
    place: Place | None = None,
) -> Params:
    """The parameters in a Hugging Face directory, in float32.

    Holds one parameter (all layers of it) and one tensor of the file at a time; what
    ``place`` returns is kept.

    Args:
        spec: directory or hub name; float32, bfloat16 or float16 safetensors.
        config: what :func:`load_config` gives for it, up to how the model runs.
        head: 'lm' for the parameters of ``CausalLM``, 'scalar' for those of
            ``ScalarModel``. From a language model the latter come without ``head``: the
            caller draws one. The bias of a sequence classifier is read from
            ``config.json`` (see :func:`save`), and 0 where transformers wrote it.
        place: (path, array) → array, to put a parameter straight into its sharding;
            None for ``jnp.asarray``.

    Returns:
        A nested dict of parameters.

    Raises:
        ValueError: no safetensors; tensors missing, left over or of another shape; a
            sequence classifier where a language model is asked for.
    """
    directory = resolve(spec)
    entries = _read_json(directory / 'config.json')
    family, source = _family(directory, entries)
    if head == 'lm' and source == 'scalar':
        raise ValueError(
            f'{directory} holds a {family.architectures["scalar"]}, which has no '
            f'language-model head; use a {family.architectures["lm"]}, or head=scalar'
        )
    place = place or (lambda path, array: jnp.asarray(array))
    expected = _expected(config, head)
    if head == 'scalar' and source == 'lm':
        expected = {
            path: x for path, x in expected.items() if not path.startswith('head/')
        }
    files = _open_weights(directory)
    weights = _named(family, expected)
    _check_tensors(directory, files, family, config, weights, expected)
    if head == 'lm' and config.tied_embeddings:
        _check_tied(directory, files, family)

    params = {}
    for weight in weights:
        path = tuple(weight.path.split('/'))
        params[path] = place(path, _read(files, weight, expected[weight.path].shape))
    if ('head', 'kernel') in params:
        bias = entries.get('rlhf_jax', {}).get('score_bias', 0.0)
        params['head', 'bias'] = place(('head', 'bias'), np.asarray(bias, np.float32))
    return traverse_util.unflatten_dict(params)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise ValueError(
            f'{path} is missing: {path.parent} is no model directory'
        ) from error
    except ValueError as error:
        raise ValueError(f'{path} is not valid JSON: {error}') from error


def _family(directory: Path, entries: Mapping[str, Any]) -> tuple[Family, Head]:
    names = entries.get('architectures') or []
    if len(names) != 1:
        raise ValueError(
            f'{directory / "config.json"}: architectures={names} must name one class'
        )
    try:
        return hf_families.family_of(names[0])
    except ValueError as error:
        raise ValueError(f'{directory / "config.json"}: {error}') from error


def _expected(config: TransformerConfig, head: Head) -> dict[str, jax.ShapeDtypeStruct]:
    """Path → shape of the parameters that the model itself would make."""
    if head not in ('lm', 'scalar'):
        raise ValueError(f"head={head!r} is unknown; use 'lm' or 'scalar'")
    model = CausalLM(config) if head == 'lm' else ScalarModel(config)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), bool)
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens, mask)['params']
    return traverse_util.flatten_dict(tree, sep='/')


def _named(family: Family, expected: Mapping[str, Any]) -> list[Weight]:
    """The weights of the family's table that this model has (no scalar bias there)."""
    weights = [weight for weight in family.weights if weight.path in expected]
    nameless = expected.keys() - {weight.path for weight in weights} - {'head/bias'}
    if nameless:
        raise ValueError(f'{family.model_type} has no {", ".join(sorted(nameless))}')
    return weights


def _open_weights(directory: Path) -> dict[str, Any]:
    """Tensor name → the open file that holds it."""
    if (directory / INDEX).exists():
        names = sorted(set(_read_json(directory / INDEX)['weight_map'].values()))
    elif (directory / WEIGHTS).exists():
        names = [WEIGHTS]
    else:
        pickles = sorted(path.name for path in directory.glob('pytorch_model*.bin'))
        reason = 'it holds no weights that can be read'
        if pickles:
            reason = (
                f'{", ".join(pickles)} is not read, because a pickle can run code: '
                'convert it by save_pretrained of transformers'
            )
        raise ValueError(f'{directory} has neither {WEIGHTS} nor {INDEX}; {reason}')
    files = {}
    for name in names:
        try:
            file = safe_open(directory / name, framework='np')
        except (OSError, SafetensorError) as error:
            raise ValueError(f'{directory / name} cannot be read: {error}') from error
        files.update(dict.fromkeys(file.keys(), file))
    return files


def _tensor_names(weight: Weight, num_layers: int) -> list[str]:
    if '{layer}' not in weight.name:
        return [weight.name]
    return [weight.name.format(layer=layer) for layer in range(num_layers)]


def _check_tensors(
    directory: Path,
    files: Mapping[str, Any],
    family: Family,
    config: TransformerConfig,
    weights: Sequence[Weight],
    expected: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    wanted = {}
    for weight in weights:
        ours = expected[weight.path]
        if '{layer}' in weight.name:
            ours = jax.ShapeDtypeStruct(ours.shape[1:], ours.dtype)
        shape = jax.eval_shape(LAYOUTS[weight.layout].write, ours).shape
        wanted.update(dict.fromkeys(_tensor_names(weight, config.num_layers), shape))
    problems = [f'{name} is missing' for name in wanted if name not in files]
    # An LM head is spare where embeddings are tied or a scalar head takes its place.
    spare = {weight.name for weight in family.weights if weight.path == 'lm_head'}
    for name, file in files.items():
        stored = file.get_slice(name)
        if name in wanted:
            if tuple(stored.get_shape()) != wanted[name]:
                problems.append(
                    f'{name} is {stored.get_shape()}, not {list(wanted[name])}'
                )
            if stored.get_dtype() not in READABLE:
                problems.append(
                    f'{name} is {stored.get_dtype()}, not one of {", ".join(READABLE)}'
                )
        elif name not in spare and not any(
            re.fullmatch(p, name) for p in family.ignored
        ):
            problems.append(f'{name} belongs to nothing in this model')
    if problems:
        more = f' and {len(problems) - 8} more' if len(problems) > 8 else ''
        raise ValueError(
            f'{directory} does not fit its config: {"; ".join(problems[:8])}{more}'
        )


def _check_tied(directory: Path, files: Mapping[str, Any], family: Family) -> None:
    """Refuses tied embeddings beside a head of other values: one of them is wrong."""
    names = {weight.path: weight.name for weight in family.weights}
    embedding, head = names['backbone/embed/tokens'], names['lm_head']
    if head in files and not np.array_equal(
        files[head].get_tensor(head), files[embedding].get_tensor(embedding)
    ):
        raise ValueError(
            f'{directory}: tie_word_embeddings is true, but {head} differs from '
            f'{embedding}; set it to false in config.json, or remove {head}'
        )


def _read(
    files: Mapping[str, Any], weight: Weight, shape: tuple[int, ...]
) -> np.ndarray:
    layout = LAYOUTS[weight.layout]
    out = np.empty(shape, np.float32)
    if '{layer}' not in weight.name:
        out[...] = layout.read(files[weight.name].get_tensor(weight.name), shape)
        return out
    for layer, name in enumerate(_tensor_names(weight, shape[0])):
        out[layer] = layout.read(files[name].get_tensor(name), shape[1:])
    return out


# ------------------------------------------------------------------------------- export


def save(
    directory: str | Path,
    params: Params,
    config: TransformerConfig,
    *,
    head: Head,
    tokenizer: PreTrainedTokenizerBase | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a model as a Hugging Face directory in float32, complete or not at all.

    The files are written beside it, into ``<directory>.partial``, which is renamed at
    the end, and replaced by the next attempt if this one is killed.

    A scalar model becomes a sequence classifier with one label. transformers has no
    bias there: it goes into config.json as ``{"rlhf_jax": {"score_bias": …}}``, where
    :func:`load_params` finds it, and the scores of transformers are lower by it.
    transformers reads a score at the last token that is not ``pad_token_id``: with the
    EOS id as the pad id that is the token *before* a final EOS.

    Args:
        directory: must not exist, or be empty.
        params: parameters of ``CausalLM`` or ``ScalarModel``.
        config: their config.
        head: 'lm' or 'scalar', as in :func:`load_params`.
        tokenizer: saved too, when given.
        bos_token_id: None for the tokenizer's.
        eos_token_id: one id, or all that end a response; None for the tokenizer's.
        pad_token_id: None for the tokenizer's. A scalar model needs one, and takes the
            (first) EOS id where there is none.
        max_shard_bytes: weights are split into files of at most this size; a tensor is
            never split.

    Raises:
        ValueError: the directory is not empty, no family can hold the model, the
            parameters do not fit the config, or an id lies outside the vocabulary.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(
            f'{directory} exists already; export to a new or empty directory'
        )
    family = hf_families.family_for(config)
    flat = _check_params(params, config, head)
    special = {'bos': bos_token_id, 'eos': eos_token_id, 'pad': pad_token_id}
    ids = _token_ids(special, tokenizer, config.vocab_size, head)

    entries = {
        'architectures': [family.architectures[head]],
        'dtype': 'float32',
        **hf_families.write_config(family, config),
        **ids,
    }
    if head == 'scalar':
        entries['id2label'], entries['label2id'] = {'0': 'score'}, {'score': 0}
        entries['rlhf_jax'] = {'score_bias': float(flat['head/bias'])}

    partial = directory.with_name(directory.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_weights(partial, flat, _named(family, flat), config, max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    if head == 'lm':
        _write_json(partial / 'generation_config.json', ids)
    _write_json(partial / 'config.json', entries)
    partial.rename(directory)


def _check_params(
    params: Params, config: TransformerConfig, head: Head
) -> dict[str, Any]:
    flat = traverse_util.flatten_dict(params, sep='/')
    expected = _expected(config, head)
    problems = [f'{path} is missing' for path in expected if path not in flat]
    for path, value in flat.items():
        if path not in expected:
            problems.append(f'{path} belongs to nothing in this model')
        elif value.shape != expected[path].shape:
            problems.append(
                f'{path} is {list(value.shape)}, not {list(expected[path].shape)}'
            )
    if problems:
        raise ValueError(
            f'parameters do not fit the config and head={head!r}: {"; ".join(problems)}'
        )
    return flat


def _token_ids(
    given: Mapping[str, int | Sequence[int] | None],
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    head: Head,
) -> dict[str, Any]:
    """``{'bos_token_id': …}`` for config.json: as given, else the tokenizer's."""
    ids = {}
    for name, value in given.items():
        value = getattr(tokenizer, f'{name}_token_id', None) if value is None else value
        ids[f'{name}_token_id'] = list(value) if isinstance(value, Sequence) else value
    if head == 'scalar' and ids['pad_token_id'] is None:
        eos = ids['eos_token_id']
        if eos is None or eos == []:
            raise ValueError(
                'a scalar model needs pad_token_id (or eos_token_id): '
                'transformers finds the last token of a text by it'
            )
        ids['pad_token_id'] = eos[0] if isinstance(eos, list) else eos
    for name, value in ids.items():
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not 0 <= token < vocab_size:
                raise ValueError(
                    f'{name}={token} lies outside the vocabulary of {vocab_size}'
                )
    return ids


def _write_json(path: Path, entries: Mapping[str, Any]) -> None:
    path.write_text(
        json.dumps(entries, indent=2, sort_keys=True) + '\n', encoding='utf-8'
    )


def _write_weights(
    directory: Path,
    flat: Mapping[str, Any],
    weights: Sequence[Weight],
    config: TransformerConfig,
    max_shard_bytes: int,
) -> None:
    """Writes the shards; holds the tensors of one at a time."""
    shards: list[list[tuple[str, Weight, int]]] = [[]]
    size = total = 0
    for weight in weights:
        names = _tensor_names(weight, config.num_layers)
        nbytes = 4 * flat[weight.path].size // len(names)
        for layer, name in enumerate(names):
            if shards[-1] and size + nbytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append((name, weight, layer))
            size += nbytes
            total += nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS
        if len(shards) > 1:
            file = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
        tensors = dict(_tensors(flat, shard))
        save_file(tensors, directory / file, metadata={'format': 'pt'})
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
        _write_json(directory / INDEX, index)


def _tensors(
    flat: Mapping[str, Any], shard: Sequence[tuple[str, Weight, int]]
) -> Iterator[tuple[str, np.ndarray]]:
    for name, weight, layer in shard:
        value = flat[weight.path]
        value = value[layer] if '{layer}' in weight.name else value
        value = LAYOUTS[weight.layout].write(np.asarray(value, np.float32))
        yield name, np.ascontiguousarray(value)
