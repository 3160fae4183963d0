"""A Hugging Face directory from a config and parameters: the inverse of ``reader.py``.

Read ``families.py`` next.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from rlhf_jax.hf.families import family_for
from rlhf_jax.hf.reader import (
    INDEX,
    WEIGHTS,
    Head,
    expected_shapes,
    named_weights,
    tensor_names,
)
from rlhf_jax.hf.schema import LAYOUTS, Weight, write_config
from rlhf_jax.hf.tokenizers import save_tokenizer_files, with_pad
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.types import Params

if TYPE_CHECKING:  # slow to import, and only named here
    from transformers import PreTrainedTokenizerBase


def save(
    directory: str | Path,
    params: Params,
    config: TransformerConfig,
    *,
    head: Head,
    score_names: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a model as a Hugging Face directory in float32, complete or not at all.

    The files are written beside it, into ``<directory>.partial``, which is renamed at
    the end, and replaced by the next attempt if this one is killed.

    A scalar model becomes a sequence classifier with a label for each score.
    transformers has no bias there: it goes into config.json as
    ``{"rlhf_jax": {"score_bias": …}}``, where :func:`load_params` finds it, and the
    scores of transformers are lower by it. transformers reads a decoder's score at the
    last token that is not ``pad_token_id``, which therefore must end no text; a token
    that the tokenizer lacks is added, with a row of zeros where there is none for it.

    Args:
        directory: must not exist, or be empty.
        params: parameters of ``CausalLM`` or ``ScalarModel``.
        config: their config.
        head: 'lm' or 'scalar', as in :func:`load_params`.
        score_names: of a scalar model with named heads; they become the labels.
        tokenizer: saved too, when given.
        bos_token_id: None for the tokenizer's.
        eos_token_id: one id, or all that end a response; None for the tokenizer's.
        pad_token_id: None for the tokenizer's, or for the one that :func:`with_pad`
            finds. A decoder with a score needs one that is no EOS id.
        max_shard_bytes: weights are split into files of at most this size; a tensor is
            never split.

    Raises:
        ValueError: the directory is not empty, no family can hold the model, the
            parameters do not fit the config, an id lies outside the vocabulary, or a
            decoder's score has no pad id that ends no text.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(
            f'{directory} exists already; export to a new or empty directory'
        )
    family = family_for(config)
    flat = _check_params(params, config, head, score_names)
    special = {'bos': bos_token_id, 'eos': eos_token_id, 'pad': pad_token_id}
    # transformers reads a decoder's score before the padding, an encoder's first.
    if head == 'scalar' and config.attention == 'causal':
        tokenizer, special['pad'] = _score_pad(special, tokenizer)
        if pad_token_id is None and special['pad'] == config.vocab_size:  # a new token
            config, flat = _with_row(config, flat)
    ids = _token_ids(special, tokenizer, config.vocab_size)

    entries = {
        'architectures': [family.architectures[head]],
        'dtype': 'float32',
        **ids,
        **write_config(family, config),  # may fix the padding id
    }
    if head == 'scalar':
        has_bias = any('head/bias' in weight.paths for weight in family.weights)
        bias = None if has_bias else np.asarray(flat['head/bias'], float)
        entries |= _score_entries(score_names, bias)

    partial = directory.with_name(directory.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_weights(partial, flat, named_weights(family, flat), config, max_shard_bytes)
    if tokenizer is not None:
        save_tokenizer_files(tokenizer, partial)
    if head == 'lm':
        _write_json(partial / 'generation_config.json', ids)
    _write_json(partial / 'config.json', entries)
    partial.rename(directory)


def _score_entries(
    score_names: Sequence[str], bias: np.ndarray | None
) -> dict[str, Any]:
    """The labels of config.json, and what transformers has no place for."""
    names = tuple(score_names) or ('score',)
    ours = {'score_names': list(score_names)} if score_names else {}
    if bias is not None:
        ours['score_bias'] = bias.tolist()
    labels = {
        'id2label': {str(i): name for i, name in enumerate(names)},
        'label2id': {name: i for i, name in enumerate(names)},
    }
    # By this, pipelines of transformers give scores as they are, not squashed.
    entries = {**labels, 'problem_type': 'regression'}
    return {**entries, 'rlhf_jax': ours} if ours else entries


def _check_params(
    params: Params, config: TransformerConfig, head: Head, score_names: Sequence[str]
) -> dict[str, Any]:
    flat = traverse_util.flatten_dict(params, sep='/')
    expected = expected_shapes(config, head, score_names)
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


def _with_row(
    config: TransformerConfig, flat: Mapping[str, Any]
) -> tuple[TransformerConfig, dict[str, Any]]:
    """A row of zeros more in the embeddings."""
    name = 'backbone/embed/tokens'
    table = np.pad(np.asarray(flat[name]), ((0, 1), (0, 0)))
    config = dataclasses.replace(config, vocab_size=config.vocab_size + 1)
    return config, {**flat, name: table}


def _score_pad(
    given: Mapping[str, int | Sequence[int] | None],
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedTokenizerBase | None, int]:
    """The tokenizer that pads the texts of a score, and the id that it pads with."""
    eos, pad = given['eos'], given['pad']
    ends = set(eos if isinstance(eos, Sequence) else [eos])
    if tokenizer is not None:
        # Some append a token to every text; the last of a word itself does no harm.
        ends |= {tokenizer.eos_token_id, *tokenizer.encode('a')[-1:]}
    problem = f'pad_token_id={pad}, which may end a text'
    if pad is None and tokenizer is None:
        problem = 'no pad_token_id, and no tokenizer to find one in'
    if (pad is None and tokenizer is None) or (pad is not None and pad in ends):
        raise ValueError(
            f'a decoder with a score has {problem}: transformers reads the score at '
            'the last token that is not the pad id; give the tokenizer and no '
            'pad_token_id, or an id that ends no text'
        )
    if tokenizer is None:
        return None, pad
    tokenizer = with_pad(tokenizer, ends, pad)
    return tokenizer, tokenizer.pad_token_id


def _token_ids(
    given: Mapping[str, int | Sequence[int] | None],
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
) -> dict[str, Any]:
    """``{'bos_token_id': …}`` for config.json: as given, else the tokenizer's."""
    ids = {}
    for name, value in given.items():
        value = getattr(tokenizer, f'{name}_token_id', None) if value is None else value
        ids[f'{name}_token_id'] = list(value) if isinstance(value, Sequence) else value
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
        names = tensor_names(weight, config.num_layers)
        nbytes = 4 * sum(flat[path].size for path in weight.paths) // len(names)
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
        values = [flat[path] for path in weight.paths]
        if '{layer}' in weight.name:
            values = [value[layer] for value in values]
        ours = [np.asarray(value, np.float32) for value in values]
        yield name, np.ascontiguousarray(LAYOUTS[weight.layout].write(ours))
