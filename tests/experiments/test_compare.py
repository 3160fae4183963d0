"""The table over methods and seeds, by hand."""

import json
from pathlib import Path

import pytest

from experiments.compare import (
    FAMILIES,
    METHODS,
    read,
    read_pace,
    summarise,
    to_markdown,
)

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / 'experiments' / 'results' / 'compare.json'


def run(win_rate, low):
    return {
        'win_rate': win_rate,
        'win_rate_interval': [low, 1.0],
        'gold_reward_before': 3.0,
        'gold_reward_after': 4.0 + win_rate,
        'kl': 2.0,
        'length_after': 15.0,
        'distinct_after': 0.1,
    }


RESULTS = {
    'ppo': {'0': run(0.7, 0.6)},
    'rloo': {'0': run(0.6, 0.5), '1': run(0.8, 0.7)},
    'dpo': {'1': run(0.75, 0.65)},
}


def test_summary_by_hand():
    table = summarise(RESULTS, {'ppo': 1.0, 'rloo': 0.5})
    rloo = table['rloo']
    assert rloo['win_rate'] == pytest.approx(0.7)
    assert rloo['win_rate_range'] == [0.6, 0.8] and rloo['lowest_end'] == 0.5
    assert rloo['gold_gain'] == pytest.approx(1.7) and rloo['seeds'] == 2
    assert rloo['time_to_ppo'] == 0.5 and table['dpo']['time_to_ppo'] is None


def test_the_best_of_a_family_comes_first():
    lines = to_markdown(summarise(RESULTS, {})).splitlines()[2:]
    assert [line.split('|')[1].strip(' *`') for line in lines] == [
        'reward model, sampling',
        'ppo',
        'rloo',
        'comparisons',
        'dpo',
    ]
    assert '| `rloo` | 2 | 0.700 (0.600–0.800) | 0.500 | +1.70 |' in lines[2]


def test_results_are_added_to_those_there_are(tmp_path):
    path = tmp_path / 'compare.json'
    assert read(path, smoke=False) == {}
    path.write_text(json.dumps({'smoke': True, 'runs': RESULTS}))
    assert read(path, smoke=True) == RESULTS
    with pytest.raises(ValueError, match=r'compare.json holds runs with smoke=True'):
        read(path, smoke=False)


def test_the_results_of_the_docs_can_be_added_to():
    pace = read_pace(COMMITTED.with_name('pace.json'))
    assert pace.keys() == METHODS.keys()
    table = summarise(read(COMMITTED, smoke=False), pace)
    text = (ROOT / 'docs' / 'recipes.md').read_text()
    for line in to_markdown(table).splitlines()[2:]:
        assert line in text


def test_every_method_has_a_recipe():
    assert len(METHODS) == sum(map(len, FAMILIES.values()))
    for recipe, _ in METHODS.values():
        __import__(f'configs.{recipe}')
