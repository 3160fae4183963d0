"""What scores responses: reward models, and Python functions of the texts.

All become one kind of thing, a ``Scorer``. A reward model that reads the policy's
tokens scores them where they are, on the mesh; one with another tokenizer and a
function get the texts, which are decoded once per batch for all of them. ``check_…``
finds what is wrong before anything compiles. Functions are in
``stages/reward_function.py``, ratings by language models in ``stages/rating.py``; read
``stages/loop.py`` next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.checkpoint import ScoreFacts
from rlhf_jax.config import nearest
from rlhf_jax.data.chat import rendered
from rlhf_jax.data.examples import Dataset
from rlhf_jax.data.formats import Judged
from rlhf_jax.data.joining import find_joint, last_id, open_prompts
from rlhf_jax.data.rows import Row, step_rows
from rlhf_jax.data.tokenizer import (
    check_vocabulary,
    encode,
    frame,
    load_scoring_tokenizer,
    truncate,
)
from rlhf_jax.responses import Responses, Scored, Scorer
from rlhf_jax.rewards import (
    combine_members,
    combine_steps,
    ensemble_scores,
    reward_model_scores,
)
from rlhf_jax.stages.judging import Judge
from rlhf_jax.stages.rating import check_rating, make_rater
from rlhf_jax.stages.reward_function import (
    RewardFunction,
    check_function,
    score_by_function,
)
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import RewardSource
from rlhf_jax.stages.sources import (
    check_trained_score,
    frozen,
    load_ensemble,
    load_scalar,
    resolve,
)
from rlhf_jax.types import Array, Params

SHORTEST_BUCKET = 32  # tokens; texts are padded to the next power of two
# Tokenises responses: a policy that spells a control token does not write one.
PLAIN = functools.partial(encode, plain=True)


@dataclasses.dataclass(frozen=True)
class Reward:
    """A checked source of scores; its model is not loaded yet."""

    where: str  # how the user knows it, e.g. 'config.ppo.rewards.rm'
    source: RewardSource
    fn: RewardFunction | None
    tokenizer: Any | None  # of its model, where that is not the run's
    judge: Judge | None = None  # a language model that is asked for a rating


def check_reward(
    run: Run,
    where: str,
    source: RewardSource,
    longest: int,
    prompts: Sequence[Dataset] = (),
) -> Reward:
    """Checks a source before anything compiles.

    Args:
        run: the run.
        where: the place of the source in the config.
        source: what the user wrote there.
        longest: tokens of prompt and response together.
        prompts: the data sets whose responses it will score.

    Raises:
        ValueError: not exactly one of model and fn, a rating by a function, one that
            :func:`check_function` refuses, a model without a trained head, with too few
            embeddings or positions, a way to combine members where there is one alone,
            or texts to score in several processes.
    """
    if (source.model is None) == (source.fn is None):
        raise ValueError(
            f'{where} has model={source.model!r} and fn={source.fn!r}; set exactly one'
        )
    if source.fn is not None and source.rating is not None:
        raise ValueError(
            f'{where} has fn={source.fn!r} and rating, which a language model gives; '
            'name one as model in the place of fn, or remove rating'
        )
    fn = tokenizer = judge = None
    if source.combine is not None:
        _check_ensemble(run, where, source)
    if source.fn is not None:
        fn = check_function(where, source, prompts)
    elif source.rating is not None:
        judge = check_rating(run, where, source, longest)
    else:
        try:
            tokenizer = _check_model(run, source, longest)
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from error
    asks = (fn, tokenizer, source.steps, judge)
    reads_texts = any(x is not None for x in asks)
    if jax.process_count() > 1 and reads_texts:
        raise ValueError(
            f'{where} scores texts, which one process alone can do, and this run has '
            f"{jax.process_count()}; use a reward model with the policy's tokenizer, "
            'or a single process'
        )
    return Reward(where, source, fn, tokenizer, judge)


def check_rewards(
    run: Run,
    where: str,
    rewards: Mapping[str, RewardSource],
    longest: int,
    prompts: Sequence[Dataset],
    reserved: Sequence[str] = (),
) -> dict[str, Reward]:
    """:func:`check_reward` for the rewards of a stage, by name.

    Args:
        run: the run.
        where: the section of the stage, e.g. ``'config.ppo'``.
        rewards: its setting ``rewards``.
        longest: tokens of prompt and response together.
        prompts: the data sets whose responses they will score.
        reserved: names of settings beside ``rewards`` that score too.

    Raises:
        ValueError: a name that is reserved, or a reward that cannot score.
    """
    for name in rewards.keys() & {*reserved}:
        raise ValueError(
            f'{where}.rewards.{name}: that name is kept for {where}.{name}; take '
            'another'
        )
    return {
        name: check_reward(run, f'{where}.rewards.{name}', source, longest, prompts)
        for name, source in rewards.items()
    }


def weights_of(rewards: Mapping[str, Reward]) -> dict[str, float]:
    """Of the rewards in their sum, by name."""
    return {name: reward.source.weight for name, reward in rewards.items()}


def _check_ensemble(run: Run, where: str, source: RewardSource) -> None:
    if source.fn is None and resolve(run, source.model).members > 1:
        return
    what = f'{source.fn} is a function'
    if source.fn is None:
        what = f'{source.model!r} is a single model'
    raise ValueError(
        f'{where}.combine={source.combine!r} is for the members of an ensemble, and '
        f'{what}; remove it, or train an ensemble: --config.rm.members=5'
    )


def _check_model(run: Run, source: RewardSource, longest: int) -> Any | None:
    """The tokenizer of the model, where that is not the run's."""
    if source.args:
        raise ValueError(
            f'args={source.args}, but a model takes none; remove them, or name a '
            'function in the place of model'
        )
    model = resolve(run, source.model)
    check_trained_score(model, 'model')
    tokenizer = model.tokenizer
    if source.tokenizer is not None:
        tokenizer = load_scoring_tokenizer(source.tokenizer)
    _check_scores(model.facts, source)
    config = model.config('reward')
    if tokenizer is not None and not reads_alike(tokenizer, run.tokenizer):
        check_vocabulary(tokenizer, config.vocab_size)
        return tokenizer
    check_vocabulary(run.tokenizer, config.vocab_size)
    if longest > config.max_positions:
        raise ValueError(
            f'prompts and responses of {longest} tokens exceed the '
            f'{config.max_positions} positions of its model; shorten prompt_buckets or '
            'max_new_tokens'
        )
    return None


