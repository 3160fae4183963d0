"""The page in Chromium: by keyboard alone, on a phone, with odd texts, and while its
server is killed again and again.
"""

import json
import random
import signal
import socket
import sqlite3
import time
from collections import Counter

import pytest

from rlhf_jax.labels.store import labels_of
from tests.labels import folder as made
from tests.labels.browser import NARROW, WIDE, open_browser, until
from tests.labels.serving import Serving

pytest.importorskip('starlette')
pytest.importorskip('uvicorn')
pytestmark = pytest.mark.browser


class Labeller:
    """A browser at a link."""

    def __init__(self, link, size=WIDE):
        self.browser = open_browser(size)
        self.browser.get(link)
        self.wait_for_item()

    def text(self, selector='body'):
        return self.run(
            'return document.querySelector(arguments[0])?.innerText', selector
        )

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def run_module(self, script, *arguments):
        """What an expression of modules of the page gives."""
        return self.browser.execute_async_script(
            'const done = arguments[arguments.length - 1];'
            "Promise.all([import('/markdown.js'), import('/differences.js')])"
            f'.then(([markdown, differences]) => {{ {script} }})'
            ".then(done, (error) => done('' + error));",
            *arguments,
        )

    def wait_for_item(self):
        until(lambda: self.text('.card, .end'), what='an item')
        time.sleep(0.3)  # keys that are meant for the item before are not taken

    def wait_for_end(self):
        until(lambda: 'Nothing is left' in self.text('main'), 300, 'the last item')

    def press(self, keys):
        self.browser.switch_to.active_element.send_keys(keys)

    def answers(self, keys, store, count):
        """Presses keys until the database has so many labels; returns the last."""
        self.press(keys)
        labels = until(
            lambda: len(found := labels_of(store)) == count and found,
            what=f'{count} labels behind {keys!r}',
        )
        until(lambda: 'sending' not in self.run('return document.body.className'))
        self.wait_for_item()
        return labels[-1]

    def errors(self):
        """Of the console; the ones of a server that is not there are left out."""
        found = self.browser.get_log('browser')
        return [x['message'] for x in found if 'net::ERR_' not in x['message']]


@pytest.fixture
def serve(tmp_path):
    """Starts a server and opens browsers; ends all of them."""
    begun = []

    def started(rows, *, size=WIDE, **plan):
        folder = made.write(tmp_path / 'people', rows, **plan)
        serving = Serving(folder, '--port=0')
        begun.append(serving)
        labeller = Labeller(serving.links()['ann'], size)
        begun.append(labeller)
        return labeller, folder / 'labels.db'

    yield started
    for one in begun:
        if isinstance(one, Serving):
            one.end(signal.SIGKILL)
        else:
            one.browser.quit()


ESCAPE, ENTER, LEFT, RIGHT, BACK = '\ue00c', '\ue007', '\ue012', '\ue014', '\ue003'


def _good_side(label):
    """On which side of the screen the first completion stood."""
    return label.order.index(0)


def test_from_the_first_item_to_the_last_by_keyboard(serve):
    rows = [*made.items(8), *made.training(1)]
    guideline = {'': '# Rule\nBe **kind**.'}
    page, store = serve(rows, guideline=guideline)
    assert 'Training' in page.text('h1') and 'kind' in page.text('aside')
    page.answers('9', store, 1)
    assert 'expected' in page.text('.feedback') and 'first one is good' in page.text(
        'footer'
    )
    page.press(ENTER)
    page.wait_for_item()
    assert 'Training' not in page.text('h1')

    first = page.answers('1', store, 2)
    assert first.strength == 4
    assert first.probability == (1.0 if _good_side(first) == 0 else 0.0)
    second = page.answers('6', store, 3)
    assert second.strength == 1
    assert second.probability == (1.0 if _good_side(second) == 1 else 0.0)
    assert 'B is slightly better' in page.text('#toast')
    assert page.answers('5', store, 4).probability == 0.5

    page.press('u')  # undone, and said otherwise
    until(lambda: len(labels_of(store)) == 3)
    page.wait_for_item()
    assert page.run("return document.querySelector('.option.selected').innerText")
    assert page.answers(LEFT + ENTER, store, 4).strength == 1
    assert page.answers('t', store, 5).probability == 0.5
    assert page.answers('b', store, 6).verdict == 'bad'

    page.press('f')
    page.press('s u b 1')  # no keys while a note is written
    page.press(ENTER)
    page.press('gdmm?')
    until(lambda: page.run("return document.getElementById('help').open"))
    page.press('1')  # nor while the help is open
    page.press(ESCAPE)
    until(lambda: not page.run("return document.getElementById('help').open"))
    assert page.run("return document.querySelectorAll('mark').length") >= 2
    assert page.run("return document.getElementById('guideline').hidden")
    flagged = page.answers('s', store, 7)
    assert (flagged.verdict, flagged.flagged, flagged.note) == (
        'skipped',
        True,
        's u b 1',
    )
    page.press('f' + ESCAPE)
    last = page.answers(RIGHT + RIGHT + ENTER, store, 8)
    assert (last.strength, last.flagged, last.note) == (2, False, None)
    assert 0.2 < last.seconds < 60
    page.answers('3', store, 9)
    assert 'Nothing is left to label' in page.text('main')
    assert '8 done' in page.text('header') and page.errors() == []


