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

from rlhf_jax.files import named_path
from rlhf_jax.hf.families import family_of
from rlhf_jax.hf.schema import (
    LARGEST,
    LAYOUTS,
    Family,
    Weight,
    entry,
    mapping,
    read_config,
)
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import CausalLM, ScalarModel
from rlhf_jax.types import Array, Params

Head = Literal['lm', 'scalar']
Source = Literal['lm', 'scalar', 'base']  # what a directory holds
Place = Callable[[tuple[str, ...], np.ndarray], Array]

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
DOWNLOADS = ('*.json', '*.safetensors', 'tokenizer*', '*.model', '*.txt')
# Models that the package ships, by name: a decoder that knows the text of tiny_tldr.
SHIPPED = {'tiny': Path(__file__).parents[1] / 'datasets' / 'tiny_base'}
PIECE = 2**22  # numbers that are checked at a time
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
    directory = SHIPPED.get(str(spec)) or named_path(spec)
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
        ValueError: no config.json, an architecture or a setting that is not supported,
            or weights beside it that hold another number of layers.
    """
    directory = resolve(spec)
    entries = _read_json(directory / 'config.json')
    family, _ = _family(directory, entries)
    try:
        config = read_config(family, entries)
    except ValueError as error:
        raise ValueError(f'{directory / "config.json"}: {error}') from error
    _check_layers(directory, family, config)
    return config


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
    names = entry(mapping(entries, 'rlhf_jax'), 'score_names', [])
    if not isinstance(names, list) or any(type(name) is not str for name in names):
        raise ValueError(f'score_names={names!r} must be a list of names')
    return tuple(names)


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
    files = _find_tensors(directory, family)
    expected = expected_shapes(config, head, _score_names(entries))
    if head == 'scalar' and source != 'scalar':
        expected = {
            path: x for path, x in expected.items() if not path.startswith('head/')
        }
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
        bias = _score_bias(directory, entries, expected['head/bias'].shape)
        params['head', 'bias'] = place(('head', 'bias'), bias.astype(dtype))
    return traverse_util.unflatten_dict(params)


def _score_bias(
    directory: Path, entries: Mapping[str, Any], shape: tuple[int, ...]
) -> np.ndarray:
    """What :func:`save` left in config.json, else 0."""
    value = entry(mapping(entries, 'rlhf_jax'), 'score_bias', np.zeros(shape).tolist())
    numbers = value if isinstance(value, list) else [value]
    if (
        any(type(x) not in (int, float) or not abs(x) < 1e300 for x in numbers)
        or np.shape(value) != shape
    ):
        raise ValueError(
            f'{directory / "config.json"}: score_bias={value!r} must be '
            f'{math.prod(shape)} finite numbers'
        )
    return np.asarray(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise ValueError(
            f'{path} is missing: {path.parent} is no model directory'
        ) from error
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror})') from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not valid JSON: {error}') from error
    if not isinstance(entries, dict):
        raise ValueError(f'{path} is a {type(entries).__name__}, not a JSON object')
    return entries


def _family(directory: Path, entries: Mapping[str, Any]) -> tuple[Family, Source]:
    path = directory / 'config.json'
    names = entry(entries, 'architectures', [])
    if not isinstance(names, list) or len(names) != 1 or type(names[0]) is not str:
        raise ValueError(f'{path}: architectures={names!r} must name one class')
    try:
        family, source = family_of(names[0])
        # transformers builds two labels where none are named.
        labels = len(mapping(entries, 'id2label')) or 2
        labels = entry(entries, 'num_labels', labels)
        scores = max(1, len(_score_names(entries)))
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    if source == 'scalar' and labels != scores:
        raise ValueError(
            f'{path}: a classifier with {labels} labels is no reward model; num_labels '
            'must be 1'
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
            array = file.get_tensor(self.name)
        flat = array.reshape(-1)
        for start in range(0, flat.size, PIECE):
            if not np.isfinite(flat[start : start + PIECE]).all():
                raise ValueError(
                    f'{self.file}: {self.name} holds NaN or infinite numbers; the '
                    'model was damaged before it was saved'
                )
        return array


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model; none where the directory has no weights."""
    path = directory / INDEX
    if not path.exists():
        return [path for path in [directory / WEIGHTS] if path.exists()]
    places = _read_json(path).get('weight_map')
    if not isinstance(places, dict) or not places:
        raise ValueError(
            f"{path} has no 'weight_map', which says in which file each tensor is; "
            'fetch it again'
        )
    names = list(places.values())
    if any(type(name) is not str or Path(name).name != name for name in names):
        raise ValueError(
            f"{path}: 'weight_map' must give the name of a file for every tensor"
        )
    return [directory / name for name in sorted(set(names))]


