"""The table over methods and seeds, by hand."""

import json
from pathlib import Path

import pytest

from experiments.compare import (
    FAMILIES,
    METHODS,
    learning_seconds,
    read,
    summarise,
    to_markdown,
)

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / 'experiments' / 'results' / 'compare.json'


def run(win_rate, low, seconds):
    return {
        'win_rate': win_rate,
        'win_rate_interval': [low, 1.0],
        'gold_reward_before': 3.0,
        'gold_reward_after': 4.0 + win_rate,
        'kl': 2.0,
        'length_after': 15.0,
        'distinct_after': 0.1,
        'learning_seconds': seconds,
    }


RESULTS = {
    'ppo': {'0': run(0.7, 0.6, 100.0)},
    'rloo': {'0': run(0.6, 0.5, 50.0), '1': run(0.8, 0.7, 90.0)},
    'dpo': {'1': run(0.75, 0.65, 10.0)},
}


def test_summary_by_hand():
    table = summarise(RESULTS)
    rloo = table['rloo']
    assert rloo['win_rate'] == pytest.approx(0.7)
    assert rloo['win_rate_range'] == [0.6, 0.8] and rloo['lowest_end'] == 0.5
    assert rloo['gold_gain'] == pytest.approx(1.7) and rloo['seeds'] == 2
    # Time is compared with PPO's of the same seed, which is known for seed 0 alone.
    assert rloo['time_to_ppo'] == 0.5
    assert table['dpo']['time_to_ppo'] is None
    busy = {**RESULTS, 'rloo': {'0': run(0.6, 0.5, None)}}
    assert summarise(busy)['rloo']['time_to_ppo'] is None


def test_the_best_of_a_family_comes_first():
    lines = to_markdown(summarise(RESULTS)).splitlines()[2:]
    assert [line.split('|')[1].strip(' *`') for line in lines] == [
        'reward model, sampling',
        'ppo',
        'rloo',
        'comparisons',
        'dpo',
    ]
    assert '| `rloo` | 2 | 0.700 (0.600–0.800) | 0.500 | +1.70 |' in lines[2]


def test_time_is_that_of_the_median_step(tmp_path):
    """Paces of 1, 0.5 and 1 s; the second row of a step, an evaluation's, has none."""
    rows = [(1, 9), (2, 10), (2, 11.5), (3, 12), (10, 19)]
    text = '\n'.join(json.dumps({'step': s, 'seconds': t}) for s, t in rows)
    (tmp_path / 'metrics.jsonl').write_text(text)
    assert learning_seconds(tmp_path) == pytest.approx(10 * 1.0)


def test_results_are_added_to_those_there_are(tmp_path):
    path = tmp_path / 'compare.json'
    assert read(path, smoke=False) == {}
    path.write_text(json.dumps({'smoke': True, 'runs': RESULTS}))
    assert read(path, smoke=True) == RESULTS
    with pytest.raises(ValueError, match=r'compare.json holds runs with smoke=True'):
        read(path, smoke=False)


def test_the_results_of_the_docs_can_be_added_to():
    table = summarise(read(COMMITTED, smoke=False))
    text = (ROOT / 'docs' / 'recipes.md').read_text()
    for line in to_markdown(table).splitlines()[2:]:
        assert line.rsplit('|', 2)[0] in text  # all but the time


def test_every_method_has_a_recipe():
    assert len(METHODS) == sum(map(len, FAMILIES.values()))
    for recipe, _ in METHODS.values():
        __import__(f'configs.{recipe}')
