"""Dr. GRPO: GRPO without its two biases.

    python -m rlhf_jax.main --config configs/dr_grpo.py --workdir runs/dr_grpo
    python -m rlhf_jax.main --config configs/dr_grpo.py:from=RUN --workdir DIR

No division by the spread of a group (prompts whose responses hardly differ do not
weigh more), none by the length of a response (long wrong ones are not spared). Liu et
al. 2025, arXiv 2503.20783.

Arguments: ``from`` a finished run to take sft and rm from; ``smoke``, ``seed=N``.
Equation, defaults and what goes wrong: docs/algorithms/dr_grpo.md.
"""

from ml_collections import ConfigDict

from configs.ladder import below, online
from rlhf_jax.algos.anchors import AnchorHParams
from rlhf_jax.algos.estimators import dr_grpo
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
        unset(dr_grpo.HParams),
        name='dr_grpo',
        **online(arg),
        group_size=2 if arg.smoke else 8,
        kl_coef=0.2,
        fixed_length=28,  # max_new_tokens
        num_epochs=2,
        num_minibatches=2,
    )
    return config
