"""Online DPO: a preference loss on the policy's own samples.

    python -m rlhf_jax.main --config configs/online_dpo.py --workdir runs/online_dpo
    python -m rlhf_jax.main --config configs/online_dpo.py:from=RUN --workdir DIR

The reward model compares the best with the worst of ``group_size`` responses to every
prompt; the loss is that of ``preference/``, on data that follow the policy. Guo et al.
2024, arXiv 2402.04792; Xiong et al. 2023, arXiv 2312.11456.

Arguments: ``loss`` a pairwise module of rlhf_jax/preference, or your own;
``from`` a finished run to take sft and rm from; ``smoke``, ``seed=N``.
Equation, defaults and what goes wrong: docs/algorithms/online_preference.md.
"""

from ml_collections import ConfigDict

from configs.ladder import arguments, below, online
from rlhf_jax.stages.kinds import stage


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = arguments(arg, loss='dpo')
    config = below('online_preference', arg)
    config.online_preference = stage(
        'online_preference',
        name=arg.loss,
        **online(arg),
        group_size=2 if arg.smoke else 4,
        num_epochs=2,
        num_minibatches=2,
    )
    # Labels are certain, however near the scores, so that margins grow without end: at
    # the others' rate and DPO's own β of 0.1 the policy runs away (docs/recipes.md).
    if not (arg.model or arg.learning_rate):
        config.online_preference.optim.learning_rate = 1e-4
    if arg.loss == 'dpo':
        config.online_preference.beta = 0.5
    return config