def _stored(path: Path) -> list[_Tensor]:
    """The tensors of a file; their numbers are not read yet."""
    tensors = []
    try:
        with safe_open(path, framework='np') as file:
            for key in file.keys():
                stored = file.get_slice(key)
                shape = tuple(stored.get_shape())
                tensors.append(_Tensor(path, key, shape, stored.get_dtype()))
    except (OSError, SafetensorError, UnicodeError) as error:
        raise ValueError(f'{path} cannot be read: {error}') from error
    return tensors


def _check_layers(directory: Path, family: Family, config: TransformerConfig) -> None:
    """Compares the number of layers with the weights, if there are any: what is made of
    a wrong one may take hours, or all memory.
    """
    named = next(w.name for w in family.weights if '{layer}' in w.name)
    before = re.escape(named.split('{layer}')[0].removeprefix(family.prefix))
    pattern = rf'(?:{re.escape(family.prefix)})?{before}(\d+)\.'
    found = [
        re.match(pattern, tensor.name)
        for path in _weight_files(directory)
        for tensor in _stored(path)
    ]
    layers = {int(match[1]) for match in found if match}
    if layers and config.num_layers != len(layers):
        raise ValueError(
            f'{directory / "config.json"}: it has {config.num_layers} layers, and the '
            f'weights have {len(layers)}; one of them belongs to another model'
        )


def _find_tensors(directory: Path, family: Family) -> dict[str, _Tensor]:
    """Tensors by name. The bare body that some files hold lacks the family's prefix."""
    paths = _weight_files(directory)
    if not paths:
        pickles = sorted(path.name for path in directory.glob('pytorch_model*.bin'))
        reason = 'it holds no weights that can be read'
        if pickles:
            reason = (
                f'{", ".join(pickles)} is not read, because a pickle can run code: '
                'convert it by save_pretrained of transformers'
            )
        raise ValueError(f'{directory} has neither {WEIGHTS} nor {INDEX}; {reason}')
    tensors = [tensor for path in paths for tensor in _stored(path)]
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
    wanted, problems = {}, []
    for weight in weights:
        names = tensor_names(weight, config.num_layers)
        stacked = '{layer}' in weight.name
        shapes = [expected[path].shape[stacked:] for path in weight.paths]
        size = sum(map(math.prod, shapes))
        odd = [n for n in names if n in files and math.prod(files[n].shape) != size]
        if odd and size > LARGEST:  # more than can be laid out, by a wrong setting
            problems += [
                f'{n} is {list(files[n].shape)}, not {size} numbers' for n in odd
            ]
            wanted.update(dict.fromkeys(names))
            continue
        # The layout itself shows their shape, on a byte for each number at most.
        ours = [np.broadcast_to(np.int8(0), shape) for shape in shapes]
        shape = LAYOUTS[weight.layout].write(ours).shape
        wanted.update(dict.fromkeys(names, shape))
    problems += [f'{name} is missing' for name in wanted if name not in files]
    # An LM head is spare where embeddings are tied or a scalar head takes its place.
    spare = {w.name for w in family.weights if w.paths == ('lm_head',)}
    for name, stored in files.items():
        if name in wanted:
            if wanted[name] not in (None, stored.shape):
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
