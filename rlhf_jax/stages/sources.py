"""Where a model comes from: a stage, finished or not, a Hugging Face model, or nothing.

Every setting that names a model (``settings.ModelName``) is resolved here to one
:class:`Source`, which all checks ask. Loading from it works once the stage that it
names has finished. Read ``stages/sampler.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from rlhf_jax import checkpoint, hf
from rlhf_jax.checkpoint import ScoreFacts
from rlhf_jax.config import build, nearest
from rlhf_jax.data.tokenizer import (
    check_vocabulary,
    load_scoring_tokenizer,
    stage_tokenizer,
)
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import CausalLM, ScalarModel, in_compute_dtype
from rlhf_jax.models.presets import preset
from rlhf_jax.sharding import init_sharded, shardings, spec_of
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import ModelSettings, SamplerSettings
from rlhf_jax.types import Params, PRNGKey

SCRATCH = 'scratch'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A model that a setting names."""

    name: str  # as the user wrote it
    folder: Path | None  # of a stage
    # By part, as this run computes them: 'policy' has a language-model head, 'reward' a
    # trained score, 'critic' one that says what is still to come; 'base' has no head.
    configs: Mapping[str, TransformerConfig]
    members: int = 1  # of an ensemble of reward models
    facts: ScoreFacts = ScoreFacts()  # what the scores of a reward model mean
    read_tokenizer: Callable[[], Any | None] = lambda: None

    @functools.cached_property
    def tokenizer(self) -> Any | None:
        """The one that comes with it; None where none does."""
        return self.read_tokenizer()

    @property
    def is_policy(self) -> bool:
        """Whether text can be sampled from it."""
        return 'policy' in self.configs

    @property
    def has_score(self) -> bool:
        """Whether it has a trained score: a critic's is none."""
        return 'reward' in self.configs

    def config(self, part: str = 'policy') -> TransformerConfig:
        """The Transformer of a part, or of what there is instead."""
        if part in self.configs:
            return self.configs[part]
        return next(iter(self.configs.values()))


def resolve(run: Run, name: str) -> Source:
    """What a name stands for; works before the stage that it names has run.

    Raises:
        ValueError: nothing of that name, with the places looked at.
    """
    (settings,) = build(run.config.model, ModelSettings, where='config.model')
    if name == SCRATCH:
        configs = {'policy': preset(settings.preset, len(run.tokenizer))}
        return Source(name=name, folder=None, configs=_computed(run, settings, configs))
    folder = run.source_dir(name)
    if folder is None:
        return _from_hub(run, settings, name)
    if not (folder / 'model.json').exists():
        return _unfinished(run, name, folder)
    configs = checkpoint.load_model_configs(folder)
    return Source(
        name=name,
        folder=folder,
        configs=_computed(run, settings, configs),
        members=checkpoint.load_members(folder, 'reward'),
        facts=checkpoint.load_score_facts(folder, 'reward'),
        read_tokenizer=lambda: stage_tokenizer(folder),
    )


def _from_hub(run: Run, settings: ModelSettings, name: str) -> Source:
    try:
        head, config = hf.load_head(name), hf.load_config(name)
    except ValueError as error:
        if name.count('/') > 1 or Path(name).expanduser().is_dir():
            raise
        known = run.config.stages
        raise ValueError(
            f'{name!r} is no stage of this run{nearest(name, known)}; as a model: '
            f'{error}'
        ) from error
    part = {'lm': 'policy', 'scalar': 'reward', 'base': 'base'}[head]

    def tokenizer() -> Any | None:
        directory = hf.resolve(name)
        files = ('tokenizer.json', 'tokenizer_config.json')
        if not any((directory / file).exists() for file in files):
            return None
        return load_scoring_tokenizer(str(directory))

    return Source(
        name=name,
        folder=None,
        configs=_computed(run, settings, {part: config}),
        facts=ScoreFacts(hf.load_score_names(name)),
        read_tokenizer=tokenizer,
    )


def _unfinished(run: Run, name: str, folder: Path) -> Source:
    makes = run.makes(name)
    if not makes.parts:
        raise ValueError(f'{name!r} is a stage that makes no model; name one that does')
    return Source(
        name=name,
        folder=folder,
        configs={
            part: resolve(run, start).config() for part, start in makes.parts.items()
        },
        members=makes.members,
        facts=makes.facts,
        read_tokenizer=lambda: (
            run.tokenizer
            if makes.tokenizer is None
            else load_scoring_tokenizer(makes.tokenizer)
        ),
    )


def _computed(
    run: Run, settings: ModelSettings, configs: Mapping[str, TransformerConfig]
) -> dict[str, TransformerConfig]:
    """The Transformers as this run computes them."""
    known = max(run.tokenizer.get_vocab().values()) + 1
    return {
        part: dataclasses.replace(
            config,
            num_tokens=known if known < config.vocab_size else None,
            dtype=settings.dtype,
            remat=settings.remat,
            scan_unroll=settings.scan_unroll,
        )
        for part, config in configs.items()
    }


# ------------------------------------------------------------------------------ checks


def check_policy(run: Run, where: str, name: str) -> Source:
    """Refuses what no text can be sampled from, before anything compiles.

    Raises:
        ValueError: a reward model, a classifier, or an encoder.
    """
    source = resolve(run, name)
    if not source.is_policy:
        raise ValueError(
            f'{where}={name!r} is no language model that could write a response; name '
            "one, e.g. 'sft' or a …ForCausalLM directory"
        )
    return source


