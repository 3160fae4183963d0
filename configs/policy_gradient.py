"""Policy gradients without a critic, on the embedded data set: one method each.

    python -m rlhf_jax.main --config configs/policy_gradient.py:name=grpo --workdir DIR
    python -m rlhf_jax.main --config configs/policy_gradient.py:name=rloo,from=RUN
    --workdir DIR

Samples of the policy are scored by the reward model; what a sample is compared with,
and how the loss is clipped and summed up, makes the method. GRPO's KL stands in the
reward here and not in the loss (``kl_loss_coef``), which bought more gold reward for
the same KL: docs/recipes.md.

Arguments: ``name`` one of ``METHODS``, or an estimator of your own, package.module;
``from`` a finished run to take sft and rm from; ``smoke``, ``seed=N``. Equations,
sources, settings and what goes wrong: docs/algorithms/README.md and the page of each
method there. For rewards of 0 and 1 (maxrl, dapo) see configs/rlvr.py.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.ladder import arguments, below, online
from rlhf_jax.stages.kinds import stage

# What makes a method beside its estimator, which is the one of its name unless told.
METHODS: dict[str, dict[str, Any]] = {
    'rloo': {},
    'grpo': {},
    'dr_grpo': {},
    # Drawing again does nothing against a learned reward, and no KL holds the policy.
    'dapo': dict(
        max_draws=4,
        clip_eps_low=0.2,
        clip_eps_high=0.28,
        kl_coef=0.0,
    ),
    'reinforce_pp': dict(group_size=1, aggregation='token_mean'),
    'remax': dict(group_size=1),
    # Bounds of a ratio averaged over tokens, hence small.
    'gspo': dict(
        name='grpo', ratio_level='sequence', clip_eps_low=3e-4, clip_eps_high=4e-4
    ),
    'cispo': dict(
        name='grpo',
        objective='cispo',
        clip_eps_low=None,
        clip_eps_high=1.0,  # ours; the paper gives none
        aggregation='token_mean',
    ),
    'gdpo': {},
}
# A second reward, of which GDPO makes an advantage of its own: words beyond 12 cost.
SHORT = dict(
    fn='rlhf_jax.datasets.tiny_tldr:words_over', args={'limit': 12}, weight=-0.5
)


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = arguments(arg, name='grpo')
    config = below('policy_gradient', arg)
    settings = online(arg)
    if arg.name == 'gdpo':
        settings['rewards']['short'] = SHORT
    settings |= dict(
        name=arg.name,
        group_size=2 if arg.smoke else 8,
        kl_coef=0.2,
        num_epochs=2,
        num_minibatches=2,
    )
    settings |= METHODS.get(arg.name, {})
    if arg.name == 'dr_grpo':
        settings['fixed_length'] = settings['max_new_tokens']
    if arg.name == 'dapo':  # a fifth, as theirs
        settings['overlong_buffer'] = -(-settings['max_new_tokens'] // 5)
    config.policy_gradient = stage(
        'policy_gradient',
        **settings,
    )
    return config
