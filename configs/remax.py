"""ReMax: a response against the policy's own greedy one.

    python -m rlhf_jax.main --config configs/remax.py --workdir runs/remax
    python -m rlhf_jax.main --config configs/remax.py:from=runs/quickstart --workdir DIR

One more generation per prompt in the place of a critic. Li et al. 2023, arXiv
2310.10505.

Arguments: ``from`` a finished run to take sft and rm from; ``smoke``, ``seed=N``.
Equation, defaults and what goes wrong: docs/algorithms/remax.md.
"""

from ml_collections import ConfigDict

from configs.ladder import below, online
from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.estimators import remax
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
        unset(remax.HParams),
        name='remax',
        **online(arg),
        group_size=1,
        kl_coef=0.2,
        num_epochs=2,
        num_minibatches=2,
    )
    return config
