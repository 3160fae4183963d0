"""RLOO: a response against the mean of the others to its prompt.

    python -m rlhf_jax.main --config configs/rloo.py --workdir runs/rloo
    python -m rlhf_jax.main --config configs/rloo.py:from=runs/quickstart --workdir DIR

The response is one action, so its log-probability is a sum over tokens, and the KL
stands in the reward. Ahmadian et al. 2024, arXiv 2402.14740.

Arguments: ``from`` a finished run to take sft and rm from; ``smoke``, ``seed=N``.
Equation, defaults and what goes wrong: docs/algorithms/rloo.md.
"""

from ml_collections import ConfigDict

from configs.ladder import below, online
from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.estimators import rloo
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
        unset(rloo.HParams),
        name='rloo',
        **online(arg),
        group_size=2 if arg.smoke else 8,
        kl_coef=0.2,
        num_epochs=2,
        num_minibatches=2,
    )
    return config
