"""GSPO: GRPO with one ratio, and one clip, per response.

    python -m rlhf_jax.main --config configs/gspo.py --workdir runs/gspo
    python -m rlhf_jax.main --config configs/gspo.py:from=runs/quickstart --workdir DIR

The bounds are those of a ratio averaged over tokens, hence small. Zheng et al. 2025,
arXiv 2507.18071.

Arguments: ``from`` a finished run to take sft and rm from; ``smoke``, ``seed=N``.
Equation, defaults and what goes wrong: docs/algorithms/gspo.md.
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
        ratio_level='sequence',
        clip_eps_low=3e-4,
        clip_eps_high=4e-4,
        kl_coef=0.2,
        num_epochs=2,
        num_minibatches=2,
    )
    return config
