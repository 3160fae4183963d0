"""DAPO: GRPO with dynamic sampling, an asymmetric clip, no KL.

    python -m rlhf_jax.main --config configs/dapo.py --workdir runs/dapo
    python -m rlhf_jax.main --config configs/dapo.py:from=runs/quickstart --workdir DIR

Prompts whose responses all score the same are drawn again, up to ``max_draws`` times;
tokens weigh alike; over-long responses are marked down. Against a learned reward there
is always some difference, so that dynamic sampling does nothing here (see
configs/rlvr.py), and without a KL nothing holds the policy. Yu et al. 2025, arXiv
2503.14476.

Arguments: ``from`` a finished run to take sft and rm from; ``smoke``, ``seed=N``.
Equation, defaults and what goes wrong: docs/algorithms/dapo.md.
"""

from ml_collections import ConfigDict

from configs.ladder import below, online
from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.estimators import dapo
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
        unset(dapo.HParams),
        name='dapo',
        **online(arg),
        group_size=2 if arg.smoke else 8,
        max_draws=4,
        clip_eps_low=0.2,
        clip_eps_high=0.28,
        overlong_buffer=6,  # a fifth of max_new_tokens, as theirs
        num_epochs=2,
        num_minibatches=2,
    )
    return config
