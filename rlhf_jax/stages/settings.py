"""What a run and its stages can be told, beside the hyperparameters of the steps.

Defaults stand here and in the ``…HParams`` of ``algos``, and nowhere else;
``config.section`` lays them out for the command line. Read ``stages/run.py`` next.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from rlhf_jax.optim import OptimConfig
from rlhf_jax.ranges import Range, above, at_least, between
from rlhf_jax.rewards import Combine, StepCombine

LENGTHS = Range(1, ascending=True)  # of buckets, in tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model of ``init='scratch'``, and how any model is computed."""

    preset: str = 'micro'  # models/presets.py
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of activations
    remat: bool = False  # recompute layers in the backward pass; wants scan_unroll=1
    scan_unroll: Annotated[int, at_least(1)] = 1  # layers per scan iteration


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How often a stage logs, saves and evaluates."""

    log_every_steps: Annotated[int, at_least(1)] = 10
    save_every_steps: Annotated[int, at_least(1)] = 100
    keep_checkpoints: Annotated[int, at_least(1)] = 2
    eval_every_steps: Annotated[int | None, at_least(1)] = None  # None: only at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineSettings:
    """A stage over a fixed data set: pretrain, sft, rm, preference."""

    init: str  # 'scratch', a stage of this run, another run's stage folder, an HF model
    train: str  # data spec
    eval: str  # data spec, held out
    tokenizer: str | None = None  # rm: of its model, when it is not the run's
    # rows per update; of comparisons, pairs
    batch_size: Annotated[int, at_least(1)] = 64
    num_steps: Annotated[int | None, at_least(1)] = None  # either this
    num_epochs: Annotated[float | None, above(0)] = None  # or this
    # static lengths in tokens; the last is the limit
    buckets: Annotated[tuple[int, ...], LENGTHS] = (128,)
    overlong: Literal['drop', 'truncate'] = 'drop'  # both are counted and reported
    on_bad: Literal['error', 'skip'] = 'error'  # skipped records are counted
    # Of records that spell a control token; None: refused in messages, else allowed
    control_tokens: Literal['refuse', 'escape', 'allow'] | None = None
    loss_on: Literal['response', 'all', 'assistant'] = 'response'  # sft: what counts
    # rm: of an ensemble; each has a head and a data order of its own
    members: Annotated[int, at_least(1)] = 1
    # pretrain, sft: several documents in a row of the longest bucket, kept apart
    packing: Literal['best_fit'] | None = None
    # rm, preference, sft: batches whose rows are sorted by length together, so that
    # shorter buckets suffice for most; None leaves rows of any lengths in a batch
    sort_batches: Annotated[int | None, at_least(2)] = None
    references: str | None = None  # rm: demonstrations whose mean score becomes 0
    num_references: Annotated[int, at_least(1)] = 512
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    loop: LoopSettings = dataclasses.field(default_factory=LoopSettings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings(OfflineSettings):
    """The stage that trains a reward model. What its loss can be told stands beside
    these settings, with None for the loss's own default; see ``config.unset``.
    """

    # A module of rlhf_jax.reward_losses, or package.module; it says which data it needs
    loss: str = 'bradley_terry'
    heads: tuple[str, ...] = ()  # dimensions with a score each; () for a single score
    rating_range: tuple[float, ...] | None = None  # lowest, highest; needed for ratings
    rating_unit: Literal['given', 'range'] = 'given'  # 'range': it becomes 0 to 1
    step_separator: str = '\n'  # between the steps of a response


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReading:
    """How the scores of the steps of a response become one."""

    combine: StepCombine = 'min'  # of the probabilities that the steps are right
    separator: str | None = None  # between steps; None for that of the model's training


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSource:
    """What scores a response: a reward model or a Python function, exactly one."""

    model: str | None = None  # a stage of this run, another run's stage folder, HF
    fn: str | None = None  # 'package.module:function', see stages/scoring.py
    args: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords of fn
    weight: float = 1.0  # in the sum of the rewards
    tokenizer: str | None = None  # of model; None for the one that comes with it
    heads: dict[str, float] | None = None  # weights of a model's named scores
    steps: StepReading | None = None  # of a model that scores steps
    combine: Combine | None = None  # the scores of an ensemble; None: their mean
    # λ of combine='uncertainty', per reward unit; 0.1 in the code of Coste et al. 2023
    uncertainty_coef: Annotated[float, at_least(0)] = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How a policy samples, and what judges its samples when its stage ends."""

    eval_prompts: str  # data spec, held out
    # By name; online stages optimise their weighted sum, preference looks at it.
    rewards: dict[str, RewardSource] = dataclasses.field(default_factory=dict)
    gold: RewardSource | None = None  # judges, and is never optimised
    base: str | None = None  # a language model; how likely are the responses to it?
    # static prompt lengths, in tokens
    prompt_buckets: Annotated[tuple[int, ...], LENGTHS] = (64,)
    max_new_tokens: Annotated[int, at_least(1)] = 32
    # Responses that are written at the same time on one device: a row whose response
    # has ended takes the next prompt. None writes all, until the longest has ended.
    decode_rows: Annotated[int | None, at_least(1)] = None
    top_k: Annotated[int | None, at_least(1)] = None
    top_p: Annotated[float | None, Range(0, 1, open_low=True)] = None
    # end a response too, in all stages of the run
    extra_eos_ids: tuple[int, ...] = ()
    stop_sequences: tuple[str, ...] = ()
    # response tokens before a stop sequence counts
    stop_after: Annotated[int, at_least(0)] = 0
    eval_batch_size: Annotated[int, at_least(1)] = 128
    num_samples: Annotated[int, at_least(0)] = 16  # before/after samples written down
    # the report's bar for the lower end of the interval
    expected_win_rate: Annotated[float, between(0, 1)] = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings(OfflineSettings, EvaluationSettings):
    """The preference stage. What its loss can be told stands beside these settings,
    with None for the loss's own default; see ``config.unset``.
    """

    name: str  # of the loss: a module of rlhf_jax.preference, or package.module
    temperature: Annotated[float, above(0)] = 1.0  # of the samples at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineSettings(EvaluationSettings):
    """A stage that samples from its own policy: expert_iteration, and all below."""

    init: str  # the policy, and the reference it is anchored to
    prompts: str  # data spec
    batch_size: Annotated[int, at_least(1)] = 64  # responses per rollout
    num_rollouts: Annotated[int, at_least(1)] = 100
    overlong: Literal['drop', 'truncate'] = 'drop'
    on_bad: Literal['error', 'skip'] = 'error'
    control_tokens: Literal['refuse', 'escape', 'allow'] | None = None
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    loop: LoopSettings = dataclasses.field(default_factory=LoopSettings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOSettings(OnlineSettings):
    """The ppo stage."""

    # What the critic starts from: a reward model (of an ensemble its first member), or
    # a policy
    critic: str
    critic_optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    ptx: str | None = None  # demonstrations or text for ppo.ptx_coef
    ptx_kind: Literal['demonstrations', 'text'] = 'demonstrations'
    ptx_buckets: Annotated[tuple[int, ...], LENGTHS] = (128,)
    # times a rollout is prepared anew and trained on
    rollout_passes: Annotated[int, at_least(1)] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LagrangianSettings(PPOSettings):
    """The ppo_lagrangian stage."""

    cost: RewardSource  # of a response, above 0 where it does harm; weighs nothing
    cost_critic: str  # what the second critic starts from: a cost model, or a policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradientSettings(OnlineSettings):
    """The policy_gradient stage. What its estimator can be told stands beside these
    settings, with None for the estimator's own default; see ``config.unset``.
    """

    name: str  # of the estimator: a module of algos/estimators, or package.module
    # Prompts whose responses all score the same are replaced by others, from so many
    # draws at most (DAPO's dynamic sampling); 1 takes what comes.
    max_draws: Annotated[int, at_least(1)] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlinePreferenceSettings(OnlineSettings):
    """The online_preference stage. What its loss can be told stands beside these
    settings, with None for the loss's own default; see ``config.unset``.
    """

    name: str = 'dpo'  # of the loss: a module of rlhf_jax.preference, or package.module
