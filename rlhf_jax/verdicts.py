"""Whether a stage did what it is for: the verdicts of the report, and its warnings.

Each stage is judged by its ``eval.json`` alone, by the rule documented at its
``_judge_…`` function. Read ``report.py`` next, which shows them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

REWARD_MODELS = ('rm', 'cost')  # stages that train one
ONLINE = (
    'expert_iteration',
    'online_preference',
    'policy_gradient',
    'ppo',
    'ppo_lagrangian',
)
COMPARED = ('preference', *ONLINE)  # stages whose policy is compared with its start
FEW_END = 0.05  # where a smaller share of the responses ends, practically none does


@dataclass(frozen=True)
class Verdict:
    """Whether a stage did what it is for."""

    verdict: str  # 'pass', 'fail' or 'unknown'
    figure: str  # the number that decides
    expected: str  # what it had to be


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: significant digits, thousands separated, '–' for None."""
    if value is None or not math.isfinite(value):
        return '–'
    if float(value).is_integer() and abs(value) < 1e15:
        return f'{value:,.0f}'.replace('-', '−')
    if 1e3 <= abs(value) < 1e7:
        return f'{value:,.0f}'.replace('-', '−')
    return f'{value:.{digits}g}'.replace('-', '−')


def fraction(value: float | None) -> str:
    """A fraction to three decimals, '–' for None."""
    return '–' if value is None else f'{value:.3f}'


def interval(pair: list[float | None]) -> str:
    """An interval of fractions."""
    return f'[{fraction(pair[0])}, {fraction(pair[1])}]'


def _less(a: float | None, b: float | None) -> bool:
    """a < b, and False when either is not a finite number."""
    return a is not None and b is not None and a < b


def _judge_pretrain(e: Json) -> Verdict:
    """Pass: the loss is below the one it started from, and below uniform guessing."""
    good = _less(e['loss'], e['loss_before']) and _less(e['loss'], e['uniform_loss'])
    return Verdict(
        'pass' if good else 'fail',
        f'loss {number(e["loss"])} nats/token',
        f'below {number(e["loss_before"])} (before) and {number(e["uniform_loss"])} '
        '(uniform)',
    )


def _judge_sft(e: Json) -> Verdict:
    """Pass: the loss is below the one of the model it started from."""
    good = _less(e['loss'], e['loss_before'])
    return Verdict(
        'pass' if good else 'fail',
        f'loss {number(e["loss"])} nats/token',
        f'below {number(e["loss_before"])} (before)',
    )


def kind_of(e: Json) -> str:
    """What a reward model was judged on: 'comparisons', 'rankings', 'ratings' or
    'steps'.
    """
    return e.get('kind', 'comparisons')


def _judge_rm(e: Json) -> Verdict:
    """As its kind of data is judged."""
    if kind_of(e) == 'ratings':
        return _judge_ratings(e)
    return _judge_steps(e) if kind_of(e) == 'steps' else _judge_pairs(e)


def _judge_ratings(e: Json) -> Verdict:
    """Pass: every score surely goes with its ratings, and errs less than their mean.

    The lower end of the 95% interval of Pearson's r is above 0, and the root mean
    squared error below that of predicting the mean of the held-out ratings.
    """
    good = all(
        _less(0.0, row['interval'][0]) and _less(row['rmse'], row['baseline_rmse'])
        for row in e['by_head']
    )
    figure = '; '.join(
        f'{row["head"]}: r {number(row["pearson"])} {interval(row["interval"])}, '
        f'error {number(row["rmse"])} of {number(row["baseline_rmse"])}'
        for row in e['by_head']
    )
    expected = 'interval of r above 0, error below that of the mean rating'
    return Verdict('pass' if good else 'fail', figure, expected)


def _judge_steps(e: Json) -> Verdict:
    """Pass: surely better than calling every step what most of them are."""
    floor = e['majority_baseline']
    good = _less(floor, e['interval'][0])
    figure = f'accuracy {fraction(e["accuracy"])} {interval(e["interval"])}'
    expected = f'interval above {fraction(floor)} (the more frequent label)'
    return Verdict('pass' if good else 'fail', figure, expected)