def test_plain_choices_on_a_phone_by_touch(serve):
    page, store = serve(made.items(3), scale='choice', size=NARROW)
    wide = page.run('return document.documentElement.scrollWidth')
    assert wide <= NARROW[0]
    flag = "document.querySelector('.others > :nth-child(3)').click()"
    hidden = "return document.querySelector('.note').hidden"
    assert page.run(f'{flag}; {hidden}') is False
    assert page.run(f'{flag}; {hidden}') is True
    page.run("document.querySelectorAll('.option')[2].click()")
    until(lambda: len(labels_of(store)) == 1)
    label = labels_of(store)[0]
    assert label.probability == float(_good_side(label) == 1)
    assert label.strength is None and not label.flagged
    page.wait_for_item()
    assert page.answers('2', store, 2).probability == 0.5
    label = page.answers('1', store, 3)
    assert label.probability == float(_good_side(label) == 0)


def test_ratings_by_keyboard(serve):
    rows = made.items(3, form='rating', completions=['an answer'])
    page, store = serve(rows, form='rating')
    assert page.answers('4', store, 1).rating == 4
    assert page.answers(LEFT + LEFT + ENTER, store, 2).rating == 1
    page.press('9')  # not on this scale
    assert page.answers('1', store, 3).rating == 1


def test_ratings_on_a_long_scale(serve):
    rows = made.items(1, form='rating', completions=['an answer'])
    page, store = serve(rows, form='rating', rating_range=[0, 100])
    assert page.answers(RIGHT + LEFT + LEFT + ENTER, store, 1).rating == 49


def test_rankings_by_keyboard(serve):
    rows = made.items(2, form='ranking', completions=['a', 'b', 'c', 'd'])
    page, store = serve(rows, form='ranking')
    page.press('3' + ENTER)  # not all are ranked
    label = page.answers('33' + '1' + BACK + '4=12' + ENTER, store, 1)
    assert [label.ranks[i] for i in label.order] == [2, 3, 1, 2]
    page.run("for (const x of document.querySelectorAll('.badge')) x.click()")
    label = page.answers(ENTER, store, 2)
    assert [label.ranks[i] for i in label.order] == [1, 2, 3, 4]


def test_odd_texts_are_shown_as_they_are(serve):
    long = ' '.join(f'word{i}' for i in range(2700))[:20000]
    texts = [
        (
            '</script><script>document.title = 1</script>',
            '<img src=x onerror=alert(1)>',
        ),
        ('שלום עולם', 'left to right'),
        (long, long.replace('word7', 'other7')),
        ('', '\u202eabc'),
    ]
    rows = [
        row | {'completions': pair, 'prompt': pair[0]}
        for row, pair in zip(made.items(4), texts)
    ]
    page, store = serve(rows, guideline={'': '<b>bold</b> </aside>'})
    assert '<b>bold</b> </aside>' in page.text('aside')
    for count, pair in enumerate(texts, 1):
        shown = page.run(
            "return [...document.querySelectorAll('.card')].map(x => x.innerText)"
        )
        for text in pair:
            wanted = text or '(empty)'
            assert any(wanted in one for one in shown), wanted[:40]
        page.press('d')
        page.press('d')
        page.answers('5', store, count)
        if count == 1:
            way = "return getComputedStyle(document.querySelector('.card p')).direction"
            sides = {page.run(way)} | {
                page.run(way.replace("'.card p'", "'.card + .card p'"))
            }
            assert sides == {'rtl', 'ltr'}
    assert 'Labelling' in page.browser.title and page.errors() == []


