"""The pages of stages that train a policy: by preferences, or by its own samples."""

from __future__ import annotations

import dataclasses

import numpy as np

from rlhf_jax.pages.drawing import (
    BLUE,
    HALF,
    Panel,
    Plot,
    Rows,
    blank,
    draw_curve,
    draw_curves,
    draw_panels,
    not_logged,
    series,
    to_svg,
)
from rlhf_jax.pages.held_out import draw_accuracies, draw_held_out
from rlhf_jax.pages.language_model import GRAD_NORM
from rlhf_jax.pages.page import Json, Page, Verdict, fraction, interval, less, number
from rlhf_jax.responses import FEW_END

REWARDS = (
    Panel('train/rewards/chosen', 'Implicit reward, chosen', 'reward units'),
    Panel('train/rewards/rejected', 'Implicit reward, rejected', 'reward units'),
    Panel('train/logps/chosen', 'log π(chosen)', 'nats per sequence'),
    Panel('train/logps/rejected', 'log π(rejected)', 'nats per sequence'),
    Panel('train/loss', 'Loss', "in the loss's own units"),
    GRAD_NORM,
)
BEHAVIOUR = (
    Panel('objective/kl', 'KL to the reference', 'nats per sequence', reference=0.0),
    Panel('rollout/response_length', 'Response length', 'tokens'),
    Panel('objective/entropy', 'Policy entropy', 'nats'),
    Panel('rollout/ended', 'Responses that ended', 'fraction'),
)
UPDATES = (
    Panel('policy/approxkl', 'KL of one update', 'nats per token'),
    Panel('policy/clipfrac', 'Clipped ratios', 'fraction of tokens'),
    Panel('policy/ratio_max', 'Largest ratio', 'π / π_old', reference=1.0),
    Panel(
        'val/explained_variance', 'Explained variance', 'of the returns', reference=0
    ),
    Panel('loss/policy', 'Policy loss', 'per token'),
    Panel('loss/value', 'Value loss', 'reward units²'),
    Panel('objective/kl_coef', 'KL coefficient β', 'reward units per nat', exact=True),
    Panel('objective/rlhf_reward', 'Reward less KL', 'reward units'),
    Panel('objective/cost', 'Cost', 'cost units'),
    Panel('objective/lambda', 'Multiplier λ', 'reward per cost', exact=True),
)


def has_gold(e: Json) -> bool:
    """Whether a judge has scored the samples."""
    keys = ('win_rate', 'win_rate_interval', 'gold_reward_after')
    return any(e.get(key) is not None for key in keys)


def collapsed(e: Json) -> Verdict | None:
    """Fail: responses no longer end, or all have the same reward; None otherwise.

    Responses have to end where some did before, or where training marks down those
    that do not. One reward for all is what a solved task gives too: it fails where the
    mean has not risen.
    """
    before, after = e.get('ended_before'), e.get('ended_after')
    has_to_end = e.get('needs_end') or less(FEW_END, before)
    if has_to_end and less(after, FEW_END):
        figure = f'responses that ended {fraction(before)} → {fraction(after)}'
        return Verdict('fail', figure, f'at least {fraction(FEW_END)} of them')
    low, high = e.get('proxy_range_after') or (None, None)
    rose = less(e.get('proxy_reward_before'), e.get('proxy_reward_after'))
    if low is not None and low == high and not rose:
        figure = f'the proxy reward of every response is {number(low)}'
        return Verdict('fail', figure, 'rewards that differ, or a rise')
    return None


def verdict_of_policy(e: Json) -> Verdict:
    """Pass: surely wins more often than expected; without gold, the proxy reward rose.

    The lower end of the win rate's 95% interval is above ``expected_win_rate``, or ½
    where none is set. A gold reward without a win-rate interval is not judged. Nothing
    passes when responses no longer end or all score the same (``collapsed``).
    """
    if (collapse := collapsed(e)) is not None:
        return collapse
    ends = e.get('win_rate_interval')
    floor = e.get('expected_win_rate')
    floor = 0.5 if floor is None else floor
    expected = f'win-rate interval above {fraction(floor)}'
    if ends is not None:
        good = less(floor, ends[0])
        figure = f'win rate {fraction(e.get("win_rate"))} {interval(ends)}'
        return Verdict('pass' if good else 'fail', figure, expected)
    if has_gold(e):
        return Verdict('unknown', 'no win-rate interval', expected)
    before, after = e['proxy_reward_before'], e['proxy_reward_after']
    figure = f'proxy reward {number(before)} → {number(after)}'
    verdict = 'pass' if less(before, after) else 'fail'
    return Verdict(verdict, figure, 'a rise; alone it proves nothing (no gold reward)')


