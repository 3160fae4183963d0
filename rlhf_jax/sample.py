"""Shows what the policy of a finished stage responds, and how it scores.

    python -m rlhf_jax.sample --workdir runs/quickstart --prompt "…"
    python -m rlhf_jax.sample --workdir runs/quickstart --stage sft --num 3

Without ``--stage`` the policy that was finished last is taken; every reward model of
the run that gives a response a single score scores. Without ``--prompt`` the first
prompts of the run's ``samples.jsonl`` are continued. A ``\\n`` in the prompt is a line
break.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from rlhf_jax import checkpoint
from rlhf_jax.data.chat import rendered
from rlhf_jax.data.joining import decode_behind, open_prompts
from rlhf_jax.data.stops import eos_ids
from rlhf_jax.data.tokenizer import stage_tokenizer
from rlhf_jax.files import named_path
from rlhf_jax.generate import generate, sampling
from rlhf_jax.models.heads import CausalLM, ScalarModel
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


def sample(
    workdir: Path,
    stage: str,
    prompt: str,
    *,
    num: int = 2,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    top_p: float | None = None,
    seed: int = 0,
    templated: bool | None = None,
) -> list[tuple[str, bool, dict[str, float]]]:
    """Continues a prompt.

    Args:
        workdir: of the run.
        stage: finished stage with a policy.
        prompt: as the data set writes it, e.g. ending in ``TL;DR:``.
        num: samples.
        max_new_tokens: longest response.
        temperature: 0 is greedy.
        top_p: nucleus, None for off.
        seed: of the samples.
        templated: whether a chat template wrote the prompt, so that nothing is put
            before it; None where that is seen in the text, which then begins as the
            tokenizer's template does.

    Returns:
        (response, whether it ended by itself, its scores by the name of the reward
        model) per sample.

    Raises:
        ValueError: an unfinished stage, an empty prompt, or one that is too long.
    """
    model, params = load_part(workdir, stage, 'policy')
    tokenizer = stage_tokenizer(workdir / stage)
    if templated is None:
        (templated,) = rendered(tokenizer, [prompt])
    (tokens,) = open_prompts(tokenizer, [prompt], [templated])
    if not tokens:
        raise ValueError('the prompt is empty')
    if len(tokens) + max_new_tokens > model.config.max_positions:
        raise ValueError(
            f'{len(tokens)} prompt tokens and {max_new_tokens} new ones exceed the '
            f'{model.config.max_positions} positions of the model'
        )
    prompt_end = tokens[-1]
    tokens = jnp.asarray(np.tile(tokens, (num, 1)), jnp.int32)
    how = sampling(eos_ids=eos_ids(tokenizer), temperature=temperature, top_p=top_p)
    write = jax.jit(
        functools.partial(generate, model=model, max_new_tokens=max_new_tokens)
    )
    key, rows = jax.random.PRNGKey(seed), jnp.arange(num)
    result = write(params, tokens, jnp.ones_like(tokens, bool), rows, key, how)
    kept = [
        row[mask]
        for row, mask in zip(
            np.asarray(result.tokens), np.asarray(result.response_mask)
        )
    ]
    texts = decode_behind(tokenizer, [prompt_end] * num, kept)
    ended = np.asarray(result.ended).tolist()
    columns = {
        name: _scores(workdir, name, result, prompt, texts)
        for name in finished_stages(workdir, 'reward')
        if checkpoint.load_score_facts(workdir / name, 'reward')
        == checkpoint.ScoreFacts()
    }
    scores = [{name: column[i] for name, column in columns.items()} for i in range(num)]
    return list(zip(texts, ended, scores))


def finished_stages(workdir: Path, part: str) -> list[str]:
    """The finished stages of a run that made a part, the last one at the end."""
    done = sorted(workdir.glob('*/done.json'), key=lambda path: path.stat().st_mtime)
    folders = [path.parent for path in done if (path.parent / 'model.json').exists()]
    return [f.name for f in folders if part in checkpoint.load_model_configs(f)]


def _scores(
    workdir: Path, name: str, generation: Generation, prompt: str, texts: list[str]
) -> list[float]:
    """By a reward model of the run; of an ensemble the mean of its members."""
    folder = workdir / name
    reward, params = load_part(workdir, name, 'reward')
    read, mask = generation.tokens, generation.mask
    if (folder / 'tokenizer').exists():  # not the policy's
        own, limit = stage_tokenizer(folder), reward.config.max_positions
        ended = np.asarray(generation.ended).tolist()
        read, mask, _ = text_batch(own, [prompt] * len(texts), texts, ended, limit)
    if checkpoint.load_members(folder, 'reward') > 1:
        values = ensemble_scores(params, read, mask, model=reward).mean(-1)
    else:
        values = reward_model_scores(params, read, mask, model=reward)
    return [float(value) for value in values]


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
        if values.prompt is None:
            prompts = _known(workdir, stage)
        else:
            # The shell's bytes are UTF-8, whatever the locale took them for.
            prompt = os.fsencode(values.prompt).decode('utf-8')
            prompts = [(prompt.replace('\\n', '\n'), None)]
        for prompt, templated in prompts:
            console.print(Panel(Text(prompt), title='prompt', title_align='left'))
            for text, ended, scores in sample(
                workdir,
                stage,
                prompt,
                num=values.num,
                max_new_tokens=values.max_new_tokens,
                temperature=values.temperature,
                top_p=values.top_p,
                seed=values.seed,
                templated=templated,
            ):
                mark = '' if ended else '  (did not end)'
                label = ', '.join(f'{name} {x:+.3f}' for name, x in scores.items())
                label = label or 'no reward model'
                console.print(f'{label}{mark}: {text}', markup=False)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(1)


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
    flags.DEFINE_integer('num', 2, 'Samples per prompt.', lower_bound=1)
    text = 'Longest response, in tokens.'
    flags.DEFINE_integer('max_new_tokens', 48, text, lower_bound=1)
    flags.DEFINE_float('temperature', 1.0, '0 is greedy.', lower_bound=0)
    flags.DEFINE_float('top_p', None, 'Nucleus; off by default.', 1e-9, 1)
    flags.DEFINE_integer('seed', 0, 'Of the samples.')
    app.run(main)


if __name__ == '__main__':
    run()