def length_rule(longer: float | None) -> tuple[str, float]:
    """The better of the two rules that look at length alone, and its accuracy.

    Args:
        longer: the accuracy of 'longer wins'; that of 'shorter wins' is the rest. None
            where it is not known.
    """
    if longer is None or longer == 0.5:
        return 'chance', 0.5
    return ('longer wins', longer) if longer > 0.5 else ('shorter wins', 1 - longer)


def _judge_pairs(e: Json) -> Verdict:
    """Pass: surely better than length alone, and near the ceiling if it is known.

    The lower end of the accuracy's 95% interval is above that of 'longer wins' and of
    'shorter wins', one of which is at least ½; where the data has a gold order,
    accuracy is at least its ceiling − 0.05; where it says on which side of 0 a text
    lies, that is surely told better than by the more frequent side.
    """
    rule, floor = length_rule(e['length_baseline'])
    good = _less(floor, e['interval'][0])
    expected = f'interval above {fraction(floor)} ({rule})'
    ceiling = e.get('accuracy_ceiling')
    if ceiling is not None:
        accuracy = e['accuracy']
        # Rounded, because in floating point 0.768 lies below 0.818 − 0.05.
        near = accuracy is not None and round(ceiling - accuracy, 9) <= 0.05
        good = good and near
        expected += f', accuracy ≥ {fraction(ceiling - 0.05)} (ceiling − 0.05)'
    figure = f'accuracy {fraction(e["accuracy"])} {interval(e["interval"])}'
    if (side := e.get('sign_baseline')) is not None:
        good = good and _less(side, e['sign_interval'][0])
        expected += f', of the sign above {fraction(side)} (the more frequent one)'
        figure += f', of the sign {fraction(e["sign_accuracy"])} '
        figure += interval(e['sign_interval'])
    return Verdict('pass' if good else 'fail', figure, expected)


def has_gold(e: Json) -> bool:
    """Whether a judge has scored the samples."""
    keys = ('win_rate', 'win_rate_interval', 'gold_reward_after')
    return any(e.get(key) is not None for key in keys)


def _collapsed(e: Json) -> Verdict | None:
    """Fail: responses no longer end, or all have the same reward; None otherwise.

    Responses have to end where some did before, or where training marks down those
    that do not. One reward for all is what a solved task gives too: it fails where the
    mean has not risen.
    """
    before, after = e.get('ended_before'), e.get('ended_after')
    has_to_end = e.get('needs_end') or _less(FEW_END, before)
    if has_to_end and _less(after, FEW_END):
        figure = f'responses that ended {fraction(before)} → {fraction(after)}'
        return Verdict('fail', figure, f'at least {fraction(FEW_END)} of them')
    low, high = e.get('proxy_range_after') or (None, None)
    rose = _less(e.get('proxy_reward_before'), e.get('proxy_reward_after'))
    if low is not None and low == high and not rose:
        figure = f'the proxy reward of every response is {number(low)}'
        return Verdict('fail', figure, 'rewards that differ, or a rise')
    return None


def _judge_online(e: Json) -> Verdict:
    """Pass: surely wins more often than expected; without gold, the proxy reward rose.

    The lower end of the win rate's 95% interval is above ``expected_win_rate``, or ½
    where none is set. A gold reward without a win-rate interval is not judged. Nothing
    passes when responses no longer end or all score the same (``_collapsed``).
    """
    if (collapse := _collapsed(e)) is not None:
        return collapse
    ends = e.get('win_rate_interval')
    floor = e.get('expected_win_rate')
    floor = 0.5 if floor is None else floor
    expected = f'win-rate interval above {fraction(floor)}'
    if ends is not None:
        good = _less(floor, ends[0])
        figure = f'win rate {fraction(e.get("win_rate"))} {interval(ends)}'
        return Verdict('pass' if good else 'fail', figure, expected)
    if has_gold(e):
        return Verdict('unknown', 'no win-rate interval', expected)
    before, after = e['proxy_reward_before'], e['proxy_reward_after']
    figure = f'proxy reward {number(before)} → {number(after)}'
    verdict = 'pass' if _less(before, after) else 'fail'
    return Verdict(verdict, figure, 'a rise; alone it proves nothing (no gold reward)')


