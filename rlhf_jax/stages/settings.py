"""Settings of a run and of its stages, beside the hyperparameters of the steps.

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


class _Marker(str):
    """Marks a text that names a model or data; see ``stages/kinds.py``."""


# 'scratch', a stage of this run, another run's stage folder, a Hugging Face model.
ModelName = Annotated[str, _Marker('model')]
# What ``data/sources.py`` reads, or 'stage:NAME' for the records of a stage.
DataSpec = Annotated[str, _Marker('data')]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model of ``init='scratch'``, and how every model is computed."""

    preset: str = 'micro'  # models/presets.py
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of activations
    remat: bool = False  # recompute layers in the backward pass; wants scan_unroll=1
    scan_unroll: Annotated[int, at_least(1)] = 1  # layers per scan iteration


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How often a stage logs and saves."""

    log_every_steps: Annotated[int, at_least(1)] = 10
    save_every_steps: Annotated[int, at_least(1)] = 100
    keep_checkpoints: Annotated[int, at_least(1)] = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineLoopSettings(LoopSettings):
    """How often a stage over a fixed data set logs, saves and evaluates."""

    eval_every_steps: Annotated[int | None, at_least(1)] = None  # None: only at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """What becomes of records that are too long, bad, or spell a control token."""

    overlong: Literal['drop', 'truncate'] = 'drop'  # both are counted and reported
    on_bad: Literal['error', 'skip'] = 'error'  # skipped records are counted
    # A record that spells a control token; None: refused in messages, else allowed
    control_tokens: Literal['refuse', 'escape', 'allow'] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineSettings(RecordSettings):
    """A stage over a fixed data set."""

    init: ModelName
    train: DataSpec
    eval: DataSpec  # held out
    # rows per update; of comparisons, pairs
    batch_size: Annotated[int, at_least(1)] = 64
    num_steps: Annotated[int | None, at_least(1)] = None  # either this
    num_epochs: Annotated[float | None, above(0)] = None  # or this
    # static lengths in tokens; the last is the limit
    buckets: Annotated[tuple[int, ...], LENGTHS] = (128,)
    # So many batches are sorted by length together, so that most fit a shorter bucket;
    # None: rows are batched in any order
    sort_batches: Annotated[int | None, at_least(2)] = None
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    loop: OfflineLoopSettings = dataclasses.field(default_factory=OfflineLoopSettings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTSettings(OfflineSettings):
    """A stage that trains a language model on texts: SFT, pretraining."""

    # 'text' is cut into pieces of the longest bucket, and all of it counts
    form: Literal['demonstrations', 'text'] = 'demonstrations'
    loss_on: Literal['response', 'all', 'assistant'] = 'response'  # of demonstrations
    # several documents in a row of the longest bucket, kept apart
    packing: Literal['best_fit'] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings(OfflineSettings):
    """A reward model. The settings of its loss stand beside these; None is the loss's
    own default, see ``config.unset``.
    """

    # A module of rlhf_jax.reward_losses, or package.module; it says which data it needs
    loss: str = 'bradley_terry'
    tokenizer: str | None = None  # of its model, when it is not the run's
    # of an ensemble; each has a head and a data order of its own
    members: Annotated[int, at_least(1)] = 1
    references: DataSpec | None = None  # demonstrations whose mean score becomes 0
    num_references: Annotated[int, at_least(1)] = 512
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

    model: ModelName | None = None
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
class SamplerSettings:
    """How a policy samples."""

    # static prompt lengths, in tokens
    prompt_buckets: Annotated[tuple[int, ...], LENGTHS] = (64,)
    max_new_tokens: Annotated[int, at_least(1)] = 32
    # Responses that are sampled at the same time on one device: a row whose response
    # has ended takes the next prompt. None samples all, until the longest has ended.
    decode_rows: Annotated[int | None, at_least(1)] = None
    top_k: Annotated[int | None, at_least(1)] = None
    top_p: Annotated[float | None, Range(0, 1, open_low=True)] = None
    # end a response too, in all stages of the run
    extra_eos_ids: tuple[int, ...] = ()
    stop_sequences: tuple[str, ...] = ()
    # response tokens before a stop sequence counts
    stop_after: Annotated[int, at_least(0)] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The evaluation of a policy when its stage ends."""

    eval_prompts: DataSpec  # held out
    gold: RewardSource | None = None  # scores the responses, and is never optimised
    base: ModelName | None = None  # a language model; it scores their likelihood
    eval_batch_size: Annotated[int, at_least(1)] = 128
    num_samples: Annotated[int, at_least(0)] = 16  # before and after, samples.jsonl
    # the report's bar for the lower end of the interval
    expected_win_rate: Annotated[float, between(0, 1)] = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings(OfflineSettings, SamplerSettings, EvaluationSettings):
    """Preference optimisation on fixed data. The settings of its loss stand beside
    these; None is the loss's own default, see ``config.unset``.
    """

    name: str  # of the loss: a module of rlhf_jax.preference, or package.module
    temperature: Annotated[float, above(0)] = 1.0  # of the samples at the end
    # By name; they score the samples at the end, for the report
    rewards: dict[str, RewardSource] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineSettings(RecordSettings, SamplerSettings, EvaluationSettings):
    """A stage that learns from samples of its own policy."""

    init: ModelName  # the policy, and the reference it is anchored to
    prompts: DataSpec
    # By name; their weighted sum is optimised.
    rewards: dict[str, RewardSource] = dataclasses.field(default_factory=dict)
    batch_size: Annotated[int, at_least(1)] = 64  # responses per rollout
    num_rollouts: Annotated[int, at_least(1)] = 100
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    loop: LoopSettings = dataclasses.field(default_factory=LoopSettings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOSettings(OnlineSettings):
    """PPO."""

    # What the critic starts from: a reward model (of an ensemble its first member), or
    # a policy
    critic: ModelName
    critic_optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    ptx: DataSpec | None = None  # demonstrations or text for ppo.ptx_coef
    ptx_form: Literal['demonstrations', 'text'] = 'demonstrations'
    ptx_buckets: Annotated[tuple[int, ...], LENGTHS] = (128,)
    # times that every rollout is prepared and trained on
    rollout_passes: Annotated[int, at_least(1)] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LagrangianSettings(PPOSettings):
    """PPO under a constraint on a cost."""

    cost: RewardSource  # of a response, above 0 where it does harm; weighs nothing
    cost_critic: ModelName  # what the second critic starts from


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradientSettings(OnlineSettings):
    """Policy gradients. The settings of the estimator stand beside these; None is the
    estimator's own default, see ``config.unset``.
    """

    name: str  # of the estimator: a module of algos/estimators, or package.module
    # DAPO's dynamic sampling: prompts whose responses all score the same are replaced
    # by others, in so many draws at most; 1: never.
    max_draws: Annotated[int, at_least(1)] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlinePreferenceSettings(OnlineSettings):
    """A preference loss on the policy's own samples. The settings of the loss stand
    beside these; None is the loss's own default, see ``config.unset``.
    """

    name: str = 'dpo'  # of the loss: a module of rlhf_jax.preference, or package.module
