"""Pretrains the base model of the embedded world, which the package ships.

    python -m experiments.pretrain_base --workdir runs/base --out base

Runs the stage ``pretrain`` of ``configs/ladder.py:scratch`` twice, on short texts and
then for longer on more articles; both resume like any other run. Writes the result as a
Hugging Face directory with a model card. The package has it in
``rlhf_jax/datasets/tiny_base``, and ``init='tiny'`` loads it.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import app, flags, logging
from safetensors.numpy import load_file

from configs.ladder import get_config
from rlhf_jax.export import export
from rlhf_jax.main import launch

DRILLS = 'python:rlhf_jax.datasets.tiny_tldr:drills?count=20000'
ARTICLES = 'python:rlhf_jax.datasets.tiny_tldr:more_articles?count=100000'
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The base model of tiny_tldr

A decoder of {parameters:,} parameters (the Llama family; {size}) that has read the texts
of the embedded summarisation world, `rlhf_jax/datasets/tiny_tldr.py`: articles of 40 words
about invented people, retellings of their facts, and facts that are called right or
wrong. It can copy a person's facts and tell a fact from an invention; it has seen no
summary and no preference. It is of no use outside that world.

    python -m experiments.pretrain_base --workdir runs/base --out base

| | |
|---|---|
| seed | {seed} |
| first, steps × rows | {first} of {drills} |
| then, steps × rows | {steps:,} × {rows} of {articles} |
| held-out loss | {loss:.4f} nats/token ({tokens:,} tokens of the split `articles:test`); {before:.2f} before |
| versions | {versions} |

Text and weights: Apache-2.0. The training texts are made by rule; nothing was
downloaded.
"""  # noqa: E501  a row of a Markdown table stands in one line


def card(first: Path, workdir: Path, out: Path) -> str:
    """The model card, with the figures of two finished runs, on drills and then on
    articles, whose export is ``out``.
    """

    def read(folder: Path, name: str) -> dict:
        return json.loads((folder / name).read_text(encoding='utf-8'))

    drills = read(first, 'config.json')['config']['pretrain']
    run, evaluation = read(workdir, 'config.json'), read(workdir, 'pretrain/eval.json')
    pretrain = run['config']['pretrain']
    shape = read(workdir, 'pretrain/model.json')['policy']
    versions = ('jax', 'flax', 'optax', 'python')
    weights = load_file(out / 'model.safetensors')
    return CARD.format(
        parameters=sum(x.size for x in weights.values()),
        size=f'{shape["num_layers"]} layers, width {shape["width"]}',
        seed=run['config']['seed'],
        first=f'{drills["num_steps"]:,} × {drills["batch_size"]}',
        drills=f'`{drills["train"]}`',
        steps=pretrain['num_steps'],
        rows=pretrain['batch_size'],
        articles=f'`{pretrain["train"]}`',
        loss=evaluation['loss'],
        tokens=evaluation['tokens'],
        before=evaluation['loss_before'],
        versions=', '.join(f'{name} {run["versions"][name]}' for name in versions),
    )


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    first, last = Path(values.workdir) / 'drills', Path(values.workdir) / 'articles'
    config = get_config(f'scratch,seed={values.seed}')
    config.stages = ('pretrain',)
    # Short texts first: from them it learns within minutes to compare a word with those
    # before it; from articles alone it had not begun to after 2,500 steps.
    config.pretrain.update(
        train=DRILLS, num_steps=values.first_steps, batch_size=32, buckets=(56,)
    )
    launch(config, first)
    config = get_config(f'scratch,seed={values.seed}')
    config.stages = ('pretrain',)
    config.pretrain.loop.eval_every_steps = 1000
    config.pretrain.update(
        init=str(first / 'pretrain'), train=ARTICLES, num_steps=values.steps
    )
    launch(config, last)
    out = Path(values.out)
    export(last, 'pretrain', out)
    (out / 'README.md').write_text(card(first, last, out), encoding='utf-8')


def run() -> None:
    """Entry point; defines the flags, so that an import of this file defines none."""
    flags.DEFINE_string('workdir', 'runs/base', 'Work directory of the run.')
    flags.DEFINE_string('out', None, 'Directory to write the model to.', required=True)
    flags.DEFINE_integer('first_steps', 800, 'Steps on short texts.')
    flags.DEFINE_integer('steps', 9_000, 'Steps on articles.')
    flags.DEFINE_integer('seed', 0, 'Seed of the run.')
    app.run(main)


if __name__ == '__main__':
    run()
