"""The report page: what stands in report.json, verdicts both ways, and a safe page.

``make_run`` writes a work directory as the stages do; every test changes a thing in it.
"""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from rlhf_jax.report import write_report

STAGES = ('pretrain', 'sft', 'rm', 'ppo')


def curve(rng, steps, start, end, noise):
    """A value that falls or rises to its end exponentially, with noise."""
    time = np.arange(1, steps + 1) / steps
    return end + (start - end) * np.exp(-5 * time) + noise * rng.normal(size=steps)


def metrics(rng, stage, gold):
    """Columns of metrics.jsonl."""
    if stage in ('pretrain', 'sft'):
        start, end, n = (8.3, 3.1, 600) if stage == 'pretrain' else (3.4, 2.2, 240)
        columns = {
            'train/loss': curve(rng, n, start, end, 0.06),
            'eval/loss': curve(rng, n, start, end + 0.05, 0.01),
            'train/grad_norm': np.exp(curve(rng, n, 1.5, -0.5, 0.2)),
            'train/lr': 3e-4
            * np.minimum(1, np.arange(1, n + 1) / 30)
            * np.linspace(1, 0, n),
            'train/tokens_per_second': curve(rng, n, 20_000, 41_000, 900),
        }
    elif stage == 'rm':
        n = 200
        columns = {
            'train/loss': curve(rng, n, 0.71, 0.52, 0.03),
            'train/accuracy': np.clip(curve(rng, n, 0.5, 0.75, 0.04), 0, 1),
            'eval/loss': curve(rng, n, 0.70, 0.56, 0.003),
            'eval/accuracy': curve(rng, n, 0.5, 0.72, 0.005),
            'train/grad_norm': np.exp(curve(rng, n, 1.0, 0.2, 0.2)),
        }
    elif stage == 'preference':
        n = 200
        columns = {
            'train/loss': curve(rng, n, 0.7, 0.5, 0.02),
            'train/rewards/accuracies': np.clip(curve(rng, n, 0.5, 0.75, 0.04), 0, 1),
            'train/rewards/margins': curve(rng, n, 0, 0.9, 0.1),
            'train/rewards/chosen': curve(rng, n, 0, 0.1, 0.05),
            'train/rewards/rejected': curve(rng, n, 0, -0.8, 0.05),
            'train/logps/chosen': curve(rng, n, -20, -19, 0.5),
            'train/logps/rejected': curve(rng, n, -20, -28, 0.5),
            'train/grad_norm': np.exp(curve(rng, n, 1.0, 0.2, 0.2)),
            'eval/accuracy': curve(rng, n, 0.5, 0.72, 0.005),
            'eval/margin': curve(rng, n, 0, 0.8, 0.01),
        }
    else:
        n = 150
        kl = np.maximum(curve(rng, n, -1.5, 11.0, 0.5), 0.001)
        columns = {
            'objective/proxy_reward': 0.9 * np.sqrt(kl) + 0.1 * rng.normal(size=n),
            'objective/scores': 0.9 * np.sqrt(kl) - 0.3 + 0.1 * rng.normal(size=n),
            'objective/gold': 0.8 * np.sqrt(kl) - 0.1 * kl + 0.05 * rng.normal(size=n),
            'objective/kl': kl,
            'objective/entropy': curve(rng, n, 62, 41, 1.0),
            'objective/rlhf_reward': 0.8 * np.sqrt(kl) - 0.5 + 0.1 * rng.normal(size=n),
            'objective/kl_coef': curve(rng, n, 0.15, 0.06, 0.0),
            'policy/approxkl': np.abs(curve(rng, n, 0.001, 0.006, 0.001)),
            'policy/clipfrac': np.abs(curve(rng, n, 0.01, 0.06, 0.008)),
            'policy/ratio_max': 1 + np.exp(curve(rng, n, -1, 0.3, 0.2)),
            'loss/policy': curve(rng, n, 0.0, -0.02, 0.004),
            'loss/value': np.abs(curve(rng, n, 0.9, 0.2, 0.04)),
            'val/explained_variance': curve(rng, n, -0.4, 0.55, 0.05),
            'rollout/response_length': curve(rng, n, 21, 26, 0.7),
            'rollout/ended': np.clip(curve(rng, n, 0.9, 0.97, 0.01), 0, 1),
        }
        if not gold:
            del columns['objective/gold']
    return columns


