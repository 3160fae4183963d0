"""The calls of the page: tokens, answers, undoing, and requests that no page makes."""

import itertools
import json

import pytest

from rlhf_jax.labels.exchange import add_labels
from rlhf_jax.labels.queue import book_of
from rlhf_jax.labels.records import Label
from rlhf_jax.labels.session import Conflict, Session
from rlhf_jax.labels.store import labels_of, open_store, read_stage
from tests.labels import folder as made

pytest.importorskip('starlette')
pytest.importorskip('httpx')

from starlette.testclient import TestClient  # noqa: E402

from rlhf_jax.labels.server import ASSETS, LARGEST, make_app  # noqa: E402


class Page:
    """What the page of one labeller sends."""

    def __init__(self, client, token):
        self.client = client
        self.headers = {'Authorization': f'Bearer {token}'}
        self.names = itertools.count()

    def post(self, path, value):
        sent = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.client.post(path, content=sent, headers=self.headers)

    def state(self):
        return self.client.get('/state', headers=self.headers).json()

    def answer(self, said, **fields):
        """Answers what is on the screen; returns what was sent and the reply."""
        key = self.state()['task']['key']
        name = f'{self.headers["Authorization"][-5:]}-{next(self.names)}'
        sent = {'id': name, 'key': key, 'said': said, 'seconds': 1.5, **fields}
        return sent, self.post('/answer', sent)


class Desk:
    """A server and its pages."""

    def __init__(self, folder, rows, **plan):
        self.path = folder / 'labels.db'
        made.write(folder, rows, **plan)
        self.told, self.refused = [], []
        items, self.plan = read_stage(folder)
        store = open_store(self.path)
        store.claim(items)
        app = make_app(
            Session(store, book_of(items, self.plan)),
            lambda: self.told.append(1),
            lambda host, count: self.refused.append(count),
        )
        self.client = TestClient(app)
        tokens = store.tokens(self.plan.labellers)
        self.pages = {n: Page(self.client, token) for n, token in tokens.items()}
        self.ann = self.pages['ann']

    def labels(self):
        return labels_of(self.path)


def judged(place, strength=3):
    return {'verdict': 'judged', 'place': place, 'strength': strength}


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path, made.items(3))


def test_the_page_and_its_files_are_strict_and_hold_no_text_of_the_run(desk):
    for path in ASSETS:
        reply = desk.client.get(path)
        assert reply.status_code == 200, path
        policy = reply.headers['content-security-policy']
        assert "default-src 'none'" in policy and 'unsafe' not in policy
        assert reply.headers['x-content-type-options'] == 'nosniff'
        assert 'innerHTML' not in reply.text and 'http://' not in reply.text
        assert 'https://' not in reply.text
    assert desk.client.get('/labels.db').status_code == 404
    assert desk.client.get('/../store.py').status_code == 404


@pytest.mark.parametrize('path', ['/state', '/answer', '/undo'])
@pytest.mark.parametrize('header', [None, 'Bearer wrong', 'Basic x', 'Bearer', 'é'])
def test_a_wrong_token_is_refused_and_counted(desk, path, header):
    headers = {} if header is None else {'Authorization': header.encode()}
    method = 'GET' if path == '/state' else 'POST'
    for count in (1, 2):
        reply = desk.client.request(method, path, headers=headers)
        assert reply.status_code == 403 and 'not valid' in reply.json()['error']
        assert desk.refused[-1] == count
    assert open_store(desk.path).refused() == 2
    assert not desk.told and not desk.labels()


def test_the_token_of_somebody_who_is_no_longer_in_the_plan_is_refused(tmp_path):
    token = open_store(tmp_path / 'labels.db').tokens(['eve'])['eve']
    desk = Desk(tmp_path, made.items(1))
    assert Page(desk.client, token).client.get('/state').status_code == 403


@pytest.mark.parametrize('labeller', ['ann', 'bob'])
def test_a_choice_becomes_the_probability_of_the_first_completion(tmp_path, labeller):
    desk = Desk(tmp_path, made.items(30), overlap=2)
    page, orders = desk.pages[labeller], set()
    for place in itertools.islice(itertools.cycle([0, 1]), 30):
        shown = page.state()['task']['completions']
        _, reply = page.answer(judged(place, 4))
        assert reply.status_code == 200
        label = desk.labels()[-1]
        good = shown[place].startswith('good')
        assert label.probability == (1.0 if good else 0.0)
        assert [shown[label.order.index(i)][:4] for i in (0, 1)] == ['good', 'poor']
        assert (label.labeller, label.strength, label.seconds) == (labeller, 4, 1.5)
        orders.add(label.order)
    assert orders == {(0, 1), (1, 0)}


