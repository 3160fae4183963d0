"""The kind online_preference: a preference loss on pairs of the policy's own samples.

``config.NAME.name`` is a pairwise loss of ``preference/``; see
``algos/online_preference.py``. Read ``stages/expert_iteration.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from rlhf_jax import preference
from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.online_preference import (
    OnlinePreferenceHParams,
    online_preference_step,
    prepare_pairs,
)
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.pages import policy as pages
from rlhf_jax.preference import PreferenceLoss, wants_tokens
from rlhf_jax.rewards import ScoreHParams
from rlhf_jax.stages.kinds import Choice
from rlhf_jax.stages.online import Online, check_optimised, load_online, policy_method
from rlhf_jax.stages.online import makes as makes
from rlhf_jax.stages.online import reads as reads
from rlhf_jax.stages.online import train as train
from rlhf_jax.stages.rollouts import Method
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import OnlineSettings
from rlhf_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlinePreferenceSettings(OnlineSettings):
    """A preference loss on the policy's own samples. The settings of the loss stand
    beside these; None is the loss's own default, see ``config.unset``.
    """

    name: str = 'dpo'  # of the loss: a module of rlhf_jax.preference, or package.module


SETTINGS = (
    OnlinePreferenceSettings,
    OnlinePreferenceHParams,
    ScoreHParams,
    AnchorHParams,
)
CHOICE = Choice('name', preference.load)
PAGE = dataclasses.replace(pages.ONLINE, title='Online preference optimisation')


def load(
    run: Run,
    stage: str,
    settings: OnlinePreferenceSettings,
    hp: OnlinePreferenceHParams,
    shaping: ScoreHParams,
    anchors: AnchorHParams,
    loss: PreferenceLoss,
    loss_hp: Any,
) -> Online:
    """Reads and checks.

    Raises:
        ValueError: a loss on single responses, or what is wrong with the rest.
    """
    where = f'config.{stage}'
    check_optimised(where, settings)
    if loss.DATA != 'pairs':
        raise ValueError(
            f'{where}.name={settings.name!r} learns from single responses, and this '
            "stage makes pairs of them; use a loss on pairs, such as 'dpo'"
        )
    if wants_tokens(loss) and loss.REFERENCE:
        raise ValueError(
            f'{where}.name={settings.name!r} looks at single tokens under the '
            'reference policy, which only the stage preference runs in every step; '
            "use a loss on sums, such as 'dpo'"
        )
    begin = functools.partial(_begin, loss=loss, loss_hp=loss_hp)
    size = hp.group_size
    return load_online(run, stage, settings, hp, shaping, anchors, begin, size, kept=1)


def _begin(
    run: Run,
    job: Online,
    policy: CausalLM,
    params: Params,
    *,
    loss: PreferenceLoss,
    loss_hp: Any,
) -> Method:
    prepare = functools.partial(prepare_pairs, loss=loss)
    step = functools.partial(online_preference_step, loss=loss, loss_hp=loss_hp)
    return policy_method(run, job, policy, params, prepare, step)