COUNTS = (520, 480, 560, 340, 100)


def bins(edges, accuracies):
    """An accuracy per bin, as by_margin and by_length_difference hold it."""
    keys = ('lo', 'hi', 'count', 'accuracy')
    return [dict(zip(keys, row)) for row in zip(edges, edges[1:], COUNTS, accuracies)]


def evaluation(stage, gold):
    """A passing eval.json."""
    if stage in ('pretrain', 'sft'):
        loss, before = (3.14, 8.35) if stage == 'pretrain' else (2.21, 3.39)
        both = {'loss': loss, 'loss_before': before}
        return both | {'tokens': 65_536, 'uniform_loss': 8.318}
    if stage == 'rm':
        margins = (0.0, 0.25, 0.5, 1.0, 2.0, None)
        lengths = (None, -10, -3, 3, 10, None)
        rows = zip((0.53, 0.6, 0.7, 0.83, 0.94), (0.53, 0.59, 0.69, 0.81, 0.91), COUNTS)
        keys = ('predicted', 'observed', 'count')
        result = {
            'accuracy': 0.721,
            'interval': [0.7, 0.742],
            'pairs': 2000,
            'loss': 0.561,
            'length_baseline': 0.58,
            'by_margin': bins(margins, (0.55, 0.66, 0.77, 0.88, 0.96)),
            'by_length_difference': bins(lengths, (0.61, 0.67, 0.72, 0.77, 0.8)),
            'calibration': [dict(zip(keys, row)) for row in rows],
            'mean_reference_score': 0.003,
            'padding_gap': 2e-6,
        }
        return result | ({'accuracy_ceiling': 0.752} if gold else {})
    if stage == 'preference':
        both = evaluation('rm', gold) | evaluation('ppo', gold) | {'margin': 0.8}
        return {k: v for k, v in both.items() if not k.startswith('proxy')}
    result = {'prompts': 512, 'kl': 10.8}
    result |= {'proxy_reward_before': -0.21, 'proxy_reward_after': 2.62}
    result |= {'length_before': 21.3, 'length_after': 26.1}
    result |= {'ended_before': 0.91, 'ended_after': 0.97}
    result |= {'distinct_before': 0.83, 'distinct_after': 0.71}
    if gold:
        result |= {'win_rate': 0.781, 'win_rate_interval': [0.743, 0.815]}
        result |= {'ties': 0.02, 'expected_win_rate': 0.6}
        result |= {'gold_reward_before': 0.12, 'gold_reward_after': 1.55}
    return result


POST = (
    'My landlord has told me that he will sell the flat in spring. I have lived here '
    'for six years, the rent is low and my work is round the corner.\n\nI could ask '
    'the new owner for a lease, or look for something now, while the market is calm. '
)


def samples(stage, gold):
    """Rows of samples.jsonl; the second holds what must not become markup."""
    rows = []
    for i in range(14):
        prompt = POST * (1 + i % 3) + '\n\nTL;DR:'
        text = ' Landlord sells the flat; ask for a lease or look for another one now?'
        if i == 1:
            prompt, text = '<script>alert(0)</script>', ' <script>alert(1)</script>'
        if stage not in ('preference', 'ppo'):
            rows.append({'prompt': prompt, 'response': text})
            if stage == 'rm':
                rows[-1]['score'] = 0.25 * i - 1
            continue
        row = {'prompt': prompt, 'before': text[:40], 'after': text}
        row['reference'] = ' <b>Move'
        row |= {'proxy_before': -0.3, 'proxy_after': 2.125}
        rows.append(row | ({'gold_before': 0.1, 'gold_after': 1.5} if gold else {}))
    return rows


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding='utf-8')


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')


