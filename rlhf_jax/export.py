"""Writes a finished stage as a Hugging Face directory.

    python -m rlhf_jax.export --workdir runs/quickstart --stage ppo --out
    exported/policy python -m rlhf_jax.export --workdir runs/quickstart --stage ppo
    --part critic --out exported/critic

A policy becomes ``…ForCausalLM``; a reward model or critic
``…ForSequenceClassification`` with one label, or one for each of its named scores; of
an ensemble every member becomes a directory of its own, ``OUT/member_0`` and so on, or
with ``--member 2`` that one alone becomes ``OUT``. The tokenizer goes along.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import app, flags, logging

from rlhf_jax.files import named_path
from rlhf_jax.types import Params


def export(
    workdir: Path,
    stage: str,
    out: Path,
    part: str | None = None,
    max_shard_mb: int = 5000,
    member: int | None = None,
) -> None:
    """Exports one part of a finished stage.

    Args:
        workdir: of the run.
        stage: whose ``params/`` to read.
        out: directory to write.
        part: 'policy', 'reward' or 'critic'; None takes policy or reward, whichever is
            there.
        max_shard_mb: larger models are cut into several files.
        member: of an ensemble, the only one to write; None writes all of them, in
            directories below ``out``.

    Raises:
        ValueError: an unfinished stage, an unknown part or member, or an ``out`` that
            is in use.
    """
    import jax

    from rlhf_jax import checkpoint, hf
    from rlhf_jax.data.stops import eos_ids
    from rlhf_jax.data.tokenizer import stage_tokenizer
    from rlhf_jax.sample import load_part

    if part is None:
        configs = checkpoint.load_model_configs(workdir / stage)
        part = 'policy' if 'policy' in configs else 'reward'
    facts = checkpoint.load_score_facts(workdir / stage, part)
    if facts.step_separator is not None:
        raise ValueError(
            f'{workdir / stage} scores the steps of a response, and a sequence '
            'classifier would be read at its end alone; use it as a reward here: '
            "rewards={'rm': dict(model=…, steps=dict(combine='min'))}"
        )
    model, params = load_part(workdir, stage, part)
    tokenizer = stage_tokenizer(workdir / stage)

    def save(out: Path, params: Params) -> None:
        hf.save(
            out,
            params,
            model.config,
            head='lm' if part == 'policy' else 'scalar',
            score_names=facts.heads,
            tokenizer=tokenizer,
            # All that end a response; an encoder's tokenizer has none.
            eos_token_id=None if tokenizer.eos_token_id is None else eos_ids(tokenizer),
            max_shard_bytes=max_shard_mb * 10**6,
        )

    members = checkpoint.load_members(workdir / stage, part)
    if member is not None and not (members > 1 and 0 <= member < members):
        has = f'has members 0 to {members - 1}' if members > 1 else 'is no ensemble'
        raise ValueError(
            f'--member={member}, but {part!r} of {workdir / stage} {has}; name another '
            'or leave it out'
        )
    if members == 1:
        return save(out, params)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f'{out} exists already and is not empty; name another')
    for i in range(members) if member is None else [member]:
        place = out if member is not None else out / f'member_{i}'
        save(place, jax.tree.map(lambda x, i=i: x[i], params))


def main(argv: list[str]) -> None:
    """The command; see the module docstring."""
    logging.set_verbosity(logging.WARNING)  # Orbax reports every read at INFO
    values = flags.FLAGS
    try:
        export(
            named_path(values.workdir),
            values.stage,
            named_path(values.out),
            values.part,
            values.max_shard_mb,
            values.member,
        )
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(1)
    print(f'wrote {values.out}')


def run() -> None:
    """Entry point; defines the flags, so that an import of this file defines none."""
    # Otherwise transformers says at every start that PyTorch is missing.
    os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
    # A console without UTF-8 shows other characters by their code.
    sys.stdout.reconfigure(errors='backslashreplace')
    flags.DEFINE_string('workdir', None, 'Work directory of the run.', required=True)
    flags.DEFINE_string(
        'stage', None, 'Finished stage, e.g. sft, rm, ppo.', required=True
    )
    flags.DEFINE_string('part', None, 'policy, reward or critic; by default the first.')
    flags.DEFINE_string(
        'out', None, 'Directory to write; must not exist.', required=True
    )
    flags.DEFINE_integer('member', None, 'The only member of an ensemble to write.')
    flags.DEFINE_integer('max_shard_mb', 5000, 'Largest safetensors file, in MB.')
    app.run(main)


if __name__ == '__main__':
    run()
