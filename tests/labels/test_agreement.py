"""The report of labels, by hand and with planted labellers, and the command."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax.agreement import agreement, lines
from rlhf_jax.labels.agreement import report
from rlhf_jax.labels.coefficients import krippendorff_alpha, wilson
from rlhf_jax.labels.records import Item, Label, to_row
from tests.labels.test_aggregation import items, labels_of, planted


def label(item, labeller, probability, **more):
    return Label(item=item, labeller=labeller, probability=probability, **more)


def write(path, rows):
    path.write_text(''.join(json.dumps(to_row(row)) + '\n' for row in rows))
    return path


# ------------------------------------------------------------------------- by hand

GOLD = Item(
    item='g', prompt='p', completions=('good', 'bad'), purpose='gold',
    known={'probability': 1},
)  # fmt: skip
TAUGHT = Item(
    item='t', prompt='p', completions=('x', 'y'), purpose='training',
    known={'probability': 1},
)  # fmt: skip
ASKED = [
    Item(item='1', prompt='p', completions=('long one', 'short')),
    Item(item='2', prompt='p', completions=('tiny', 'much longer')),
    Item(item='3', prompt='p', completions=('same', 'size')),
    GOLD,
    TAUGHT,
]
SAID = [
    label('1', 'ann', 1, order=(0, 1), seconds=4.0),
    label('1', 'bob', 1, order=(1, 0), flagged=True, seconds=5.0),
    label('2', 'ann', 0.8, order=(1, 0), seconds=8.0),
    label('2', 'bob', 0, order=(1, 0)),
    label('3', 'ann', 0.5, order=(0, 1), seconds=30.0),
    label('3', 'bob', 0.5),
    Label(item='1', labeller='cy', verdict='bad'),
    Label(item='2', labeller='cy', verdict='skipped'),
    label('g', 'ann', 1),
    label('g', 'bob', 0),
    label('t', 'bob', 0.5, seconds=105.0, flagged=True),
    Label(item='t', labeller='cy', verdict='skipped'),
    label('t', 'dee', 1),
    label('1', 'ann', 1, repeat=1, order=(1, 0)),
    label('2', 'ann', 0, repeat=1, order=(1, 0)),
]


def test_the_report_by_hand():
    found = report(ASKED, SAID)
    # Those of the training item, all of dee among them, are in none of the numbers.
    assert (found['labels'], found['labellers']) == (12, 3)
    assert (found['items'], found['items_shared']) == (3, 3)
    assert (found['skipped'], found['bad'], found['flagged']) == (1, 1, 1)
    assert found['ties'] == pytest.approx(2 / 6)
    # first first; first second; tie tie
    assert found['agreement'] == pytest.approx(2 / 3)
    # p_e = 2/3·1/3 + 0·1/3 + 1/3·1/3
    assert found['cohen_kappa'] == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))
    # Of those that chose one of two is equal: q² + (1 − q)² = ½.
    assert (found['ceiling'], found['ceiling_least']) == (0.5, 0.5)
    assert found['ceiling_dawid_skene'] is None
    assert (found['gold'], found['gold_count']) == (0.5, 2)


def test_single_labellers_by_hand():
    ann, bob, cy = report(ASKED, SAID)['by_labeller']
    assert [row['labeller'] for row in (ann, bob, cy)] == ['ann', 'bob', 'cy']
    assert (ann['labels'], ann['ties'], ann['seconds']) == (6, 1, 8.0)
    assert (bob['labels'], bob['ties'], bob['seconds']) == (4, 1, 5.0)
    assert (bob['flagged'], cy['skipped']) == (1, 1)
    assert (ann['gold'], bob['gold'], cy['gold']) == (1, 0, None)
    assert (ann['others'], ann['others_count']) == (pytest.approx(2 / 3), 3)
    assert ann['others_interval'] == wilson(2 / 3, 3)
    assert ann['chance'] == pytest.approx(2 / 3 * 1 / 3 + 1 / 3 * 1 / 3)
    # Asked again: the first of 1 again, and the second of 2 after the first.
    assert (ann['self'], ann['self_count'], bob['self']) == (0.5, 2, None)
    # The first shown: yes, no (2), then no and yes where asked again.
    assert (ann['first_shown'], ann['first_shown_count']) == (0.5, 4)
    assert (bob['first_shown'], bob['first_shown_count']) == (0.5, 2)
    # The longer: 1 yes, 2 no, gold yes ('good'), again yes and yes.
    assert (ann['longer'], ann['longer_count']) == (pytest.approx(4 / 5), 5)
    assert cy['others'] is None and cy['others_count'] == 0 and cy['bad'] == 1


def test_gold_of_a_dimension_is_of_that_alone():
    gold = dataclasses.replace(GOLD, known={'probability': 1, 'dimension': 'kind'})
    said = [label('g', 'x', p, dimension=d) for d, p in (('kind', 1), ('brief', 0))]
    found = report([gold], said)
    assert (found['gold'], found['gold_count']) == (1, 1)


def test_without_items_there_is_nothing_of_gold_and_lengths():
    said = [x for x in SAID if x.item in '123']
    found = report(None, said)
    assert found['agreement'] == pytest.approx(2 / 3)
    assert found['gold'] is None and found['longer'] is None
    assert found['first_shown_count'] == 6


def test_rankings_agree_pair_by_pair_and_are_drawn_by_item():
    said = [
        Label(item=str(i), labeller=name, ranks=ranks, order=(2, 1, 0))
        for i in range(4)
        for name, ranks in (('x', (1, 2, 3)), ('y', (1, 3, 2)))
    ]
    found = report(items(4, 'ranking', ('aaa', 'bb', 'c')), said)
    assert found['items'] == 4 and found['agreement'] == pytest.approx(2 / 3)
    assert found['agreement_interval'] == pytest.approx([2 / 3, 2 / 3])
    x, y = found['by_labeller']
    assert x['first_shown'] == 0 and y['first_shown'] == pytest.approx(1 / 3)
    assert x['longer'] == 1 and y['longer'] == pytest.approx(2 / 3)
    # Twelve cases of four items, which count as four.
    assert (x['longer_count'], x['longer_interval']) == (12, wilson(1, 4))
    assert y['first_shown_interval'] == pytest.approx(wilson(1 / 3, 4))


def test_ratings_have_an_order_and_no_ceiling():
    rng = np.random.default_rng(0)
    truth = rng.integers(1, 6, 50)
    table = np.clip(truth[:, None] + rng.integers(-1, 2, (50, 3)), 1, 5)
    said = [
        Label(item=str(u), labeller=f'l{k}', rating=float(x))
        for u, row in enumerate(table)
        for k, x in enumerate(row)
    ]
    found = report(items(50, 'rating', ('a',)), said)
    assert found['alpha_nominal'] == pytest.approx(
        krippendorff_alpha(table - 1, 'nominal')
    )
    assert found['alpha_ordinal'] == pytest.approx(
        krippendorff_alpha(table - 1, 'ordinal')
    )
    assert found['alpha_ordinal'] > found['alpha_nominal'] + 0.2
    assert found['ceiling'] is None and found['ties'] is None
    gold = [Item(item='g', prompt='p', completions=('a',), form='rating',
                 purpose='gold', known={'rating': 3})]  # fmt: skip
    extra = [
        Label(item='g', labeller='l0', rating=x, repeat=i) for i, x in enumerate((3, 4))
    ]
    found = report(items(50, 'rating', ('a',)) + gold, said + extra)
    assert (found['gold'], found['self']) == (1, 0)


def test_strengths_are_an_order():
    """Labellers who choose differently, but never far from each other."""
    said = []
    for i in range(30):
        near = i % 3 == 0
        for k in range(2):
            first = (i + k * near) % 2 == 0
            strength = 1 if near else 4
            said.append(label(str(i), f'l{k}', float(first), strength=strength))
    found = report(items(30), said)
    plain = report(items(30), [label(x.item, x.labeller, x.probability) for x in said])
    assert found['agreement'] == plain['agreement'] == pytest.approx(2 / 3)
    assert plain['alpha_ordinal'] == pytest.approx(plain['alpha_nominal'])
    assert found['alpha_ordinal'] > found['alpha_nominal'] + 0.3


# --------------------------------------------------------------------- the ceiling


def test_the_ceiling_of_equally_hard_pairs():
    truth, values = planted(count=4000, right=(0.8, 0.8, 0.8))
    found = report(items(4000), labels_of(values.tolist()))
    accuracy = (values == truth[:, None]).mean()  # of who knows the truth
    assert found['ceiling'] == pytest.approx(accuracy, abs=0.01)
    assert found['ceiling_dawid_skene'] == pytest.approx(accuracy, abs=0.015)
    low, high = found['ceiling_interval']
    assert low < 0.8 < high and high - low < 0.03
    assert found['ceiling_least'] == pytest.approx(0.8**2 + 0.2**2, abs=0.02)


def test_the_ceiling_of_pairs_that_are_clear_or_not():
    rng = np.random.default_rng(0)
    truth, clear = rng.uniform(size=(2, 4000)) < 0.5
    values = np.where(
        clear[:, None], truth[:, None], rng.uniform(size=(4000, 3)) < 0.5
    ).astype(float)
    found = report(items(4000), labels_of(values.tolist()))
    accuracy = (values == truth[:, None]).mean()  # 3/4
    assert found['ceiling_least'] == pytest.approx(accuracy, abs=0.02)
    assert found['ceiling'] > accuracy + 0.08


def test_the_ceiling_of_labellers_of_different_quality():
    truth, values = planted(count=3000, right=(0.95, 0.9, 0.9, 0.5))
    found = report(items(3000), labels_of(values.tolist()))
    accuracy = (values == truth[:, None]).mean()
    assert found['ceiling_dawid_skene'] == pytest.approx(accuracy, abs=0.015)


# ------------------------------------------------------------------- whom to trust


def test_random_labellers_and_one_who_never_agrees_are_named():
    _, values = planted(right=(0.9, 0.9, 0.85, 0.8, 0.5, 0.5))
    said = labels_of(values.tolist())
    found = report(items(300), said)
    assert found['near_chance'] == ['l4', 'l5'] and found['never_agree'] == []
    same = [label(str(i), f'l{k}', 1) for i in range(8) for k in range(3)]
    odd = [label(str(i), 'odd', 0) for i in range(8)]
    found = report(items(8), same + odd)
    assert found['never_agree'] == ['odd']
    assert found['by_labeller'][-1]['others'] == 0
    few = report(items(8), same + odd[:3])
    assert few['never_agree'] == []


def test_position_and_length_preference():
    rng = np.random.default_rng(0)
    asked = [
        Item(item=str(i), prompt='p', completions=('a' * n, 'b' * (9 - n)))
        for i, n in enumerate(rng.integers(0, 9, 200) + 1)
    ]
    orders = [(0, 1) if x else (1, 0) for x in rng.uniform(size=200) < 0.5]
    said = []
    for item, order in zip(asked, orders):
        longer = len(item.completions[0]) > len(item.completions[1])
        said.append(label(item.item, 'side', float(order[0] == 0), order=order))
        said.append(label(item.item, 'length', float(longer), order=order))
    length, side = report(asked, said)['by_labeller']
    assert side['first_shown'] == 1 and length['longer'] == 1
    assert side['longer_interval'][0] < 0.5 < side['longer_interval'][1]
    assert length['first_shown_interval'][0] < 0.5 < length['first_shown_interval'][1]


# ------------------------------------------------------------------------ odd labels


def test_one_labeller_agrees_with_nobody():
    found = report(items(4), labels_of([[1], [0], [1], [0.5]]))
    for name in (
        'agreement',
        'cohen_kappa',
        'fleiss_kappa',
        'alpha_nominal',
        'ceiling',
    ):
        assert found[name] is None and found.get(f'{name}_interval') is None
    assert 'one labeller: agreement needs two' in lines(found)


def test_all_ties_and_nothing_judged():
    found = report(items(3), labels_of([[0.5, 0.5]] * 3))
    assert found['agreement'] == 1 and found['fleiss_kappa'] is None
    assert found['ties'] == 1 and found['ceiling'] is None
    found = report(items(1), [Label(item='0', labeller='x', verdict='skipped')])
    assert found['items'] == 0 and found['agreement'] is None and found['ties'] is None
    assert lines(found)


def test_what_is_refused():
    said = labels_of([[1, 0]])
    with pytest.raises(ValueError, match='there are no labels'):
        report(items(1), [])
    with pytest.raises(ValueError, match='all labels are of training items'):
        report([TAUGHT], [label('t', 'ann', 1)])
    with pytest.raises(ValueError, match="2 of 2 labels are of items .*'0'"):
        report(items(2)[1:], said)
    with pytest.raises(ValueError, match='stands there twice'):
        report(items(1), said + said[:1])
    with pytest.raises(ValueError, match='ratings beside comparisons'):
        report(None, [*said, Label(item='9', labeller='x', rating=3)])


def test_the_report_is_the_same_whatever_the_order_and_is_json():
    _, values = planted(count=60)
    said = labels_of(values.tolist())
    found = report(items(60), said)
    assert report(items(60), said[::-1]) == found
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# ----------------------------------------------------------------------- the command


def run(*args):
    return subprocess.run(
        [sys.executable, '-m', 'rlhf_jax.agreement', *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command(tmp_path):
    write(tmp_path / 'items.jsonl', ASKED)
    path = write(tmp_path / 'labels.jsonl', SAID)
    done = run(path, '--json', tmp_path / 'out.json')
    assert done.returncode == 0, done.stderr
    assert "Cohen's κ                     0.500" in done.stdout
    assert 'right on gold items           0.500' in done.stdout
    assert json.loads((tmp_path / 'out.json').read_text()) == report(ASKED, SAID)
    (tmp_path / 'items.jsonl').rename(tmp_path / 'asked.jsonl')
    found = agreement(path, tmp_path / 'asked.jsonl')
    assert found == report(ASKED, SAID) != agreement(path)


def test_mistakes_of_the_command_take_one_line(tmp_path):
    records = tmp_path / 'records.jsonl'
    records.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    done = run(records)
    assert done.returncode == 1 and done.stdout == ''
    assert done.stderr.startswith(f'error: {records}:1: label has no field')
    assert done.stderr.count('\n') == 1
    path = write(tmp_path / 'labels.jsonl', SAID)
    write(tmp_path / 'items.jsonl', ASKED[1:])
    with pytest.raises(ValueError, match=r"labels.jsonl: 4 of 15 labels .*'1'"):
        agreement(path)
    with pytest.raises(ValueError, match='missing.jsonl'):
        agreement(tmp_path / 'missing.jsonl')
