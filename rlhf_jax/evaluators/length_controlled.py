"""The win rate that a policy would have at the length of the policy of before.

logit P(after wins) = θ + φ·x   x = tanh((L_after − L_before) / σ)   rate = 1/(1 + e⁻ᶿ)

L are lengths in tokens, and σ is the standard deviation of their difference over the
prompts. Judges prefer long answers, and policies learn that: where the rate is far
below the plain win rate, length is what won.

Source: Dubois et al. 2024 (length-controlled AlpacaEval), arXiv 2404.04475, §3.
Deviations: no term for the difficulty of a prompt, which they fit over many models; a
tie is half a win.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_jax.evals.policy import Sampled, outcomes
from rlhf_jax.pages.drawing import (
    BLUE,
    HALF,
    ORANGE,
    Plot,
    Rows,
    blank,
    draw_level,
    to_svg,
)
from rlhf_jax.pages.page import Json
from rlhf_jax.responses import GOLD

WANTS_GOLD = True
FACTS = (
    ('Wins over before at equal length', 'lc_win_rate', 'by gold reward'),
    ('Effect of length on winning', 'lc_length_effect', 'logit at a long difference'),
)
RESAMPLES, STEPS, BINS = 1000, 10, 5
# Of ½·(θ² + φ²): what it adds to the information of the prompts. All wins would have no
# finite θ without it.
PRIOR = 0.1


def evaluate(
    before: Sampled, after: Sampled, weights: Mapping[str, float]
) -> dict[str, Any]:
    """``lc_win_rate`` with a 95% bootstrap interval over prompts, ``lc_length_effect``
    φ, and ``lc_by_length``, the plain win rate by the difference of length.
    """
    wins = outcomes(after.scores[GOLD], before.scores[GOLD])
    longer = (after.lengths - before.lengths).astype(np.float64)
    x = np.tanh(longer / longer.std()) if longer.std() > 0 else np.zeros_like(longer)
    theta, phi = _fit(wins, x)
    rng, rates = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        rows = rng.integers(len(x), size=len(x))
        rates.append(_sigmoid(_fit(wins[rows], x[rows])[0]))
    parts = np.array_split(np.argsort(longer, kind='stable'), min(BINS, len(x)))
    return {
        'lc_win_rate': float(_sigmoid(theta)),
        'lc_win_rate_interval': np.percentile(rates, (2.5, 97.5)).tolist(),
        'lc_length_effect': float(phi),
        'lc_by_length': [
            {'longer': float(longer[part].mean()), 'win_rate': float(wins[part].mean())}
            for part in parts
        ],
    }


def _fit(wins: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(θ, φ) of the regression on [N] each, by Newton's method."""
    inputs = np.stack([np.ones_like(x), x], axis=-1)
    found = np.zeros(2)
    for _ in range(STEPS):
        p = _sigmoid(inputs @ found)
        slope = inputs.T @ (wins - p) - PRIOR * found
        bend = (inputs.T * (p * (1 - p))) @ inputs + PRIOR * np.eye(2)
        found = found + np.linalg.solve(bend, slope)
    return found


def _sigmoid(x: Any) -> Any:
    return 0.5 * (1 + np.tanh(0.5 * x))


def draw(stage: str, rows: Rows, evaluation: Json) -> tuple[list[Plot], list[str]]:
    """The win rate by the difference of length, and the one at equal length."""
    bins = evaluation['lc_by_length']
    figure, ((axes,),) = blank(HALF, 2.9)
    longer, rates = ([row[key] for row in bins] for key in ('longer', 'win_rate'))
    axes.plot(longer, rates, 'o-', color=BLUE, label='plain')
    low, high = evaluation['lc_win_rate_interval']
    rate = evaluation['lc_win_rate']
    reach = [[max(rate - low, 0)], [max(high - rate, 0)]]
    axes.errorbar(
        0, rate, reach, fmt='s', color=ORANGE, capsize=3, label='at equal length'
    )
    draw_level(axes, 0.5)
    axes.margins(x=0.05)
    axes.set(ylim=(-0.03, 1.03), ylabel='win rate, by gold reward')
    axes.set_xlabel('tokens longer than before, mean of a fifth of the prompts')
    axes.legend(loc='lower left', bbox_to_anchor=(-0.02, 1.0), ncols=2, borderpad=0.2)
    title = 'Winning by length'
    caption = (
        'A win rate that climbs to the right says that longer responses win; at equal '
        'length it is what a logistic regression on the difference gives.'
    )
    return [Plot(title, to_svg(figure, f'{stage}-length', title), caption)], []