def _check_scores(facts: ScoreFacts, source: RewardSource) -> None:
    """What is said of the model's scores must fit what they are."""
    if facts.heads and not source.heads:
        raise ValueError(
            f'the model has the scores {", ".join(facts.heads)}; say how they add up, '
            f'such as heads={dict.fromkeys(facts.heads, 1.0)!r}'
        )
    for name in source.heads or ():
        if name not in facts.heads:
            hint = nearest(name, facts.heads) if facts.heads else '; it has one score'
            raise ValueError(f'heads: the model has no score {name!r}{hint}')
    if facts.step_separator is not None and source.steps is None:
        raise ValueError(
            'the model scores the steps of a response; say how they become one score, '
            "such as steps=dict(combine='min')"
        )
    if source.steps is None:
        return
    separator = source.steps.separator or facts.step_separator
    if separator is None:
        raise ValueError(
            'steps: the model does not say what separates them; set '
            "steps=dict(separator='\\n', …), if it scores steps"
        )
    if facts.step_separator not in (None, separator):
        raise ValueError(
            f'steps.separator={separator!r}, but the model was trained with '
            f'{facts.step_separator!r}; leave it out'
        )


def reads_alike(one: Any, other: Any) -> bool:
    """Whether two tokenizers give a text the same ids, beginning and end included; the
    tokens that they pad with stand in no text.
    """
    pads = {one.pad_token, other.pad_token}
    ids, others = (
        {token: i for token, i in tokenizer.get_vocab().items() if token not in pads}
        for tokenizer in (one, other)
    )
    return ids == others and frame(one) == frame(other)


def make_scorers(run: Run, rewards: Mapping[str, Reward]) -> dict[str, Scorer]:
    """Loads the models; a compiled program and its parameters per reward model."""
    return {name: _make_scorer(run, reward) for name, reward in rewards.items()}


