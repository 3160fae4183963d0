"""Writes a finished stage as a Hugging Face directory.

    python -m rlhf_jax.export --workdir runs/quickstart --stage ppo --out
    exported/policy python -m rlhf_jax.export --workdir runs/quickstart --stage ppo
    --part critic --out exported/critic

A policy becomes ``…ForCausalLM``; a reward model or critic
``…ForSequenceClassification`` with one label. The tokenizer goes along.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import app, flags, logging


def export(
    workdir: Path,
    stage: str,
    out: Path,
    part: str | None = None,
    max_shard_mb: int = 5000,
) -> None:
    """Exports one part of a finished stage.

    Args:
        workdir: of the run.
        stage: whose ``params/`` to read.
        out: directory to write.
        part: 'policy', 'reward' or 'critic'; None takes policy or reward, whichever is
            there.
        max_shard_mb: larger models are cut into several files.

    Raises:
        ValueError: an unfinished stage, an unknown part, or an ``out`` that is in use.
    """
    from rlhf_jax import checkpoint, hf
    from rlhf_jax.data.tokenizer import eos_ids, stage_tokenizer
    from rlhf_jax.sample import load_part

    if part is None:
        configs = checkpoint.load_model_configs(workdir / stage)
        part = 'policy' if 'policy' in configs else 'reward'
    model, params = load_part(workdir, stage, part)
    tokenizer = stage_tokenizer(workdir / stage)
    hf.save(
        out,
        params,
        model.config,
        head='lm' if part == 'policy' else 'scalar',
        tokenizer=tokenizer,
        # All that end a response; an encoder's tokenizer has none.
        eos_token_id=None if tokenizer.eos_token_id is None else eos_ids(tokenizer),
        max_shard_bytes=max_shard_mb * 10**6,
    )


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    logging.set_verbosity(logging.WARNING)  # Orbax reports every read at INFO
    values = flags.FLAGS
    try:
        export(
            Path(values.workdir),
            values.stage,
            Path(values.out),
            values.part,
            values.max_shard_mb,
        )
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(1)
    print(f'wrote {values.out}')


def run() -> None:
    """Entry point; defines the flags, so that an import of this file defines none."""
    # Otherwise transformers says at every start that PyTorch is missing.
    os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
    flags.DEFINE_string('workdir', None, 'Work directory of the run.', required=True)
    flags.DEFINE_string(
        'stage', None, 'Finished stage, e.g. sft, rm, ppo.', required=True
    )
    flags.DEFINE_string('part', None, 'policy, reward or critic; by default the first.')
    flags.DEFINE_string(
        'out', None, 'Directory to write; must not exist.', required=True
    )
    flags.DEFINE_integer('max_shard_mb', 5000, 'Largest safetensors file, in MB.')
    app.run(main)


if __name__ == '__main__':
    run()
