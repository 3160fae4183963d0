"""People label, on a page that ``python -m rlhf_jax.label`` serves.

The stage writes what is asked and stops; the command of the run, given again, goes on
once enough is labelled. Read ``labels/store.py`` next.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from rlhf_jax import files
from rlhf_jax.files import named_path
from rlhf_jax.labels.records import Item, to_row
from rlhf_jax.labels.store import (
    DATABASE,
    ITEMS,
    PLAN,
    LabelPlan,
    Unusable,
    labels_of,
    open_store,
    progress,
)
from rlhf_jax.ranges import at_least, between
from rlhf_jax.stages.console import tell
from rlhf_jax.stages.labellers import Answered, Asked, Asks
from rlhf_jax.stages.labellers.crowd import CrowdHParams, check_crowd, known_items
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import DataSpec

NOT_YET = 75  # the exit status of a run that waits for labels, EX_TEMPFAIL


@dataclasses.dataclass(frozen=True, kw_only=True)
class HParams(CrowdHParams):
    """People who label."""

    form: Literal['comparison', 'ranking', 'rating'] = 'comparison'
    ranked: Annotated[int, at_least(2)] = 4  # responses in a ranking
    # of a comparison: which is better, or also how much, 1 slightly to 4 far
    scale: Literal['choice', 'strength'] = 'strength'
    # by dimension a Markdown file; of several, every item is asked for each
    guidelines: dict[str, str] = dataclasses.field(default_factory=dict)
    rating_range: tuple[int, ...] = (1, 5)  # lowest and highest
    gold_share: Annotated[float, between(0, 0.5)] = 0.1  # of the items shown
    # comparisons for everybody to begin with, whose answer (and ``why``) is then told
    training: DataSpec | None = None


class Checked(NamedTuple):
    """What ``check`` finds."""

    known: list[Item]  # gold and training items
    guideline: dict[str, str]  # the files' texts


def asks(hp: HParams) -> Asks:
    """Comparisons, rankings or ratings."""
    return Asks(hp.form, {'comparison': 2, 'ranking': hp.ranked, 'rating': 1}[hp.form])


def check(run: Run, where: str, hp: HParams) -> Checked:
    """Guidelines, and the items whose answer is known.

    Raises:
        ValueError: a crowd that cannot label, a file that cannot be read, or known
            items where it is no comparisons that are asked.
    """
    check_crowd(where, hp)
    for name in ('gold', 'training'):
        if getattr(hp, name) is not None and hp.form != 'comparison':
            raise ValueError(
                f'{where}.{name} are comparisons, and form={hp.form!r} is asked; '
                'remove it'
            )
    known = known_items(run, hp.training, f'{where}.training', 'training')
    known += known_items(run, hp.gold, f'{where}.gold', 'gold')
    guideline = {}
    for dimension, name in hp.guidelines.items():
        path = named_path(name)
        try:
            guideline[dimension] = path.read_text(encoding='utf-8')
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f'{where}.guidelines.{dimension}: {path} cannot be read ({error})'
            ) from error
    _plan(hp, guideline, where, run.config.seed)
    return Checked(known, guideline)


def _plan(hp: HParams, guideline: dict[str, str], where: str, seed: int) -> LabelPlan:
    try:
        return LabelPlan(
            labellers=hp.labellers,
            form=hp.form,
            scale=hp.scale,
            overlap=hp.overlap,
            repeats=hp.repeats,
            gold_share=hp.gold_share,
            dimensions=tuple(guideline) if len(guideline) > 1 else (),
            guideline=guideline,
            rating_range=hp.rating_range,
            seed=seed,
        )
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from error


def label(asked: Asked) -> Answered:
    """The labels of everybody, once there are enough.

    Raises:
        SystemExit: there are not yet enough; a line says how to go on.
        ValueError: the answers that are there already are to other items.
    """
    folder, (known, guideline) = asked.folder, asked.checked
    plan = _plan(asked.hp, guideline, asked.where, asked.run.config.seed)
    items = [*asked.items, *known]
    _check_unchanged(folder / DATABASE, items, asked.where)
    files.write_rows(folder / ITEMS, map(to_row, items))
    files.write_json(folder / PLAN, dataclasses.asdict(plan))
    labels = labels_of(folder / DATABASE)
    state = progress(items, labels, plan)
    if not state.done:
        tell(
            f'{folder.name}: {state.line}; `python -m rlhf_jax.label --workdir '
            f'{shlex.quote(str(folder.parent))} --stage {shlex.quote(folder.name)}` '
            'serves the page, and then the same command goes on'
        )
        raise SystemExit(NOT_YET)
    return Answered(items, labels)


def _check_unchanged(path: Path, items: list[Item], where: str) -> None:
    """The answers that are there already are answers to these items."""
    if not path.exists():
        return
    try:
        open_store(path).claim(items)
    except Unusable:
        raise
    except ValueError as error:
        raise ValueError(
            f'{path} holds answers to other items than {where} now asks: its '
            'responses, gold or training items have changed since; put the old ones '
            f'back, or `mv {shlex.quote(str(path))}* DIR` to begin with none'
        ) from error
