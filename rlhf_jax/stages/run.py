"""What every stage of a run shares, and where a stage gets its model from.

Read ``stages/loop.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from rlhf_jax import checkpoint, files, hf, reward_losses
from rlhf_jax.config import build
from rlhf_jax.data.examples import Dataset
from rlhf_jax.data.stops import decide_ends
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import CausalLM, ScalarModel, in_compute_dtype
from rlhf_jax.models.presets import preset
from rlhf_jax.sharding import compile_step, init_sharded, shardings, spec_of
from rlhf_jax.stages.settings import ModelSettings
from rlhf_jax.types import Params, PRNGKey
from rlhf_jax.verdicts import REWARD_MODELS


@dataclasses.dataclass(frozen=True)
class Run:
    """A launched config: built once by ``main`` and handed to every stage."""

    workdir: Path
    config: ConfigDict
    mesh: Mesh
    tokenizer: Any
    profile: bool = False  # of every stage, see stages/profiling.py

    def stage_dir(self, stage: str) -> Path:
        """The folder of a stage, created when missing."""
        path = self.workdir / stage
        path.mkdir(parents=True, exist_ok=True)
        return path

    def key(self, stage: str) -> PRNGKey:
        """The base key of a stage, a pure function of the seed and the stage's name."""
        base = jax.random.PRNGKey(self.config.seed)
        return jax.random.fold_in(base, zlib.crc32(stage.encode()) & 0x7FFFFFFF)

    def compile(self, fn: Any, **kinds: Any) -> Any:
        """``sharding.compile_step`` on this run's mesh and backend."""
        backend = self.config.parallel.backend
        return compile_step(fn, mesh=self.mesh, backend=backend, **kinds)


