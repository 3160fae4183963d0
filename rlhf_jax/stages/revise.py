"""The kind revise: responses are criticised by principles and written again.

Constitutional AI's first half: a policy's response to every prompt (or the one that the
record has), a critique of it by a drawn principle, a revision by the critique, and so
on for ``rounds`` rounds, each of which starts from the last revision alone. What every
step said is written down. A killed stage goes on behind its last whole batch
(``stages/batches.py``).

Source: Bai et al. 2022, arXiv 2212.08073, §3. Read ``stages/revision.py`` first, and
``stages/label.py`` next.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jax
import numpy as np

from rlhf_jax import files
from rlhf_jax.data import pipeline, sources
from rlhf_jax.data.formats import to_turns
from rlhf_jax.data.joining import find_joint
from rlhf_jax.labels.constitution import Principle, draw, read_constitution
from rlhf_jax.labels.critique import RequestPrompt, critique_prompt, revision_prompt
from rlhf_jax.pages import revision as page
from rlhf_jax.ranges import above, at_least
from rlhf_jax.rewards import weighted_sum
from rlhf_jax.sharding import check_batch_size
from rlhf_jax.stages import scoring, trails
from rlhf_jax.stages.batches import Batch, remove_batches, write_batches
from rlhf_jax.stages.console import tell, tell_left_out
from rlhf_jax.stages.kinds import Makes
from rlhf_jax.stages.revision import (
    Asked,
    Write,
    Written,
    ask_critique,
    ask_revision,
    make_writer,
    score_texts,
    written_behind,
)
from rlhf_jax.stages.run import RECORDS, Result, Run
from rlhf_jax.stages.sampler import check_sampler, make_sampler
from rlhf_jax.stages.settings import (
    LENGTHS,
    DataSpec,
    ModelName,
    RecordSettings,
    RewardSource,
    SamplerSettings,
)
from rlhf_jax.stages.sources import (
    check_policy,
    check_positions,
    frozen,
    load_policy,
)
from rlhf_jax.stages.trails import LEFT_OUT, Trail, is_changed, last

TRAILS = 'trails.jsonl'  # every prompt with all steps, those left out as well
SHOWN = 32  # trails in samples.jsonl
PRINCIPLE = 17  # a purpose folded into the stage's key


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReviseSettings(RecordSettings, SamplerSettings):
    """The revise stage. ``prompt_buckets`` and ``max_new_tokens`` are those of prompts
    and responses.
    """

    prompts: DataSpec
    constitution: str  # a file, see labels/constitution.py
    policy: ModelName | None = None  # answers; None: the records have answers
    critic: ModelName | None = None  # criticises and revises; None: the policy
    rounds: Annotated[int, at_least(1)] = 1
    # Prompt files, see labels/critique.py; None for those of the package
    critique_prompt: str | None = None
    revision_prompt: str | None = None
    # static lengths of the prompts for critiques and revisions, in tokens
    critique_buckets: Annotated[tuple[int, ...], LENGTHS] = (256,)
    max_critique_tokens: Annotated[int, at_least(1)] = 64
    temperature: Annotated[float, above(0)] = 1.0  # of the policy's responses
    # of critiques and revisions; 0 is greedy
    critic_temperature: Annotated[float, at_least(0)] = 1.0
    batch_size: Annotated[int, at_least(1)] = 128  # prompts at a time
    # By name; they score the first response and the last revision, for the report
    rewards: dict[str, RewardSource] = dataclasses.field(default_factory=dict)
    # Demonstrations of the last revision, or comparisons in which it is chosen over the
    # first response
    keep: Literal['last', 'pairs'] = 'last'


SETTINGS = (ReviseSettings,)
PAGE = page.PAGE


@dataclasses.dataclass(frozen=True)
class ReviseJob:
    """A checked stage."""

    stage: str
    settings: ReviseSettings
    prompts: pipeline.Dataset
    asked: list[Asked]  # the same prompts, as they were found too
    principles: list[Principle]
    templates: tuple[RequestPrompt, RequestPrompt]
    rewards: dict[str, scoring.Reward]


def makes(settings: ReviseSettings) -> Makes:
    """Records."""
    is_pair = settings.keep == 'pairs'
    return Makes(records='comparisons' if is_pair else 'demonstrations')


def reads(settings: ReviseSettings) -> dict[str, str]:
    """Prompts, or responses to them."""
    return {'prompts': 'prompts' if settings.policy else 'responses'}


# ----------------------------------------------------------------------------- loading


def load(run: Run, stage: str, settings: ReviseSettings) -> ReviseJob:
    """Reads and checks.

    Raises:
        ValueError: a constitution or a prompt file that cannot be used, no policy where
            the records have no answers, a critic with another tokenizer, several
            processes, or whatever is wrong with the rest.
    """
    where = f'config.{stage}'
    if jax.process_count() > 1:
        raise ValueError(
            f'{where} writes texts, which one process alone can do, and this run has '
            f'{jax.process_count()}'
        )
    needed = ('critique_request', 'revision_request')
    principles = read_constitution(settings.constitution, needed)
    templates = (
        critique_prompt(settings.critique_prompt),
        revision_prompt(settings.revision_prompt),
    )
    _check_models(run, where, settings)
    check_sampler(run, where, settings)
    check_batch_size(settings.batch_size, run.mesh, where)
    prompts = tell_left_out(
        pipeline.load_prompts(
            settings.prompts,
            run.tokenizer,
            max_prompt_length=settings.prompt_buckets[-1],
            **settings.reading,
        )
    )
    found = {record.where: record for record in sources.read(settings.prompts)}
    asked = [Asked(found[prompt.where], prompt) for prompt in prompts.records]
    for one in asked:
        _check_asked(where, settings, templates, one)
    rewards = scoring.check_rewards(
        run, where, settings.rewards, _scored_length(settings), [prompts]
    )
    return ReviseJob(stage, settings, prompts, asked, principles, templates, rewards)


def _check_models(run: Run, where: str, settings: ReviseSettings) -> None:
    if settings.policy is None and settings.critic is None:
        raise ValueError(
            f'{where}: set policy, which answers, criticises and revises, or critic, '
            'where the records have answers'
        )
    if settings.policy is not None:
        source = check_policy(run, f'{where}.policy', settings.policy)
        check_positions(run, f'{where}.policy', source, settings)
    name = 'policy' if settings.critic is None else 'critic'
    source = check_policy(run, f'{where}.{name}', getattr(settings, name))
    tokenizer = source.tokenizer
    if tokenizer is not None and not scoring.reads_alike(tokenizer, run.tokenizer):
        raise ValueError(
            f'{where}.{name}={source.name!r} has another tokenizer than the run, whose '
            'tokens it is asked in; name a model of the same tokenizer'
        )
    try:
        for how in (_critic_settings(settings, 0), _critic_settings(settings, 1)):
            check_positions(run, f'{where}.{name}', source, how)
    except ValueError as error:
        raise ValueError(
            f'{error} (here critique_buckets, with max_critique_tokens or '
            'max_new_tokens)'
        ) from error


def _critic_settings(settings: ReviseSettings, step: int) -> ReviseSettings:
    """How critiques (step 0) and revisions (step 1) are sampled."""
    size = (settings.max_critique_tokens, settings.max_new_tokens)[step]
    return dataclasses.replace(
        settings, prompt_buckets=settings.critique_buckets, max_new_tokens=size
    )


def _scored_length(settings: ReviseSettings) -> int:
    """Tokens of prompt, response and EOS."""
    return settings.prompt_buckets[-1] + settings.max_new_tokens + 1


def _check_asked(
    where: str,
    settings: ReviseSettings,
    templates: tuple[RequestPrompt, RequestPrompt],
    one: Asked,
) -> None:
    """A prompt can be asked further, and has an answer where nobody else gives one."""
    place = one.source.where
    if not one.has_messages and one.prompt.templated:
        raise ValueError(
            f'{place}: the prompt is a text that a chat template has written, to which '
            f'no further turn can be added; give {where}.prompts in messages'
        )
    for template in templates:
        if (template.turn if one.has_messages else template.text) is None:
            raise ValueError(
                f'{place}: the prompt is in '
                f'{"messages" if one.has_messages else "text"}, and {template.where} '
                f'is for the other kind: it has {{prompt}} for prompts in text, and '
                'has it not for those in messages'
            )
    if settings.policy is None:
        answer = to_turns(one.source).answer
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(
                f'{place}: no completion, and {where}.policy is not set; name a policy '
                'that answers, or give records with a completion'
            )


# ----------------------------------------------------------------------------- training


def train(run: Run, job: ReviseJob) -> Result:
    """Writes, criticises, revises and scores, batch by batch."""
    clock = time.monotonic()
    folder, settings = run.stage_dir(job.stage), job.settings
    about = {
        f'the constitution {settings.constitution}': [
            dataclasses.asdict(p) | {'where': None} for p in job.principles
        ],
        'a prompt file': [[t.text, t.turn] for t in job.templates],
        str(settings.prompts): [one.source.fields for one in job.asked],
    }
    found, counts = write_batches(
        folder, lambda start: _batches(run, job, start), about
    )
    report = {**trails.report(found), **counts}
    _tell_left_out(job.stage, report)
    files.write_rows(folder / 'samples.jsonl', map(trails.sample, found[:SHOWN]))
    kept = (trail for trail in found if trail['left_out'] is None)
    is_pair = settings.keep == 'pairs'
    as_record = trails.comparison if is_pair else trails.demonstration
    files.write_rows(folder / RECORDS, map(as_record, kept))
    files.write_rows(folder / TRAILS, found)
    remove_batches(folder)
    return Result(
        steps=0,
        init=settings.policy or settings.critic,
        seconds={'revise': time.monotonic() - clock},
        data={'prompts': job.prompts},
        evaluation=report,
    )


def _tell_left_out(stage: str, report: dict[str, Any]) -> None:
    said = [f'{report[why]} {why}' for why in LEFT_OUT if report[why]]
    if said:
        tell(
            f'{stage}: {report["records"]} records of {report["prompts"]} prompts; '
            f'left out: {", ".join(said).replace("_", " ")} (see {TRAILS})'
        )


def _batches(run: Run, job: ReviseJob, start: int) -> Iterator[Batch]:
    """The trails of every batch from ``start`` on, and texts that scorers cut."""
    settings, base = job.settings, run.key(job.stage)
    answer, criticise, revise = _writers(run, job)
    scorers = scoring.make_scorers(run, job.rewards)
    batches = pipeline.eval_batches(
        job.prompts, settings.batch_size, settings.prompt_buckets
    )
    for number, batch in enumerate(batches):
        if number < start:
            continue
        key = jax.random.fold_in(base, number)
        places = [i for i in np.asarray(batch.index).tolist() if i >= 0]
        begun = _begun(run, job, places, answer(batch, key))
        for round_ in range(settings.rounds):
            keys = [jax.random.fold_in(key, 1 + 2 * round_ + i) for i in (0, 1)]
            _go_round(run, job, begun, places, round_, keys, (criticise, revise))
        cut = _scored(run, job, scorers, batch, begun)
        own = {'key': [int(x) for x in np.asarray(key).tolist()]}
        closed = [_closed(settings, trail) | own for trail in begun]
        yield Batch(closed, {'scores_cut': cut})


def _writers(run: Run, job: ReviseJob) -> tuple[Any, Write, Write]:
    """What answers prompts, criticises, and revises."""
    settings, base = job.settings, run.key(job.stage)
    loaded = {}
    for name in {settings.policy, settings.critic or settings.policy} - {None}:
        model, params = load_policy(run, name, base)
        loaded[name] = model, frozen(run, model, params)
    criticise, revise = (
        make_writer(
            run,
            _critic_settings(settings, step),
            settings.critic_temperature,
            *loaded[settings.critic or settings.policy],
            batch_size=settings.batch_size,
            control_tokens=settings.control_tokens,
        )
        for step in (0, 1)
    )
    if settings.policy is None:
        return lambda batch, key: None, criticise, revise
    policy, params = loaded[settings.policy]
    sampler = make_sampler(run, settings, settings.temperature, policy)

    def answer(batch: Any, key: Any) -> list[Written]:
        drawn = sampler(params, batch, jax.random.fold_in(key, 0))
        return written_behind(run, job.prompts.records, batch, drawn)

    return answer, criticise, revise


def _begun(
    run: Run, job: ReviseJob, places: list[int], answers: list[Written] | None
) -> list[Trail]:
    """Trails with the first responses: those that were sampled, or of the records."""
    asked, settings = [job.asked[place] for place in places], job.settings
    if answers is None:
        texts = [to_turns(one.source).answer for one in asked]
        ids = find_joint(run.tokenizer).encode([None] * len(texts), texts)
        answers = [Written(t, len(row), None, True) for t, row in zip(texts, ids)]
    begun = []
    for one, answer in zip(asked, answers, strict=True):
        trail: Trail = {
            'prompt': one.prompt.prompt,
            'response': answer._asdict(),
            'steps': [],
            'left_out': None if answer.text.strip() else 'blank',
            'by': settings.policy,
            'critic': settings.critic or settings.policy,
            'temperature': settings.temperature,
            'critic_temperature': settings.critic_temperature,
        }
        begun.append(trail | ({'templated': True} if one.prompt.templated else {}))
    return begun


def _go_round(
    run: Run,
    job: ReviseJob,
    begun: list[Trail],
    places: list[int],
    round_: int,
    keys: list[Any],
    writers: tuple[Write, Write],
) -> None:
    """Adds a step to every trail that is not left out."""
    base = [int(x) for x in np.asarray(run.key(job.stage)).tolist()]
    principles = [
        draw(job.principles, np.random.default_rng([*base, PRINCIPLE, place, round_]))
        for place in places
    ]
    parts = list(zip(begun, principles, (job.asked[place] for place in places)))

    def wrote(write: Write, requests: list[Any], key: Any) -> list[Written | None]:
        found = write(requests, key)
        for trail, one in zip(begun, found):
            if isinstance(one, str):
                trail['left_out'] = one
        return [one if isinstance(one, Written) else None for one in found]

    critiques = wrote(
        writers[0],
        [
            None
            if trail['left_out']
            else ask_critique(job.templates[0], asked, last(trail)['text'], principle)
            for trail, principle, asked in parts
        ],
        keys[0],
    )
    revisions = wrote(
        writers[1],
        [
            None
            if critique is None
            else ask_revision(
                job.templates, asked, last(trail)['text'], critique.text, principle
            )
            for (trail, principle, asked), critique in zip(parts, critiques)
        ],
        keys[1],
    )
    for (trail, principle, _), critique, revision in zip(parts, critiques, revisions):
        if revision is None:
            continue
        if not revision.text.strip():
            trail['left_out'] = 'blank'
        said = {'critique': critique._asdict(), 'revision': revision._asdict()}
        trail['steps'].append({'principle': principle.id, **said})


def _scored(
    run: Run, job: ReviseJob, scorers: Any, batch: Any, begun: list[Trail]
) -> int:
    """Writes the scores of first responses and last revisions into the begun."""
    limit, cut = _scored_length(job.settings), 0
    for end, texts in (
        ('before', [trail['response'] for trail in begun]),
        ('after', [last(trail) for trail in begun]),
    ):
        scores, truncated = score_texts(
            run,
            scorers,
            job.prompts.records,
            batch,
            [text['text'] for text in texts],
            [text['ended'] for text in texts],
            limit,
        )
        cut += truncated
        if scores:
            weights = scoring.weights_of(job.rewards)
            scores['reward'] = np.asarray(weighted_sum(scores, weights))
        for i, trail in enumerate(begun):
            trail[f'scores_{end}'] = {k: float(v[i]) for k, v in scores.items()}
    return cut


def _closed(settings: ReviseSettings, trail: Trail) -> Trail:
    """The trail, left out where its pair would be of equals."""
    is_whole = trail['left_out'] is None
    if settings.keep == 'pairs' and is_whole and not is_changed(trail):
        trail['left_out'] = 'equal'
    return trail
