"""SFT → reward model → PPO on the embedded data, in one file, read from top to bottom.

    python -m examples.ppo_in_one_file
    python -m examples.ppo_in_one_file --sft_steps 50 --rollouts 20

What ``configs/quickstart.py`` runs in stages, with checkpoints and a report, stands
here as a script over the library's public functions: a small language model that knows
the text of a tiny world learns to summarise its articles as imperfect labellers do,
a reward model learns which of two summaries they prefer, and PPO raises that reward.
The gold reward, which nothing here is trained on, says whether it helped.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import (
    ActorCritic,
    CausalLM,
    Generation,
    PPOHParams,
    PPOState,
    RMHParams,
    ScalarModel,
    ScoreHParams,
    Scores,
    SFTHParams,
    TrainState,
    generate,
    hf,
    ppo_step,
    prepare,
    response_logprobs,
    reward_model_scores,
    rm_step,
    sampling,
    sft_step,
    shape_scores,
    start_from,
    train_state,
)
from rlhf_jax.data import pipeline
from rlhf_jax.data.joining import decode_behind
from rlhf_jax.data.stops import eos_ids
from rlhf_jax.datasets import tiny_tldr
from rlhf_jax.evals.policy import win_rate

DATA = 'tfds:tiny_tldr'
LENGTH = 88  # tokens of an article with its summary
PROMPT, RESPONSE = 56, 28  # tokens


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The settings; those that have a value are the quickstart's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--sft_steps', type=int, default=150)
    parser.add_argument('--rm_steps', type=int, default=450)
    parser.add_argument('--rollouts', type=int, default=80)
    parser.add_argument('--batch_size', type=int, default=32, help='of SFT and RM')
    parser.add_argument('--rollout_size', type=int, default=64)
    parser.add_argument('--eval_prompts', type=int, default=1000)
    return parser.parse_args(arguments)


def compiled(function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """A pure function with its static arguments bound, compiled."""
    return jax.jit(functools.partial(function, **static))


def adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with a clip of the gradient's norm, its rate falling to 0."""
    schedule = optax.cosine_decay_schedule(rate, max(steps, 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, eps=1e-5))