def test_the_page_is_not_told_what_an_item_is(tmp_path):
    facts = [{'by': 'secret-model'}, {'by': 'other-model'}]
    rows = [*made.items(9, facts=facts), *made.gold(3)]
    desk = Desk(tmp_path, rows, repeats=0.5, gold_share=0.3)
    fields = set()
    while (state := desk.ann.state())['task'] is not None:
        text = json.dumps(state)
        assert 'secret' not in text and 'gold' not in text and 'pair-' not in text
        fields.add(frozenset(state['task']))
        before = state['answered']
        after = desk.ann.answer(judged(0))[1].json()
        assert after['answered'] == before + 1, 'every answer counts, gold or not'
    assert len(fields) == 1
    assert {x.item[:4] for x in desk.labels()} == {'pair', 'gold'}
    assert any(x.repeat for x in desk.labels())


def test_an_answer_that_is_sent_again_is_stored_once(desk):
    sent, first = desk.ann.answer(judged(0))
    for _ in range(3):
        again = desk.ann.post('/answer', sent)
        assert again.status_code == 200 and again.json() == first.json()
    assert len(desk.labels()) == 1


def test_two_windows_of_one_labeller_give_one_answer(desk):
    sent, _ = desk.ann.answer(judged(0))
    reply = desk.ann.post('/answer', sent | {'id': 'the other window'})
    assert reply.status_code == 409 and 'already' in reply.json()['error']
    assert reply.json()['state']['task']['key'] != sent['key']
    assert len(desk.labels()) == 1
    bob = desk.pages['bob'].post('/answer', sent)  # with the same id
    assert bob.status_code == 409 and len(desk.labels()) == 1


def test_undoing_shows_the_item_again_with_what_was_said(desk):
    first = desk.ann.state()['task']
    sent, reply = desk.ann.answer(judged(1, 2), flagged=True, note='odd')
    assert reply.json()['undo'] == sent['id']
    for _ in range(2):  # the second time, as after a lost reply
        state = desk.ann.post('/undo', {'id': sent['id']}).json()
        assert state['task']['completions'] == first['completions']
        assert state['task']['before'] == judged(1, 2)
        assert state['undo'] is None and desk.labels() == []
    desk.ann.answer(judged(0, 1))
    assert [x.strength for x in desk.labels()] == [1]
    # What was on the screen before the undoing is there again.
    assert desk.ann.state()['task']['key'] == reply.json()['task']['key']


def test_an_imported_label_takes_its_item_off_the_page(desk):
    label = Label(item='pair-0', labeller='ann', probability=1.0)
    key = desk.ann.state()['task']['key']
    add_labels(open_store(desk.path), [label])
    sent = {'id': 'late', 'key': key, 'said': judged(0), 'seconds': 1}
    assert desk.ann.post('/answer', sent).status_code == 409
    assert desk.ann.state()['undo'] is None and desk.labels() == [label]


def test_an_answer_from_before_an_import_is_undone_and_no_imported_one(desk):
    sent, _ = desk.ann.answer(judged(0))
    label = Label(item='pair-2', labeller='ann', probability=1.0)
    add_labels(open_store(desk.path), [label])
    assert desk.ann.state()['undo'] == sent['id']
    assert desk.ann.post('/undo', {'id': sent['id']}).json()['undo'] is None
    assert desk.labels() == [label]


def _refused_everywhere(desk, told):
    """No call shows or changes anything, and the message says why."""
    before = desk.labels()
    sent = {'id': 'late', 'key': 'x', 'said': judged(0), 'seconds': 1}
    replies = [
        desk.client.get('/state', headers=desk.ann.headers),
        desk.ann.post('/answer', sent),
        desk.ann.post('/undo', {'id': 'x'}),
    ]
    for reply in replies:
        assert reply.status_code == 409 and told in reply.json()['error']
        assert 'state' not in reply.json()
    assert desk.labels() == before


def test_no_answer_is_taken_for_texts_that_were_not_shown(desk):
    key = desk.ann.state()['task']['key']
    rows = [row | {'completions': ['other', 'texts']} for row in made.items(3)]
    items, plan = read_stage(made.write(desk.path.parent, rows))
    store = open_store(desk.path)
    store.claim(items)  # as the stage does, under the server
    _refused_everywhere(desk, 'the items of this stage have changed')
    sent = {'id': 'a', 'key': key, 'said': judged(0), 'seconds': 1}
    assert desk.ann.post('/answer', sent).status_code == 409 and not desk.labels()
    # A server that is started again shows the new texts.
    again = Session(store, book_of(items, plan))
    assert sorted(again.state('ann')['task']['completions']) == ['other', 'texts']
    with pytest.raises(Conflict):
        again.answer('ann', sent)


