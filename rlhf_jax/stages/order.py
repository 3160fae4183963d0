"""In which order stages run: each after those that it takes models or records from.

Read ``main.py`` next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.config import nearest
from rlhf_jax.files import named_path
from rlhf_jax.stages.kinds import kind_of, named, read_settings
from rlhf_jax.stages.run import RECORDS, Run, records_of
from rlhf_jax.stages.settings import DataSpec, ModelName

# What the records of a stage can be read as, by what they hold (``Makes.records``).
READABLE_AS = {
    'demonstrations': ('demonstrations', 'responses', 'prompts'),
    'comparisons': ('comparisons', 'responses', 'rankings', 'unpaired', 'prompts'),
    'rankings': ('rankings', 'prompts'),
    'ratings': ('ratings', 'prompts'),
    'prompts': ('prompts',),
}


def check_order(run: Run, unfinished: Sequence[str]) -> list[Path]:
    """Makes sure that what the unfinished stages start from is there when they run.

    Returns:
        The folders of finished stages that they read.

    Raises:
        ValueError: a stage that comes later, is not run, or does not write what is
            read; or a setting that is wrong.
    """
    found = {}
    for stage in unfinished:
        for place, name in _models(run.config, stage):
            _check_earlier(run, f'config.{stage}.{place}', stage, name)
            if name not in unfinished and (folder := run.source_dir(name)) is not None:
                found[folder] = None
        for place, name in _records(run.config, stage):
            where = f'config.{stage}.{place}'
            _check_earlier(run, where, stage, name)
            _check_records(run, where, stage, place, name)
            if name not in unfinished:
                found[run.source_dir(name)] = None
    return list(found)


def in_order(config: Mapping[str, Any], stages: Sequence[str]) -> list[str]:
    """The stages of a run, each after those that it reads from; otherwise as they
    come.
    """
    ordered: list[str] = []

    def add(stage: str, below: tuple[str, ...]) -> None:
        if stage in ordered or stage in below or stage not in stages:
            return
        for _, name in (*_models(config, stage), *_records(config, stage)):
            add(name, (*below, stage))
        ordered.append(stage)

    for stage in stages:
        add(stage, ())
    return ordered


def _settings(config: Mapping[str, Any], stage: str) -> tuple[Any, ...]:
    return read_settings(kind_of(config, stage), config[stage], f'config.{stage}')


def _models(config: Mapping[str, Any], stage: str) -> Iterator[tuple[str, str]]:
    for part in _settings(config, stage):
        yield from named(part, ModelName)


def _records(config: Mapping[str, Any], stage: str) -> Iterator[tuple[str, str]]:
    for part in _settings(config, stage):
        for place, spec in named(part, DataSpec):
            for name in records_of(spec):
                yield place, name


def _check_earlier(run: Run, where: str, stage: str, name: str) -> None:
    order = tuple(run.config.stages)
    if not name.strip():
        raise ValueError(f'{where}={name!r} is empty; name a stage or a model')
    try:
        named_path(name)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from error
    if name in order:
        if order.index(name) >= order.index(stage):
            raise ValueError(
                f'{where}={name!r} does not come before {stage} in config.stages='
                f'{order}'
            )
    elif name in run.config and run.source_dir(name) is None:
        raise ValueError(
            f'{where}={name!r} is neither among config.stages={order} nor finished in '
            f"{run.workdir}; add it to the stages, or name another run's stage folder"
        )


def _check_records(run: Run, where: str, stage: str, place: str, name: str) -> None:
    """The stage writes records, and of the kind that is read."""
    if name not in run.config.stages:
        folder = run.source_dir(name)
        if folder is None or not (folder / RECORDS).exists():
            raise ValueError(
                f"{where}='stage:{name}': no stage of that name has written records"
                f'{nearest(name, run.config.stages)}'
            )
        return
    writes = run.makes(name).records
    if writes is None:
        raise ValueError(f"{where}='stage:{name}': {name} writes no records")
    kind = run.kind(stage)
    reads = kind.reads(*run.settings(stage)) if hasattr(kind, 'reads') else {}
    if place in reads and reads[place] not in READABLE_AS[writes]:
        raise ValueError(
            f"{where}='stage:{name}': it takes {reads[place]}, and {name} writes "
            f'{writes}'
        )
