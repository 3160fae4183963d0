"""The time of learning, from rows and runs made by hand."""

import json

import pytest

from experiments.pace import median_pace, over_unit


def test_pace_is_that_of_the_median_step(tmp_path):
    """Paces of 1, 2 and 1 s; the second row of a step, an evaluation's, is left out."""
    rows = [(1, 9), (2, 10), (2, 11.5), (3, 12), (10, 19)]
    text = '\n'.join(json.dumps({'step': s, 'seconds': t}) for s, t in rows)
    (tmp_path / 'metrics.jsonl').write_text(text)
    assert median_pace(tmp_path / 'metrics.jsonl') == pytest.approx(1.0)


def test_a_method_is_held_against_ppo_around_it():
    order = ['ppo', 'rloo', 'dpo', 'ppo', 'kto', 'ppo']
    ratios = over_unit(order, [100.0, 75.0, 30.0, 200.0, 30.0, 100.0])
    assert ratios == {
        'ppo': 1.0,
        'rloo': pytest.approx(75 / 150),
        'dpo': pytest.approx(30 / 150),
        'kto': pytest.approx(30 / 150),
    }
