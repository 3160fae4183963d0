"""The page of a stage that has responses criticised and revised."""

from __future__ import annotations

from rlhf_jax.pages.drawing import BLUE, HALF, ORANGE, Plot, Rows, blank, to_svg
from rlhf_jax.pages.page import Json, Page, Verdict, number


def _verdict(e: Json) -> Verdict:
    """Pass: something was written, and some revision differs from its response."""
    figure = f'{number(e["changed"])} of responses changed, {number(e["records"])} kept'
    is_good = bool(e['records'] and e['changed'])
    return Verdict('pass' if is_good else 'fail', figure, 'some revision is another')


def _warnings(e: Json) -> list[str]:
    found = []
    if e.get('too_long'):
        found.append(
            f'{number(e["too_long"])} of {number(e["prompts"])} prompts were left out: '
            'with response and critique they are longer than critique_buckets.'
        )
    if e.get('scores_cut'):
        found.append(
            f'{number(e["scores_cut"])} texts were cut to fit where they were scored.'
        )
    if e.get('changed') == 1.0 and e['prompts'] > 1:
        found.append(
            'Every response was changed: a critic that finds fault with all of them '
            'may not read them; look at the samples.'
        )
    return found


def _draw(stage: str, rows: Rows, e: Json) -> tuple[list[Plot], list[str]]:
    """Which share of the responses scores higher and lower after their revision."""
    scores = {name: s for name, s in (e.get('scores') or {}).items() if s}
    if not scores:
        return [], ['No named rewards: no scores before and after.']
    figure, ((axes,),) = blank(HALF, 1.2 + 0.5 * len(scores))
    names = list(scores)
    for side, colour, sign in (('higher', BLUE, 1), ('lower', ORANGE, -1)):
        shares = [sign * scores[name][side] for name in names]
        axes.barh(range(len(names)), shares, color=colour, label=side)
    axes.axvline(0, linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel='share of the responses (lower to the left)', xlim=(-1, 1))
    svg = to_svg(figure, f'{stage}-scores', 'shares of higher and lower scores')
    said = '; '.join(
        f'{name} {number(s["before"])} → {number(s["after"])}'
        for name, s in scores.items()
    )
    caption = f'Of the last revision against the first response. Means: {said}.'
    return [Plot('Scores by revision', svg, caption)], []


PAGE = Page(
    title='Revisions',
    verdict=_verdict,
    warnings=_warnings,
    required=lambda e: ('records', 'prompts', 'changed'),
    facts=(
        ('Prompts', 'prompts', ''),
        ('Records written', 'records', ''),
        ('Left out: too long with their critique', 'too_long', ''),
        ('Left out: a blank response or revision', 'blank', ''),
        ('Left out: refused by the chat template', 'refused', ''),
        ('Left out: revision and response are equal', 'equal', ''),
        ('Responses that the revisions changed', 'changed', 'fraction'),
        ('Rounds that changed something', 'rounds_changed', 'fraction'),
        ('Critique length', 'critique_length', 'tokens'),
        ('Weighted reward before', 'reward_before', 'mean, reward units'),
        ('Weighted reward after', 'reward_after', 'mean, reward units'),
    ),
    changes=(
        ('Response length', 'length', 'tokens'),
        ('Responses that ended', 'ended', 'fraction'),
        ('Distinct bigrams', 'distinct', 'fraction'),
    ),
    draw=_draw,
    max_samples=12,
)
