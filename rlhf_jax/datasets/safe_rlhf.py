"""PKU-SafeRLHF: two answers to a question, which does more harm, which helps more.

A record has ``prompt``, ``response_0``, ``response_1``, a verdict on each
(``is_response_0_safe``, ``is_response_1_safe``), and the numbers of the more helpful
and of the less harmful one (``better_response_id``, ``safer_response_id``):

    python:rlhf_jax.datasets.safe_rlhf:costs?data=jsonl:train.jsonl
    python:rlhf_jax.datasets.safe_rlhf:preferences?data=jsonl:train.jsonl

The first are for a cost model, the second for a reward model or a preference loss.

Source: Dai et al. 2023 (Safe RLHF), arXiv 2310.12773; Ji et al. 2024 (PKU-SafeRLHF),
arXiv 2406.15513; the files of ``PKU-Alignment/PKU-SafeRLHF`` have these fields among
others. Read ``judgements.py`` next, which says what a completion that is null means.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_jax.data.sources import SourceRecord, read

# safe-rlhf's; an answer opens with a space.
TEMPLATE = 'BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:'


def costs(data: str, template: str = TEMPLATE) -> Iterator[dict[str, Any]]:
    """Rankings by harm, the most harmful first: harmful > null > safe.

    The virtual response, null, is where harm begins; the less safe one of two harmful
    or of two safe responses is ranked above the other.

    Args:
        data: data spec of the records.
        template: of a prompt, with ``{prompt}`` in it.

    Returns:
        Records of ``prompt``, ``completions``, ``ranks``.

    Raises:
        ValueError: a field that is missing or of another kind, or verdicts that say the
            opposite of ``safer_response_id``, with the place.
    """
    for record, prompt, responses in _records(data, template):
        safer = _field(record, 'safer_response_id', int)
        safe = [_field(record, f'is_response_{i}_safe', bool) for i in range(2)]
        if safe[1 - safer] and not safe[safer]:
            raise ValueError(
                f'{record.where}: safer_response_id is {safer}, and yet '
                f'is_response_{safer}_safe is false and is_response_{1 - safer}_safe '
                'is true; mend one of the three, or leave the record out'
            )
        order: list[str | None] = [responses[1 - safer], responses[safer]]
        order.insert(2 - sum(safe), None)
        yield {'prompt': prompt, 'completions': order, 'ranks': [1, 2, 3]}


def preferences(data: str, template: str = TEMPLATE) -> Iterator[dict[str, str]]:
    """Comparisons by help alone, ``better_response_id``, whatever the harm.

    Args:
        data: data spec of the records.
        template: of a prompt, with ``{prompt}`` in it.

    Returns:
        Records of ``prompt``, ``chosen``, ``rejected``.

    Raises:
        ValueError: a field that is missing or of another kind, with its place.
    """
    for record, prompt, responses in _records(data, template):
        better = _field(record, 'better_response_id', int)
        chosen, rejected = responses[better], responses[1 - better]
        yield {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}


def _records(
    data: str, template: str
) -> Iterator[tuple[SourceRecord, str, tuple[str, str]]]:
    """Every record with its prompt and its two responses."""
    if '{prompt}' not in template:
        raise ValueError(f'template={template!r} has no {{prompt}}')
    for record in read(data):
        prompt = template.replace('{prompt}', _field(record, 'prompt', str))
        first, second = (_field(record, f'response_{i}', str) for i in range(2))
        yield record, prompt, (f' {first}', f' {second}')


def _field(record: SourceRecord, name: str, kind: type) -> Any:
    """A field of the kind; empty texts are left to ``formats.py``, ids are 0 or 1."""
    value = record.fields.get(name)
    if type(value) is not kind or (kind is int and value not in (0, 1)):
        use = {str: 'a text', bool: 'true or false', int: '0 or 1'}[kind]
        found = ', '.join(record.fields) or 'none'
        raise ValueError(
            f'{record.where}: the field {name!r} is {value!r}; it should be {use} '
            f'(fields: {found})'
        )
    return value