def test_a_link_that_is_wrong_or_has_no_token_says_so(serve):
    page, _ = serve(made.items(1))
    address = page.browser.current_url.partition('#')[0]
    for link, told in (('#wrong', 'not valid'), ('', 'needs the link')):
        page.browser.get('about:blank')
        page.browser.get(f'{address}{link}')
        until(lambda: 'No items here' in page.text())
        assert told in page.text()


def test_a_stage_that_has_ended_takes_no_more_answers_and_says_so(serve):
    page, store = serve(made.items(3))
    page.answers('1', store, 1)
    store.with_name('done.json').write_text('{}')
    page.press('1')
    until(lambda: 'this stage is finished' in page.text(), what='the end')
    assert len(labels_of(store)) == 1
    page.browser.refresh()
    until(lambda: 'this stage is finished' in page.text(), what='the end again')


def test_an_answer_that_was_not_sent_is_sent_when_the_page_is_opened_again(tmp_path):
    folder = made.write(tmp_path / 'people', made.items(2))
    port, store = f'--port={_free_port()}', folder / 'labels.db'
    serving, page = Serving(folder, port), None
    try:
        link = serving.links()['ann']
        page = Labeller(link)
        serving.end(signal.SIGKILL)
        page.press('1')
        until(lambda: 'not saved yet' in page.text('#notice'))
        page.browser.get('about:blank')
        serving = Serving(folder, port)
        assert serving.links()['ann'] == link and labels_of(store) == []
        page.browser.get(link)
        until(lambda: len(labels_of(store)) == 1)
        until(lambda: '1 done' in page.text('header'))
        page.wait_for_item()
        assert page.answers('1', store, 2).item == 'pair-1'
    finally:
        serving.end(signal.SIGKILL)
        if page is not None:
            page.browser.quit()


