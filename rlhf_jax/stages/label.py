"""The kind label: two responses to a prompt are compared by a Python function.

It reads the responses that a ``sample`` stage wrote (``keep='all'``) and writes
comparisons. Read ``stages/evaluate.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np

from rlhf_jax import files
from rlhf_jax.config import load_dotted
from rlhf_jax.data import sources
from rlhf_jax.pages.page import Page, Verdict, number
from rlhf_jax.ranges import at_least
from rlhf_jax.stages.kinds import Makes
from rlhf_jax.stages.run import RECORDS, Result, Run
from rlhf_jax.stages.settings import DataSpec

PICK = 16  # a purpose folded into the stage's key


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """The label stage."""

    responses: DataSpec  # several to a prompt
    # 'package.module:function': (prompts, firsts, seconds, rng, **args) -> [N] bool,
    # whether the first response is the better one
    fn: str
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    pairs: Annotated[int, at_least(1)] = 1  # of a prompt, drawn from its responses


SETTINGS = (LabelSettings,)


def _verdict(e: dict[str, Any]) -> Verdict:
    """Pass: something was compared."""
    figure = f'{number(e["comparisons"])} comparisons of {number(e["prompts"])} prompts'
    return Verdict('pass' if e['comparisons'] else 'fail', figure, 'at least one')


PAGE = Page(
    title='Labels',
    verdict=_verdict,
    required=lambda e: ('comparisons', 'prompts'),
    facts=(
        ('Prompts', 'prompts', ''),
        ('Comparisons', 'comparisons', ''),
        ('Prompts whose responses are all equal', 'equal', ''),
        ('Responses that repeat one to the same prompt', 'repeated', 'left out'),
        ('The first of two was chosen', 'first_chosen', 'fraction'),
        ('The longer of two was chosen', 'longer_chosen', 'fraction'),
    ),
    draw=lambda stage, rows, evaluation: ([], []),
)


@dataclasses.dataclass(frozen=True)
class LabelJob:
    """A checked stage."""

    stage: str
    settings: LabelSettings
    label: Callable[..., np.ndarray]
    groups: list[list[dict[str, Any]]]  # the responses to every prompt, all different
    repeated: int  # responses that were left out of them


def makes(settings: LabelSettings) -> Makes:
    """Comparisons."""
    return Makes(records='comparisons')


def reads(settings: LabelSettings) -> dict[str, str]:
    """Responses."""
    return {'responses': 'demonstrations'}


def load(run: Run, stage: str, settings: LabelSettings) -> LabelJob:
    """Reads the responses and finds the function.

    Raises:
        ValueError: no such function, or responses without a prompt or a text.
    """
    where = f'config.{stage}'
    fn = load_dotted(settings.fn, f'{where}.fn')
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    records = sources.read(settings.responses)
    for record in records:
        for name in ('prompt', 'completion'):
            if not isinstance(record.fields.get(name), str):
                raise ValueError(
                    f'{record.where}: {name} is no text; {where}.responses are the '
                    "records of a sample stage with keep='all'"
                )
        fields = record.fields
        groups.setdefault(fields['prompt'], {}).setdefault(fields['completion'], fields)
    label = functools.partial(fn, **settings.args)
    different = [list(group.values()) for group in groups.values()]
    repeated = len(records) - sum(map(len, different))
    return LabelJob(stage, settings, label, different, repeated)


def _record(
    first: dict[str, Any], second: dict[str, Any], is_first: bool
) -> dict[str, Any]:
    """A comparison; what was known of the responses goes along, scores by name."""
    chosen, rejected = (first, second) if is_first else (second, first)
    row = {'prompt': chosen['prompt'], 'first_chosen': is_first}
    for side, response in (('chosen', chosen), ('rejected', rejected)):
        row[side] = response['completion']
        for name, value in response.items():
            if name.startswith('score_'):
                row[f'{name.removeprefix("score_")}_{side}'] = value
    for name in ('templated', 'by'):
        if name in chosen:
            row[name] = chosen[name]
    return row


def train(run: Run, job: LabelJob) -> Result:
    """Draws pairs, has them compared, and writes the comparisons."""
    clock, folder = time.monotonic(), run.stage_dir(job.stage)
    rng = np.random.default_rng([*map(int, run.key(job.stage)), PICK])
    pairs = []
    for group in job.groups:
        if len(group) < 2:
            continue
        for _ in range(job.settings.pairs):
            one, other = rng.choice(len(group), 2, replace=False)
            pairs.append((group[one], group[other]))
    texts = [[pair[side]['completion'] for pair in pairs] for side in (0, 1)]
    prompts = [pair[0]['prompt'] for pair in pairs]
    first = np.asarray(job.label(prompts, *texts, rng)) if pairs else np.zeros(0)
    if first.shape != (len(pairs),) or first.dtype != bool:
        raise ValueError(
            f'config.{job.stage}.fn={job.settings.fn!r} gave {first.dtype} of shape '
            f'{list(first.shape)} for {len(pairs)} pairs; return [N] bool, whether the '
            'first response is the better one'
        )
    labelled = zip(pairs, first.tolist())
    files.write_rows(folder / RECORDS, (_record(*pair, x) for pair, x in labelled))
    longer = [(len(a) > len(b)) == is_first for a, b, is_first in zip(*texts, first)]
    report = {
        'prompts': len(job.groups),
        'comparisons': len(pairs),
        'repeated': job.repeated,
        'equal': sum(len(group) < 2 for group in job.groups),
    }
    if pairs:
        report['first_chosen'] = float(first.mean())
        report['longer_chosen'] = float(np.mean(longer))
    seconds = {'label': time.monotonic() - clock}
    return Result(steps=0, seconds=seconds, data={}, evaluation=report)
