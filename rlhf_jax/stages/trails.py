"""Trails of revision as records, as samples, and counted for the report.

A trail is a JSON object: ``prompt``; ``response`` and ``steps``, each of which has the
id of its ``principle``, a ``critique`` and a ``revision``; ``scores_before`` and
``scores_after`` by name; and ``left_out``, the word for why it is no record, or None.
What a model has written are the fields of ``revision.Written``. Read ``revise.py``
next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.evals.policy import distinct_bigrams

Trail = dict[str, Any]
LEFT_OUT = ('too_long', 'blank', 'refused', 'equal')
# Kept in records.
ABOUT = ('templated', 'by', 'critic', 'temperature', 'critic_temperature', 'key')


def last(trail: Trail) -> dict[str, Any]:
    """The last revision; the first response where there is none."""
    return trail['steps'][-1]['revision'] if trail['steps'] else trail['response']


def is_changed(trail: Trail) -> bool:
    """Whether the last revision is another text than the first response."""
    return trail['response']['text'].strip() != last(trail)['text'].strip()


def demonstration(trail: Trail) -> dict[str, Any]:
    """The prompt with the last revision, and all that led to it."""
    end = last(trail)
    row = {'prompt': trail['prompt'], 'completion': end['text']}
    row |= {name: end[name] for name in ('tokens', 'logprob', 'ended')}
    for suffix, end in (('', 'after'), ('_before', 'before')):
        for name, x in trail[f'scores_{end}'].items():
            row[f'{name if name == "reward" else f"score_{name}"}{suffix}'] = x
    return {**row, **_behind(trail)}


def comparison(trail: Trail) -> dict[str, Any]:
    """The last revision chosen over the first response, and all that led to it."""
    sides = {'chosen': last(trail), 'rejected': trail['response']}
    row = {'prompt': trail['prompt']}
    row |= {side: text['text'] for side, text in sides.items()}
    for side, end in (('chosen', 'after'), ('rejected', 'before')):
        row |= {f'{name}_{side}': x for name, x in trail[f'scores_{end}'].items()}
    return {**row, **_behind(trail)}


def sample(trail: Trail) -> dict[str, Any]:
    """Before, after and the steps between, as the report shows them."""
    row = {'prompt': trail['prompt'], 'before': trail['response']['text']}
    row['after'] = last(trail)['text']
    row['steps'] = [_said(step) for step in trail['steps']]
    for end in ('before', 'after'):
        if 'reward' in trail[f'scores_{end}']:
            row[f'proxy_{end}'] = trail[f'scores_{end}']['reward']
    return {**row, 'left_out': trail['left_out']}


def _said(step: dict[str, Any]) -> dict[str, str]:
    said = {name: step[name]['text'] for name in ('critique', 'revision')}
    return {'principle': step['principle'], **said}


def _behind(trail: Trail) -> dict[str, Any]:
    about = {name: trail[name] for name in ABOUT if trail.get(name) is not None}
    return {'response': trail['response'], 'steps': trail['steps'], **about}


def report(trails: Sequence[Trail]) -> dict[str, Any]:
    """Counts over all trails, and means over those that went through all rounds."""
    counts = {
        reason: sum(trail['left_out'] == reason for trail in trails)
        for reason in LEFT_OUT
    }
    whole = [trail for trail in trails if trail['left_out'] in (None, 'equal')]
    found: dict[str, Any] = {
        'prompts': len(trails),
        'records': sum(trail['left_out'] is None for trail in trails),
        **counts,
        'changed': _mean([is_changed(trail) for trail in whole]),
        'rounds_changed': _mean([x for trail in whole for x in _rounds(trail)]),
        'principles': _by_principle(whole),
    }
    for end, texts in (
        ('before', [trail['response'] for trail in whole]),
        ('after', [last(trail) for trail in whole]),
    ):
        found[f'length_{end}'] = _mean([text['tokens'] for text in texts])
        found[f'ended_{end}'] = _mean([text['ended'] for text in texts])
        found[f'distinct_{end}'] = distinct_bigrams([text['text'] for text in texts])
    steps = [step for trail in whole for step in trail['steps']]
    found['critique_length'] = _mean([step['critique']['tokens'] for step in steps])
    scores = {
        name: _scores(whole, name)
        for name in (whole[0]['scores_before'] if whole else ())
    }
    if 'reward' in scores:
        weighted = scores.pop('reward')
        found |= {f'reward_{end}': weighted[end] for end in ('before', 'after')}
    return {**found, 'scores': scores}


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _rounds(trail: Trail) -> list[bool]:
    """Of every round, whether its revision is another text than what it revises."""
    texts = [trail['response'], *(step['revision'] for step in trail['steps'])]
    stripped = [text['text'].strip() for text in texts]
    return [a != b for a, b in zip(stripped, stripped[1:])]


def _by_principle(trails: Sequence[Trail]) -> dict[str, dict[str, Any]]:
    found: dict[str, list[bool]] = {}
    for trail in trails:
        for step, is_other in zip(trail['steps'], _rounds(trail)):
            found.setdefault(step['principle'], []).append(is_other)
    return {
        name: {'drawn': len(changed), 'changed': _mean(changed)}
        for name, changed in sorted(found.items())
    }


def _scores(trails: Sequence[Trail], name: str) -> dict[str, float]:
    before, after = (
        np.asarray([trail[f'scores_{end}'][name] for trail in trails])
        for end in ('before', 'after')
    )
    return {
        'before': _mean(before),
        'after': _mean(after),
        'higher': _mean(after > before),
        'lower': _mean(after < before),
    }
