"""A language model rates responses: a reward without a reward model.

    reward = Σ_k k·p(k),  k = lowest, …, highest

p is how likely the model is to say each rating behind a filled prompt file, normalised
over the ratings.

Source: Lee et al. 2023, arXiv 2309.00267, §3.3 (direct RLAIF).
Deviations: they map the ratings to [−1, 1]; here they stay as they are, and ``weight``
says what they count. Read ``stages/scoring.py`` next.
"""

from __future__ import annotations

import numpy as np

from rlhf_jax.data.chat import readable
from rlhf_jax.labels.judge import RATE, read_prompt
from rlhf_jax.responses import Responses, Scored, Scorer
from rlhf_jax.stages.judging import Judge, check_judge, load_judge, tokens_of
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.settings import RatingSettings, RewardSource


def check_rating(run: Run, where: str, source: RewardSource, longest: int) -> Judge:
    """Checks a language model that shall rate, before anything compiles.

    Args:
        run: the run.
        where: the place of the source in the config.
        source: what the user wrote there.
        longest: tokens of prompt and response together, by the run's tokenizer.

    Raises:
        ValueError: settings that it does not read, ratings that are none, a prompt file
            that lacks a place, a model that cannot judge, or buckets that are too short
            for the prompt file with a prompt and a response.
    """
    unread = ('args', 'tokenizer', 'heads', 'steps', 'combine')
    if given := [name for name in unread if getattr(source, name)]:
        raise ValueError(
            f'{where} has rating and {given[0]}, which a language model that rates '
            'does not read; remove it'
        )
    how = source.rating
    if how.highest <= how.lowest:
        raise ValueError(
            f'{where}.rating: highest={how.highest} is not above lowest={how.lowest}'
        )
    prompt = read_prompt(how.prompt_file or RATE, ('prompt', 'response'))
    labels = [f' {number}' for number in range(how.lowest, how.highest + 1)]
    judge = check_judge(run, f'{where}.model', source.model, how, prompt, labels)
    if judge.tokenizer.get_vocab() == run.tokenizer.get_vocab():
        (frame,) = tokens_of(judge, [_question(how, '', '')])
        needed = frame + longest
        if needed > how.judge_buckets[-1]:
            raise ValueError(
                f'{where}.rating.judge_buckets={how.judge_buckets}: {prompt.where} has '
                f'{frame} tokens with a label, prompts and responses up to {longest}; '
                f'use a last bucket of {needed}'
            )
    return judge


def make_rater(run: Run, judge: Judge) -> Scorer:
    """Loads the model; the scores are in units of the rating."""
    key = run.key(judge.where)
    ask = load_judge(run, judge, key)
    numbers = np.asarray([int(label) for label in judge.labels])

    def score(responses: Responses) -> Scored:
        prompts = [
            readable(run.tokenizer, prompt) if whole else prompt
            for prompt, whole in zip(responses.prompts, responses.templated)
        ]
        pairs = zip(prompts, responses.texts)
        said, _ = ask([_question(judge.hp, p, text) for p, text in pairs], key)
        return Scored(responses.spread((said @ numbers).astype(np.float32)))

    return score


def _question(how: RatingSettings, prompt: str, response: str) -> dict[str, str]:
    """What stands at the places of the prompt file."""
    scale = {'lowest': str(how.lowest), 'highest': str(how.highest)}
    return {'prompt': prompt, 'response': response, **scale}