def test_no_answer_is_taken_once_the_run_has_used_the_labels(desk):
    sent, _ = desk.ann.answer(judged(0))
    (desk.path.parent / 'done.json').write_text('{}')
    _refused_everywhere(desk, 'this stage is finished')
    assert desk.ann.post('/answer', sent).status_code == 409  # the same once more
    assert desk.ann.post('/undo', {'id': sent['id']}).status_code == 409
    assert len(desk.labels()) == 1


def test_several_answers_are_undone_one_after_the_other(desk):
    sent = [desk.ann.answer(judged(0))[0] for _ in range(3)]
    assert desk.ann.post('/undo', {'id': sent[0]['id']}).status_code == 409
    for name in (sent[2], sent[1], sent[0]):
        assert desk.ann.post('/undo', {'id': name['id']}).status_code == 200
    assert desk.labels() == []
    assert desk.pages['bob'].post('/undo', {'id': sent[0]['id']}).status_code == 409


def test_ties_bad_pairs_skips_and_flags(desk):
    desk.ann.answer(judged(None, None), flagged=True, note='</script> שלום')
    desk.ann.answer({'verdict': 'bad'})
    desk.ann.answer({'verdict': 'skipped'}, note='')
    tie, bad, skipped = desk.labels()
    assert (tie.probability, tie.strength, tie.verdict) == (0.5, None, 'judged')
    assert (tie.flagged, tie.note) == (True, '</script> שלום')
    assert (bad.verdict, bad.probability) == ('bad', None)
    assert (skipped.verdict, skipped.note, skipped.flagged) == ('skipped', None, False)


def test_a_plain_choice_has_no_strength(tmp_path):
    desk = Desk(tmp_path, made.items(1), scale='choice')
    desk.ann.answer(judged(0, None))
    assert desk.labels()[0].strength is None


def test_training_gives_feedback_once_more_after_a_lost_reply(tmp_path):
    desk = Desk(tmp_path, [*made.items(1), *made.training(2, '**Why** not')])
    good = desk.ann.state()['task']['completions'].index('good 0')
    sent, reply = desk.ann.answer(judged(1 - good))
    feedback = {'right': False, 'expected': judged(good, 2), 'why': '**Why** not'}
    assert reply.json()['feedback'] == feedback
    assert reply.json()['undo'] is None and reply.json()['answered'] == 0
    assert desk.ann.post('/answer', sent).json()['feedback'] == feedback
    assert desk.ann.post('/undo', {'id': sent['id']}).status_code == 409
    good = desk.ann.state()['task']['completions'].index('good 1')
    assert desk.ann.answer(judged(good, 4))[1].json()['feedback']['right']
    assert 'feedback' not in desk.ann.answer(judged(0))[1].json()


def test_ratings(tmp_path):
    rows = made.items(2, form='rating', completions=['an answer'])
    desk = Desk(tmp_path, rows, form='rating', rating_range=[0, 10])
    assert desk.ann.answer({'verdict': 'judged', 'rating': 11})[1].status_code == 400
    assert desk.ann.answer({'verdict': 'judged', 'rating': 2.5})[1].status_code == 400
    assert desk.ann.answer({'verdict': 'bad'})[1].status_code == 400
    desk.ann.answer({'verdict': 'judged', 'rating': 10})
    assert (desk.labels()[0].rating, desk.labels()[0].order) == (10.0, None)


def test_rankings_are_of_the_completions_and_not_of_places(tmp_path):
    rows = made.items(6, form='ranking', completions=['a', 'b', 'c'])
    desk = Desk(tmp_path, rows, form='ranking')
    for ranks in (
        [1, 3, 4],
        [1, 1],
        [0, 1, 2],
        [2, 2, 3],
        ['1', 2, 3],
        'abc',
        [10**9] * 3,
    ):
        said = {'verdict': 'judged', 'ranks': ranks}
        assert desk.ann.answer(said)[1].status_code == 400, ranks
    for _ in range(6):
        shown = desk.ann.state()['task']['completions']
        wanted = {'a': 2, 'b': 1, 'c': 2}
        desk.ann.answer({'verdict': 'judged', 'ranks': [wanted[x] for x in shown]})
    assert {x.ranks for x in desk.labels()} == {(2, 1, 2)}
    assert len({x.order for x in desk.labels()}) > 1