def train(
    name: str,
    step: Callable[..., Any],
    state: TrainState,
    batches: Iterator[Any],
    steps: int,
) -> TrainState:
    """One update for every batch; prints the metrics now and then."""
    for i in range(steps):
        state, metrics = step(state, next(batches))
        if i % 50 == 0 or i == steps - 1:
            shown = {k: float(v.value()) for k, v in metrics.items()}
            parts = [f'{k} {shown[k]:.3f}' for k in ('loss', 'accuracy') if k in shown]
            print(f'{name} step {i + 1}:', ', '.join(parts))
    return state


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the ladder; returns what the last lines print."""
    args = parse(arguments)
    keys = iter(jax.random.split(jax.random.PRNGKey(args.seed), 5))

    # 1. The models. ``policy`` and ``scorer`` hold no numbers: parameters are dicts
    #    that go in and come out. 'tiny' is the base model that the package ships.
    tokenizer = tiny_tldr.tokenizer()
    # Few layers are faster unrolled on a CPU.
    config = dataclasses.replace(hf.load_config('tiny'), scan_unroll=4)
    policy, scorer = CausalLM(config), ScalarModel(config)
    base = hf.load_params('tiny', config, head='lm')

    # 2. The data: records become token ids here, batches are functions of the seed.
    def stream(data: Any, size: int, length: int) -> Iterator[Any]:
        return pipeline.batches(data, size, seed=args.seed, buckets=(length,))

    demonstrations = pipeline.load_demonstrations(
        f'{DATA}/demonstrations:train', tokenizer, max_length=LENGTH
    )
    comparisons = pipeline.load_comparisons(
        f'{DATA}/comparisons:train', tokenizer, max_length=LENGTH
    )
    prompts, held_out = (
        pipeline.load_prompts(
            f'{DATA}/prompts:{part}', tokenizer, max_prompt_length=PROMPT
        )
        for part in ('train', f'test[:{args.eval_prompts}]')
    )

    # 3. SFT: the mean log-likelihood of the labellers' summaries.
    tx = adam(1.5e-3, args.sft_steps)
    sft = train(
        'sft',
        compiled(sft_step, model=policy, tx=tx, hp=SFTHParams()),
        train_state(base, tx, next(keys)),
        stream(demonstrations, args.batch_size, LENGTH),
        args.sft_steps,
    ).params

    # 4. The reward model: the SFT model with a new head, on which of two they prefer.
    tx = adam(1.2e-3, args.rm_steps)
    some = np.zeros((1, 2), np.int32)
    fresh = scorer.init(next(keys), some, some == 0)['params']
    reward = train(
        'rm',
        compiled(rm_step, model=scorer, tx=tx, hp=RMHParams()),
        train_state(start_from(fresh, sft), tx, next(keys)),
        stream(comparisons, args.batch_size, LENGTH),
        args.rm_steps,
    ).params

    # 5. PPO. A rollout: responses → scores → ``prepare`` (KL to the reference policy,
    #    values, advantages; once) → ``ppo_step`` (all epochs and minibatches).
    hp = PPOHParams(kl_coef=0.2, num_epochs=2, num_minibatches=2)
    shaping = ScoreHParams(missing_eos_penalty=1.0)
    models = ActorCritic(policy=policy, critic=scorer)
    tx = adam(5e-4, args.rollouts * hp.num_epochs * hp.num_minibatches)
    # The critic starts from the reward model. Nothing is changed in place: ``sft``
    # stays the reference policy, ``reward`` the judge.
    both, kl_coef = {'policy': sft, 'critic': reward}, jnp.float32(hp.kl_coef)
    state = train_state(both, tx, next(keys), of=PPOState, kl_coef=kl_coef)
    how = sampling(eos_ids=eos_ids(tokenizer), temperature=hp.temperature)
    write = compiled(generate, model=policy, max_new_tokens=RESPONSE)
    score = compiled(reward_model_scores, model=scorer)
    ready = compiled(prepare, model=models, hp=hp)
    step = compiled(ppo_step, model=models, tx=tx, hp=hp)
    draws = next(keys)

    def respond(params: Any, batch: Any, key: Any) -> Generation:
        rows = jnp.arange(len(batch.tokens))  # every row draws from a key of its own
        return write(params, batch.tokens, batch.mask, rows, key, how)

    rollouts = stream(prompts, args.rollout_size, PROMPT)
    for i in range(args.rollouts):
        key = jax.random.fold_in(draws, i)
        responses = respond(state.params['policy'], next(rollouts), key)
        scores = shape_scores(
            score(reward, responses.tokens, responses.mask),
            responses.ended,
            responses.response_mask.sum(-1),
            hp=shaping,
            max_length=RESPONSE,
        )
        rollout, before = ready(state, sft, responses, Scores(scores))
        state, _ = step(state, rollout)
        if i % 10 == 0 or i == args.rollouts - 1:
            score_now, kl_now = (
                float(before[f'objective/{name}'].value()) for name in ('scores', 'kl')
            )
            print(f'ppo rollout {i + 1}: score {score_now:.3f}, KL {kl_now:.3f} nats')

    # 6. Evaluation: both policies answer the held-out prompts with the same keys.
    ratios = compiled(response_logprobs, model=policy, temperature=hp.temperature)

    def evaluate(params: Any) -> tuple[np.ndarray, float]:
        """Gold rewards [N], and the mean KL to the SFT policy in nats per response."""
        gold, kl = [], []
        for batch in pipeline.eval_batches(held_out, args.rollout_size, (PROMPT,)):
            responses = respond(params, batch, jax.random.fold_in(draws, 10**6))
            difference = ratios(params, responses)[0] - ratios(sft, responses)[0]
            real = np.flatnonzero(batch.index >= 0)  # others only fill up the batch
            kl.append(np.asarray(difference.sum(-1))[real])
            tokens, mask = jax.device_get((responses.tokens, responses.response_mask))
            texts = decode_behind(
                tokenizer,
                batch.tokens[real, -1].tolist(),
                [tokens[row, mask[row]] for row in real],
            )
            asked = [held_out.records[row].prompt for row in batch.index[real]]
            gold.append(tiny_tldr.gold(asked, texts))
        return np.concatenate(gold), float(np.concatenate(kl).mean())

    (before, _), (after, kl) = evaluate(sft), evaluate(state.params['policy'])
    rate, (low, high), _ = win_rate(after, before)
    print(f'gold reward {before.mean():.2f} → {after.mean():.2f}, KL {kl:.1f} nats')
    print(f'win rate {rate:.3f} [{low:.3f}, {high:.3f}] of {len(after)} prompts')
    return {
        'gold_before': float(before.mean()),
        'gold_after': float(after.mean()),
        'kl': kl,
        'win_rate': rate,
    }


if __name__ == '__main__':
    main()