def config_of(stages):
    """A config as ``config.json`` has it: one stage starts from the one before."""
    kinds = {'pretrain': 'sft', 'rm': 'reward_model', 'cost': 'reward_model'}
    result, before = {'seed': 1, 'stages': list(stages)}, 'scratch'
    for name in stages:
        kind = kinds.get(name, name)
        values = {'name': 'dpo'} if kind == 'preference' else {}
        if kind in ('ppo', 'ppo_lagrangian'):
            values = {'critic': before, 'clip_eps': 0.2, 'prompts': 'none'}
        else:
            values |= {'train': 'none', 'eval': 'none'}
        if kind in ('ppo', 'preference'):
            values['eval_prompts'] = 'none'
        result[name] = {'kind': kind, 'init': before, **values}
        before = name
    return result


def make_run(root, stages=STAGES, gold=True):
    """Writes a work directory in which every stage passes."""
    rng = np.random.default_rng(0)
    run = {
        'config': {**config_of(stages), 'note': '</pre><script>x()</script>'},
        'versions': {'jax': '0.10.2', 'flax': '0.12.1'},
        'commit': '0123456789abcdef0123456789abcdef01234567',
        'device': '8 × TPU v5e',
    }
    write_json(root / 'config.json', run)
    for stage in stages:
        columns = metrics(rng, stage, gold)
        rows = []
        for i in range(len(next(iter(columns.values())))):
            row = {'step': i + 1, 'seconds': 0.4 * i}
            for name, values in columns.items():
                if not name.startswith('eval/') or i % 20 == 19:
                    row[name] = float(values[i])
            rows.append(row)
        write_rows(root / stage / 'metrics.jsonl', rows)
        write_rows(root / stage / 'samples.jsonl', samples(stage, gold))
        write_json(root / stage / 'eval.json', evaluation(stage, gold))
        seconds = {'compile': 21.5, 'train': 240.25, 'evaluate': 12.0}
        if stage == 'ppo':
            seconds = {
                'compile': 95.0,
                'generate': 610.5,
                'score': 80.0,
                'train': 420.0,
            }
        done = {
            'stage': stage,
            'steps': len(rows),
            'seconds': seconds,
            'init': {'pretrain': 'random', 'ppo': 'rm'}.get(stage, 'sft'),
            'data': {'train': '40,000 examples of tiny_tldr', 'eval': '2,000 held out'},
        }
        write_json(root / stage / 'done.json', done)
    return root