def check_trained_score(source: Source, where: str) -> None:
    """Refuses what has no trained scalar head, where a reward is to be optimised.

    Raises:
        ValueError: a policy (its critic is no reward model), or nothing.
    """
    if source.name == SCRATCH or not source.has_score:
        raise ValueError(
            f'{where}={source.name!r} has no trained score: it is a policy; name a '
            "reward model, e.g. 'rm'"
        )


def check_single_score(source: Source, where: str) -> None:
    """Refuses a critic that would start from a model of several scores.

    Raises:
        ValueError: it has named heads.
    """
    if source.facts.heads:
        raise ValueError(
            f'{where}={source.name!r} has the scores {", ".join(source.facts.heads)}, '
            "a critic has one; start it from the policy, e.g. 'sft'"
        )


def check_positions(
    run: Run, where: str, source: Source, settings: SamplerSettings
) -> None:
    """Refuses a model that is too small for the tokens or the lengths of the samples.

    Raises:
        ValueError: it has fewer embeddings than ids, or too few positions.
    """
    config = source.config()
    check_vocabulary(run.tokenizer, config.vocab_size)
    longest = settings.prompt_buckets[-1] + settings.max_new_tokens
    if longest > config.max_positions:
        raise ValueError(
            f'{where}={source.name!r}: prompts of {settings.prompt_buckets[-1]} and '
            f'responses of {settings.max_new_tokens} tokens, {longest} together, '
            f'exceed its {config.max_positions} positions; shorten prompt_buckets or '
            'max_new_tokens'
        )


# ----------------------------------------------------------------------------- loading


def load_policy(run: Run, name: str, key: PRNGKey) -> tuple[CausalLM, Params]:
    """A language model and its parameters, in place on the mesh.

    Raises:
        ValueError: the source is unfinished, of another shape, or has no policy.
    """
    source = resolve(run, name)
    model = CausalLM(source.config())
    start = functools.partial(_init, model)
    if name == SCRATCH:
        return model, init_sharded(start, run.mesh, key)
    if source.folder is None:
        return model, _from_hf(run, name, model.config, 'lm')
    like = _like(run, start, key)
    return model, checkpoint.load_params(source.folder, 'policy', like)


def frozen(run: Run, model: CausalLM | ScalarModel, params: Params) -> Params:
    """Parameters for reading alone, see ``models.heads.in_compute_dtype``, in place on
    the mesh; ``params`` themselves where nothing changes.
    """
    rounded = functools.partial(in_compute_dtype, config=model.config)
    after = jax.eval_shape(rounded, params)
    if jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype, params, after)):
        return params
    return init_sharded(rounded, run.mesh, params)


def load_ensemble(run: Run, source: Source) -> tuple[ScalarModel, Params]:
    """The model that all members of a finished ensemble are, and their parameters,
    stacked: [M, …].
    """
    model = ScalarModel(source.config('reward'))

    def start(key: PRNGKey) -> Params:
        keys = jax.random.split(key, source.members)
        return jax.vmap(functools.partial(_init, model))(keys)

    like = _like(run, start, jax.random.PRNGKey(0))  # shapes alone: nothing is drawn
    return model, checkpoint.load_params(source.folder, 'reward', like)


def load_scalar(
    run: Run,
    name: str,
    key: PRNGKey,
    part: Literal['reward', 'critic'],
    heads: tuple[str, ...] | None = None,
) -> tuple[ScalarModel, Params]:
    """A reward model or critic: whole from one, or a policy's backbone with a fresh
    head; of an ensemble the first member.

    Args:
        run: the run.
        name: what it starts from.
        key: of the fresh head.
        part: which of the two.
        heads: names of its scores; None for those of the source. Where they differ, the
            head is fresh.
    """
    source = resolve(run, name)
    if source.members > 1:
        model, params = load_ensemble(run, source)
        first = functools.partial(jax.tree.map, lambda x: x[0])
        return model, init_sharded(first, run.mesh, params)
    given = source.facts.heads
    heads = given if heads is None else heads
    model = ScalarModel(source.config(part), heads)
    start = functools.partial(_init, model)
    if name == SCRATCH:
        return model, init_sharded(start, run.mesh, key)
    if source.folder is None:
        loaded = _from_hf(run, name, model.config, 'scalar')
    else:
        parts = (part, 'reward', 'critic', 'policy')
        found = next(part for part in parts if part in source.configs)
        kind = ScalarModel(model.config, given)
        kind = CausalLM(model.config) if found == 'policy' else kind
        like = _like(run, functools.partial(_init, kind), key)
        loaded = checkpoint.load_params(source.folder, found, like)
    if 'head' in loaded and heads == given:
        return model, loaded
    head = init_sharded(lambda k: start(k)['head'], run.mesh, key)
    return model, {'backbone': loaded['backbone'], 'head': head}


def _init(model: Any, key: PRNGKey) -> Params:
    tokens = jnp.zeros((1, 2), jnp.int32)
    return model.init(key, tokens, jnp.ones((1, 2), bool))['params']


def _like(run: Run, start: Any, key: PRNGKey) -> Params:
    shapes = jax.eval_shape(start, key)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        shardings(shapes, run.mesh),
    )


def _from_hf(run: Run, name: str, config: TransformerConfig, head: str) -> Params:
    def put(path: tuple[str, ...], x: Any) -> jax.Array:
        spec = spec_of('/'.join(path), x.shape, run.mesh)
        return jax.device_put(x, NamedSharding(run.mesh, spec))

    return hf.load_params(name, config, head=head, place=put)
