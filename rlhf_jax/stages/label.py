"""The kind label: who says which response to a prompt is better, and what they say.

It reads the responses that a ``sample`` stage wrote (``keep='all'``), draws pairs of
them, and has them labelled by whom ``by`` names: people, a model, simulated people, a
Python function (``stages/labellers/``). What each labeller said is ``labels.jsonl``;
what becomes of it, comparisons for other stages, is ``records.jsonl``. Comparisons that
exist already are labelled anew. Read ``stages/labellers/__init__.py`` next.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from typing import Annotated, Any, Literal

import numpy as np

from rlhf_jax import files
from rlhf_jax.data import sources
from rlhf_jax.data.chat import readable
from rlhf_jax.data.formats import (
    GOLD,
    BadRecord,
    how_sure,
    number_of,
    text_of,
    to_turns,
)
from rlhf_jax.labels.aggregation import METHODS, Method
from rlhf_jax.labels.agreement import report as report_agreement
from rlhf_jax.labels.judge import flat
from rlhf_jax.labels.outcomes import to_records
from rlhf_jax.labels.pairs import Rule, draw, group
from rlhf_jax.labels.records import Item, Label, to_row
from rlhf_jax.labels.store import ITEMS
from rlhf_jax.pages import labels as pages
from rlhf_jax.ranges import at_least
from rlhf_jax.stages.batches import remove_batches
from rlhf_jax.stages.console import tell
from rlhf_jax.stages.kinds import Choice, Makes
from rlhf_jax.stages.labellers import Asked, load_labeller
from rlhf_jax.stages.run import RECORDS, Result, Run
from rlhf_jax.stages.settings import DataSpec

PICK = 16  # a purpose folded into the stage's key
LABELS = 'labels.jsonl'
SHOWN = 16  # comparisons in samples.jsonl
SIDES = ('chosen', 'rejected')
# What cannot be made of the labels of an item, by its form.
UNFIT = {
    'comparison': (),
    'rating': ('dawid_skene', 'bradley_terry'),
    'ranking': ('majority', 'dawid_skene', 'bradley_terry'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """The label stage. The settings of the labeller stand beside these; None is its own
    default, see ``config.unset``.
    """

    responses: DataSpec  # several to a prompt, or comparisons
    by: str = 'fn'  # a module of stages/labellers, or package.module
    rule: Rule = 'random'  # which pairs of responses, see labels/pairs.py
    # For the other rules: NAME of the responses' field score_NAME
    score: str | None = None
    per_prompt: Annotated[int, at_least(1)] = 1  # items of a prompt at most
    limit: Annotated[int | None, at_least(1)] = None  # items in all
    # what becomes of several labels of an item, see labels/aggregation.py
    aggregate: Method = 'share'
    on_bad: Literal['error', 'skip'] = 'error'  # skipped records are counted


SETTINGS = (LabelSettings,)
PAGE = pages.PAGE
CHOICE = Choice('by', load_labeller)


@dataclasses.dataclass(frozen=True)
class LabelJob:
    """A checked stage."""

    stage: str
    settings: LabelSettings
    by: Any  # the labeller's module
    hp: Any  # its settings
    checked: Any  # what it found before anything compiled
    groups: list[list[dict[str, Any]]]  # the responses to every prompt, all different
    compared: list[tuple[dict[str, Any], dict[str, Any]]]  # pairs that were given
    repeated: int  # equal responses to a prompt that were left out
    bad: int  # records that were skipped


def makes(settings: LabelSettings, by: Any, hp: Any) -> Makes:
    """Comparisons, rankings or ratings."""
    return Makes(records=f'{by.asks(hp).form}s')


def reads(settings: LabelSettings, by: Any, hp: Any) -> dict[str, str]:
    """Responses, and comparisons whose answer is known."""
    return {'responses': 'responses', 'gold': 'comparisons'}


def load(run: Run, stage: str, settings: LabelSettings, by: Any, hp: Any) -> LabelJob:
    """Reads the responses and asks the labeller's module.

    Raises:
        ValueError: responses without a prompt or a text, too few of them, a rule
            without its score, an ``aggregate`` that is not for what is asked, or what
            the labeller's module refuses.
    """
    where = f'config.{stage}'
    if (settings.rule == 'random') != (settings.score is None):
        raise ValueError(
            f'{where}.rule={settings.rule!r} and score={settings.score!r}: every rule '
            "but 'random' asks for a score of the responses"
        )
    form, size = by.asks(hp)
    if form != 'comparison' and settings.rule != 'random':
        raise ValueError(
            f'{where}.rule={settings.rule!r} draws pairs, and a {form} is asked; use '
            "'random'"
        )
    if settings.aggregate in UNFIT[form]:
        raise ValueError(
            f'{where}.aggregate={settings.aggregate!r} is not for {form}s; use '
            f'{" or ".join(repr(x) for x in METHODS if x not in UNFIT[form])}'
        )
    checked = by.check(run, where, hp)
    responses, compared, repeated, bad = _read(stage, where, settings)
    if compared and form != 'comparison':
        raise ValueError(
            f'{where}.responses are comparisons, and a {form} is asked; take those of '
            'a sample stage'
        )
    if compared and settings.rule != 'random':
        raise ValueError(
            f'{where}.rule={settings.rule!r} chooses among several responses to a '
            f"prompt, and {where}.responses are comparisons; use 'random'"
        )
    groups, more = group(responses)
    repeated += more
    job = LabelJob(stage, settings, by, hp, checked, groups, compared, repeated, bad)
    if not compared and all(len(responses) < size for responses in groups):
        raise ValueError(
            f'{where}: nothing to label: a {form} is of {size} different responses '
            f'to a prompt, and no prompt of {len(groups)} has as many ({job.repeated} '
            'equal ones were left out); sample more responses to a prompt'
        )
    return job


def _read(
    stage: str, where: str, settings: LabelSettings
) -> tuple[list[dict[str, Any]], list[Any], int, int]:
    """(responses, comparisons as two sides each, comparisons of equal texts, records
    that are bad).
    """
    responses, compared, repeated, bad = [], [], 0, 0
    for record in sources.read(settings.responses):
        fields = record.fields
        try:
            _check_record(record, where)
            sides = _sides(record) if 'chosen' in fields else None
        except BadRecord as error:
            if settings.on_bad == 'error':
                raise ValueError(
                    f"{error}; mend the record, or set {where}.on_bad='skip' to leave "
                    'such records out'
                ) from error
            bad += 1
            continue
        if sides is None:
            responses.append(dict(fields))
        elif fields['chosen'] == fields['rejected']:
            repeated += 1
        else:
            compared.append(sides)
    if bad:
        tell(f'{stage}: {bad} records of {settings.responses} are bad and left out')
    return responses, compared, repeated, bad


def _check_record(record: sources.SourceRecord, where: str) -> None:
    """A prompt with a response, or with two of them, and numbers as scores."""
    fields = record.fields
    names = SIDES if 'chosen' in fields else ('completion',)
    for name in ('prompt', *names):
        value = fields.get(name)
        if name == 'prompt' and isinstance(value, list):
            continue
        if not isinstance(value, str):
            raise BadRecord(
                f'{record.where}: {name} is no text; {where}.responses are the '
                "records of a sample stage with keep='all', or comparisons"
            )
        text_of(record, name, value)
    to_turns(record)
    for name, value in fields.items():
        if name.startswith('score_') or name in GOLD:
            number_of(record, name, value)


def _sides(record: sources.SourceRecord) -> tuple[dict[str, Any], dict[str, Any]]:
    """A comparison as its two responses, with what is known of each; ``known`` is
    whether it was the better one, where one was.
    """
    fields, (probability, _) = record.fields, how_sure(record)
    shared = {
        k: v
        for k, v in fields.items()
        if not (k.startswith(SIDES) or k in ('first_chosen', 'was_chosen'))
    }
    found = []
    for side, other in (SIDES, SIDES[::-1]):
        response = {k: v for k, v in shared.items() if not k.endswith(f'_{other}')}
        for name in list(response):
            if name.endswith(f'_{side}'):
                score = name.removesuffix(f'_{side}')
                response[f'score_{score}'] = response.pop(name)
        if probability != 0.5:
            response['known'] = (side == 'chosen') == (probability > 0.5)
        found.append({**response, 'completion': fields[side]})
    return found[0], found[1]


def train(run: Run, job: LabelJob) -> Result:
    """Draws pairs, has them labelled, and writes labels and comparisons.

    Raises:
        SystemExit: labels are still to come; the same command goes on.
        ValueError: no comparison came of the labels.
    """
    clock, folder = time.monotonic(), run.stage_dir(job.stage)
    rng = np.random.default_rng([*map(int, run.key(job.stage)), PICK])
    settings, where = job.settings, f'config.{job.stage}'
    form, size = job.by.asks(job.hp)
    try:
        drawn = draw(
            job.groups,
            rng,
            size=size,
            rule=settings.rule,
            score=settings.score,
            per_prompt=settings.per_prompt,
            limit=settings.limit,
        )
    except ValueError as error:
        raise ValueError(f'{where}.{error}') from error
    drawn += [pair if rng.random() < 0.5 else pair[::-1] for pair in job.compared]
    if settings.limit is not None and len(drawn) > settings.limit:
        kept = rng.choice(len(drawn), settings.limit, replace=False)
        drawn = [drawn[i] for i in sorted(kept.tolist())]
    if not drawn:
        raise ValueError(
            f'{where}.rule={settings.rule!r} drew nothing: of every prompt all '
            f'responses have the same score_{settings.score}'
        )
    main = [_item(run, i, responses, form) for i, responses in enumerate(drawn)]
    asked = Asked(run, where, folder, job.hp, job.checked, main, rng)
    items, labels, facts = job.by.label(asked)
    records = to_records(main, labels, settings.aggregate)
    if not records:
        said = Counter(label.verdict for label in labels)
        raise ValueError(
            f'{where}: no {form} came of {len(labels)} labels of {len(main)} items '
            f'({said["skipped"]} skipped, {said["bad"]} called bad); more labels are '
            'needed, or other responses'
        )
    files.write_rows(folder / ITEMS, map(to_row, items))
    files.write_rows(folder / LABELS, map(to_row, labels))
    files.write_rows(folder / RECORDS, records)
    files.write_rows(folder / 'samples.jsonl', _samples(records, labels))
    remove_batches(folder)  # those of a judge
    report = {
        'prompts': len(job.groups) + len(job.compared),
        'records': len(records),
        'repeated': job.repeated,
        'bad_records': job.bad,
        'equal': sum(len(group) < size for group in job.groups),
        'unused': len(main) - len({row['item'] for row in records}),
        **_facts(records),
        **_agreement(items, labels),
        **facts,
    }
    seconds = {'label': time.monotonic() - clock}
    return Result(steps=0, seconds=seconds, data={}, evaluation=report)


def _item(run: Run, index: int, responses: Any, form: Any) -> Item:
    """What is asked of responses to a prompt."""
    facts = tuple(
        {k: v for k, v in response.items() if k not in ('prompt', 'completion')}
        for response in responses
    )
    prompt = responses[0]['prompt']
    templated = responses[0].get('templated', False) is True
    return Item(
        item=str(index),
        prompt=prompt,
        completions=tuple(response['completion'] for response in responses),
        form=form,
        facts=facts,
        templated=templated,
        readable=readable(run.tokenizer, prompt) if templated else None,
    )


def _agreement(items: list[Item], labels: list[Label]) -> dict[str, Any]:
    """What is known of the labels and of those who gave them, see ``agreement.py``."""
    found = report_agreement(items, labels)
    return {k: v for k, v in found.items() if v is not None and k != 'ties'}


def _facts(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the comparisons are like."""
    if 'chosen' not in records[0]:
        return {}
    sure = [row for row in records if row.get('probability', 1.0) > 0.5]
    sure = [row for row in sure if 'tie' not in row]
    certainty = [row.get('probability', 1.0) for row in sure]
    facts: dict[str, Any] = {'ties': len(records) - len(sure)}
    if sure:
        facts['certainty'] = float(np.mean(certainty))
        longer = [len(row['chosen']) > len(row['rejected']) for row in sure]
        facts['first_chosen'] = float(np.mean([row['first_chosen'] for row in sure]))
        facts['longer_chosen'] = float(np.mean(longer))
    gaps = np.asarray(
        [row['gold_chosen'] - row['gold_rejected'] for row in sure if _has_gold(row)]
    )
    if (gaps != 0).any():
        facts['gold_agreement'] = float((gaps[gaps != 0] > 0).mean())
    if known := [row['was_chosen'] for row in sure if 'was_chosen' in row]:
        facts['known_agreement'] = float(np.mean(known))
    return facts


def _has_gold(row: dict[str, Any]) -> bool:
    return 'gold_chosen' in row and 'gold_rejected' in row


def _samples(
    records: list[dict[str, Any]], labels: list[Label]
) -> list[dict[str, Any]]:
    """The first comparisons, ratings or rankings, with what labellers noted (of a judge
    its reasoning), for the page.
    """
    shown, notes = [], {}
    for label in labels:
        if label.note:
            said = f'\n{label.labeller} notes: {label.note.strip()}'
            notes[label.item] = notes.get(label.item, '') + said
    for row in records[:SHOWN]:
        text = row.get('completion')
        if 'chosen' in row:
            text = f'better: {row["chosen"]}\nworse: {row["rejected"]}'
        if 'completions' in row:
            lines = zip(row['completions'], _columns(row['ranks']))
            text = '\n'.join(f'{rank}: {completion}' for completion, rank in lines)
        text += notes.get(row['item'], '')
        shown.append({'prompt': flat(row['prompt']), 'response': text})
        score = row.get('probability', row.get('rating'))
        shown[-1] |= {} if score is None else {'score': score}
    return shown


def _columns(ranks: Any) -> list[Any]:
    return ranks if isinstance(ranks, list) else list(zip(*ranks.values()))
