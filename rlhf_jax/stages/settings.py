"""Settings that several kinds of stages share; those of one kind stand in its file.

Defaults stand in such dataclasses and in the ``…HParams`` of ``algos``, and nowhere
else; ``config.section`` lays them out for the command line. Read ``stages/run.py``
next.
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

    @property
    def reading(self) -> dict[str, Any]:
        """These three by name, as the loaders of ``data/pipeline.py`` take them."""
        names = (field.name for field in dataclasses.fields(RecordSettings))
        return {name: getattr(self, name) for name in names}


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
class StepReading:
    """How the scores of the steps of a response become one."""

    combine: StepCombine = 'min'  # of the probabilities that the steps are right
    separator: str | None = None  # between steps; None for that of the model's training


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionSettings:
    """How a language model that judges is asked; see ``stages/judging.py``."""

    prompt_file: str | None = None  # None for that of the package
    # 'chat': the filled prompt is a user's turn, in the judge's chat template
    prompt_format: Literal['text', 'chat'] = 'text'
    # tokens of a filled prompt with its label, without what is written at {reasoning}
    judge_buckets: Annotated[tuple[int, ...], LENGTHS] = (512,)
    judge_batch_size: Annotated[int, at_least(1)] = 16  # filled prompts at a time
    max_reasoning_tokens: Annotated[int, at_least(1)] = 256
    reasoning_temperature: Annotated[float, at_least(0)] = 1.0  # 0 is greedy


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatingSettings(QuestionSettings):
    """A rating by a language model: the mean of its distribution over whole numbers."""

    lowest: Annotated[int, at_least(0)] = 1
    highest: Annotated[int, between(1, 99)] = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSource:
    """What scores a response: a reward model, a language model that is asked for a
    rating, or a Python function; exactly one model or function.
    """

    model: ModelName | None = None
    fn: str | None = None  # 'package.module:function', see stages/scoring.py
    args: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords of fn
    weight: float = 1.0  # in the sum of the rewards
    tokenizer: str | None = None  # of model; None for the one that comes with it
    heads: dict[str, float] | None = None  # weights of a model's named scores
    steps: StepReading | None = None  # of a model that scores steps
    rating: RatingSettings | None = None  # of a language model, in place of a score
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
    # What else is measured: modules of rlhf_jax.evaluators, or package.module
    evaluators: tuple[str, ...] = ()


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
