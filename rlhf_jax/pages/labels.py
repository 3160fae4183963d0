"""What the report says of labels: who said what, and how far they agree.

Read ``pages/policy.py`` next.
"""

from __future__ import annotations

from typing import Any

from rlhf_jax.pages.drawing import BLUE, HALF, ORANGE, Plot, blank, to_svg
from rlhf_jax.pages.page import Json, Page, Verdict, fraction, interval, number

Figures = tuple[list[Plot], list[str]]


def verdict(e: Json) -> Verdict:
    """Pass: something was judged, and not everything equal."""
    figure = f'{number(e["records"])} records of {number(e["prompts"])} prompts'
    if e.get('ties') == e['records']:
        return Verdict('fail', f'{figure}, all of them ties', 'one is better')
    return Verdict('pass' if e['records'] else 'fail', figure, 'at least one')


def warnings(e: Json) -> list[str]:
    """Labellers to look at, and a judge that goes by the place."""
    found = []
    for name, what in (
        ('never_agree', 'never agree with anybody'),
        ('near_chance', 'agree with the others no more than chance would'),
    ):
        if e.get(name):
            found.append(f'{", ".join(e[name])}: {what}; their labels were used')
    by_place = e.get('judge_first_chosen')
    if by_place is not None and abs(by_place - 0.5) > 0.25:
        found.append(
            f'The judge names the first of two in {fraction(by_place)} of its answers; '
            'both orders were averaged'
        )
    return found


def draw(stage: str, rows: Any, e: Json) -> Figures:
    """Every labeller's agreement with the others and with gold items."""
    people = [row for row in e.get('by_labeller') or [] if row['others'] is not None]
    if len(people) < 2:
        return [], []
    figure, ((axes,),) = blank(HALF, 2.9)
    for shift, name, label, color in (
        (-0.12, 'others', 'the others', BLUE),
        (0.12, 'gold', 'gold items', ORANGE),
    ):
        for i, row in enumerate(people):
            if row[name] is None:
                continue
            axes.plot([i + shift] * 2, row[f'{name}_interval'], color=color, lw=1.2)
            first = label if i == 0 else None
            axes.plot(i + shift, row[name], 'o', color=color, ms=4, label=first)
    axes.set_xticks(range(len(people)), [row['labeller'] for row in people])
    axes.set(ylim=(0, 1.04), ylabel='agreement')
    axes.legend(fontsize=8)
    svg = to_svg(figure, f'{stage}-labellers', 'agreement of every labeller')
    caption = 'Share of equal answers, with 95% intervals.'
    return [Plot('Labellers', svg, caption)], []


def remark(e: Json) -> str | None:
    """How far labels can be trusted, in a sentence."""
    if e.get('agreement') is None:
        return None
    text = f'Two labels of an item are equal in {fraction(e["agreement"])}'
    if e.get('agreement_interval'):
        text += f' {interval(e["agreement_interval"])}'
    text += ' of the cases'
    if e.get('ceiling') is not None:
        text += (
            f'; a reward model that knows every better response is right on at most '
            f'{fraction(e["ceiling"])} of such labels'
        )
    return text + '.'


PAGE = Page(
    title='Labels',
    verdict=verdict,
    warnings=warnings,
    required=lambda e: ('records', 'prompts'),
    remark=remark,
    facts=(
        ('Prompts', 'prompts', ''),
        ('Records', 'records', ''),
        ('Labels', 'labels', ''),
        ('Labellers', 'labellers', ''),
        ('Prompts with too few different responses', 'equal', ''),
        ('Responses that repeat one to the same prompt', 'repeated', 'left out'),
        ('Bad records', 'bad_records', 'left out'),
        ('Items without a record', 'unused', 'skipped, or both bad'),
        ('Ties', 'ties', 'of the records'),
        ('The first of two was chosen', 'first_chosen', 'fraction'),
        ('The longer of two was chosen', 'longer_chosen', 'fraction'),
        ('Certainty of the labels', 'certainty', 'mean probability of the chosen'),
        ('Agreement with the gold reward', 'gold_agreement', 'fraction'),
        ('Agreement with the labels before', 'known_agreement', 'fraction'),
        ('Equal labels of an item', 'agreement', 'fraction of pairs of labels'),
        ('Cohen’s κ', 'cohen_kappa', 'mean over pairs of labellers'),
        ('Fleiss’ κ', 'fleiss_kappa', ''),
        ('Krippendorff’s α', 'alpha_nominal', 'nominal'),
        ('Krippendorff’s α', 'alpha_ordinal', 'ordinal'),
        ('Ceiling of a reward model', 'ceiling', 'accuracy, by the agreement'),
        ('Right on gold items', 'gold', 'fraction'),
        ('Labellers agree with themselves', 'self', 'fraction of repeats'),
        ('What was shown first was chosen', 'first_shown', 'fraction'),
        ('Judge: the first of two', 'judge_first_probability', 'mean probability'),
        ('Judge: the first of two is likelier', 'judge_first_chosen', 'fraction'),
        ('Judge: both orders agree', 'judge_consistent', 'fraction'),
        ('Judge: prompts read', 'judge_calls', ''),
        ('Judge: tokens read', 'judge_tokens', 'of prompts, with a label'),
        ('Judge: items left out', 'judge_too_long', 'longer than its buckets'),
    ),
    draw=draw,
)
