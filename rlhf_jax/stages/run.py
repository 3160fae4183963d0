"""A launched run, and what a stage leaves when it ends.

Read ``stages/sources.py`` next, then ``stages/loop.py``.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import checkpoint, files
from rlhf_jax.checkpoint import ScoreFacts
from rlhf_jax.data.clock import save_date
from rlhf_jax.data.examples import Dataset
from rlhf_jax.data.sources import AND
from rlhf_jax.data.stops import decide_ends
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.sharding import compile_step
from rlhf_jax.stages import kinds
from rlhf_jax.stages.kinds import Kind, Makes
from rlhf_jax.types import Params, PRNGKey

RECORDS = 'records.jsonl'  # what a stage writes for others to read
# 'stage:NAME', and a slice
_STAGE_DATA = re.compile(r'stage:([^\[\]]+)(\[[^\[\]]*\])?')


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

    def kind(self, stage: str) -> Kind:
        """The kind of a stage of this run."""
        return kinds.kind_of(self.config, stage)

    def settings(self, stage: str) -> tuple[Any, ...]:
        """The settings of a stage of this run; its data are where they can be read."""
        where = f'config.{stage}'
        settings = kinds.read_settings(self.kind(stage), self.config[stage], where)
        return tuple(kinds.replace_data(part, self.data_spec) for part in settings)

    def makes(self, stage: str) -> Makes:
        """What a stage of this run leaves to others."""
        return self.kind(stage).makes(*self.settings(stage))

    def source_dir(self, name: str) -> Path | None:
        """The stage folder behind a name, of this run or of another; or None."""
        return source_dir(self.workdir, self.config.stages, name)

    def data_spec(self, spec: str) -> str:
        """A data spec with the file of a stage in place of every ``stage:NAME`` whose
        records are written.
        """

        def of(part: str) -> str:
            if (match := _STAGE_DATA.fullmatch(part)) is None:
                return part
            folder = self.source_dir(match[1])
            if folder is None or not (folder / RECORDS).exists():
                return part
            return f'jsonl:{folder / RECORDS}{match[2] or ""}'

        return AND.join(of(part) for part in spec.split(AND))


def source_dir(workdir: Path, stages: tuple[str, ...], name: str) -> Path | None:
    """See :meth:`Run.source_dir`."""
    if name in stages:
        return workdir / name
    folder = files.named_path(name)
    if _holds_result(workdir / name):
        return workdir / name
    return folder if _holds_result(folder) else None


def _holds_result(folder: Path) -> bool:
    return any((folder / file).exists() for file in ('model.json', RECORDS))


def records_of(spec: str) -> list[str]:
    """Every NAME of a data spec ``stage:NAME``."""
    matches = [_STAGE_DATA.fullmatch(part) for part in spec.split(AND)]
    return [match[1] for match in matches if match is not None]


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
            if not isinstance(token, int) or token not in known:
                raise ValueError(
                    f'config.{stage}.extra_eos_ids={section.extra_eos_ids}: {token!r} '
                    f'is no id of the tokenizer {config.tokenizer!r}, which has the '
                    f'ids 0 to {max(known)}'
                )
            extra.append(token)
    decide_ends(tokenizer, extra)
    return tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a stage has done."""

    steps: int  # that it made
    seconds: dict[str, float]  # that it took, by phase
    data: Mapping[str, Dataset]  # what it read, by what it was for
    evaluation: Mapping[str, Any]  # its eval.json
    init: str | None = None  # what it started from
    params: Mapping[str, Params] = dataclasses.field(default_factory=dict)  # by part
    configs: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # by part
    members: int = 1  # of an ensemble, whose parameters are stacked
    facts: ScoreFacts | None = None  # what the scores of a reward model mean
    tokenizer: Any | None = None  # of its models, where that is not the run's


def finish(run: Run, stage: str, result: Result) -> None:
    """Writes the result of a stage: ``eval.json``, ``params/``, ``model.json``; last
    ``done.json``.
    """
    folder = run.stage_dir(stage)
    files.write_json(folder / 'eval.json', dict(result.evaluation))
    if result.tokenizer is not None:
        result.tokenizer.save_pretrained(folder / 'tokenizer')
        save_date(result.tokenizer, folder / 'tokenizer')
    checkpoint.save_params(
        folder,
        dict(result.params),
        dict(result.configs),
        result.members,
        result.facts,
    )
    done = {
        'stage': stage,
        'steps': result.steps,
        'init': result.init,
        'seconds': result.seconds,
        'data': {name: part.counts.describe() for name, part in result.data.items()},
    }
    files.write_json(folder / 'done.json', done)
