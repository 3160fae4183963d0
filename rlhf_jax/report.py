"""The page a run leaves: ``report.html`` for people, ``report.json`` for scripts.

``write_report`` reads what the stages wrote into the work directory, shows each as the
page of its kind says (``pages/page.py``, which to read next) and renders the template
``report.html`` beside this file. It computes nothing about models: a number that no
stage wrote is left out, and the page says so. ``main.py`` calls it at the end of a run.
"""

from __future__ import annotations

import datetime
import importlib.resources
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from rlhf_jax.evaluators import shown
from rlhf_jax.files import delete_line, read_json, remake, remake_config, without_rows
from rlhf_jax.pages.drawing import drawn
from rlhf_jax.pages.page import Json, Page, Verdict, interval, number
from rlhf_jax.stages.kinds import kind_of
from rlhf_jax.stages.order import in_order

REQUIRED_IN_BINS = {
    'by_margin': ('lo', 'hi', 'count', 'accuracy'),
    'by_length_difference': ('lo', 'hi', 'count', 'accuracy'),
    'calibration': ('predicted', 'observed', 'count'),
}
# What numbers, lists or texts in the place of others end in.
_ODD = (TypeError, LookupError, AttributeError, ArithmeticError, ValueError)
LONG_PROMPT = 240  # characters; a longer prompt is folded on the page


# ----------------------------------------------------------------------------- reading


def _finite(value: Any) -> Any:
    """The same JSON value with null for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _read_json(path: Path, mend: str) -> Json | None:
    """A JSON object, or None when there is no such file."""
    return _finite(read_json(path, mend)) if path.exists() else None


def _read_rows(path: Path, required: tuple[str, ...]) -> list[Json]:
    """The objects of a JSONL file; none when there is no such file."""
    if not path.exists():
        return []
    # A last line without its end is being written at this moment: it is not a row yet.
    try:
        lines = path.read_bytes().split(b'\n')[:-1]
    except OSError as error:
        raise ValueError(
            f'{path} cannot be read ({error.strerror}); put it back'
        ) from error
    rows = []
    for i, line in enumerate(lines):
        place = f'{path}:{i + 1}'
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f'{place} is no JSON ({error}); {delete_line(path, i)}'
            ) from error
        _require(row, required, place, delete_line(path, i))
        if 'step' in required:
            _require_numbers(row, place, delete_line(path, i))
        rows.append(_finite(row))
    return rows


def _require(row: Any, keys: tuple[str, ...], where: str, mend: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f'{where} holds a {type(row).__name__}, not an object; {mend}')
    missing = [key for key in keys if key not in row]
    if missing:
        raise ValueError(
            f'{where} lacks {", ".join(missing)}; it has '
            f'{", ".join(row) or "nothing"}; {mend}'
        )


def _require_numbers(row: Any, where: str, mend: str) -> None:
    """Refuses an object with something else than numbers; null is a missing one."""
    if not isinstance(row, dict):
        raise ValueError(f'{where}: {row!r:.80} is no object of numbers; {mend}')
    for name, value in row.items():
        is_one = isinstance(value, float | None) or type(value) is int
        if not is_one or (type(value) is int and value.bit_length() > 63):
            raise ValueError(f'{where}: {name} is {value!r:.80}, not a number; {mend}')


def _page_of(config: Json, stage: str) -> Page:
    """The page of a stage's kind; a plain one for a folder that no config knows."""
    return kind_of(config, stage).PAGE if stage in config else Page(title='Folder')


def _read_evaluation(page: Page, folder: Path) -> Json | None:
    path = folder / 'eval.json'
    evaluation = _read_json(path, remake(folder))
    if evaluation is None:
        return None
    _require(evaluation, page.required(evaluation), str(path), remake(folder))
    for key, keys in REQUIRED_IN_BINS.items():
        for i, row in enumerate(evaluation.get(key) or []):
            _require(row, keys, f'{path}: {key}[{i}]', remake(folder))
    return evaluation


def _read_stage(
    page: Page, folder: Path
) -> tuple[list[Json], Json | None, Json | None, list[Json]]:
    """Rows of metrics, evaluation, what it took, samples; as far as they are there."""
    rows = _read_rows(folder / 'metrics.jsonl', ('step',))
    evaluation = _read_evaluation(page, folder)
    done = _read_json(folder / 'done.json', remake(folder))
    if done is not None:
        place = str(folder / 'done.json')
        _require(done, ('steps', 'seconds'), place, remake(folder))
        _require_numbers({'steps': done['steps']}, place, remake(folder))
        _require_numbers(done['seconds'], place, remake(folder))
    samples = _read_rows(folder / 'samples.jsonl', page.sample_keys)
    return rows, evaluation, done, samples


def check_files(workdir: Path, config: Json) -> None:
    """Reads everything that the report of a run will read, before it goes on.

    Args:
        workdir: of the run.
        config: of the run; the finished ones of its stages must have all their files.

    Raises:
        ValueError: a file is damaged or missing.
    """
    for stage in _stages(workdir, config):
        folder = workdir / stage
        _, evaluation, done, _ = _read_stage(_page_of(config, stage), folder)
        if done is None or stage not in config['stages']:
            continue
        if evaluation is None:
            raise ValueError(f'{folder / "eval.json"} is missing; {remake(folder)}')
        if done['steps'] and not (folder / 'metrics.jsonl').exists():
            raise ValueError(without_rows(folder / 'metrics.jsonl'))


# ---------------------------------------------------------------------------- assembly