def verdict_of_preference(e: Json) -> Verdict:
    """Pass: as online stages where a judge has scored; else surely more than chance.

    Then the lower end of the 95% interval of the implicit reward's accuracy is above ½.
    """
    if has_gold(e):
        return verdict_of_policy(e)
    if (collapse := collapsed(e)) is not None:
        return collapse
    good = less(0.5, e['interval'][0])
    figure = f'implicit accuracy {fraction(e["accuracy"])} {interval(e["interval"])}'
    expected = 'interval above 0.500 (chance); of the texts it says nothing (no gold)'
    return Verdict('pass' if good else 'fail', figure, expected)


def warnings(e: Json) -> list[str]:
    """What looks wrong although the verdict may be a pass.

    The proxy reward rose while the gold fell; responses longer than 1.5 times before;
    fewer of them end, or none; one proxy reward for all; KL above 50 nats.

    Returns:
        One sentence each, with the numbers.
    """
    get, found = e.get, []
    proxy_rose = less(get('proxy_reward_before'), get('proxy_reward_after'))
    if proxy_rose and less(get('gold_reward_after'), get('gold_reward_before')):
        found.append(
            'Reward hacking suspected: the proxy reward rose from '
            f'{number(e["proxy_reward_before"])} to {number(e["proxy_reward_after"])} '
            f'while the gold reward fell from {number(e["gold_reward_before"])} to '
            f'{number(e["gold_reward_after"])}.'
        )
    before, after = get('length_before'), get('length_after')
    if before is not None and less(1.5 * before, after):
        found.append(
            f'Responses grew from {number(before)} to {number(after)} tokens, more '
            'than 1.5 times: length may be what is rewarded.'
        )
    if less(after_end := get('ended_after'), FEW_END):
        found.append(
            f'{number(after_end)} of the responses end by themselves: look at which '
            'tokens end a response, or raise max_new_tokens.'
        )
    low, high = get('proxy_range_after') or (None, None)
    if low is not None and low == high:
        found.append(
            f'The proxy reward of every response is {number(low)}: nothing is left to '
            'learn from it.'
        )
    ended = get('ended_before')
    if ended is not None and less(get('ended_after'), ended - 0.01):  # less is noise
        found.append(
            f'Fewer responses end by themselves: {number(e["ended_before"])} before, '
            f'{number(e["ended_after"])} after.'
        )
    if less(50, get('kl')):
        found.append(
            f'KL is {number(e["kl"])} nats per sequence, above 50: the policy is far '
            'from its reference, where no text was rated.'
        )
    return found


def draw_preference(
    stage: str, rows: Rows, evaluation: Json
) -> tuple[list[Plot], list[str]]:
    """Held-out comparisons, and what becomes of the responses in training."""
    plots, absent = draw_held_out(stage, 'implicit reward', evaluation)
    accuracies = ('train/rewards/accuracies', 'eval/accuracy')
    plots += draw_accuracies(stage, rows, accuracies)
    caption = 'The implicit reward of the chosen response less that of the rejected.'
    title, unit, level = 'Margin during training', 'reward units', ('none', 0.0)
    margins = ('train/rewards/margins', 'eval/margin')
    plots += draw_curves(f'{stage}-margin', title, unit, rows, margins, level, caption)
    caption = (
        'A chosen response that becomes much less likely, together with the rejected '
        'one, means that probability goes to texts which nobody compared.'
    )
    title = 'What the policy makes of the responses'
    plots += draw_panels(f'{stage}-panels', title, rows, REWARDS, caption)
    return plots, not_logged(rows, [panel.metric for panel in REWARDS]) + absent


PROXY, GOLD = (
    ('objective/proxy_reward', 'Proxy reward'),
    ('objective/gold', 'Gold reward'),
)
# What is optimised: the proxy reward after scaling, clipping and penalties.
SHAPED = ('objective/scores', 'Shaped score')


def _rewards(
    name: str, title: str, rows: Rows, by_kl: bool, caption: str
) -> list[Plot]:
    """Proxy, shaped score (by step alone) and gold, one panel each since their scales
    differ, by √KL or by step.
    """
    rows = [row for row in rows if not by_kl or row.get('objective/kl') is not None]
    panels = (PROXY, GOLD) if by_kl else (PROXY, SHAPED, GOLD)
    drawn = [item for item in panels if len(series(rows, item[0])[0])]
    if not drawn:
        return []
    figure, grid = blank(HALF, 0.7 + 1.75 * len(drawn), len(drawn), sharex=True)
    for axes, (metric, panel) in zip(grid[:, 0], drawn, strict=True):
        axes.set(title=panel, ylabel='reward units')
        if not by_kl:
            draw_curve(axes, *series(rows, metric), BLUE, panel)
            continue
        both = [row for row in rows if row.get(metric) is not None]
        (steps, kl), (_, reward) = series(both, 'objective/kl'), series(both, metric)
        root = np.sqrt(np.maximum(kl, 0))
        points = axes.scatter(root, reward, c=steps, s=13, cmap='viridis')
        axes.margins(x=0.03)
    root_kl = '√KL to the reference (√nats per sequence)'
    grid[-1, 0].set_xlabel(root_kl if by_kl else 'training step')
    if by_kl and np.ptp(steps) > 0:
        bar = figure.colorbar(points, ax=grid[:, 0], aspect=30, pad=0.02)
        bar.set_label('training step')
        bar.outline.set_visible(False)
    return [Plot(title, to_svg(figure, name, title), caption)]