def _make_scorer(run: Run, reward: Reward) -> Scorer:
    if reward.fn is not None:
        return functools.partial(score_by_function, reward.fn)
    if reward.judge is not None:
        return make_rater(run, reward.judge)
    if reward.source.steps is not None:
        return _make_step_scorer(run, reward)
    score, limit = _load_scores(run, reward)
    if reward.tokenizer is None:
        return lambda responses: score(
            responses.generation.tokens, responses.generation.mask
        )
    return functools.partial(_score_texts, score, reward.tokenizer, limit)


def _load_scores(run: Run, reward: Reward) -> tuple[Callable[..., Scored], int]:
    """(tokens, mask) -> Scored by a reward model or an ensemble, and its positions."""
    source, inputs = reward.source, ('params', 'batch', 'batch')
    named = resolve(run, source.model)
    if named.members == 1:
        model, params = load_scalar(run, source.model, run.key(reward.where), 'reward')
        params = frozen(run, model, params)
        # [H] as the heads stand in the model; a single score stays as it is.
        weights = np.asarray([(source.heads or {}).get(h, 0.0) for h in model.heads])

        def scored(params: Params, tokens: Array, mask: Array) -> Array:
            scores = reward_model_scores(params, tokens, mask, model=model)
            return scores @ weights.astype(np.float32) if model.heads else scores

        compiled = run.compile(
            scored,
            inputs=inputs,
            outputs=('batch',),
            donate=(),
        )
        return lambda *text: Scored(compiled(params, *text)), model.config.max_positions
    model, params = load_ensemble(run, named)
    params = frozen(run, model, params)

    def combine(params: Params, tokens: Array, mask: Array) -> tuple[Array, ...]:
        members = ensemble_scores(params, tokens, mask, model=model)
        combined = combine_members(
            members, source.combine or 'mean', source.uncertainty_coef
        )
        return *combined, members

    compiled = run.compile(
        combine, inputs=inputs, outputs=('batch', 'batch', 'batch'), donate=()
    )

    def score(tokens: Array, mask: Array) -> Scored:
        scores, deviation, members = compiled(params, tokens, mask)
        return Scored(scores, deviation=deviation, members=members)

    return score, model.config.max_positions


def _score_texts(
    score: Callable[..., Scored], tokenizer: Any, limit: int, responses: Responses
) -> Scored:
    ended = np.asarray(responses.generation.ended)[responses.real]
    templated = _templated(tokenizer, responses)
    tokens, mask, truncated = text_batch(
        tokenizer, responses.prompts, responses.texts, ended, limit, templated
    )
    scored = score(responses.spread(tokens), responses.spread(mask))
    return scored._replace(truncated=truncated)


def _templated(tokenizer: Any, responses: Responses) -> list[bool] | None:
    """Which prompts the tokenizer's chat template has written, where that is the
    policy's too; None where it has to be seen in the texts.
    """
    same = tokenizer.chat_template == responses.tokenizer.chat_template
    return responses.templated if same else None


def _make_step_scorer(run: Run, reward: Reward) -> Scorer:
    source = reward.source
    model, params = load_scalar(run, source.model, run.key(reward.where), 'reward')
    params = frozen(run, model, params)
    tokenizer = reward.tokenizer or run.tokenizer
    trained = resolve(run, source.model).facts.step_separator
    separator, limit = source.steps.separator or trained, model.config.max_positions

    def scored(params: Params, tokens: Array, mask: Array, ends: Array) -> Array:
        values = model.apply({'params': params}, tokens, mask)
        return combine_steps(values, ends, source.steps.combine)

    compiled = run.compile(
        scored,
        inputs=('params', 'batch', 'batch', 'batch'),
        outputs=('batch',),
        donate=(),
    )

    def score(responses: Responses) -> Scored:
        ended = np.asarray(responses.generation.ended)[responses.real]
        *arrays, truncated = step_batch(
            tokenizer,
            responses.prompts,
            responses.texts,
            ended,
            limit,
            separator,
            _templated(tokenizer, responses),
        )
        scores = compiled(params, *(responses.spread(x) for x in arrays))
        return Scored(scores, truncated)

    return score