def _checked_view(stage: str, page: Page, folder: Path) -> Json:
    try:
        return _stage_view(stage, page, folder)
    except _ODD as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        raise ValueError(
            f'{folder / "eval.json"} or samples.jsonl beside it holds what no run '
            f'writes ({type(error).__name__}: {error}); {remake(folder)}'
        ) from error


def _stage_view(stage: str, page: Page, folder: Path) -> Json:
    """Everything the template needs to know about one stage."""
    rows, evaluation, done, samples = _read_stage(page, folder)
    page = shown(page, evaluation or {})
    figures, absent = drawn(page.draw, stage, rows, evaluation or {})
    holes = {
        name: sum(row.get(name, 0) is None for row in rows)
        for name in dict.fromkeys(key for row in rows for key in row)
    }
    absent += [
        f'{name} was not finite in {count} of {len(rows)} rows: no points there.'
        for name, count in holes.items()
        if count
    ]
    if evaluation is None:
        absent.append('No eval.json: the stage has not been evaluated.')
    if not rows:
        absent.append('No metrics.jsonl with rows: there are no learning curves.')
    if not samples:
        absent.append('No samples.jsonl with rows: there are no samples.')
    judged = Verdict('unknown', 'not evaluated', 'an evaluation when the stage ends')
    if evaluation is not None:
        judged = page.verdict(evaluation)
    return {
        'name': stage,
        'page': page,
        'facts': _numbers(evaluation or {}) if page.facts is None else page.facts,
        'rows': rows,
        'evaluation': evaluation,
        'done': done,
        'judged': judged,
        'warnings': page.warnings(evaluation or {}),
        'remark': page.remark(evaluation or {}),
        'plots': figures,
        'absent': absent,
        'samples': samples,
    }


def _report(views: list[Json], run: Json) -> Json:
    """The contents of report.json."""
    stages, phases = {}, {}
    for view in views:
        done, judged = view['done'], view['judged']
        stages[view['name']] = {
            **(view['evaluation'] or {}),
            'verdict': judged.verdict,
            'expected': judged.expected,
            'figure': judged.figure,
            'warnings': view['warnings'],
            'finished': done is not None,
            'steps': done['steps']
            if done
            else max((r['step'] for r in view['rows']), default=0),
        }
        if done:
            phases[view['name']] = done['seconds']
    return {
        'stages': stages,
        'seconds': sum(s for phase in phases.values() for s in phase.values() if s),
        'phases': phases,
        'versions': run.get('versions'),
        'commit': run.get('commit'),
        'device': run.get('device'),
    }


def _numbers(evaluation: Json) -> tuple[tuple[str, str, str], ...]:
    """All single numbers, for a page that names no facts."""
    return tuple(
        (key, key, '')
        for key, value in evaluation.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return '–'
    if seconds < 90:
        return f'{seconds:.1f} s'
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f'{minutes} min {rest:02d} s'
    return f'{minutes // 60} h {minutes % 60:02d} min'


def _page(title: str, report: Json, views: list[Json], run: Json) -> str:
    source = importlib.resources.files('rlhf_jax') / 'report.html'
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        'number': number,
        'interval': interval,
        'duration': _duration,
    }
    now = datetime.datetime.now(datetime.UTC)
    return environment.from_string(source.read_text(encoding='utf-8')).render(
        title=title,
        written=now.strftime('%d %B %Y, %H:%M UTC'),
        report=report,
        views=views,
        config=json.dumps(run['config'], indent=2, ensure_ascii=False),
        long_prompt=LONG_PROMPT,
    )


def _stages(workdir: Path, config: Json) -> list[str]:
    """The stages with a folder, in order; folders that no config knows come last."""
    files = ('metrics.jsonl', 'eval.json', 'done.json')
    there = {path.parent.name for name in files for path in workdir.glob(f'*/{name}')}
    sections = {name for name in config if isinstance(config[name], dict)}
    there |= {name for name in sections if (workdir / name).is_dir()}
    listed = list(config['stages']) if 'stages' in config else []
    known = sorted(there & config.keys() - {*listed})
    ordered = in_order(config, [s for s in (*known, *listed) if s in there])
    return ordered + sorted(there - {*ordered})


def write_report(workdir: str | os.PathLike[str]) -> Json:
    """Writes ``report.json`` and ``report.html`` into a work directory.

    Works at any time after the run started: a stage without a folder is left out, an
    unfinished one is shown as far as it got.

    Args:
        workdir: holds ``config.json`` and one folder per stage.

    Returns:
        What stands in report.json: ``stages`` (each its eval.json plus ``verdict``,
        ``figure``, ``expected``, ``warnings``, ``finished`` and ``steps``), ``seconds``
        (of the finished stages), ``phases``, ``versions``, ``commit``, ``device``.
        Numbers that are not finite are None.

    Raises:
        ValueError: no config.json, or a file that lacks what it must hold.
    """
    workdir = Path(workdir)
    path = workdir / 'config.json'
    run = _read_json(path, remake_config(path))
    if run is None:
        raise ValueError(
            f'{path} does not exist; --workdir must name the directory of a run'
        )
    _require(run, ('config',), str(path), remake_config(path))
    config = run['config'] or {}
    views = [
        _checked_view(stage, _page_of(config, stage), workdir / stage)
        for stage in _stages(workdir, config)
    ]
    report = _report(views, run)
    page = _page(workdir.resolve().name, report, views, run)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    for name, content in (('report.json', text + '\n'), ('report.html', page)):
        # Renamed into place: a reader never finds half a report.
        aside = workdir / (name + '.tmp')
        aside.write_text(content, encoding='utf-8')
        os.replace(aside, workdir / name)
    return report
