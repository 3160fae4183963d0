"""Medians, ratios, slopes and tables of results made up by hand."""

import pytest

from benchmarks import tables
from benchmarks.sizes import Model, Probe, Work


def answer(*seconds, peak=2**20, **phases):
    memory = {'peak_bytes': peak, 'now_bytes': 1}
    return {'seconds': list(seconds), 'phases': phases, 'memory': memory}


OURS = {
    'rounds': [answer(1.0, 1.0, 4.0, generate=[0.5, 0.7, 0.9]), answer(2.0, 3.0, 2.0)],
    'warm': [9.0, 3.5, 1.0],
}
PEER = {
    'rounds': [answer(3.0, 3.0, 3.0), answer(3.0, 5.0, 6.0, peak=3 * 2**20)],
    'warm': [1.0, 1.0],
}


def test_the_median_is_over_all_rounds():
    assert tables.median_of(OURS) == 2.0  # 1 1 2 2 3 4
    assert tables.median_of(PEER) == 3.0


def test_a_ratio_with_its_rounds():
    # Medians 3 over 1 in the first round, 5 over 2 in the second.
    assert tables.ratio_of(PEER, OURS) == (1.5, 2.5, 3.0)


def test_compilation_is_what_warming_up_takes_beyond_usual_steps():
    assert tables.compile_seconds(OURS) == pytest.approx(7.0 + 1.5)
    assert tables.compile_seconds(PEER) == 0.0


def test_the_peak_is_the_best_of_all_rounds():
    rounds = [
        answer(1.0, product=[2.0], copy=[0.5]),
        answer(1.0, product=[1.0], copy=[1.0]),
    ]
    probe = Probe(side=10, dtype='float32', copied=100)
    assert tables.peak_of(rounds, probe) == {'flops': 2000.0, 'bandwidth': 400.0}


def test_memory_is_the_accelerators_where_there_is_one():
    assert tables.peak_bytes(PEER) == 3 * 2**20
    memory = {'peak_bytes': 5, 'device_peak_bytes': 7}
    assert tables.peak_bytes({'rounds': [{'memory': memory}]}) == 7


def test_the_slope_of_a_power_law():
    points = {x: 5 * x**1.5 for x in (1.0, 2.0, 8.0)}
    assert tables.slope(points) == pytest.approx(1.5)
    # By hand: log₂ x = 0, 1, 2 and log₂ y = 0, 1, 3 have slope Σ(x−1)(y−4/3)/2 = 3/2.
    assert tables.slope({1.0: 1.0, 2.0: 2.0, 4.0: 8.0}) == pytest.approx(1.5)
    with pytest.raises(ValueError, match='two points'):
        tables.slope({1.0: 1.0})


@pytest.mark.parametrize(
    ('x', 'text'),
    [
        (0.0, '0.0'),
        (0.012345, '0.0123'),
        (1.0, '1.00'),
        (99.99, '100.0'),
        (12345.6, '12,300'),
    ],
)
def test_numbers_have_three_digits(x, text):
    assert tables.number(x) == text


def test_the_table_of_speeds():
    results = {
        'sft': {'rlhf_jax': OURS, 'trl': PEER, 'tunix': {'error': 'tunix: no'}},
        'rm': {'rlhf_jax': OURS, 'trl': PEER, 'tunix': {'lacks': 'no trainer'}},
    }
    table = tables.speed_table(results, ['rlhf_jax', 'trl', 'tunix']).splitlines()
    assert table[0] == (
        '| work | rlhf_jax, s | trl, s | trl / rlhf_jax (rounds) | tunix, s '
        '| tunix / rlhf_jax (rounds) |'
    )
    assert table[2] == '| sft | 2.00 | 3.00 | **1.50** (2.50–3.00) | – | – |'
    assert (
        tables.reasons(results) == '* sft, tunix: tunix: no\n* rm, tunix: no trainer\n'
    )


def test_the_table_of_shares():
    model = Model(vocab=7, layers=1, width=4, heads=2, kv_heads=1, mlp=3)
    works = {
        'sft': Work(kind='sft', batch=2, length=4),  # 5,088 FLOPs, see test_flops.py
        'write': Work(kind='generate', batch=5, prompt=3, response=2),  # 1,456 bytes
    }
    # 2·1,000 FLOPs and 2·100 bytes. The machine is slower in the rounds of the second.
    probe = Probe(side=10, dtype='float32', copied=100)
    quick, slow = (
        {'rounds': [answer(1.0, product=[2000 / flops], copy=[200 / bandwidth, 1.0])]}
        for flops, bandwidth in ((25_440.0, 99.0), (10_000.0, 7280.0))
    )
    results = {
        'sft': {'rlhf_jax': OURS, 'machine': quick},
        'write': {'rlhf_jax': OURS, 'machine': slow},
    }
    table = tables.share_table(results, ['rlhf_jax'], model, works, probe).splitlines()
    assert table[2] == '| sft | 0.00000509 | 0.0000254 | 10.0% |  |'
    assert table[3].split(' | ')[2] == '0.0000100'
    assert table[3].endswith('| 10.0% |')


def test_the_tables_of_costs_and_phases():
    results = {'ppo': {'rlhf_jax': OURS, 'trl': PEER, 'machine': OURS}}
    table = tables.cost_table(results, ['rlhf_jax', 'trl']).splitlines()
    assert table[2] == '| ppo | 8.50 | 0.0 | 1 | 3 |'
    phases = tables.phase_table(results).splitlines()
    assert phases[2:] == ['| ppo, rlhf_jax | generate 0.700 |']


def test_the_table_of_scaling():
    def steady(seconds):
        return {'rlhf_jax': {'rounds': [answer(seconds)], 'warm': [seconds + 1]}}

    results = {
        '8': steady(1.0),
        '16': steady(2.0),
        '32': {'rlhf_jax': {'error': 'no'}},
    }
    table = tables.scaling_table('batch', results, ['rlhf_jax']).splitlines()
    assert table[2] == '| 8 | 1.00 | 1.00 |'
    assert table[4] == '| 32 | – | – |'
    assert table[5] == '| log–log slope | 1.00 |  |'
