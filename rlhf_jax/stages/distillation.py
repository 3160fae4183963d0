"""The kind distillation: a policy learns from what a teacher says of its samples.

See ``algos/distillation.py``; rewards may be added, and none is needed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.distillation import (
    DistillationHParams,
    distillation_step,
    prepare_distillation,
)
from rlhf_jax.evals.policy import KINDS, row_statistics
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.pages import policy as pages
from rlhf_jax.pages.drawing import Panel, Plot, Rows, draw_panels
from rlhf_jax.pages.page import Json, Verdict, less, number
from rlhf_jax.responses import Responses, Scored
from rlhf_jax.rewards import ScoreHParams
from rlhf_jax.stages.online import Online, load_online, policy_method
from rlhf_jax.stages.online import makes as makes
from rlhf_jax.stages.online import reads as reads
from rlhf_jax.stages.online import train as train
from rlhf_jax.stages.rollouts import Method
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import ModelName, OnlineSettings
from rlhf_jax.stages.sources import check_policy, check_positions, frozen, load_policy
from rlhf_jax.types import Params

TEACHER_KL = 'teacher_kl'  # of the samples at the end, before and after


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationSettings(OnlineSettings):
    """The distillation stage; its rewards may be none."""

    teacher: ModelName  # of any shape, with the run's tokens


SETTINGS = (DistillationSettings, DistillationHParams, ScoreHParams)

# ------------------------------------------------------------------------------ report

TEACHER_PANELS = (
    Panel(
        'objective/teacher_kl', 'KL to the teacher', 'nats per sequence', reference=0
    ),
)


def _verdict(e: Json) -> Verdict:
    """Pass: with a gold reward as for any policy; without, the KL to the teacher fell
    on held-out prompts, and responses still end.
    """
    if pages.has_gold(e):
        return pages.verdict_of_policy(e)
    if (collapse := pages.collapsed(e)) is not None:
        return collapse
    before, after = e['teacher_kl_before'], e['teacher_kl_after']
    figure = f'KL to the teacher {number(before)} → {number(after)} nats'
    verdict = 'pass' if less(after, before) else 'fail'
    return Verdict(verdict, figure, 'a fall, on held-out prompts')


def _draw(stage: str, rows: Rows, evaluation: Json) -> tuple[list[Plot], list[str]]:
    """As any online stage, and the KL to the teacher."""
    caption = 'It falls to 0 where the policy has become the teacher.'
    title = 'Distance from the teacher'
    plots = draw_panels(f'{stage}-teacher', title, rows, TEACHER_PANELS, caption)
    if any('objective/proxy_reward' in row for row in rows):
        more, absent = pages.draw_online(stage, rows, evaluation)
        return plots + more, absent
    # Scores are 0 everywhere.
    rows = [{k: v for k, v in row.items() if k != 'objective/scores'} for row in rows]
    more, _ = pages.draw_online(stage, rows, evaluation)
    return plots + more, ['There are no rewards: the teacher alone decides.']


PAGE = dataclasses.replace(
    pages.ONLINE,
    title='On-policy distillation',
    verdict=_verdict,
    required=lambda e: ('prompts', 'kl', 'teacher_kl_before', 'teacher_kl_after'),
    changes=(('KL to the teacher', TEACHER_KL, 'nats per sequence'), *pages.CHANGES),
    draw=_draw,
    remark=lambda e: None,
)

# ------------------------------------------------------------------------------- stage


def load(
    run: Run,
    stage: str,
    settings: DistillationSettings,
    hp: DistillationHParams,
    shaping: ScoreHParams,
) -> Online:
    """Reads and checks.

    Raises:
        ValueError: a teacher that does not read the run's tokens, rewards without
            groups in which they are compared, a setting of rewards without any, or what
            is wrong with the rest.
    """
    where = f'config.{stage}'
    _check_teacher(run, f'{where}.teacher', settings)
    _check_rewards(where, settings, hp, shaping)
    anchors, size = AnchorHParams(), hp.group_size
    return load_online(run, stage, settings, hp, shaping, anchors, _begin, size)


def _check_teacher(run: Run, where: str, settings: DistillationSettings) -> None:
    source = check_policy(run, where, settings.teacher)
    if source.tokenizer is not None:
        ours, theirs = run.tokenizer.get_vocab(), source.tokenizer.get_vocab()
        ours.pop(run.tokenizer.pad_token, None)  # stands in no text
        others = [token for token, i in ours.items() if theirs.get(token) != i]
        if others:
            raise ValueError(
                f'{where}={settings.teacher!r} has another tokenizer: {len(others)} of '
                f"the {len(ours)} tokens of the run's, such as {others[0]!r}, have "
                'another id there or none; a teacher reads the tokens of the policy, '
                'so use one with the same tokenizer'
            )
    check_positions(run, where, source, settings)


def _check_rewards(
    where: str,
    settings: DistillationSettings,
    hp: DistillationHParams,
    shaping: ScoreHParams,
) -> None:
    if settings.rewards and hp.group_size == 1:
        raise ValueError(
            f'{where}.group_size=1: with {where}.rewards the responses to a prompt are '
            'compared with each other; use a group_size of 2 or more, or no rewards'
        )
    if TEACHER_KL in settings.rewards:
        raise ValueError(
            f'{where}.rewards.{TEACHER_KL}: that name is kept for the KL to the '
            'teacher; take another'
        )
    if settings.rewards:
        return
    for field in dataclasses.fields(shaping):
        value = getattr(shaping, field.name)
        if value != field.default:
            raise ValueError(
                f'{where}.{field.name}={value!r} changes the sum of the rewards, and '
                f'{where}.rewards is empty; use {field.default!r}, or add a reward'
            )


def _begin(run: Run, job: Online, policy: CausalLM, params: Params) -> Method:
    settings = job.settings
    key = run.key(f'{job.stage}.teacher')  # for 'scratch' alone
    teacher, teacher_params = load_policy(run, settings.teacher, key)
    teacher_params = frozen(run, teacher, teacher_params)
    return policy_method(
        run,
        job,
        policy,
        params,
        functools.partial(prepare_distillation, teacher=teacher),
        distillation_step,
        models=(teacher_params,),
        judges={TEACHER_KL: _teacher_kl(run, teacher, teacher_params, job.hp)},
    )


def _teacher_kl(
    run: Run, teacher: CausalLM, params: Params, hp: DistillationHParams
) -> Any:
    """A scorer: the KL of every response to the teacher, in nats."""
    statistics = run.compile(
        functools.partial(row_statistics, policy=teacher, temperature=hp.temperature),
        **KINDS,
    )

    def score(responses: Responses) -> Scored:
        return Scored(statistics(params, responses.generation)['kl'])

    return score
