"""RLHF in JAX/Flax as pure functions: SFT → reward model → PPO, and preference losses.

The public names, explicit. Everything here is a pure function or a plain dataclass;
nothing reads a config or touches a disk. ``docs/library.md`` has them by use, and the
modules for what does: reading models and data, checkpoints, evaluation. Read
``types.py`` next.
"""

from rlhf_jax import preference, reward_losses
from rlhf_jax.algos import estimators
from rlhf_jax.algos.anchors import AnchorHParams, move_anchors
from rlhf_jax.algos.ensemble import ensemble_rm_step, stack_batches, stack_members
from rlhf_jax.algos.expert_iteration import (
    ExpertIterationHParams,
    expert_iteration_step,
    prepare_best,
)
from rlhf_jax.algos.lagrangian import (
    ActorCritics,
    LagrangianHParams,
    initial_log_lambda,
    lagrangian_step,
    prepare_lagrangian,
)
from rlhf_jax.algos.online_preference import (
    OnlinePreferenceHParams,
    online_preference_step,
    prepare_pairs,
)
from rlhf_jax.algos.policy_gradient import PolicyHParams, policy_step, prepare_policy
from rlhf_jax.algos.ppo import ActorCritic, PPOHParams, ppo_step, prepare
from rlhf_jax.algos.preference import (
    PreferenceHParams,
    implicit_rewards,
    preference_step,
    reference_logps,
)
from rlhf_jax.algos.rm import RMHParams, rm_step
from rlhf_jax.algos.rollout import response_logprobs
from rlhf_jax.algos.sft import SFTHParams, sft_step
from rlhf_jax.continuous_batching import generate_continuously
from rlhf_jax.generate import Sampling, generate, sampling
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import CausalLM, ScalarModel, start_from
from rlhf_jax.ops.best_of_n import (
    best_of_n_kl,
    best_of_n_kl_bound,
    best_of_n_mean,
    best_of_n_win_rate,
)
from rlhf_jax.ops.kl import kl_estimate, token_kl
from rlhf_jax.ops.rows import in_groups, pad_left, pad_right, repeat_prompts
from rlhf_jax.ops.stop_table import stop_table
from rlhf_jax.rewards import (
    ScoreHParams,
    combine_members,
    combine_steps,
    ensemble_scores,
    initial_moments,
    overlong_penalty,
    reward_model_scores,
    scale_scores,
    shape_scores,
)
from rlhf_jax.types import (
    Generation,
    JudgedBatch,
    LagrangianRollout,
    LagrangianState,
    Metrics,
    OnlineState,
    Outcomes,
    PPOState,
    PromptBatch,
    Rollout,
    RunningMoments,
    Scores,
    TokenBatch,
    TrainState,
    merge_metrics,
    train_state,
)

__all__ = [
    'ActorCritic',
    'ActorCritics',
    'AnchorHParams',
    'CausalLM',
    'ExpertIterationHParams',
    'Generation',
    'JudgedBatch',
    'LagrangianHParams',
    'LagrangianRollout',
    'LagrangianState',
    'Metrics',
    'OnlinePreferenceHParams',
    'OnlineState',
    'Outcomes',
    'PPOHParams',
    'PPOState',
    'PolicyHParams',
    'PreferenceHParams',
    'PromptBatch',
    'RMHParams',
    'Rollout',
    'Scores',
    'RunningMoments',
    'SFTHParams',
    'Sampling',
    'ScalarModel',
    'ScoreHParams',
    'TokenBatch',
    'TrainState',
    'TransformerConfig',
    'best_of_n_kl',
    'best_of_n_kl_bound',
    'best_of_n_mean',
    'best_of_n_win_rate',
    'combine_members',
    'combine_steps',
    'ensemble_rm_step',
    'ensemble_scores',
    'estimators',
    'expert_iteration_step',
    'generate',
    'generate_continuously',
    'implicit_rewards',
    'in_groups',
    'initial_log_lambda',
    'initial_moments',
    'kl_estimate',
    'lagrangian_step',
    'merge_metrics',
    'move_anchors',
    'online_preference_step',
    'overlong_penalty',
    'pad_left',
    'pad_right',
    'policy_step',
    'ppo_step',
    'preference',
    'preference_step',
    'prepare',
    'prepare_best',
    'prepare_lagrangian',
    'prepare_pairs',
    'prepare_policy',
    'reference_logps',
    'repeat_prompts',
    'response_logprobs',
    'reward_losses',
    'reward_model_scores',
    'rm_step',
    'sampling',
    'scale_scores',
    'sft_step',
    'shape_scores',
    'stack_batches',
    'stack_members',
    'start_from',
    'stop_table',
    'token_kl',
    'train_state',
]
