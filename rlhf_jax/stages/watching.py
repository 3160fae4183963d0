"""Warnings during a stage that samples: nothing is left to learn from.

``loop.run_loop`` asks after every rollout and prints what is said; the report's page
(``pages/policy.py``) says the same when the stage ends. Read ``rollouts.py``
next.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_jax.ranges import LARGEST_SCORE
from rlhf_jax.responses import FEW_END

# Metrics that are rewards, in the order in which one is made of the other.
REWARDS = ('reward/', 'objective/gold', 'objective/proxy_reward', 'objective/scores')
PATIENCE = 3  # rollouts in a row, before anything is said


class Watch:
    """Notices that all scores are equal, or that responses no longer end.

    Each is said once, and again when it comes back.
    """

    def __init__(self, needs_end: bool):
        self.needs_end = needs_end
        self.flat = self.endless = 0  # rollouts in a row

    def __call__(self, values: Mapping[str, float]) -> list[str]:
        """Sentences for the console; mostly none.

        Args:
            values: the metrics of a rollout.
        """
        low = values.get('objective/scores_min')  # None without rewards
        is_flat = low is not None and low == values['objective/scores_max']
        self.flat = self.flat + 1 if is_flat else 0
        ended = values['rollout/ended']
        self.endless = self.endless + 1 if ended < FEW_END else 0
        found = []
        if self.flat == PATIENCE:
            found.append(
                f'all responses of {PATIENCE} rollouts in a row have the score '
                f'{low:.4g}: nothing can be learned from them'
            )
        if self.endless == PATIENCE:
            what = f'{ended:.1%} of the responses end by themselves, in {PATIENCE} '
            what += 'rollouts in a row'
            if self.needs_end:
                what += ', and those that do not are marked down'
            found.append(
                f'{what}: raise max_new_tokens, or look at which tokens end a response'
            )
        return found


def why_not_finite(values: Mapping[str, float]) -> str:
    """What may have made a number not finite, and what to do: the first reward that is
    too large, else the usual reason.

    Args:
        values: the metrics of a step.
    """
    for prefix in REWARDS:
        for name, value in values.items():
            if name.startswith(prefix) and abs(value) > LARGEST_SCORE:
                return (
                    f'{name} is {value:g}, beyond ±{LARGEST_SCORE:g}, and more than '
                    'float32 can square: lower the weights of the rewards, or scale '
                    'what they return'
                )
    return 'Lower the learning rate or look at the data around that step'
