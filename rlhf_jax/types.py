"""Every pytree that crosses a file boundary: batches, rollouts, states, metrics.

This file stands at the bottom of the package: it imports nothing from it, and
everything else imports it. Letters: ``B`` sequences, ``T`` tokens, ``P`` pairs, ``V``
vocabulary. Read ``algos/sft.py`` next, the smallest complete use of what stands here.

Words, of one meaning each:

* reference policy: frozen (or slowly moving), KL and preference losses compare with it;
* reference answer: the known right answer that comes with a prompt;
* sampler: draws responses from a policy; rollout: one batch of them, ready to train on;
* score: a number for a response; gold reward: judges, and is never trained on;
* verdict: pass, fail or unknown, of a stage in the report;
* training step: one call of a step function; reasoning step: a part of a response;
* unpaired: a response labelled desirable or not, by itself; pair: chosen and rejected;
* record: an entry of a data file; row: an entry of a batch;
* stage: a named part of a run; kind: the module that says what a stage does.

Conventions that hold everywhere:

* ``mask`` is bool and True where a token is real. Padding is told by the mask alone,
  never by comparing ids with a pad id (pad may equal EOS, or not exist).
* ``logprobs[:, t]`` scores ``tokens[:, t]``; position 0 has no predecessor and is
masked.
* Log-probabilities and KL are in nats, scores and rewards in reward units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
PRNGKey = jax.Array
Params = Mapping[str, Any]  # a plain nested dict of float arrays


# ------------------------------------------------------------------------------ batches


@struct.dataclass(kw_only=True)
class TokenBatch:
    """Sequences for a language-model loss. Rows without a True in ``loss_mask`` count
    nothing.
    """

    tokens: Array  # [B, T] int32, right-padded
    mask: Array  # [B, T] bool, real tokens
    loss_mask: Array  # [B, T] bool, tokens whose log-probability enters the loss
    # [B, T] int32, ascending: the document of each token, where rows hold several
    segments: Array | None = None
    # Tokens from the first in the loss to the end of its text, at most: one that is
    # further makes the loss NaN. None where that is not known, and then the model is
    # run to the end at every place.
    response_length: int | None = struct.field(pytree_node=False, default=None)


@struct.dataclass(kw_only=True)
class JudgedBatch:
    """K responses to each of P prompts with what was said of them, for reward models
    and preference losses. What a loss does not read may be None.

    ===================  =======  ====================================================
    comparison           K = 2    the chosen text first; ``labels`` are None, unless the
                                  data have rankings too
    ranking              K texts  ranks: 1 is the best, equal is a tie
    rating               K = 1    the number that was given
    response in steps    K = 1    at the last token of every step: 1 right, 0 wrong
    unpaired response    K = 1    1 desirable, 0 not
    ===================  =======  ====================================================

    In a ranking, a completion that is not there has one token and no label; one that
    has a label and no token is the virtual response, whose score is 0.
    """

    tokens: Array  # [P, K, T] int32, right-padded
    mask: Array  # [P, K, T] bool
    weight: Array  # [P] float32, 0 for rows that only fill up a batch
    response_mask: Array | None = None  # [P, K, T] bool, response tokens, EOS included
    labels: Array | None = None  # [P, K, H] float32, by head; of steps [P, K, T]
    judged: Array | None = None  # like ``labels``, bool: where there is one
    # [P] float32, demanded score difference; 0 where labellers gave none
    margin: Array | None = None
    # [P] float32 of comparisons: how likely the chosen text is the better one, ½ of a
    # tie. None where all labels of the data are certain.
    probability: Array | None = None
    tied: Array | None = None  # [P] bool: judged equal; None where the data have no tie
    # P rows: the prompt with the response to another one, which is what ``loss_mask``
    # counts; for losses on unpaired responses (KTO)
    mismatched: TokenBatch | None = None
    # float32, what ``reference_logps`` returned, for a loss with a reference:
    ref_logps: Array | None = None  # [P, K] Σ log π_ref of the response
    ref_shared_logps: Array | None = None  # [P, 2], see ``PairLogps``
    ref_mismatched_logps: Array | None = None  # [P]
    # As in TokenBatch; of the mismatched responses too
    response_length: int | None = struct.field(pytree_node=False, default=None)

    @property
    def desirable(self) -> Array:
        """[P] bool, of unpaired responses."""
        return self.labels[:, 0, 0] > 0


@struct.dataclass(kw_only=True)
class TokenLogps:
    """What a preference loss sees of single tokens, where it asks for them: arrays as
    the tokens of the batch, [P, 2, T] or [P, T], 0 where ``mask`` is False. Texts are
    where they were, or right-aligned.
    """

    mask: Array  # bool, response tokens; none of a row that fills up a batch
    logps: Array  # float32, log π of each token
    ref_logps: Array | None = None  # float32, the same of the reference policy
    # float32, KL(π_ref ‖ π) between what both say of this token, over the vocabulary
    kl: Array | None = None


@struct.dataclass(kw_only=True)
class PairLogps:
    """What a pairwise preference loss sees of a ``JudgedBatch``.

    ``shared`` sums stop where the shorter response of the pair ends.
    """

    logps: Array  # [P, 2] float32, Σ log π of the chosen and the rejected response
    shared_logps: Array  # [P, 2] float32
    lengths: Array  # [P, 2] float32, tokens of the responses, ≥ 1
    weight: Array  # [P] float32
    ref_logps: Array | None = None  # [P, 2] float32, the same of the reference policy
    ref_shared_logps: Array | None = None  # [P, 2] float32
    tokens: TokenLogps | None = None  # [P, 2, T], for a loss with ``TOKENS``
    # [P] each: what the loss's own ``context`` said of the whole batch
    context: dict[str, Array] = struct.field(default_factory=dict)

    @property
    def log_ratios(self) -> Array:
        """[P, 2] log π − log π_ref."""
        return self.logps - self.ref_logps

    @property
    def average_logps(self) -> Array:
        """[P, 2] log π per token."""
        return self.logps / self.lengths


@struct.dataclass(kw_only=True)
class UnpairedLogps:
    """What a preference loss on unpaired responses sees of a ``JudgedBatch``; the
    mismatched responses only in its ``context``.
    """

    logps: Array  # [P] float32, Σ log π of the response
    lengths: Array  # [P] float32, tokens of the response, ≥ 1
    desirable: Array  # [P] bool
    weight: Array  # [P] float32
    mismatched_logps: Array | None = None  # [P] float32, of another row's response
    ref_logps: Array | None = None  # [P] float32, the same of the reference policy
    ref_mismatched_logps: Array | None = None  # [P] float32
    tokens: TokenLogps | None = None  # [P, T], for a loss with ``TOKENS``
    # [P] each: what the loss's own ``context`` said of the whole batch
    context: dict[str, Array] = struct.field(default_factory=dict)

    @property
    def log_ratios(self) -> Array:
        """[P] log π − log π_ref."""
        return self.logps - self.ref_logps


@struct.dataclass(kw_only=True)
class PromptBatch:
    """Prompts to continue."""

    tokens: Array  # [B, T] int32, left-padded
    mask: Array  # [B, T] bool
    # [B] int32, position of the prompt in its data set (−1: a row that fills up)
    index: Array


@struct.dataclass(kw_only=True)
class Generation:
    """Prompts with the responses sampled from a policy: ``T`` = prompt bucket +
    response length.
    """

    tokens: Array  # [B, T] int32: left-padded prompt, right-padded response
    mask: Array  # [B, T] bool, real tokens of prompt and response
    response_mask: (
        Array  # [B, T] bool, response tokens; EOS or a stop sequence is part of them
    )
    logprobs: (
        Array  # [B, T] float32, behaviour log-probabilities; 0 outside the response
    )
    ended: Array  # [B] bool, the response ended by EOS or a stop sequence
    # R of T = P + R: all prompts are in front of it. None where that is not known, and
    # then models are run to the end at every place.
    response_length: int | None = struct.field(pytree_node=False, default=None)


class Scores(NamedTuple):
    """What was said of the responses of a rollout, in reward units."""

    total: Array  # [B] float32, what is optimised: weighted, scaled and shaped
    each: Mapping[str, Array] | None = None  # [B] by name, as the scorers gave it
    weights: Mapping[str, Array | float] | None = None  # of those in the weighted sum
    baseline: Array | None = None  # [B] the total of the policy's greedy response


@struct.dataclass(kw_only=True)
class Outcomes:
    """What an advantage estimator sees: ``G`` responses to each of ``P`` prompts."""

    # [P, G, T] float32, KL penalty (if any) everywhere, score at the last token
    rewards: Array
    mask: Array  # [P, G, T] bool, response tokens
    baseline: Array | None = None  # [P, G] float32, score of the greedy response
    # [P, G] float32 each: the single rewards by name, as they were scored, before they
    # are weighted, summed up and shaped, and their weights in the sum
    scores: Mapping[str, Array] | None = None
    weights: Mapping[str, Array | float] | None = None

    @property
    def returns(self) -> Array:
        """[P, G] reward of a whole response."""
        return jnp.sum(jnp.where(self.mask, self.rewards, 0), axis=-1)

    @property
    def equal(self) -> Array:
        """[P] bool, all responses to the prompt have the same return."""
        returns = self.returns
        return jnp.all(returns == returns[:, :1], axis=-1)


@struct.dataclass(kw_only=True)
class Rollout:
    """One batch of sampled responses with everything that ``ppo_step`` or
    ``policy_step`` needs, computed once. The critic's fields are None where there is no
    critic.
    """

    tokens: Array  # [B, T] int32
    mask: Array  # [B, T] bool
    response_mask: Array  # [B, T] bool, tokens the policy is trained on
    old_logprobs: Array  # [B, T] float32, log π_old of the response tokens
    ref_logprobs: Array  # [B, T] float32, log π_ref of the response tokens
    advantages: Array  # [B, T] float32, whitened over the whole rollout when asked for
    kept: Array | None = None  # [B] bool, rows that enter the loss; None for all
    value_mask: Array | None = None  # [B, T] bool, places the critic is trained at
    old_values: Array | None = None  # [B, T] float32, critic before each response token
    returns: Array | None = None  # [B, T] float32, from the unwhitened advantages
    # As in Generation
    response_length: int | None = struct.field(pytree_node=False, default=None)
    # How the paper of the estimator of the advantages sums tokens up, see
    # ``algos/estimators``; None of a rollout with a critic
    aggregation: str | None = struct.field(pytree_node=False, default=None)


@struct.dataclass(kw_only=True)
class LagrangianRollout:
    """A rollout with costs, for ``lagrangian_step``. Both rollouts have the policy's
    combined advantages; values and returns are those of their own critic.
    """

    reward: Rollout
    cost: Rollout
    costs: Array  # [B] float32, above 0 where a response does harm


# ------------------------------------------------------------------------------- states


@struct.dataclass(kw_only=True)
class TrainState:
    """What every step carries: arrays only, so that a checkpoint is pure data.

    ``rng`` is the base key of the stage and is never advanced: a step draws from
    ``fold_in(fold_in(rng, step), PURPOSE)``, so that resuming needs no other random
    state.
    """

    step: Array  # [] int32, steps done
    rng: PRNGKey  # base key of the stage
    params: Params
    opt_state: Any


def train_state(
    params: Params, tx: Any, key: PRNGKey, of: Any = TrainState, **fields: Any
) -> Any:
    """The state that training starts from.

    Args:
        params: of the model; for a state with several, ``{'policy': …, 'critic': …}``.
        tx: the optimizer, an ``optax.GradientTransformation``.
        key: base key of the stage.
        of: the kind of state, e.g. ``PPOState``.
        **fields: what this kind has beside those of ``TrainState``, e.g.
            ``kl_coef=jnp.float32(0.05)``.
    """
    return of(
        step=jnp.int32(0),
        rng=key,
        params=params,
        opt_state=tx.init(params),
        **fields,
    )


@struct.dataclass(kw_only=True)
class RunningMoments:
    """Mean and spread of all numbers seen so far; see ``rewards.scale_scores``."""

    count: Array  # [] float32, exact up to 2²⁴
    mean: Array  # [] float32
    m2: Array  # [] float32, Σ (x − mean)²


@struct.dataclass(kw_only=True)
class OnlineState(TrainState):
    """What ``policy_step`` carries: ``params`` is ``{'policy': …}``, and a step is a
    rollout. The optional fields are None where they are not in use.
    """

    score_moments: RunningMoments | None = None  # of the scores before shaping
    # Like params['policy'] both; see algos/anchors.py.
    ref_params: Params | None = None  # a reference policy that follows the policy
    ema_params: Params | None = None  # the running average of the policy


@struct.dataclass(kw_only=True)
class PPOState(OnlineState):
    """What ``ppo_step`` carries; ``params`` is ``{'policy': …, 'critic': …}``."""

    kl_coef: Array  # [] float32, β of the per-token KL penalty; moves when adaptive


@struct.dataclass(kw_only=True)
class LagrangianState(PPOState):
    """What ``lagrangian_step`` carries; ``params`` has a ``'cost_critic'`` too."""

    log_lambda: Array  # [] float32, log λ of the constraint


# ------------------------------------------------------------------------------ metrics


@struct.dataclass
class Mean:
    """A mean that is still a sum and its weight, so that merging two of them is
    exact.
    """

    sum: Array
    weight: Array

    def merge(self, other: Mean) -> Mean:
        return Mean(self.sum + other.sum, self.weight + other.weight)

    def reduce(self, axis_name: str) -> Mean:
        return Mean(
            jax.lax.psum(self.sum, axis_name), jax.lax.psum(self.weight, axis_name)
        )

    def value(self) -> Array:
        """The mean; NaN when nothing was counted, because 0 would be a claim."""
        return jnp.where(
            self.weight > 0,
            self.sum / jnp.where(self.weight > 0, self.weight, 1),
            jnp.nan,
        )


@struct.dataclass
class Max:
    """A running maximum."""

    max: Array

    def merge(self, other: Max) -> Max:
        return Max(jnp.maximum(self.max, other.max))

    def reduce(self, axis_name: str) -> Max:
        return Max(jax.lax.pmax(self.max, axis_name))

    def value(self) -> Array:
        return self.max


@struct.dataclass
class Min:
    """A running minimum."""

    min: Array

    def merge(self, other: Min) -> Min:
        return Min(jnp.minimum(self.min, other.min))

    def reduce(self, axis_name: str) -> Min:
        return Min(jax.lax.pmin(self.min, axis_name))

    def value(self) -> Array:
        return self.min


@struct.dataclass
class Last:
    """A quantity that is the same on every device and microbatch (learning rate, β)."""

    last: Array

    def merge(self, other: Last) -> Last:
        return other

    def reduce(self, axis_name: str) -> Last:
        return self

    def value(self) -> Array:
        return self.last


Metric = Mean | Max | Min | Last
Metrics = dict[str, Metric]  # name as plotted, e.g. 'policy/clipfrac' -> Mean


def merge_metrics(a: Metrics, b: Metrics) -> Metrics:
    """Merges two dicts of the same metrics; exact, because every metric knows its
    kind.
    """
    if a.keys() != b.keys():
        raise ValueError(
            f'metrics differ: {sorted(a.keys() ^ b.keys())} stand in one dict only'
        )
    return {name: a[name].merge(b[name]) for name in a}


def reduce_metrics(metrics: Metrics, axis_name: str | None) -> Metrics:
    """Merges metrics over the devices of a mapped axis; the identity without one."""
    if axis_name is None:
        return metrics
    return {name: metric.reduce(axis_name) for name, metric in metrics.items()}
