"""A Hugging Face directory, or a hub name, as a config and parameters.

Only safetensors are read, one tensor at a time. What a family calls its weights stands
in ``families.py``; read ``writer.py`` next.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from rlhf_jax.hf.families import family_of
from rlhf_jax.hf.schema import LAYOUTS, Family, Weight, read_config
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import CausalLM, ScalarModel
from rlhf_jax.types import Array, Params

Head = Literal['lm', 'scalar']
Source = Literal['lm', 'scalar', 'base']  # what a directory holds
Place = Callable[[tuple[str, ...], np.ndarray], Array]

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
DOWNLOADS = ('*.json', '*.safetensors', 'tokenizer*', '*.model', '*.txt')
# Models that the package ships, by name: a decoder that knows the text of tiny_tldr.
SHIPPED = {'tiny': Path(__file__).parents[1] / 'data' / 'tiny_base'}
READABLE = ('F64', 'F32', 'F16', 'BF16')
OLD_NAMES = (
    ('LayerNorm.gamma', 'LayerNorm.weight'),
    ('LayerNorm.beta', 'LayerNorm.bias'),
)


def resolve(spec: str | Path) -> Path:
    """The local directory of a model: itself, that of a model which the package ships
    (``'tiny'``), or the snapshot of a hub name.

    Raises:
        ValueError: it is neither a directory nor a name that the hub, or its cache when
            offline, can give.
    """
    directory = SHIPPED.get(str(spec), Path(spec).expanduser())
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
        return read_config(family, entries)
    except ValueError as error:
        raise ValueError(f'{directory / "config.json"}: {error}') from error


def load_head(spec: str | Path) -> Source:
    """What stands on the model of a directory: 'lm', 'scalar' for a classifier with one
    label, or 'base' for a body that only a scalar model can start from.

    Raises:
        ValueError: no config.json, or an architecture that is not supported.
    """
    directory = resolve(spec)
    return _family(directory, _read_json(directory / 'config.json'))[1]


def load_score_names(spec: str | Path) -> tuple[str, ...]:
    """The names of the scores of a model with several, as :func:`save` left them; ()
    for any other.
    """
    return _score_names(_read_json(resolve(spec) / 'config.json'))


def _score_names(entries: Mapping[str, Any]) -> tuple[str, ...]:
    ours = entries.get('rlhf_jax', {})
    return tuple(ours['score_names']) if 'score_names' in ours else ()


def load_params(
    spec: str | Path,
    config: TransformerConfig,
    *,
    head: Head,
    dtype: Any = np.float32,
    place: Place | None = None,
) -> Params:
    """The parameters in a Hugging Face directory.

    Holds one parameter (all layers of it) and one tensor of the file at a time; what
    ``place`` returns is kept.

    Args:
        spec: directory or hub name; float32, bfloat16 or float16 safetensors.
        config: what :func:`load_config` gives for it, up to how the model runs.
        head: 'lm' for the parameters of ``CausalLM``, 'scalar' for those of
            ``ScalarModel``. From a language model the latter come without ``head``: the
            caller draws one. The bias of a decoder's classifier is read from
            ``config.json`` (see :func:`save`), and 0 where transformers wrote it.
        dtype: of the parameters; training wants float32.
        place: (path, array) → array, to put a parameter straight into its sharding;
            None for ``jax.device_put``.

    Returns:
        A nested dict of parameters.

    Raises:
        ValueError: no safetensors; tensors missing, left over or of another shape; a
            sequence classifier where a language model is asked for.
    """
    directory = resolve(spec)
    entries = _read_json(directory / 'config.json')
    family, source = _family(directory, entries)
    if head == 'lm' and source != 'lm':
        wanted = family.architectures.get('lm', 'decoder')
        raise ValueError(
            f'{directory} holds a {family.architectures[source]}, which has no '
            f'language-model head to sample from; use a {wanted}, or head=scalar'
        )
    place = place or (lambda path, array: jax.device_put(array))
    expected = expected_shapes(config, head, _score_names(entries))
    if head == 'scalar' and source != 'scalar':
        expected = {
            path: x for path, x in expected.items() if not path.startswith('head/')
        }
    files = _find_tensors(directory, family)
    weights = named_weights(family, expected)
    _check_tensors(directory, files, family, config, weights, expected)
    if head == 'lm' and config.tied_embeddings:
        _check_tied(directory, files, family)

    params = {}
    for weight in weights:
        shapes = [expected[path].shape for path in weight.paths]
        arrays = _read(files, weight, shapes, dtype)
        for name in weight.paths:  # held here no longer than until it is placed
            path = tuple(name.split('/'))
            params[path] = place(path, arrays.pop(0))
    if ('head', 'kernel') in params and ('head', 'bias') not in params:
        bias = entries.get('rlhf_jax', {}).get('score_bias', 0.0)
        params['head', 'bias'] = place(('head', 'bias'), np.asarray(bias, dtype))
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


def _family(directory: Path, entries: Mapping[str, Any]) -> tuple[Family, Source]:
    names = entries.get('architectures') or []
    if len(names) != 1:
        raise ValueError(
            f'{directory / "config.json"}: architectures={names} must name one class'
        )
    try:
        family, source = family_of(names[0])
    except ValueError as error:
        raise ValueError(f'{directory / "config.json"}: {error}') from error
    # transformers builds two labels where none are named.
    labels = entries.get('num_labels', len(entries.get('id2label') or (0, 1)))
    if source == 'scalar' and labels != max(1, len(_score_names(entries))):
        raise ValueError(
            f'{directory / "config.json"}: a classifier with {labels} labels is no '
            'reward model; num_labels must be 1'
        )
    return family, source


def expected_shapes(
    config: TransformerConfig, head: Head, score_names: Sequence[str] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
    """Path → shape of the parameters that the model itself would make."""
    if head not in ('lm', 'scalar'):
        raise ValueError(f"head={head!r} is unknown; use 'lm' or 'scalar'")
    model = CausalLM(config)
    if head == 'scalar':
        model = ScalarModel(config, tuple(score_names))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), bool)
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens, mask)['params']
    return traverse_util.flatten_dict(tree, sep='/')


def named_weights(family: Family, expected: Mapping[str, Any]) -> list[Weight]:
    """The weights of the family's table that this model has (no scalar bias there)."""
    weights = [w for w in family.weights if all(path in expected for path in w.paths)]
    named = {path for weight in weights for path in weight.paths}
    nameless = expected.keys() - named - {'head/bias'}
    if nameless:
        raise ValueError(f'{family.model_type} has no {", ".join(sorted(nameless))}')
    return weights


