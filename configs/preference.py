"""Preference optimisation without a reward model, on the embedded data set.

    python -m rlhf_jax.main --config configs/preference.py:loss=dpo --workdir runs/dpo
    python -m rlhf_jax.main --config configs/preference.py:smoke --workdir runs/smoke

The policy of the quickstart (sft) learns from the comparisons directly, and
is measured as the quickstart's PPO is, by the gold reward on the same prompts.

Arguments: ``loss`` a module of rlhf_jax/preference, or package.module for one of your
own; ``from`` a finished run to start from, e.g. runs/quickstart, so that a sweep does
not fine-tune again; ``smoke`` (about a minute), ``seed=N``. What a
loss can be told stands in its HParams: --config.preference.beta=0.3; what is not told
has the loss's own default.
"""

from ml_collections import ConfigDict

from configs.ladder import arguments, below, judged, rates, texts
from rlhf_jax.stages.kinds import stage


def get_config(arg: str | None = None) -> ConfigDict:
    """The run's config; see the module docstring for ``arg``."""
    arg = arguments(arg, loss='dpo')
    config = below('preference', arg)
    config.stages = tuple(stage for stage in config.stages if stage != 'rm')
    del config.rm
    reading = texts(arg, 'comparisons', 88)
    if arg.smoke:  # the reference policy looks at all of it once, before training
        reading['train'] = f'{reading["train"].partition("[")[0]}[:400]'
    *_, rate = rates(arg, 0.0, 0.0, 5e-4)
    config.preference = stage(
        'preference',
        **judged(arg) | reading,
        name=arg.loss,
        init=f'{arg["from"]}/sft' if arg['from'] else 'sft',
        num_steps=20 if arg.smoke else 450,
        batch_size=8 if arg.smoke else 32,
        optim=dict(learning_rate=rate, warmup_percent=5),
        loop=dict(eval_every_steps=100),
    )
    return config