def draw_online(
    stage: str, rows: Rows, evaluation: Json
) -> tuple[list[Plot], list[str]]:
    """Rewards, behaviour and updates, by rollout."""
    gold = len(series(rows, 'objective/gold')[0]) > 0
    caption = 'Each point is one rollout; a KL estimate below 0 is drawn at 0. ' + (
        'Over-optimisation is the proxy still rising to the right where the gold falls.'
        if gold
        else 'Without a gold reward it cannot show where rising stops being better.'
    )
    plots = _rewards(f'{stage}-frontier', 'Reward against √KL', rows, True, caption)
    caption = (
        'Means over the responses of each rollout. Proxy reward: the weighted sum of '
        'the rewards, as in the table of the evaluation. Shaped score: the same after '
        'scaling, clipping and the penalties for responses that do not end or are too '
        'long; it is what is optimised, less the KL penalty.'
    )
    plots += _rewards(
        f'{stage}-rewards', 'Reward during training', rows, False, caption
    )
    caption = (
        'Length that climbs with the reward, entropy near 0 and a KL that keeps '
        'growing are the usual signs of exploiting the reward model.'
    )
    title = 'What the policy does'
    plots += draw_panels(f'{stage}-behaviour', title, rows, BEHAVIOUR, caption)
    caption = (
        'A healthy update has a small KL, a few per cent of clipped ratios and an '
        'explained variance above 0 (the critic beats a constant).'
    )
    plots += draw_panels(
        f'{stage}-updates', 'How the updates go', rows, UPDATES, caption
    )
    # What the updates log differs from method to method.
    names = (PROXY[0], SHAPED[0])
    absent = not_logged(rows, [*names, *(panel.metric for panel in BEHAVIOUR)])
    if not gold:
        absent.append('No gold reward (objective/gold): only the learned one is shown.')
    return plots, absent


FACTS = (
    ('Prompts', 'prompts', ''),
    ('Wins over before', 'win_rate', 'by gold reward'),
    ('Ties', 'ties', ''),
    ('KL to the reference', 'kl', 'nats per sequence'),
)
# Before and after, under key_before and key_after.
CHANGES = (
    ('Proxy reward', 'proxy_reward', 'reward units, before shaping'),
    ('Gold reward', 'gold_reward', 'reward units'),
    ('Cost', 'cost', 'cost units'),
    ('Log-likelihood under the reference', 'ref_logprob', 'nats/token'),
    ('Log-likelihood under the base model', 'base_logprob', 'nats/token'),
    ('Response length', 'length', 'tokens'),
    ('Responses that ended', 'ended', 'fraction'),
    ('Distinct bigrams', 'distinct', 'fraction'),
)


def _without_gold(e: Json, why: str) -> str | None:
    if not e or has_gold(e):
        return None
    return (
        f'No gold reward. {why} Judge by the samples, by KL and length, or by a '
        'preference test.'
    )


ONLINE = Page(
    title='Policy',
    verdict=verdict_of_policy,
    warnings=warnings,
    required=lambda e: ('prompts', 'kl', 'proxy_reward_before', 'proxy_reward_after'),
    facts=FACTS,
    changes=CHANGES,
    draw=draw_online,
    max_samples=12,
    remark=lambda e: _without_gold(
        e,
        'The stage is trained to raise the learned reward, so a rise of that reward '
        'alone proves nothing about quality: it is also what exploiting the reward '
        'model looks like.',
    ),
)
PREFERENCE = dataclasses.replace(
    ONLINE,
    title='Preference optimisation',
    verdict=verdict_of_preference,
    required=lambda e: (
        'prompts',
        'kl',
        'accuracy',
        'interval',
        'pairs',
        'length_baseline',
    ),
    facts=(
        *FACTS,
        ('Held-out pairs', 'pairs', ''),
        ('Accuracy of the implicit reward', 'accuracy', 'fraction of pairs'),
        ('Mean margin of the implicit reward', 'margin', 'reward units'),
        ('Logistic loss of the margins', 'loss', 'nats/pair'),
    ),
    draw=draw_preference,
    remark=lambda e: _without_gold(
        e,
        'That the policy ranks held-out responses as people did says little about '
        'what it writes.',
    ),
)