def load_run_tokenizer(config: ConfigDict) -> Any:
    """The tokenizer of a config, with the ids that end a response in all its stages:
    those that ``data.stops`` finds, and the ``extra_eos_ids`` of every stage.

    Raises:
        ValueError: an id that the tokenizer does not have; or see
            ``data.tokenizer.load_tokenizer``.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    known, extra = set(tokenizer.get_vocab().values()), []
    for stage, section in config.items():
        if not (isinstance(section, ConfigDict) and 'extra_eos_ids' in section):
            continue
        if not isinstance(section.extra_eos_ids, tuple | list):
            raise ValueError(
                f'config.{stage}.extra_eos_ids={section.extra_eos_ids!r}: use a tuple '
                'of ids'
            )
        for token in section.extra_eos_ids:
            if token not in known:
                raise ValueError(
                    f'config.{stage}.extra_eos_ids={section.extra_eos_ids}: {token!r} '
                    f'is no id of the tokenizer {config.tokenizer!r}, which has the '
                    f'ids 0 to {max(known)}'
                )
            extra.append(token)
    decide_ends(tokenizer, extra)
    return tokenizer


def finish(
    run: Run,
    stage: str,
    steps: int,
    init: str,
    params: dict[str, Params],
    configs: dict[str, Any],
    seconds: dict[str, float],
    data: dict[str, Dataset],
    members: int = 1,
    facts: checkpoint.ScoreFacts | None = None,
) -> None:
    """Writes the result of a stage: ``params/``, ``model.json``; last ``done.json``.

    Args:
        run: the run.
        stage: its name.
        steps: that it made.
        init: what it started from.
        params: by part: 'policy', 'reward' or 'critic'.
        configs: the Transformer of every part.
        seconds: that it took, by phase.
        data: what it read, by what it was for.
        members: of an ensemble, whose parameters are stacked.
        facts: what the scores of a reward model mean.
    """
    folder = run.stage_dir(stage)
    checkpoint.save_params(folder, params, configs, members, facts)
    done = {
        'stage': stage,
        'steps': steps,
        'init': init,
        'seconds': seconds,
        'data': {name: part.counts.describe() for name, part in data.items()},
    }
    files.write_json(folder / 'done.json', done)


def source_dir(run: Run, init: str) -> Path | None:
    """The stage folder behind an ``init``: of this run, or of another; None
    otherwise.
    """
    if init in run.config.stages:
        return run.workdir / init
    files.named_path(init)
    if (run.workdir / init / 'model.json').exists():
        return run.workdir / init
    folder = files.named_path(init)
    return folder if (folder / 'model.json').exists() else None


def model_config(run: Run, init: str, part: str = 'policy') -> TransformerConfig:
    """The Transformer that ``init`` names; works before the stage it names has run.

    Raises:
        ValueError: nothing of that name, with the places looked at.
    """
    (settings,) = build(run.config.model, ModelSettings, where='config.model')
    if init == 'scratch':
        config = preset(settings.preset, len(run.tokenizer))
    elif (folder := source_dir(run, init)) is not None:
        if not (folder / 'model.json').exists():
            return model_config(run, run.config[init].init)
        parts = checkpoint.load_model_configs(folder)
        config = parts.get(part) or next(iter(parts.values()))
    else:
        config = hf.load_config(init)
    known = max(run.tokenizer.get_vocab().values()) + 1
    return dataclasses.replace(
        config,
        num_tokens=known if known < config.vocab_size else None,
        dtype=settings.dtype,
        remat=settings.remat,
        scan_unroll=settings.scan_unroll,
    )


def load_policy(run: Run, init: str, key: PRNGKey) -> tuple[CausalLM, Params]:
    """A language model and its parameters, in place on the mesh.

    Raises:
        ValueError: the source is unfinished, of another shape, or has no policy.
    """
    model = CausalLM(model_config(run, init))
    start = functools.partial(_init, model)
    if init == 'scratch':
        return model, init_sharded(start, run.mesh, key)
    folder = source_dir(run, init)
    if folder is None:
        return model, _from_hf(run, init, model.config, 'lm')
    like = _like(run, start, key)
    return model, checkpoint.load_params(folder, 'policy', like)


def frozen(run: Run, model: CausalLM | ScalarModel, params: Params) -> Params:
    """Parameters for reading alone, see ``models.heads.in_compute_dtype``, in place on
    the mesh; ``params`` themselves where nothing changes.
    """
    rounded = functools.partial(in_compute_dtype, config=model.config)
    after = jax.eval_shape(rounded, params)
    if jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype, params, after)):
        return params
    return init_sharded(rounded, run.mesh, params)


def check_policy(run: Run, where: str, init: str) -> None:
    """Refuses what no text can be sampled from, before anything compiles.

    Raises:
        ValueError: a reward model, a classifier, or an encoder.
    """
    folder = source_dir(run, init)
    if folder is None:
        bare = init != 'scratch' and hf.load_head(init) != 'lm'
    elif (folder / 'model.json').exists():
        bare = 'policy' not in checkpoint.load_model_configs(folder)
    else:
        bare = init in REWARD_MODELS
    if bare:
        raise ValueError(
            f'{where}={init!r} is no language model that could write a response; name '
            "one, e.g. 'sft' or a …ForCausalLM directory"
        )


def check_trained_head(run: Run, where: str, init: str) -> None:
    """Refuses what has no trained scalar head, where a reward is to be optimised.

    Raises:
        ValueError: a policy (its critic is no reward model), or nothing.
    """
    folder = source_dir(run, init)
    if folder is None:
        bare = init == 'scratch' or hf.load_head(init) == 'lm'
    elif (folder / 'model.json').exists():
        # A critic is none: it says what is still to come, of one policy.
        bare = 'reward' not in checkpoint.load_model_configs(folder)
    else:
        bare = init not in REWARD_MODELS
    if bare:
        raise ValueError(
            f'{where}={init!r} has no trained score: it is a policy; name a reward '
            "model, e.g. 'rm'"
        )


def ensemble_size(run: Run, name: str) -> int:
    """Members of the reward model that ``name`` names, 1 for a single one; works before
    the stage it names has run.
    """
    folder = source_dir(run, name)
    if folder is None:
        return 1
    if (folder / 'model.json').exists():
        return checkpoint.load_members(folder, 'reward')
    settings = run.config[name]
    return settings.members if 'members' in settings else 1


def score_facts(run: Run, name: str) -> checkpoint.ScoreFacts:
    """What the scores of the reward model that ``name`` names mean; works before the
    stage it names has run.
    """
    folder = source_dir(run, name)
    if name == 'scratch':
        return checkpoint.ScoreFacts()
    if folder is None:
        return checkpoint.ScoreFacts(hf.load_score_names(name))
    if (folder / 'model.json').exists():
        return checkpoint.load_score_facts(folder, 'reward')
    settings = run.config[name]
    if 'heads' not in settings:
        return checkpoint.ScoreFacts()
    loss = reward_losses.load(settings.loss, f'config.{name}.loss')
    separator = settings.step_separator if loss.DATA == 'steps' else None
    return checkpoint.ScoreFacts(tuple(settings.heads), separator)


def check_single_score(run: Run, where: str, init: str) -> None:
    """Refuses a critic that would start from a model of several scores.

    Raises:
        ValueError: it has named heads.
    """
    heads = score_facts(run, init).heads
    if heads:
        raise ValueError(
            f'{where}={init!r} has the scores {", ".join(heads)}, a critic has one; '
            "start it from the policy, e.g. 'sft'"
        )


def load_ensemble(run: Run, name: str) -> tuple[ScalarModel, Params]:
    """The model that all members of a finished ensemble are, and their parameters,
    stacked: [M, …].
    """
    model = ScalarModel(model_config(run, name, 'reward'))

    def start(key: PRNGKey) -> Params:
        keys = jax.random.split(key, ensemble_size(run, name))
        return jax.vmap(functools.partial(_init, model))(keys)

    like = _like(run, start, run.key(name))  # shapes alone: nothing is drawn
    return model, checkpoint.load_params(source_dir(run, name), 'reward', like)


def load_scalar(
    run: Run,
    init: str,
    key: PRNGKey,
    part: Literal['reward', 'critic'],
    heads: tuple[str, ...] | None = None,
) -> tuple[ScalarModel, Params]:
    """A reward model or critic: whole from one, or a policy's backbone with a fresh
    head; of an ensemble the first member.

    Args:
        run: the run.
        init: what it starts from.
        key: of the fresh head.
        part: which of the two.
        heads: names of its scores; None for those of ``init``. Where they differ, the
            head is fresh.
    """
    if ensemble_size(run, init) > 1:
        model, params = load_ensemble(run, init)
        first = functools.partial(jax.tree.map, lambda x: x[0])
        return model, init_sharded(first, run.mesh, params)
    folder, given = source_dir(run, init), score_facts(run, init).heads
    heads = given if heads is None else heads
    model = ScalarModel(model_config(run, init, part), heads)
    start = functools.partial(_init, model)
    if init == 'scratch':
        return model, init_sharded(start, run.mesh, key)
    if folder is None:
        loaded = _from_hf(run, init, model.config, 'scalar')
    else:
        parts = checkpoint.load_model_configs(folder)
        name = next((n for n in (part, 'reward', 'critic') if n in parts), 'policy')
        kind = ScalarModel(model.config, given)
        kind = CausalLM(model.config) if name == 'policy' else kind
        like = _like(run, functools.partial(_init, kind), key)
        loaded = checkpoint.load_params(folder, name, like)
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


def _from_hf(run: Run, init: str, config: TransformerConfig, head: str) -> Params:
    def put(path: tuple[str, ...], x: Any) -> jax.Array:
        spec = spec_of('/'.join(path), x.shape, run.mesh)
        return jax.device_put(x, NamedSharding(run.mesh, spec))

    return hf.load_params(init, config, head=head, place=put)
