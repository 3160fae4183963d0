"""Expert iteration: imitate the best of one's own samples.

    python -m rlhf_jax.main --config configs/expert_iteration.py --workdir DIR
    python -m rlhf_jax.main --config configs/expert_iteration.py:from=RUN --workdir DIR

Best-of-n by the reward model, distilled into the policy rollout by rollout. No KL
holds the policy but the choice among its own samples. Anthony et al. 2017, arXiv
1705.08439; Dong et al. 2023 (RAFT), arXiv 2304.06767.

Arguments: ``from`` a finished run to take sft and rm from; ``smoke``, ``seed=N``.
Equation, defaults and what goes wrong: docs/algorithms/expert_iteration.md.
"""

from ml_collections import ConfigDict

from configs.ladder import arguments, below, online
from rlhf_jax.stages.kinds import stage


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = arguments(arg)
    config = below('expert_iteration', arg)
    config.expert_iteration = stage(
        'expert_iteration',
        **online(arg),
        group_size=2 if arg.smoke else 8,
        num_epochs=1,
    )
    # Nothing anchors the policy but its own samples: the others' rate drifts.
    if not (arg.model or arg.learning_rate):
        config.expert_iteration.optim.learning_rate = 1e-4
    return config