MARKDOWN = [
    ('# One\ntwo', '<h3>One</h3><p>two</p>'),
    (
        'a **b** *c* `d` ~~e~~',
        '<p>a <strong>b</strong> <em>c</em> <code>d</code> <s>e</s></p>',
    ),
    ('2 * 3 * 4 and snake_case_name', '<p>2 * 3 * 4 and snake_case_name</p>'),
    ('**bold and *both***', '<p><strong>bold and <em>both</em></strong></p>'),
    (
        '- a\n- b\n  - c',
        '<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li></ul>',
    ),
    ('3. a\n4. b', '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
    ('- a\n\n- b\n\nend', '<ul><li><p>a</p></li><li><p>b</p></li></ul><p>end</p>'),
    ('```py\n# x\n```', '<pre><code># x</code></pre>'),
    ('```\nno end', '<pre><code>no end</code></pre>'),
    ('> a\n> b', '<blockquote><p>a\nb</p></blockquote>'),
    ('---', '<hr>'),
    (
        'a|b\n-|-\n1|2',
        '<div class="wide"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        '<tbody><tr><td>1</td><td>2</td></tr></tbody></table></div>',
    ),
    ('\\*a\\* <b>', '<p>*a* &lt;b&gt;</p>'),
    (
        '[t](javascript:x)',
        '<p><span class="link" title="javascript:x">t<small> (javascript:x)</small>'
        '</span></p>',
    ),
    (
        '![i](u)',
        '<p><span class="link" title="u">[image: i]<small> (u)</small></span></p>',
    ),
    ('`` a ` b ``', '<p><code>a ` b</code></p>'),
    ('a\r\nb', '<p>a\nb</p>'),
    ('**', '<p>**</p>'),
]


def test_markdown_and_differences(serve):
    page, _ = serve(made.items(1))
    shown = page.run_module(
        f'const texts = {json.dumps([text for text, _ in MARKDOWN])};'
        'const html = texts.map((text) => markdown.render(text).innerHTML);'
        'return html.map((text) => text.replace(/ dir="[a-z]+"/g, ""));'
    )
    for (text, wanted), found in zip(MARKDOWN, shown):
        assert found == wanted, text
    # What takes a careless parser for ever.
    hard = ['*' * 20000, '`' * 20000, '[' * 20000, '>' * 20000, '**a ' * 5000]
    hard += ['# a' + ' ' * 20000 + 'b', '- ' * 10000, '|' * 20000, '_a' * 10000]
    hard += [
        'a|b\n' + '-' + ' ' * 20000 + 'x',
        '```' + ' ' * 20000 + 'x y',
        '~' * 20000,
    ]
    hard += [
        ' ' * 20000 + 'x',
        '![' * 10000,
        '\n'.join('  ' * i + '- a' for i in range(200)),
    ]
    hard += ['`a``' * 5000, '*a **b ' * 3000, '\\' * 20000]
    for text in hard:
        spent = page.run_module(
            'const begun = performance.now();'
            f'const text = markdown.render({json.dumps(text)}).textContent;'
            'return [performance.now() - begun, text.length > 0 || true];'
        )
        assert spent[0] < 2000, (text[:20], spent)
    marked = page.run_module(
        "const a = markdown.render('one **two** three four');"
        "const b = markdown.render('one 2 three FOUR five');"
        'differences.markDifferences(a, b);'
        "const marks = (x) => [...x.querySelectorAll('mark')].map((m) => m.innerText);"
        'return [marks(a), marks(b)];'
    )
    assert marked == [['two', 'four'], ['2', 'FOUR five']]
    spent = page.run_module(
        'const word = () => `w${Math.floor(Math.random() * 99)}`;'
        'const random = (n) => Array.from({ length: n }, word);'
        'const begun = performance.now();'
        'differences.common(random(5000), random(5000));'
        'differences.common(random(10000), random(10000));'
        'return performance.now() - begun;'
    )
    assert spent < 5000


# Answers whatever is on the screen, and remembers what was acknowledged.
DRIVEN = """
window.acknowledged = [];
window.unanswered = 0;
const real = window.fetch;
window.fetch = async (path, how) => {
  window.unanswered += 1;
  const reply = await real(path, how);
  window.unanswered -= 1;
  if (path === 'answer' && reply.ok) window.acknowledged.push(JSON.parse(how.body).id);
  return reply;
};
setInterval(() => {
  if (document.body.className === 'sending' || !document.querySelector('.card')) return;
  const key = String(1 + Math.floor(Math.random() * 9));
  document.dispatchEvent(new KeyboardEvent('keydown', { key }));
}, 60);
"""


def _wait_for_labels(store, count):
    until(lambda: len(labels_of(store)) >= count, 300, f'{count} labels')


def _free_port():
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        return one.getsockname()[1]


def test_no_acknowledged_answer_is_lost_or_doubled_while_the_server_is_killed(tmp_path):
    """A thousand items, five browsers at once, twenty times kill -9."""
    names = ['ann', 'bob', 'cid', 'dan', 'eve']
    rows = [*made.items(1000), *made.gold(20)]
    plan = {'labellers': names, 'repeats': 0.05, 'gold_share': 0.05}
    folder = made.write(tmp_path / 'people', rows, **plan)
    port, store = f'--port={_free_port()}', folder / 'labels.db'
    serving, pages, kills, rng = Serving(folder, port), [], 0, random.Random(0)
    try:
        for link in serving.links().values():
            pages.append(Labeller(link))
            pages[-1].run(DRIVEN)
        while kills < 20:
            enough = len(labels_of(store)) + 5
            _wait_for_labels(store, enough)
            time.sleep(rng.uniform(0, 2))
            serving.end(signal.SIGKILL)
            kills += 1
            serving = Serving(folder, port)
            serving.links()
        _wait_for_labels(store, 1000)
        for page in pages:
            page.wait_for_end()
        acknowledged = [x for p in pages for x in p.run('return window.acknowledged')]
        lost = sum(page.run('return window.unanswered') for page in pages)
        assert lost >= 20, 'the server was killed while answers were on their way'
        assert [page.errors() for page in pages] == [[]] * len(pages)
    finally:
        serving.end(signal.SIGKILL)
        for page in pages:
            page.browser.quit()
    with sqlite3.connect(store) as db:
        stored = Counter(
            x for [x] in db.execute('SELECT id FROM answers WHERE NOT undone')
        )
    assert set(stored.values()) == {1} and {*acknowledged} == {*stored}
    assert len(acknowledged) > 1000
    main = Counter(
        x.item for x in labels_of(store) if x.item.startswith('pair') and not x.repeat
    )
    assert main == Counter(f'pair-{i}' for i in range(1000))
