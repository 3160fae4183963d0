"""The kind policy_gradient: RLOO, GRPO and the others without a critic.

``config.NAME.name`` is a module of ``algos/estimators``; with the settings of
``PolicyHParams`` it makes the method, see ``docs/algorithms``. Read
``stages/online_preference.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from rlhf_jax.algos import estimators
from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.estimators import Estimator
from rlhf_jax.algos.policy_gradient import (
    PolicyHParams,
    check_estimator,
    policy_step,
    prepare_policy,
)
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.pages import policy as pages
from rlhf_jax.ranges import at_least
from rlhf_jax.rewards import ScoreHParams
from rlhf_jax.stages.kinds import Choice
from rlhf_jax.stages.online import Online, check_optimised, load_online, policy_method
from rlhf_jax.stages.online import makes as makes
from rlhf_jax.stages.online import reads as reads
from rlhf_jax.stages.online import train as train
from rlhf_jax.stages.rollouts import Method
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import OnlineSettings
from rlhf_jax.types import Outcomes, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradientSettings(OnlineSettings):
    """Policy gradients. The settings of the estimator stand beside these; None is the
    estimator's own default, see ``config.unset``.
    """

    name: str  # of the estimator: a module of algos/estimators, or package.module
    # DAPO's dynamic sampling: prompts whose responses all score the same are replaced
    # by others, in so many draws at most; 1: never.
    max_draws: Annotated[int, at_least(1)] = 1


SETTINGS = (PolicyGradientSettings, PolicyHParams, ScoreHParams, AnchorHParams)
CHOICE = Choice('name', estimators.load)
PAGE = dataclasses.replace(pages.ONLINE, title='Policy gradient without a critic')


def load(
    run: Run,
    stage: str,
    settings: PolicyGradientSettings,
    hp: PolicyHParams,
    shaping: ScoreHParams,
    anchors: AnchorHParams,
    estimator: Estimator,
    estimator_hp: Any,
) -> Online:
    """Reads and checks.

    Raises:
        ValueError: a group of one for an estimator that compares within groups, or what
            is wrong with the rest.
    """
    where = f'config.{stage}'
    check_optimised(where, settings)
    _check(where, settings, hp, estimator, estimator_hp)
    _check_shaping(where, settings, shaping, estimator)
    begin = functools.partial(_begin, estimator=estimator, estimator_hp=estimator_hp)
    size = hp.group_size
    return load_online(run, stage, settings, hp, shaping, anchors, begin, size)


def _check(
    where: str,
    settings: PolicyGradientSettings,
    hp: PolicyHParams,
    estimator: Estimator,
    estimator_hp: object,
) -> None:
    name = f'{where}.name={settings.name!r}'
    # Nothing is computed: an estimator refuses a size of groups by their shape.
    outcomes = Outcomes(
        rewards=jnp.zeros((1, hp.group_size, 1)),
        mask=jnp.ones((1, hp.group_size, 1), bool),
        baseline=jnp.zeros((1, hp.group_size)),
        scores={name: jnp.zeros((1, hp.group_size)) for name in settings.rewards},
        weights={name: reward.weight for name, reward in settings.rewards.items()},
    )
    try:
        check_estimator(estimator, hp)
        jax.eval_shape(lambda x: estimator.advantages(x, estimator_hp, None), outcomes)
    except ValueError as error:
        raise ValueError(f'{where}: {name}: {error}') from error
    try:
        hp.aggregated_by(estimator.AGGREGATION)
    except ValueError as error:
        raise ValueError(
            f'{where}: {name}: {error}; max_new_tokens={settings.max_new_tokens}'
        ) from error
    if settings.max_draws > 1 and not hasattr(estimator, 'kept'):
        raise ValueError(
            f'{where}.max_draws={settings.max_draws}: {name} leaves no prompt out; '
            "use name='dapo', or max_draws=1"
        )
    if settings.max_draws > 1 and jax.process_count() > 1:
        raise ValueError(
            f'{where}.max_draws={settings.max_draws}: choosing prompts by their scores '
            f'needs a single process, and this run has {jax.process_count()}; use 1'
        )


def _check_shaping(
    where: str,
    settings: PolicyGradientSettings,
    shaping: ScoreHParams,
    estimator: Estimator,
) -> None:
    """What is done to the sum of the rewards must leave what an estimator looks at."""
    refused: dict[str, str] = {}
    if getattr(estimator, 'WANTS_SCORES', False):
        why = 'normalises each of the rewards by itself, and not their sum'
        refused = dict.fromkeys(
            ('score_scaling', 'score_clip', 'missing_eos_score'), why
        )
    if getattr(estimator, 'WANTS_SUCCESS', False):
        why = 'needs a reward of 0 or 1, success or not'
        refused |= dict.fromkeys((f.name for f in dataclasses.fields(shaping)), why)
    for name, why in refused.items():
        value = getattr(shaping, name)
        if value is not None:
            raise ValueError(
                f'{where}.{name}={value!r}: {where}.name={settings.name!r} {why}; use '
                'None'
            )


def _begin(
    run: Run,
    job: Online,
    policy: CausalLM,
    params: Params,
    *,
    estimator: Estimator,
    estimator_hp: Any,
) -> Method:
    return policy_method(
        run,
        job,
        policy,
        params,
        functools.partial(
            prepare_policy, estimator=estimator, estimator_hp=estimator_hp
        ),
        policy_step,
        wants_baseline=getattr(estimator, 'WANTS_BASELINE', False),
        max_draws=job.settings.max_draws,
    )