def step_batch(
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    ended: Sequence[bool],
    limit: int,
    separator: str,
    templated: Sequence[bool] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Texts in steps as a process reward model of this tokenizer was trained on them.

    Blank steps are left out. The last step ends at EOS, or where the response was cut.

    Args:
        tokenizer: of the reward model.
        prompts: N texts.
        responses: N texts, without special tokens.
        ended: N, whether the response came to its end.
        limit: tokens of prompt and response.
        separator: between two steps.
        templated: as in :func:`text_batch`.

    Returns:
        (tokens [N, T] int32, mask [N, T] bool, last tokens of steps [N, T] bool, how
        many texts were cut).
    """
    before, end = frame(tokenizer)
    records = []
    whole = _known_templated(tokenizer, prompts, templated)
    for prompt, response, is_whole in zip(prompts, responses, whole):
        steps = [step for step in response.split(separator) if step.strip()]
        named = {str(i): step for i, step in enumerate(steps)}
        records.append(Judged(prompt, named, None, {}, 'a response', is_whole))
    rows, places, truncated = [], [], 0
    found = step_rows(records, tokenizer, separator, PLAIN)
    opened = open_prompts(tokenizer, prompts, whole)
    for prompt, row, is_over in zip(opened, found, ended):
        if not isinstance(row, Row):  # nothing but blanks: EOS is the one step
            row = Row(prompt, [[end]], [True], end)
        prompt, answer = row.prompt, row.answers[0]
        if len(prompt) + len(answer) > limit:
            prompt, (answer,) = truncate(prompt, [answer], limit, before, end)
            truncated += 1
        if not is_over and len(answer) > 1:
            answer = answer[:-1]
        last = len(answer) - 1
        ends = [place for place in row.steps if place < last]
        rows.append(prompt + answer)
        places.append([len(prompt) + place for place in (*ends, last)])
    tokens, mask = _padded(rows, limit)
    step_mask = np.zeros_like(mask)
    for i, ends in enumerate(places):
        step_mask[i, ends] = True
    return tokens, mask, step_mask, truncated


def text_batch(
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    ended: Sequence[bool],
    limit: int,
    templated: Sequence[bool] | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Texts as a reward model of this tokenizer was trained on them.

    Prompt and response are tokenised and cut as by ``data.pipeline.load_comparisons``;
    what ends a text is left off where the response did not end. A response that spells
    a special token has the characters, not the token.

    Args:
        tokenizer: of the reward model.
        prompts: N texts.
        responses: N texts, without special tokens.
        ended: N, whether the response came to its end.
        limit: tokens of prompt and response.
        templated: N, whether a chat template wrote the prompt; None where that is seen
            in the text (:func:`rlhf_jax.data.chat.rendered`).

    Returns:
        (tokens [N, T] int32, mask [N, T] bool, how many texts were cut); right-padded,
        T a power of two or ``limit``.
    """
    before, end = frame(tokenizer)
    rows, truncated = [], 0
    opened = open_prompts(
        tokenizer, prompts, _known_templated(tokenizer, prompts, templated)
    )
    answers = find_joint(tokenizer).encode(
        [last_id(prompt) for prompt in opened], responses, PLAIN
    )
    for prompt, answer, is_over in zip(opened, answers, ended):
        answer = [*answer, end]
        if len(prompt) + len(answer) > limit:
            prompt, (answer,) = truncate(prompt, [answer], limit, before, end)
            truncated += 1
        rows.append(prompt + answer if is_over else prompt + answer[:-1])
    return *_padded(rows, limit), truncated


def _known_templated(
    tokenizer: Any, prompts: Sequence[str], templated: Sequence[bool] | None
) -> Sequence[bool]:
    return rendered(tokenizer, prompts) if templated is None else templated


def _padded(rows: list[list[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask [N, T], T a power of two or ``limit``."""
    lengths = np.asarray([len(row) for row in rows])
    bucket = max(SHORTEST_BUCKET, 1 << int(lengths.max() - 1).bit_length())
    mask = np.arange(min(bucket, limit)) < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask
