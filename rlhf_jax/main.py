"""Launches a run: flags → config → mesh → the stages, in order.

    python -m rlhf_jax.main --workdir runs/quickstart
    python -m rlhf_jax.main --config configs/quickstart.py:smoke --workdir runs/smoke
    python -m rlhf_jax.main --config configs/quickstart.py --config.ppo.kl_coef=0.1
    --workdir runs/b

The same command again resumes: finished stages are skipped, an unfinished one goes on.
Read ``stages/run.py`` next.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from rlhf_jax import files
from rlhf_jax.command_line import check_sections, read_flags
from rlhf_jax.ops import cpu
from rlhf_jax.workdir import claim, locked

_ROOT = Path(__file__).resolve().parents[1]
_DEFAULT = _ROOT / 'configs' / 'quickstart.py'

# What a config has beside its stages.
TOP_LEVEL = ('seed', 'stages', 'tokenizer', 'model', 'parallel', 'metrics')


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    if len(argv) > 1:
        raise app.UsageError(f'unknown arguments {argv[1:]}; flags start with --')
    if flags.FLAGS.workdir is None:
        raise app.UsageError('--workdir is needed, e.g. --workdir runs/quickstart')
    if not os.environ.get('RLHF_JAX_TRACEBACK'):
        # Orbax reports every rename, and pages of every error before it is raised.
        logging.set_verbosity(logging.FATAL)
    cpu.rarely_collect_garbage()
    workdir = flags.FLAGS.workdir
    try:
        workdir = files.named_path(workdir)
        launch(flags.FLAGS.config, workdir, flags.FLAGS.profile)
    except ValueError as error:
        _stop(error, str(error))
    except OSError as error:
        _stop(error, f'{workdir} cannot be read or written: {error}')
    except KeyboardInterrupt as error:
        how = 'the same command goes on from the last checkpoint'
        _stop(error, f'stopped by Ctrl-C; {how}', 128 + signal.SIGINT)


def _stop(error: BaseException, message: str, code: int = 1) -> NoReturn:
    if os.environ.get('RLHF_JAX_TRACEBACK'):
        raise error
    print(f'error: {message}', file=sys.stderr)
    print('(RLHF_JAX_TRACEBACK=1 shows where it was raised)', file=sys.stderr)
    sys.exit(code)


def launch(config: Any, workdir: str | Path, profile: bool = False) -> dict[str, Any]:
    """Runs the stages of a config in a work directory and writes its report.

    Args:
        config: ``ml_collections.ConfigDict`` of a file in ``configs/``.
        workdir: created when missing; resumed when it holds the same config.
        profile: leave a trace and the time per phase in every stage's ``profile/``.

    Returns:
        The contents of ``report.json``.

    Raises:
        ValueError: whatever is wrong with the config, the data, or the directory;
            raised before anything is compiled wherever it can be known.
    """
    workdir = Path(workdir)
    _check_top_level(config)
    resolved = json.loads(config.to_json_best_effort())
    claim(workdir, resolved)
    if (
        not _unfinished(config, workdir)
        and (report := _last_report(workdir)) is not None
    ):
        print(f'{workdir} is finished: {workdir / "report.html"}')
        return report
    # Heavy imports wait until the config and the directory are known to be good.
    import jax

    # Of several processes of one run, the first alone writes.
    alone = locked(workdir) if jax.process_index() == 0 else contextlib.nullcontext()
    with alone:
        return _launch_alone(config, workdir, resolved, profile)


def _unfinished(config: Any, workdir: Path) -> list[str]:
    return [s for s in config.stages if not (workdir / s / 'done.json').exists()]


def _launch_alone(
    config: Any, workdir: Path, resolved: Any, profile: bool
) -> dict[str, Any]:
    """:func:`launch` in a directory that no other process writes to."""
    claim(workdir, resolved)  # again: another process may have been here
    unfinished = _unfinished(config, workdir)
    from rlhf_jax.report import check_files

    check_files(workdir, resolved)
    if unfinished:
        _run_stages(config, workdir, unfinished, resolved, profile)
    else:
        files.write_json(workdir / 'config.json', _description(resolved))
    from rlhf_jax.report import write_report  # plots wait until there are curves

    report = write_report(workdir)
    _print_summary(report, workdir)
    return report


def _last_report(workdir: Path) -> dict[str, Any] | None:
    """What was reported; None where there is no report. A damaged one is written anew,
    being made of the files of the stages.
    """
    path = workdir / 'report.json'
    if not (path.exists() and (workdir / 'report.html').exists()):
        return None
    try:
        return files.read_json(path, 'the report is written anew')
    except ValueError as error:
        print(error, flush=True)
        return None


def _run_stages(
    config: Any, workdir: Path, unfinished: list[str], resolved: Any, profile: bool
) -> None:
    from rlhf_jax import checkpoint
    from rlhf_jax.config import build
    from rlhf_jax.data import clock
    from rlhf_jax.data.sources import NotWritten
    from rlhf_jax.data.tokenizer import check_saved, save_tokenizer
    from rlhf_jax.metrics import check_writers
    from rlhf_jax.sharding import ParallelConfig, make_mesh
    from rlhf_jax.stages import out_of_memory
    from rlhf_jax.stages.order import check_order
    from rlhf_jax.stages.run import Run, finish, load_run_tokenizer

    check_writers(tuple(config.metrics))
    (parallel,) = build(config.parallel, ParallelConfig, where='config.parallel')
    tokenizer = load_run_tokenizer(config)
    run = Run(workdir, config, make_mesh(parallel), tokenizer, profile)
    if (workdir / 'config.json').exists():
        check_saved(run.tokenizer, workdir / 'tokenizer', config.tokenizer)
        clock.restore_date(run.tokenizer, workdir / 'tokenizer')
    else:
        clock.begin(run.tokenizer)
    _keep_compiled()
    for folder in check_order(run, unfinished):
        checkpoint.check_result(folder)
    # Everything is read and checked before the first stage compiles anything; but for
    # the records that a stage of this run has still to write.
    jobs = {}
    for stage in unfinished:
        with contextlib.suppress(NotWritten):
            jobs[stage] = _load(run, stage)
    # Only now does the directory belong to this config: after a corrected mistake in
    # the data or the batch size it can be used again.
    if not (workdir / 'config.json').exists():
        save_tokenizer(run.tokenizer, workdir / 'tokenizer')
    files.write_json(workdir / 'config.json', _description(resolved))
    for stage in unfinished:
        print(f'[{stage}] {workdir / stage}', flush=True)
        try:
            job = jobs.pop(stage) if stage in jobs else _load(run, stage)
            with out_of_memory.told(config, stage, 'training'):
                result = run.kind(stage).train(run, job)
            finish(run, stage, result)
        except (OSError, ValueError) as error:
            if (reason := checkpoint.disk_error(error)) is None:
                raise
            raise ValueError(
                f'{workdir / stage} cannot be read or written ({reason}); make '
                'room or mend it, and give the same command again: it goes on from the '
                'last checkpoint'
            ) from error


def _load(run: Any, stage: str) -> Any:
    from rlhf_jax.stages import out_of_memory

    with out_of_memory.told(run.config, stage, 'reading'):
        return run.kind(stage).load(run, stage, *run.settings(stage))


def _keep_compiled() -> None:
    """Keeps what XLA compiles for the next start, in the user's cache.

    JAX's own variables say where else (JAX_COMPILATION_CACHE_DIR), from how many
    seconds of compilation on (JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS), or not to
    (JAX_ENABLE_COMPILATION_CACHE=false). With several devices of a CPU nothing is kept
    unless they say so: read back, such a program may lose the order of its collectives,
    and its devices wait for each other until XLA gives up (seen with JAX 0.10.2).
    """
    import jax

    from rlhf_jax.config import cache_dir

    if jax.config.jax_compilation_cache_dir is None:
        if jax.default_backend() == 'cpu' and jax.local_device_count() > 1:
            return
        jax.config.update('jax_compilation_cache_dir', str(cache_dir() / 'xla'))
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        # Many small programs make a start slow too.
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def _check_top_level(config: Any) -> None:
    from rlhf_jax.config import nearest
    from rlhf_jax.stages.kinds import kind_of

    for name in config:
        if name not in TOP_LEVEL and not isinstance(config[name], ConfigDict | None):
            raise ValueError(
                f'config.{name}={config[name]!r} is no setting of the run'
                f'{nearest(name, TOP_LEVEL)}; the settings of a stage are a section'
            )
    check_sections(config)
    seed = config.seed
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f'config.seed={seed!r}: use a whole number from 0 to 2³² − 1')
    known = [
        name
        for name in config
        if name not in TOP_LEVEL and isinstance(config[name], ConfigDict)
    ]
    for name in known:
        kind_of(config, name)
    if not config.stages:
        raise ValueError(f'config.stages is empty; name stages, of {sorted(known)}')
    for stage in config.stages:
        if stage not in known:
            raise ValueError(
                f'config.stages names {stage!r}, but config.{stage} is not set'
                f'{nearest(stage, known)}'
            )
        if not re.fullmatch(r'[A-Za-z_][A-Za-z0-9_-]*', stage):
            raise ValueError(
                f'config.stages: {stage!r} cannot be the name of a folder; use '
                'letters, digits, _ and -'
            )
    if len(set(config.stages)) < len(config.stages):
        raise ValueError(f'config.stages={tuple(config.stages)} names a stage twice')


def _description(resolved: Any) -> dict[str, Any]:
    import jax

    packages = (
        'rlhf_jax',
        'jax',
        'jaxlib',
        'flax',
        'optax',
        'orbax-checkpoint',
        'transformers',
    )
    versions = {'python': sys.version.split()[0]}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = 'not installed as a package'
    root = Path(__file__).resolve().parent
    command = ['git', '-C', str(root), 'rev-parse', 'HEAD']
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        'config': resolved,
        'versions': versions,
        'commit': commit.stdout.strip() or None,
        'device': f'{len(jax.devices())} × {jax.devices()[0].device_kind}',
    }


def _print_summary(report: Mapping[str, Any], workdir: Path) -> None:
    for stage, result in report['stages'].items():
        print(
            f'[{stage}] {result["verdict"]}: {result["figure"]} (expected: '
            f'{result["expected"]})'
        )
        for warning in result['warnings']:
            print(f'[{stage}] warning: {warning}')
    print(f'report: {workdir / "report.html"}')


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with a mistake told in a line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _stop(error, str(error).strip().splitlines()[-1].strip())


def run() -> None:
    """Entry point; defines the flags, so that an import of this file defines none."""
    # Otherwise transformers says at every start that PyTorch is missing.
    os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
    # A console without UTF-8 shows other characters by their code.
    sys.stdout.reconfigure(errors='backslashreplace')
    sys.path.append(str(_ROOT))  # recipes import each other as configs.NAME
    try:
        config, sys.argv[1:] = read_flags(sys.argv[1:], str(_DEFAULT))
    except ValueError as error:
        _stop(error, str(error))
    text = 'The recipe to run: file.py, or file.py:argument; --config.KEY=VALUE sets.'
    try:
        config_flags.DEFINE_config_dict('config', config, text)
    except config_flags.config_flags.UnsupportedOperationError as error:
        reason = str(error).partition(' Currently supported')[0]
        _stop(error, f'--config: {reason} Set its keys: --config.A.B.KEY=VALUE')
    flags.DEFINE_string('workdir', None, 'Where the run keeps its results.')
    flags.DEFINE_bool('profile', False, 'Trace some steps of every stage.')
    app.run(main, flags_parser=_parse_flags)


if __name__ == '__main__':
    run()
