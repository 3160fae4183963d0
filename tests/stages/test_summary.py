"""Numbers of other stages side by side."""

import json
import re

import pytest

from rlhf_jax.config import section
from rlhf_jax.main import launch
from rlhf_jax.pages.page import number
from rlhf_jax.stages import summary
from rlhf_jax.stages.kinds import stage
from tests.stages.test_label import labelled
from tests.test_main import fails

pytestmark = pytest.mark.usefixtures('one_device')

HERE = 'tests.stages.test_odd_labels'


def summed(*stages, **series):
    """A label stage ``said``, and a summary ``seen``."""
    config = labelled(fn=f'{HERE}:longer')
    config.stages = stages or ('said', 'seen')
    config.seen = stage('summary', series=series)
    return config


def test_numbers_of_this_run_and_of_a_finished_one_are_in_order(tmp_path):
    first = launch(summed(a=('said:records',)), tmp_path / 'one')['stages']
    assert first['seen']['series'] == {'a': [12]}
    said = tmp_path / 'one' / 'said'
    (said / 'eval.json').write_text(
        json.dumps({'records': 3, 'share': 0.25, 'open': None})
    )
    config = summed(
        **{
            'labels <b>': ('said:labels', f'{said}:records'),
            'share $_{': (f'{said}:share', f'{said}:open'),
        }
    )
    found = launch(config, tmp_path / 'two')['stages']['seen']
    assert found['series'] == {'labels <b>': [12, 3], 'share $_{': [0.25, None]}
    assert json.loads((tmp_path / 'two/seen/eval.json').read_text()) | found == found
    page = (tmp_path / 'two' / 'report.html').read_text()
    assert 'missing numbers: 1' in page and '<b>: 12' not in page
    assert 'labels &lt;b&gt;: 12, 3; share $_{: 0.25, –' in page


@pytest.mark.parametrize('sizes', [(1,), (3, 1, 2), (2,) * 5])
def test_every_series_has_its_axes_and_the_table_all_numbers(sizes):
    series = {f's{i}': [1.5 * k for k in range(n)] for i, n in enumerate(sizes)}
    found = {'series': series, 'order': list(series)}
    [plot], _ = summary._draw('seen', None, found)
    assert plot.wide
    svg = re.sub(r'\s+', ' ', plot.svg)
    assert all(f's{i}' in svg for i in range(len(sizes)))
    for name, values in series.items():
        assert f'{name}: {", ".join(map(number, values))}' in plot.caption
    assert summary.PAGE.verdict({'series': series}).verdict == 'pass'
    assert summary.PAGE.verdict({'series': {'a': [1, None]}}).verdict == 'fail'


@pytest.mark.parametrize(
    'series, words',
    [
        ({}, ['config.seen.series is empty']),
        ({'a': ()}, ['config.seen.series.a=(): name its points']),
        ({'a': 'said:records'}, ["config.seen.series.a='said:records': name its"]),
        ({'a': ('said',)}, ["series.a[0]='said': write 'STAGE:KEY'"]),
        ({'a': (':records',)}, ["write 'STAGE:KEY'"]),
        ({'a': ('sayd:records',)}, ["'sayd' is no earlier", "did you mean 'said'"]),
        ({'a': ('seen:records',)}, ["'seen' is no earlier stage"]),
        ({'a': ('said:recordz',)}, ['has no recordz', "did you mean 'records'"]),
        ({'a': ('said:by_labeller',)}, ['by_labeller in', 'is no number']),
    ],
)
def test_what_is_no_number_of_a_stage_is_told(series, words, tmp_path):
    fails(summed(**series), tmp_path, *words)


def test_a_summary_before_its_stages_is_told(tmp_path):
    config = summed('seen', 'said', a=('said:records',))
    fails(config, tmp_path, "'said' is no earlier stage, and no finished one")


def test_a_summary_leaves_nothing_to_others():
    settings = section(summary.SummarySettings, series={'a': ('b:c',)})
    made = summary.makes(settings)
    assert not made.parts and made.records is None
