"""The stage policy_gradient: RLOO, GRPO and the others without a critic.

``config.policy_gradient.name`` is a module of ``algos/estimators``; with the settings
of ``PolicyHParams`` it makes the method, see ``docs/algorithms``. Read
``stages/online_preference.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.estimators import Estimator, load
from rlhf_jax.algos.policy_gradient import (
    PolicyHParams,
    check_estimator,
    policy_step,
    prepare_policy,
)
from rlhf_jax.config import build_named
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.optim import make_optimizer
from rlhf_jax.rewards import ScoreHParams
from rlhf_jax.stages.online_job import (
    Judged,
    Method,
    Online,
    initial_state,
    load_online,
)
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import PolicyGradientSettings
from rlhf_jax.types import (
    Generation,
    Metrics,
    OnlineState,
    Outcomes,
    Params,
    Rollout,
)


def load_policy_gradient(run: Run, stage: str) -> Online:
    """Data and settings; see ``PolicyGradientSettings`` and ``PolicyHParams``.

    Raises:
        ValueError: no such estimator, a setting that it does not have, a group of one
            for an estimator that compares within groups, or what is wrong with the
            rest.
    """
    where = f'config.{stage}'
    estimator = load(run.config[stage]['name'], f'{where}.name')
    settings, hp, *others, estimator_hp = build_named(
        run.config[stage],
        PolicyGradientSettings,
        PolicyHParams,
        ScoreHParams,
        AnchorHParams,
        named=estimator.HParams,
        where=where,
    )
    _check(where, settings, hp, estimator, estimator_hp)
    _check_shaping(where, settings, others[0], estimator)
    begin = functools.partial(_begin, estimator=estimator, estimator_hp=estimator_hp)
    return load_online(run, stage, settings, hp, *others, begin, hp.group_size)


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
    estimator_hp: object,
) -> Method:
    settings, hp, weights = job.settings, job.hp, job.evaluation.weights
    tx = make_optimizer(settings.optim, job.num_updates)

    def prepared(
        state: OnlineState,
        ref_params: Params,
        generation: Generation,
        judged: Judged,
        *,
        axis_name: str | None = None,
    ) -> tuple[Rollout, Metrics]:
        return prepare_policy(
            state,
            ref_params,
            generation,
            judged.total,
            judged.baseline,
            {name: judged.each[name] for name in weights},
            weights,
            model=policy,
            hp=hp,
            estimator=estimator,
            estimator_hp=estimator_hp,
            axis_name=axis_name,
        )

    return Method(
        state=initial_state(run, job, {'policy': params}, tx),
        configs={'policy': policy.config},
        prepare=prepared,
        step=functools.partial(policy_step, model=policy, tx=tx, hp=hp),
        group_size=hp.group_size,
        wants_baseline=getattr(estimator, 'WANTS_BASELINE', False),
        max_draws=settings.max_draws,
    )