def _broken(key):
    good = {'id': 'x', 'key': key, 'said': judged(0), 'seconds': 1}
    changes = [
        {'id': None},
        {'id': 'x' * 65},
        {'key': 7},
        {'said': None},
        {'said': {}},
        {'said': {'verdict': 'odd'}},
        {'said': judged(2)},
        {'said': judged(True)},
        {'said': judged(0, 5)},
        {'said': judged(0, None)},
        {'said': judged(0, 1.5)},
        {'seconds': 'long'},
        {'seconds': 10**400},
        {'seconds': None},
        {'note': 7},
        {'note': 'x' * 2001},
        {'note': '\ud800', 'key': '\ud800'},
    ]
    yield from (json.dumps(good | change).encode() for change in changes)
    yield json.dumps(good).replace('1}', 'NaN}').encode()
    yield from (b'', b'{', b'[]', b'\xff', b'[' * 60000, b'null')


def test_what_no_page_sends_is_refused_and_changes_nothing(desk):
    key = desk.ann.state()['task']['key']
    for body in _broken(key):
        status = desk.ann.post('/answer', body).status_code
        assert status == 400 or (status == 409 and b'ud800' in body), (
            status,
            body[:99],
        )
        assert desk.ann.post('/undo', body).status_code in (400, 409)
    assert not desk.labels() and desk.ann.state()['task']['key'] == key


def test_large_bodies_are_refused(desk):
    assert desk.ann.post('/answer', b' ' * (LARGEST + 1)).status_code == 413
    parts = (b' ' * 1024 for _ in range(LARGEST))  # no length is told beforehand
    reply = desk.client.post('/answer', content=parts, headers=desk.ann.headers)
    assert reply.status_code == 413


def test_an_answer_that_cannot_be_stored_is_not_acknowledged(desk, capsys):
    sent, _ = desk.ann.answer(judged(0))
    desk.path.unlink()
    for name in ('labels.db-wal', 'labels.db-shm'):
        (desk.path.parent / name).unlink(missing_ok=True)
    desk.path.write_bytes(b'damaged' * 1000)
    reply = desk.ann.post('/answer', sent | {'id': 'next'})
    assert reply.status_code == 503 and 'sent again' in reply.json()['error']
    assert 'cannot be used' in capsys.readouterr().out


def test_odd_texts_come_as_they_are(tmp_path):
    texts = [
        '</script><img src=x onerror=alert(1)>',
        'שלום \u202e abc',
        'x' * 20000,
        '\ud800',
    ]
    rows = [
        row | {'item': f'{i}', 'completions': [text, '']}
        for i, (row, text) in enumerate(zip(made.items(4), texts))
    ]
    desk, seen = Desk(tmp_path, rows), []
    for _ in texts:
        seen += desk.ann.state()['task']['completions']
        assert desk.ann.answer(judged(0))[1].status_code == 200
    assert sorted(seen) == sorted([*texts, '', '', '', ''])


def test_prompts_of_messages(tmp_path):
    prompt = [
        {'role': 'user', 'content': 'Hi'},
        {'role': 'assistant', 'content': None, 'tool_calls': [{'name': 'f'}]},
        {'role': 'user', 'content': [{'type': 'text', 'text': 'two'}]},
    ]
    desk = Desk(tmp_path, made.items(1, prompt=prompt))
    (first, text), (_, call), (_, parts) = desk.ann.state()['task']['prompt']
    assert (first, text) == ('user', 'Hi')
    assert '"tool_calls"' in call and '"text": "two"' in parts


def test_templated_prompts_without_their_control_tokens(tmp_path):
    prompt = {'prompt': '<|user|> Hi', 'templated': True, 'readable': ' Hi'}
    desk = Desk(tmp_path, made.items(1, **prompt))
    assert desk.ann.state()['task']['prompt'] == [['', ' Hi']]


def test_guidelines_go_with_their_dimension(tmp_path):
    guideline = {'helpful': '# Help', 'brief': '# Short'}
    desk = Desk(tmp_path, made.items(1), dimensions=[*guideline], guideline=guideline)
    assert desk.ann.state()['guidelines'] == guideline
    reply = desk.ann.answer(judged(0))[1].json()
    assert reply['task']['dimension'] == 'brief'
    assert desk.labels()[0].dimension == 'helpful'
    alone = Desk(tmp_path / 'b', made.items(1), guideline={'': '# All'})
    assert alone.ann.state()['guidelines'] == {'': '# All'}
    alone.ann.answer(judged(0))
    assert alone.labels()[0].dimension is None
