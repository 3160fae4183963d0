"""What ppo is told, read and checked before anything compiles.

Read ``stages/online.py`` next, which runs it.
"""

from __future__ import annotations

import dataclasses

from rlhf_jax import sharding
from rlhf_jax.algos.ppo import PPOHParams
from rlhf_jax.config import build
from rlhf_jax.data import pipeline
from rlhf_jax.data.tokenizer import stop_ids
from rlhf_jax.evals.policy import GOLD
from rlhf_jax.generate import Sampling, sampling
from rlhf_jax.optim import make_schedule
from rlhf_jax.stages import scoring
from rlhf_jax.stages.run import Run, check_policy, model_config
from rlhf_jax.stages.settings import OnlineSettings


@dataclasses.dataclass(frozen=True)
class Online:
    """A checked stage, ready to train."""

    stage: str
    settings: OnlineSettings
    hp: PPOHParams
    prompts: pipeline.Dataset
    eval_prompts: pipeline.Dataset
    ptx: pipeline.Dataset | None
    rewards: dict[str, scoring.Reward]  # by name, and GOLD where there is a judge

    @property
    def weights(self) -> dict[str, float]:
        """Of the rewards in their sum; the judge has none."""
        return {name: r.weight for name, r in self.settings.rewards.items()}


def load_online(run: Run, stage: str) -> Online:
    """Data and settings of ppo; see ``OnlineSettings`` and ``PPOHParams``."""
    where = f'config.{stage}'
    settings, hp = build(run.config[stage], OnlineSettings, PPOHParams, where=where)
    parts = hp.num_minibatches * hp.num_microbatches
    sharding.check_batch_size(settings.batch_size, run.mesh, where, parts)
    devices = run.mesh.shape['data'] * run.mesh.shape['fsdp']
    if settings.eval_batch_size % devices:
        raise ValueError(
            f'{where}.eval_batch_size={settings.eval_batch_size} is not divisible by '
            f'{devices} devices; use '
            f'{-(-settings.eval_batch_size // devices) * devices}'
        )
    longest = settings.prompt_buckets[-1] + settings.max_new_tokens
    rewards = _check_rewards(run, where, settings, longest)
    _check_critic(run, where, settings)
    check_policy(run, f'{where}.init', settings.init)
    if settings.base is not None:
        check_policy(run, f'{where}.base', settings.base)
    for name in ('init', 'critic', 'base'):
        if getattr(settings, name) is None:
            continue
        config = model_config(run, getattr(settings, name))
        pipeline.check_vocabulary(run.tokenizer, config.vocab_size)
        if longest > config.max_positions:
            raise ValueError(
                f'{where}: prompts of {settings.prompt_buckets[-1]} and responses of '
                f'{settings.max_new_tokens} tokens exceed the {config.max_positions} '
                'positions '
                f'of the {name} model; shorten prompt_buckets or max_new_tokens'
            )
    ptx = None
    if hp.ptx_coef:
        if settings.ptx is None:
            raise ValueError(
                f'{where}.ptx_coef={hp.ptx_coef} needs data: set {where}.ptx'
            )
        ptx = _load_ptx(run, settings)
    limits = {
        'max_prompt_length': settings.prompt_buckets[-1],
        'overlong': settings.overlong,
        'on_bad': settings.on_bad,
    }
    make_schedule(settings.optim, settings.num_rollouts)
    return Online(
        stage=stage,
        settings=settings,
        hp=hp,
        prompts=pipeline.load_prompts(settings.prompts, run.tokenizer, **limits),
        eval_prompts=pipeline.load_prompts(
            settings.eval_prompts, run.tokenizer, **limits
        ),
        ptx=ptx,
        rewards=rewards,
    )


def _check_rewards(
    run: Run, where: str, settings: OnlineSettings, longest: int
) -> dict[str, scoring.Reward]:
    if not settings.rewards:
        raise ValueError(
            f'{where}.rewards is empty, so that there is nothing to optimise; set for '
            "instance rewards={'rm': dict(model='rm')}"
        )
    if GOLD in settings.rewards:
        raise ValueError(
            f'{where}.rewards.{GOLD}: that name is kept for the judge; take another'
        )
    sources = {f'{where}.rewards.{k}': (k, v) for k, v in settings.rewards.items()}
    if settings.gold is not None:
        sources[f'{where}.{GOLD}'] = GOLD, settings.gold
    return {
        name: scoring.check_reward(run, place, source, longest)
        for place, (name, source) in sources.items()
    }


def _check_critic(run: Run, where: str, settings: OnlineSettings) -> None:
    """A critic reads the policy's tokens, from left to right."""
    tokenizer = scoring.model_tokenizer(run, settings.critic)
    is_foreign = (
        tokenizer is not None and tokenizer.get_vocab() != run.tokenizer.get_vocab()
    )
    is_encoder = model_config(run, settings.critic).attention == 'bidirectional'
    if is_foreign or is_encoder:
        reason = 'is an encoder' if is_encoder else 'has another tokenizer'
        raise ValueError(
            f'{where}.critic={settings.critic!r} {reason}, but the critic reads the '
            "policy's tokens one after the other; start it from the policy: "
            f'{where}.critic={settings.init!r}'
        )


def _load_ptx(run: Run, settings: OnlineSettings) -> pipeline.Dataset:
    length = settings.ptx_buckets[-1]
    if settings.ptx_kind == 'text':
        return pipeline.load_texts(settings.ptx, run.tokenizer, max_length=length)
    return pipeline.load_demonstrations(
        settings.ptx,
        run.tokenizer,
        max_length=length,
        loss_on='response',
        overlong=settings.overlong,
        on_bad=settings.on_bad,
    )


def stop_rules(run: Run, job: Online, temperature: float) -> Sampling:
    """The sampling parameters of a job: its stop sequences as tokens, all EOS ids."""
    settings = job.settings
    return sampling(
        eos_ids=[*pipeline.eos_ids(run.tokenizer), *settings.extra_eos_ids],
        temperature=temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_sequences=[
            ids
            for text in settings.stop_sequences
            for ids in stop_ids(run.tokenizer, text)
        ],
        stop_after=settings.stop_after,
    )
