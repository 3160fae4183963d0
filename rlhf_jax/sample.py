"""Shows what the policy of a finished stage responds, and how it scores.

    python -m rlhf_jax.sample --workdir runs/quickstart --prompt "…"
    python -m rlhf_jax.sample --workdir runs/chat --stage sft --message "Hello!"
    python -m rlhf_jax.sample --workdir runs/chat --interactive
    python -m rlhf_jax.sample --workdir runs/quickstart --prompts jsonl:p.jsonl
    --out responses.jsonl

A ``--prompt`` is continued as it stands (a ``\\n`` in it is a line break); a
``--message`` is what the user says, in the words of the tokenizer's chat template, and
``--interactive`` asks for one after the other. ``--prompts`` is a data spec, of texts
or messages. Without any of them the first prompts of the run's ``samples.jsonl`` are
continued. Without ``--stage`` the policy that was finished last is taken; every reward
model of the run that gives a response a single score scores. ``--out`` writes JSON
lines, which other stages can read.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from rlhf_jax import checkpoint
from rlhf_jax.data import sources
from rlhf_jax.data.chat import open_prompt, rendered
from rlhf_jax.data.formats import to_prompt
from rlhf_jax.data.joining import decode_behind, open_prompts
from rlhf_jax.data.stops import eos_ids
from rlhf_jax.data.tokenizer import stage_tokenizer
from rlhf_jax.files import named_path, write_rows
from rlhf_jax.generate import generate, sampling
from rlhf_jax.models.heads import CausalLM, ScalarModel
from rlhf_jax.ops.rows import pad_left
from rlhf_jax.rewards import ensemble_scores, reward_model_scores
from rlhf_jax.stages.scoring import text_batch
from rlhf_jax.types import Generation, Params


def load_part(
    workdir: Path, stage: str, part: str
) -> tuple[CausalLM | ScalarModel, Params]:
    """A model and its parameters from a finished stage, on the first device; those of
    an ensemble are stacked.

    Raises:
        ValueError: the stage is unfinished or has no such part.
    """
    configs = checkpoint.load_model_configs(workdir / stage)
    if part not in configs:
        raise ValueError(
            f'{workdir / stage} has no {part!r}; it holds {", ".join(configs)}'
        )
    model = CausalLM(configs[part])
    if part != 'policy':
        facts = checkpoint.load_score_facts(workdir / stage, part)
        model = ScalarModel(configs[part], facts.heads)
    members = checkpoint.load_members(workdir / stage, part)
    tokens = jnp.zeros((1, 2), jnp.int32)

    def start(key: jax.Array) -> Params:
        return model.init(key, tokens, tokens == 0)['params']

    key = jax.random.PRNGKey(0)
    shapes = jax.eval_shape(start, key)
    if members > 1:
        shapes = jax.eval_shape(jax.vmap(start), jax.random.split(key, members))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
    )
    return model, checkpoint.load_params(workdir / stage, part, like)


class Sample(NamedTuple):
    """A response."""

    text: str
    ended: bool  # by itself
    scores: dict[str, float]  # by the name of the reward model


# (prompt, whether a chat template wrote it) -> its samples
Respond = Callable[[str, bool], list[Sample]]


def open_policy(
    workdir: Path,
    stage: str,
    *,
    num: int = 2,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    top_p: float | None = None,
    seed: int = 0,
) -> Respond:
    """Loads a policy and the reward models of its run.

    Args:
        workdir: of the run.
        stage: finished stage with a policy.
        num: samples per prompt.
        max_new_tokens: longest response.
        temperature: 0 is greedy.
        top_p: nucleus, None for off.
        seed: of the samples.

    Returns:
        A function, which raises ValueError for an empty prompt and one that is too
        long.

    Raises:
        ValueError: an unfinished stage, or one without a policy.
    """
    model, params = load_part(workdir, stage, 'policy')
    tokenizer = stage_tokenizer(workdir / stage)
    how = sampling(eos_ids=eos_ids(tokenizer), temperature=temperature, top_p=top_p)
    compiled = jax.jit(
        functools.partial(generate, model=model, max_new_tokens=max_new_tokens)
    )
    key, rows = jax.random.PRNGKey(seed), jnp.arange(num)
    scorers = {
        name: _scorer(workdir, name)
        for name in finished_stages(workdir, 'reward')
        if checkpoint.load_score_facts(workdir / name, 'reward')
        == checkpoint.ScoreFacts()
    }

    def respond(prompt: str, templated: bool) -> list[Sample]:
        (ids,) = open_prompts(tokenizer, [prompt], [templated])
        limit = model.config.max_positions - max_new_tokens
        if not ids:
            raise ValueError('the prompt is empty')
        if len(ids) > limit:
            raise ValueError(
                f'{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the '
                f'{model.config.max_positions} positions of the model'
            )
        # Few lengths are compiled.
        length = min(max(32, 1 << (len(ids) - 1).bit_length()), limit)
        tokens, mask = pad_left([ids] * num, length)
        result = compiled(params, tokens, mask, rows, key, how)
        kept = [
            row[real]
            for row, real in zip(
                np.asarray(result.tokens), np.asarray(result.response_mask)
            )
        ]
        texts = decode_behind(tokenizer, [ids[-1]] * num, kept)
        columns = {name: of(result, prompt, texts) for name, of in scorers.items()}
        return [
            Sample(text, bool(ended), {name: x[i] for name, x in columns.items()})
            for i, (text, ended) in enumerate(zip(texts, np.asarray(result.ended)))
        ]

    return respond


def sample(
    workdir: Path,
    stage: str,
    prompt: str,
    *,
    templated: bool | None = None,
    **how: Any,
) -> list[Sample]:
    """Continues a prompt.

    Args:
        workdir: of the run.
        stage: finished stage with a policy.
        prompt: as the data set writes it, e.g. ending in ``TL;DR:``.
        templated: whether a chat template wrote the prompt, so that nothing is put
            before it; None where that is seen in the text, which then begins as the
            tokenizer's template does.
        **how: see :func:`open_policy`.

    Raises:
        ValueError: an unfinished stage, an empty prompt, or one that is too long.
    """
    respond = open_policy(workdir, stage, **how)
    if templated is None:
        (templated,) = rendered(stage_tokenizer(workdir / stage), [prompt])
    return respond(prompt, templated)


def finished_stages(workdir: Path, part: str) -> list[str]:
    """The finished stages of a run that made a part, the last one at the end."""
    done = sorted(workdir.glob('*/done.json'), key=lambda path: path.stat().st_mtime)
    folders = [path.parent for path in done if (path.parent / 'model.json').exists()]
    return [f.name for f in folders if part in checkpoint.load_model_configs(f)]


def _scorer(
    workdir: Path, name: str
) -> Callable[[Generation, str, list[str]], list[float]]:
    """(responses, their prompt, their texts) -> scores by a reward model of the run; of
    an ensemble the mean of its members.
    """
    folder = workdir / name
    reward, params = load_part(workdir, name, 'reward')
    own = stage_tokenizer(folder) if (folder / 'tokenizer').exists() else None
    is_one = checkpoint.load_members(folder, 'reward') == 1

    def score(generation: Generation, prompt: str, texts: list[str]) -> list[float]:
        read, mask = generation.tokens, generation.mask
        if own is not None:  # not the policy's
            ended = np.asarray(generation.ended).tolist()
            prompts, limit = [prompt] * len(texts), reward.config.max_positions
            read, mask, _ = text_batch(own, prompts, texts, ended, limit)
        if is_one:
            values = reward_model_scores(params, read, mask, model=reward)
        else:
            values = ensemble_scores(params, read, mask, model=reward).mean(-1)
        return [float(value) for value in values]

    return score


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    logging.set_verbosity(logging.WARNING)  # Orbax reports every read at INFO
    values = flags.FLAGS
    console = Console()
    try:
        workdir = named_path(values.workdir)
        if (stage := values.stage) is None:
            policies = finished_stages(workdir, 'policy')
            if not policies:
                raise ValueError(f'{workdir} has no finished stage with a policy')
            stage = policies[-1]
        respond = open_policy(
            workdir,
            stage,
            num=values.num,
            max_new_tokens=values.max_new_tokens,
            temperature=values.temperature,
            top_p=values.top_p,
            seed=values.seed,
        )
        tokenizer = stage_tokenizer(workdir / stage)
        rows = []
        for prompt, templated in _prompts(values, workdir, stage, tokenizer):
            if templated is None:
                (templated,) = rendered(tokenizer, [prompt])
            found = respond(prompt, templated)
            if values.out is None:
                _show(console, prompt, found)
            flag = {'templated': True} if templated else {}
            for one in found:
                row = {'prompt': prompt, 'completion': one.text, 'ended': one.ended}
                scores = {f'score_{name}': x for name, x in one.scores.items()}
                rows.append(row | flag | scores | {'by': stage})
        if values.out is not None:
            write_rows(named_path(values.out), rows)
            print(f'wrote {len(rows)} responses to {values.out}')
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(1)


def _show(console: Console, prompt: str, found: list[Sample]) -> None:
    console.print(Panel(Text(prompt), title='prompt', title_align='left'))
    for one in found:
        mark = '' if one.ended else '  (did not end)'
        label = ', '.join(f'{name} {x:+.3f}' for name, x in one.scores.items())
        label = label or 'no reward model'
        console.print(f'{label}{mark}: {one.text}', markup=False)


def _prompts(
    values: Any, workdir: Path, stage: str, tokenizer: Any
) -> Iterator[tuple[str, bool | None]]:
    """What is asked for: prompts, and whether a chat template wrote them, if known."""
    given = ('prompt', 'message', 'prompts', 'interactive')
    if sum(bool(getattr(values, name)) for name in given) > 1:
        raise ValueError(f'give one of {", ".join("--" + name for name in given)}')

    def of_user(text: str) -> tuple[str, bool]:
        return open_prompt([{'role': 'user', 'content': text}], tokenizer), True

    if values.prompt is not None:
        # The shell's bytes are UTF-8, whatever the locale took them for.
        text = os.fsencode(values.prompt).decode('utf-8')
        yield text.replace('\\n', '\n'), None
    elif values.message is not None:
        yield of_user(os.fsencode(values.message).decode('utf-8'))
    elif values.prompts is not None:
        for record in sources.stream(values.prompts):
            prompt = to_prompt(record, tokenizer)
            yield prompt.prompt, prompt.templated
    elif values.interactive:
        is_chat = tokenizer.chat_template is not None
        print(f'{"A message" if is_chat else "A prompt"} a line; an empty one ends.')
        while text := sys.stdin.readline().strip():
            yield of_user(text) if is_chat else (text.replace('\\n', '\n'), None)
    else:
        yield from _known(workdir, stage)


def _known(workdir: Path, stage: str) -> list[tuple[str, bool | None]]:
    """The first prompts of a run, and whether a chat template wrote them."""
    paths = [workdir / stage / 'samples.jsonl', *workdir.glob('*/samples.jsonl')]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise ValueError(f'no stage of {workdir} has a samples.jsonl; give --prompt')
    try:
        with path.open(encoding='utf-8') as file:  # a line ends at a line feed alone
            rows = [json.loads(line) for line in itertools.islice(file, 3)]
        return [(row['prompt'], row.get('templated')) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f'{path} is damaged ({type(error).__name__}: {error}); give --prompt'
        ) from error


def run() -> None:
    """Entry point; defines the flags, so that an import of this file defines none."""
    # Otherwise transformers says at every start that PyTorch is missing.
    os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
    # A console without UTF-8 shows other characters by their code.
    sys.stdout.reconfigure(errors='backslashreplace')
    flags.DEFINE_string('workdir', None, 'Work directory of the run.', required=True)
    flags.DEFINE_string('stage', None, 'Stage with a policy; the last by default.')
    flags.DEFINE_string('prompt', None, 'Text to continue.')
    flags.DEFINE_string('message', None, 'What the user says.')
    flags.DEFINE_string('prompts', None, 'Data spec of prompts, e.g. jsonl:FILE.')
    flags.DEFINE_bool('interactive', False, 'Ask for one after the other.')
    flags.DEFINE_string('out', None, 'JSON lines to write, instead of showing them.')
    flags.DEFINE_integer('num', 2, 'Samples per prompt.', lower_bound=1)
    text = 'Longest response, in tokens.'
    flags.DEFINE_integer('max_new_tokens', 48, text, lower_bound=1)
    flags.DEFINE_float('temperature', 1.0, '0 is greedy.', lower_bound=0)
    flags.DEFINE_float('top_p', None, 'Nucleus; off by default.', 1e-9, 1)
    flags.DEFINE_integer('seed', 0, 'Of the samples.')
    app.run(main)


if __name__ == '__main__':
    run()
