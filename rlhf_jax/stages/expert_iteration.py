"""The kind expert_iteration: imitate the best of one's own samples.

See ``algos/expert_iteration.py``; read ``main.py`` next.
"""

from __future__ import annotations

import dataclasses

from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.expert_iteration import (
    ExpertIterationHParams,
    expert_iteration_step,
    prepare_best,
)
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.pages import policy as pages
from rlhf_jax.rewards import ScoreHParams
from rlhf_jax.stages.online import Online, check_optimised, load_online, policy_method
from rlhf_jax.stages.online import makes as makes
from rlhf_jax.stages.online import reads as reads
from rlhf_jax.stages.online import train as train
from rlhf_jax.stages.rollouts import Method
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import OnlineSettings
from rlhf_jax.types import Params

SETTINGS = (OnlineSettings, ExpertIterationHParams, ScoreHParams, AnchorHParams)
PAGE = dataclasses.replace(pages.ONLINE, title='Expert iteration')


def load(
    run: Run,
    stage: str,
    settings: OnlineSettings,
    hp: ExpertIterationHParams,
    shaping: ScoreHParams,
    anchors: AnchorHParams,
) -> Online:
    """Reads and checks; see ``online.load_online``."""
    check_optimised(f'config.{stage}', settings)
    groups = hp.group_size, hp.keep
    return load_online(run, stage, settings, hp, shaping, anchors, _begin, *groups)


def _begin(run: Run, job: Online, policy: CausalLM, params: Params) -> Method:
    return policy_method(run, job, policy, params, prepare_best, expert_iteration_step)