def edit(path, **changes):
    """Changes keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    write_json(path, {key: item for key, item in value.items() if item is not None})


def render(root):
    """Writes the report; returns the page and what write_report gave."""
    got = write_report(root)
    return (root / 'report.html').read_text(encoding='utf-8'), got


@pytest.fixture(scope='module')
def full(tmp_path_factory):
    """A complete run and its page; read only."""
    root = make_run(tmp_path_factory.mktemp('full'))
    return root, *render(root)


# ---------------------------------------------------------------------- report.json


def test_report_json_holds_the_figures_by_name(full):
    root, _, got = full
    assert got == json.loads((root / 'report.json').read_text())
    assert list(got['stages']) == list(STAGES)
    assert {stage['verdict'] for stage in got['stages'].values()} == {'pass'}
    assert got['stages']['rm']['accuracy'] == 0.721
    assert got['stages']['rm']['accuracy_ceiling'] == 0.752
    assert got['stages']['rm']['figure'] == 'accuracy 0.721 [0.700, 0.742]'
    assert got['stages']['ppo']['win_rate'] == 0.781
    assert got['stages']['ppo']['kl'] == 10.8
    assert got['stages']['ppo']['gold_reward_after'] == 1.55
    assert got['stages']['ppo']['proxy_reward_before'] == -0.21
    assert got['stages']['ppo']['steps'] == 150
    # three stages of 21.5 + 240.25 + 12 and PPO's 95 + 610.5 + 80 + 420
    assert got['seconds'] == pytest.approx(3 * 273.75 + 1205.5)
    assert got['phases']['ppo']['generate'] == 610.5
    assert got['versions']['jax'] == '0.10.2' and got['device'] == '8 × TPU v5e'
    assert got['commit'].startswith('0123456789ab')
    assert not list(root.glob('*.tmp'))


def test_numbers_that_are_not_finite_become_null_and_a_dash(tmp_path):
    root = make_run(tmp_path, stages=('sft', 'ppo'))
    edit(root / 'sft' / 'eval.json', loss=math.nan)
    edit(root / 'ppo' / 'eval.json', gold_reward_before=math.inf)
    page, got = render(root)
    text = (root / 'report.json').read_text()
    assert 'NaN' not in text and 'Infinity' not in text
    got = json.loads(text)['stages']
    assert got['sft']['loss'] is None and got['sft']['verdict'] == 'fail'
    assert got['sft']['figure'] == 'loss – nats/token'
    assert re.search(
        r'Gold reward</td><td class="num">–</td>\s*<td class="num">1.55', page
    )


def test_warnings_stand_in_both_files(tmp_path):
    root = make_run(tmp_path, stages=('ppo',))
    edit(root / 'ppo' / 'eval.json', kl=77.0)
    page, got = render(root)
    assert 'KL is 77 nats' in page
    assert len(got['stages']['ppo']['warnings']) == 1


# ----------------------------------------------------------------------------- page


def test_text_of_others_is_escaped(full):
    _, page, _ = full
    assert '<script' not in page and 'alert(1)' in page
    assert '&lt;script&gt;alert(1)&lt;/script&gt;' in page
    assert '&lt;/pre&gt;&lt;script&gt;x()' in page  # of the config
    assert ' &lt;b&gt;Move' in page


def test_page_needs_no_other_file(full):
    _, page, _ = full
    assert not re.search(r'(src|href)\s*=\s*["\']?\s*(https?:)?//', page)
    assert not re.search(r'<(link|img|iframe|object)\b|@import|url\((?!#)', page)
    # A figure with a colour bar embeds its colours as a data URI.
    targets = re.findall(r'(?:src|href)="(#|data:image/png;base64,)?', page)
    assert '' not in targets and len(targets) > 50
    assert 'purl.org' not in page  # nor what Matplotlib says about itself


def test_every_figure_is_whole_and_none_shares_an_id(full):
    _, page, _ = full
    figures = re.findall(r'<svg.*?</svg>', page, flags=re.S)
    # loss and panels (twice); seven of the reward model; four of PPO
    assert len(figures) == page.count('<figcaption>') == 2 + 2 + 7 + 4
    ids = []
    for svg in figures:
        element = ElementTree.fromstring(svg)
        assert element.get('role') == 'img' and element.get('width') is None
        own = {item.get('id') for item in element.iter() if item.get('id')}
        assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', svg)) <= own
        ids += own
    assert len(ids) == len(set(ids))


def test_page_shows_cards_samples_time_and_config(full):
    _, page, _ = full
    assert page.count('✓ PASS') == 2 * 4  # the card and the title of each stage
    assert 'The first 12 of 14 in' in page
    assert 'proxy −0.3' in page and 'gold 1.5' in page
    assert 'Prompt, 719 characters' in page  # folded
    assert '10 min 10 s' in page and '33 min 47 s' in page
    assert '&#34;clip_eps&#34;: 0.2' in page
    assert 'started from rm' in page and '40,000 examples of tiny_tldr' in page
    assert '<h3>Not shown</h3>' not in page


@pytest.mark.parametrize('gold', [True, False])
def test_the_page_of_a_preference_stage(tmp_path, gold):
    page, got = render(make_run(tmp_path, stages=('sft', 'preference'), gold=gold))
    stage = got['stages']['preference']
    assert stage['verdict'] == 'pass' and stage['margin'] == 0.8
    names = ['accuracy', 'margin', 'panels', 'bars', 'length', 'calibration']
    for name in names:  # every figure, with ids of its own
        assert f'id="preference-{name}-' in page
    assert 'implicit reward' in page and 'Responses before and after' in page
    assert page.count('<b>after</b>') == 12
    assert 'Not in metrics.jsonl' not in page.split('id="preference"')[1]
    assert ('of the texts it says nothing' in page) != gold
    assert ('ranks held-out responses as people did' in page) != gold


def test_a_subset_of_stages(tmp_path):
    root = make_run(tmp_path, stages=('sft', 'rm'))
    page, got = render(root)
    assert list(got['stages']) == ['sft', 'rm']
    assert 'id="sft"' in page and 'id="ppo"' not in page


def test_a_folder_that_no_config_knows_appears_under_its_name(tmp_path):
    root = make_run(tmp_path, stages=('sft',))
    folder = root / 'filter'
    folder.mkdir()
    rows = [{'step': step, 'kept': 0.5 + step / 100} for step in range(1, 9)]
    write_rows(folder / 'metrics.jsonl', rows)
    write_json(folder / 'eval.json', {'kept_share': 0.25, 'rule': 'best'})
    (root / 'notes').mkdir()  # no stage
    page, got = render(root)
    assert list(got['stages']) == ['sft', 'filter']
    assert got['stages']['filter']['verdict'] == 'unknown'
    assert '<code>filter</code></h2>' in page and 'kept_share' in page
    assert 'id="filter-panels-' in page


def test_no_stage_yet(tmp_path):
    root = make_run(tmp_path, stages=())
    page, got = render(root)
    assert 'No stage has started' in page and got['seconds'] == 0


def test_an_unfinished_stage_with_a_row_being_written(tmp_path):
    root = make_run(tmp_path, stages=('sft', 'rm'))
    for name in ('done.json', 'eval.json', 'samples.jsonl'):
        (root / 'rm' / name).unlink()
    rows = (root / 'rm' / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (root / 'rm' / 'metrics.jsonl').write_text(''.join(rows[:3]) + '{"step": 4, "tr')
    page, got = render(root)
    assert got['stages']['rm']['verdict'] == 'unknown'
    assert not got['stages']['rm']['finished'] and got['stages']['rm']['steps'] == 3
    assert list(got['phases']) == ['sft'] and got['seconds'] == 273.75
    assert (
        'Unfinished.' in page and 'No eval.json' in page and 'No samples.jsonl' in page
    )
    assert 'Held-out accuracy' not in page and 'Accuracy during training' in page


def test_a_stage_that_wrote_nothing_yet(tmp_path):
    root = make_run(tmp_path, stages=())
    write_json(root / 'config.json', {'config': config_of(('ppo',))})
    (root / 'ppo').mkdir()
    page, got = render(root)
    assert 'there are no learning curves' in page and '<svg' not in page


def test_absent_gold_is_said_and_not_invented(tmp_path):
    root = make_run(tmp_path, stages=('rm', 'ppo'), gold=False)
    page, got = render(root)
    assert 'alone proves nothing' in page and 'No gold reward (objective/gold)' in page
    assert 'No accuracy ceiling' in page and 'gold order (ceiling)' not in page
    assert 'Gold reward' not in page.replace('No gold reward', '')
    assert 'gold_reward_after' not in got['stages']['ppo']


def test_points_that_are_not_finite_are_counted(tmp_path):
    root = make_run(tmp_path, stages=('sft',))
    path = root / 'sft' / 'metrics.jsonl'
    path.write_text(path.read_text() + '{"step": 241, "train/loss": null}\n')
    assert 'train/loss was not finite in 1 of 241 rows' in render(root)[0]


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('config.json', None, r'config\.json does not exist'),
        ('config.json', '{"commit": null}', r'config\.json lacks config'),
        ('rm/eval.json', '{"accuracy": 0.7}', r'eval\.json lacks interval, pairs'),
        ('rm/eval.json', '{\n"accuracy":', r'eval\.json:2 is no JSON'),
        ('rm/done.json', '{"stage": "rm"}', r'done\.json lacks steps, seconds'),
        (
            'rm/metrics.jsonl',
            '{"step": 1}\n{"loss": 1}\n',
            r'metrics\.jsonl:2 lacks step',
        ),
        ('rm/metrics.jsonl', '{"step": 1}\n{"st\n', r'metrics\.jsonl:2 is no JSON'),
        ('rm/samples.jsonl', '{"prompt": ""}\n', r'samples\.jsonl:1 lacks response'),
    ],
)
def test_a_broken_file_is_an_error_with_its_place(tmp_path, name, text, message):
    root = make_run(tmp_path, stages=('rm',))
    if text is None:
        (root / name).unlink()
    else:
        (root / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        write_report(root)
    assert not (root / 'report.html').exists()


def test_a_bin_must_be_complete(tmp_path):
    root = make_run(tmp_path, stages=('rm',))
    edit(root / 'rm' / 'eval.json', calibration=[{'predicted': 0.5, 'count': 3}])
    with pytest.raises(ValueError, match=r'calibration\[0\] lacks observed'):
        write_report(root)