def _judge_preference(e: Json) -> Verdict:
    """Pass: as online stages where a judge has scored; else surely more than chance.

    Then the lower end of the 95% interval of the implicit reward's accuracy is above ½.
    """
    if has_gold(e):
        return _judge_online(e)
    if (collapse := _collapsed(e)) is not None:
        return collapse
    good = _less(0.5, e['interval'][0])
    figure = f'implicit accuracy {fraction(e["accuracy"])} {interval(e["interval"])}'
    expected = 'interval above 0.500 (chance); of the texts it says nothing (no gold)'
    return Verdict('pass' if good else 'fail', figure, expected)


JUDGES: dict[str, Callable[[Json], Verdict]] = {
    'pretrain': _judge_pretrain,
    'sft': _judge_sft,
    **dict.fromkeys(REWARD_MODELS, _judge_rm),
    'preference': _judge_preference,
    **dict.fromkeys(ONLINE, _judge_online),
}


def judge(stage: str, evaluation: Json | None) -> Verdict:
    """Judges a stage by its eval.json; 'unknown' while there is none.

    Args:
        stage: its name.
        evaluation: its eval.json, with None for numbers that are not finite.

    Returns:
        The verdict with its figure and what was expected.
    """
    if evaluation is None:
        return Verdict('unknown', 'not evaluated', 'an evaluation when the stage ends')
    if stage not in JUDGES:
        return Verdict('unknown', 'no rule for this stage', 'a rule in verdicts.JUDGES')
    return JUDGES[stage](evaluation)


def warnings(stage: str, evaluation: Json | None) -> list[str]:
    """What looks wrong although the verdict may be a pass.

    For a policy compared with its start: the proxy reward rose while
    the gold fell; responses longer than 1.5 times before; fewer of them end, or none;
    one proxy reward for all; KL above 50 nats. For a reward model: a score that
    depends on the side of the padding by more than 0.01.

    Returns:
        One sentence each, with the numbers.
    """
    e = evaluation or {}
    get = e.get
    found = []
    if stage in REWARD_MODELS and _less(0.01, get('padding_gap')):
        found.append(
            f'Scores depend on the side of the padding by {number(e["padding_gap"])}; '
            'beyond 0.01 positions or masks are wrong.'
        )
    if stage not in COMPARED:
        return found
    proxy_rose = _less(get('proxy_reward_before'), get('proxy_reward_after'))
    if proxy_rose and _less(get('gold_reward_after'), get('gold_reward_before')):
        found.append(
            'Reward hacking suspected: the proxy reward rose from '
            f'{number(e["proxy_reward_before"])} to {number(e["proxy_reward_after"])} '
            f'while the gold reward fell from {number(e["gold_reward_before"])} to '
            f'{number(e["gold_reward_after"])}.'
        )
    before, after = get('length_before'), get('length_after')
    if before is not None and _less(1.5 * before, after):
        found.append(
            f'Responses grew from {number(before)} to {number(after)} tokens, more '
            'than 1.5 times: length may be what is rewarded.'
        )
    if _less(after_end := get('ended_after'), FEW_END):
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
    if ended is not None and _less(get('ended_after'), ended - 0.01):  # less is noise
        found.append(
            f'Fewer responses end by themselves: {number(e["ended_before"])} before, '
            f'{number(e["ended_after"])} after.'
        )
    if _less(50, get('kl')):
        found.append(
            f'KL is {number(e["kl"])} nats per sequence, above 50: the policy is far '
            'from its reference, where no text was rated.'
        )
    return found
