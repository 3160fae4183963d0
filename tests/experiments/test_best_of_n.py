"""The best-of-n experiment on a small finished run, and what it writes."""

import json

import numpy as np
import pytest

from experiments.best_of_n import draw, load, markdown, plot, report, rollouts


def test_a_finished_run(finished, tmp_path):
    """Three samples of sixteen prompts: what they are, and a table of them."""
    run, stage = load(finished, None)
    job, samples = stage.evaluation, draw(run, stage, 3)
    assert [len(sampled.responses) for sampled in samples] == [16] * 3
    assert samples[0].responses != samples[1].responses
    again = draw(run, stage, 1)
    assert again[0].responses == samples[0].responses
    for sampled in samples:
        assert (sampled.lengths > 0).all() and (sampled.ref_logprobs < 0).all()
    rows = report(job, samples)
    assert [row['n'] for row in rows] == [1, 2, 3]
    proxy = np.stack([sampled.scores['rm'] for sampled in samples])
    assert rows[0]['proxy'] == pytest.approx(proxy.mean(), rel=1e-5)
    assert rows[2]['proxy'] == pytest.approx(proxy.max(0).mean(), rel=1e-5)
    assert rows[0]['proxy'] < rows[1]['proxy'] < rows[2]['proxy']
    best = np.stack([sampled.scores['gold'] for sampled in samples])
    best = np.take_along_axis(best, proxy.argmax(0)[None], 0)
    assert rows[2]['gold'] == pytest.approx(best.mean(), rel=1e-5)
    assert 0 < rows[2]['kl'] <= rows[2]['kl_bound']

    lines = markdown(rows).splitlines()
    assert lines[0] == '| n | proxy | gold | win_rate | kl_bound | kl |'
    assert len(lines) == 5 and all(line.count('|') == 7 for line in lines)
    assert lines[4].startswith('| 3 | ') and ' – ' in lines[4]

    points = rollouts(finished, job.weights)
    logged = (finished / 'ppo' / 'metrics.jsonl').read_text(encoding='utf-8')
    first = json.loads(logged.splitlines()[0])
    assert points['proxy'][0] == pytest.approx(first['reward/rm'])
    assert points['gold'][0] == pytest.approx(first['objective/gold'])
    assert points['distance'].shape == (4,)
    plot(rows, {'small': points}, tmp_path / 'best_of_n.png')
    assert (tmp_path / 'best_of_n.png').stat().st_size > 10_000


def test_no_run_to_sample_from(tmp_path):
    with pytest.raises(ValueError, match=r'has no config.json; name a finished run'):
        load(tmp_path, None)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps({'config': {'stages': ['sft']}}), encoding='utf-8')
    with pytest.raises(ValueError, match='has no ppo section'):
        load(tmp_path, None)
