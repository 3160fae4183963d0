"""The stage online_preference: a preference loss on pairs of the policy's own samples.

``config.online_preference.name`` is a pairwise loss of ``preference/``; see
``algos/online_preference.py``. Read ``stages/expert_iteration.py`` next.
"""

from __future__ import annotations

import functools
from typing import Any

from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.online_preference import (
    OnlinePreferenceHParams,
    online_preference_step,
    prepare_pairs,
)
from rlhf_jax.config import build_named
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.optim import make_optimizer
from rlhf_jax.preference import PreferenceLoss, load, wants_tokens
from rlhf_jax.rewards import ScoreHParams
from rlhf_jax.stages.online_job import (
    Judged,
    Method,
    Online,
    initial_state,
    load_online,
)
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import OnlinePreferenceSettings
from rlhf_jax.types import Generation, Metrics, OnlineState, Params, PreferencePairs


def load_online_preference(run: Run, stage: str) -> Online:
    """Data and settings; see ``OnlinePreferenceSettings``.

    Raises:
        ValueError: no such loss, one on single responses, a setting that it does not
            have, or what is wrong with the rest.
    """
    where = f'config.{stage}'
    name = run.config[stage]['name']
    loss = load(name, f'{where}.name')
    if loss.DATA != 'pairs':
        raise ValueError(
            f'{where}.name={name!r} learns from single responses, and this stage makes '
            "pairs of them; use a loss on pairs, such as 'dpo'"
        )
    if wants_tokens(loss) and loss.REFERENCE:
        raise ValueError(
            f'{where}.name={name!r} looks at single tokens under the reference policy, '
            'which only the stage preference runs in every step; use a loss on sums, '
            "such as 'dpo'"
        )
    settings, hp, *others, loss_hp = build_named(
        run.config[stage],
        OnlinePreferenceSettings,
        OnlinePreferenceHParams,
        ScoreHParams,
        AnchorHParams,
        named=loss.HParams,
        where=where,
    )
    begin = functools.partial(_begin, loss=loss, loss_hp=loss_hp)
    return load_online(run, stage, settings, hp, *others, begin, hp.group_size, kept=1)


def _begin(
    run: Run,
    job: Online,
    policy: CausalLM,
    params: Params,
    *,
    loss: PreferenceLoss,
    loss_hp: Any,
) -> Method:
    hp = job.hp
    tx = make_optimizer(job.settings.optim, job.num_updates)
    how = {'model': policy, 'hp': hp, 'loss': loss}

    def prepared(
        state: OnlineState,
        ref_params: Params,
        generation: Generation,
        judged: Judged,
        *,
        axis_name: str | None = None,
    ) -> tuple[PreferencePairs, Metrics]:
        scores = judged.total
        return prepare_pairs(ref_params, generation, scores, **how, axis_name=axis_name)

    return Method(
        state=initial_state(run, job, {'policy': params}, tx),
        configs={'policy': policy.config},
        prepare=prepared,
        step=functools.partial(online_preference_step, **how, tx=tx, loss_hp=loss_hp),
        group_size=hp.group_size,
    )
