"""GRPO: scores standardised within the responses to a prompt.

    python -m rlhf_jax.main --config configs/grpo.py --workdir runs/grpo
    python -m rlhf_jax.main --config configs/grpo.py:from=runs/quickstart --workdir DIR

A response counts as much as any, whatever its length. Shao et al. 2024, arXiv
2402.03300, who have the KL in the loss (``kl_loss_coef``); here it stands in the
reward, which bought more gold reward for the same KL: docs/recipes.md.

Arguments: ``from`` a finished run to take sft and rm from; ``smoke``, ``seed=N``.
Equation, defaults and what goes wrong: docs/algorithms/grpo.md.
"""

from ml_collections import ConfigDict

from configs.ladder import below, online
from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.estimators import grpo
from rlhf_jax.algos.policy_gradient import PolicyHParams
from rlhf_jax.config import parse_arg, section, unset
from rlhf_jax.rewards import ScoreHParams
from rlhf_jax.stages.settings import PolicyGradientSettings


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = parse_arg(arg, smoke=False, seed=0, **{'from': ''})
    config = below('policy_gradient', arg)
    config.policy_gradient = section(
        PolicyGradientSettings,
        PolicyHParams,
        ScoreHParams,
        AnchorHParams,
        unset(grpo.HParams),
        name='grpo',
        **online(arg),
        group_size=2 if arg.smoke else 8,
        kl_coef=0.2,
        num_epochs=2,
        num_minibatches=2,
    )
    return config