class _Tensor(NamedTuple):
    """Where a tensor is. The file is opened for each read: a mapping that stays open
    would keep the pages of the whole file in memory.
    """

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # in the spelling of safetensors

    def read(self) -> np.ndarray:
        with safe_open(self.file, framework='np') as file:
            return file.get_tensor(self.name)


def _find_tensors(directory: Path, family: Family) -> dict[str, _Tensor]:
    """Tensors by name. The bare body that some files hold lacks the family's prefix."""
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
    tensors = []
    for name in names:
        path = directory / name
        try:
            with safe_open(path, framework='np') as file:
                for key in file.keys():
                    stored = file.get_slice(key)
                    shape = tuple(stored.get_shape())
                    tensors.append(_Tensor(path, key, shape, stored.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise ValueError(f'{path} cannot be read: {error}') from error
    bare = not any(tensor.name.startswith(family.prefix) for tensor in tensors)
    found = {}
    for tensor in tensors:
        name = family.prefix + tensor.name if bare else tensor.name
        for old, new in OLD_NAMES:
            name = name.replace(old, new)
        found[name] = tensor
    return found


def tensor_names(weight: Weight, num_layers: int) -> list[str]:
    """Names of the tensors of a weight: one, or one for each layer."""
    if '{layer}' not in weight.name:
        return [weight.name]
    return [weight.name.format(layer=layer) for layer in range(num_layers)]


def _check_tensors(
    directory: Path,
    files: Mapping[str, _Tensor],
    family: Family,
    config: TransformerConfig,
    weights: Sequence[Weight],
    expected: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    wanted = {}
    for weight in weights:
        stacked = '{layer}' in weight.name
        shapes = [expected[path].shape[stacked:] for path in weight.paths]
        # The layout itself shows their shape, on a byte for each number at most.
        ours = [np.broadcast_to(np.int8(0), shape) for shape in shapes]
        shape = LAYOUTS[weight.layout].write(ours).shape
        wanted.update(dict.fromkeys(tensor_names(weight, config.num_layers), shape))
    problems = [f'{name} is missing' for name in wanted if name not in files]
    # An LM head is spare where embeddings are tied or a scalar head takes its place.
    spare = {w.name for w in family.weights if w.paths == ('lm_head',)}
    for name, stored in files.items():
        if name in wanted:
            if stored.shape != wanted[name]:
                problems.append(
                    f'{name} is {list(stored.shape)}, not {list(wanted[name])}'
                )
            if stored.dtype not in READABLE:
                problems.append(
                    f'{name} is {stored.dtype}, not one of {", ".join(READABLE)}'
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


def _check_tied(directory: Path, files: Mapping[str, _Tensor], family: Family) -> None:
    """Refuses tied embeddings beside a head of other values: one of them is wrong."""
    names = {weight.paths: weight.name for weight in family.weights}
    embedding, head = names['backbone/embed/tokens',], names['lm_head',]
    if head in files and not np.array_equal(
        files[head].read(), files[embedding].read()
    ):
        raise ValueError(
            f'{directory}: tie_word_embeddings is true, but {head} differs from '
            f'{embedding}; set it to false in config.json, or remove {head}'
        )


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array on a 64-byte boundary: a CPU device takes it over uncopied."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _read(
    files: Mapping[str, _Tensor],
    weight: Weight,
    shapes: Sequence[tuple[int, ...]],
    dtype: Any,
) -> list[np.ndarray]:
    layout = LAYOUTS[weight.layout]
    outs = [_aligned(shape, dtype) for shape in shapes]
    if '{layer}' not in weight.name:
        for out, array in zip(outs, layout.read(files[weight.name].read(), shapes)):
            out[...] = array
        return outs
    inner = [shape[1:] for shape in shapes]
    for layer, name in enumerate(tensor_names(weight, shapes[0][0])):
        for out, array in zip(outs, layout.read(files[name].read(), inner)):
            out[layer] = array
    return outs
