"""Responses are criticised and revised: what is written, counted and resumed."""

import json

import numpy as np
import pytest

from rlhf_jax.data.formats import Prompt, to_prompt
from rlhf_jax.data.sources import SourceRecord
from rlhf_jax.datasets import tiny_critiques, tiny_tldr
from rlhf_jax.labels.constitution import Principle
from rlhf_jax.labels.critique import critique_prompt, revision_prompt
from rlhf_jax.main import launch
from rlhf_jax.stages import batches, revise
from rlhf_jax.stages.kinds import stage
from rlhf_jax.stages.revision import Asked, Written, ask_critique, ask_revision
from tests.small_config import get_config
from tests.test_main import fails, never_compiled  # noqa: F401

pytestmark = pytest.mark.usefixtures('one_device')

DATA = 'tfds:tiny_tldr'
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}What is {{ m.content }}"
    '{% else %} TL;DR:{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}'
    '{% if add_generation_prompt %} TL;DR:{% endif %}'
)
RULES = [
    {'id': name, 'critique_request': f'What is {word}?', 'revision_request': 'Again.'}
    for name, word in (('truth', 'wrong'), ('more', 'right'))
]


def chat_tokenizer():
    """The tokenizer of the world with a chat template."""
    tokenizer = tiny_tldr.tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def rows(path):
    return [json.loads(line) for line in path.open(encoding='utf-8')]


@pytest.fixture(scope='module')
def rules(tmp_path_factory):
    path = tmp_path_factory.mktemp('rules') / 'rules.json'
    path.write_text(json.dumps(RULES))
    return str(path)


def config_below(finished, rules):
    """Two rounds of revision, and SFT on what they end in, behind a finished run."""
    config = get_config()
    run = str(finished)
    config.stages = ('revised', 'second')
    config.revised = stage(
        'revise',
        policy=f'{run}/ppo',
        critic=f'{run}/sft',
        constitution=rules,
        critique_prompt=str(tiny_critiques.CRITIQUE),
        revision_prompt=str(tiny_critiques.REVISION),
        prompts=f'{DATA}/prompts:train[:20]',
        rounds=2,
        batch_size=8,
        prompt_buckets=(56,),
        max_new_tokens=8,
        critique_buckets=(96,),
        max_critique_tokens=6,
        rewards={
            'rm': dict(model=f'{run}/rm'),
            'invented': dict(fn='rlhf_jax.datasets.tiny_tldr:invented', weight=0.0),
        },
    )
    config.second = stage(
        'sft',
        init=f'{run}/sft',
        train='stage:revised',
        eval='stage:revised',
        num_steps=1,
        batch_size=8,
        buckets=(96,),
    )
    return config


@pytest.fixture(scope='module')
def done(finished, rules, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('revise')
    return workdir, launch(config_below(finished, rules), workdir)


def test_every_step_is_written_down(done, finished):
    workdir, report = done
    found, e = rows(workdir / 'revised' / 'records.jsonl'), report['stages']['revised']
    assert e['records'] == len(found) > 10
    assert e['records'] + e['blank'] + e['too_long'] == e['prompts'] == 20
    used = set()
    for row in found:
        assert len(row['steps']) == 2 and 'left_out' not in row
        end = row['steps'][-1]['revision']
        assert row['completion'] == end['text'] and row['logprob'] == end['logprob'] < 0
        used |= {step['principle'] for step in row['steps']}
        for step in row['steps']:
            assert step['critique']['tokens'] <= 6 and step['revision']['tokens'] <= 8
        assert row['by'] == f'{finished}/ppo' and row['critic'] == f'{finished}/sft'
        assert row['temperature'] == row['critic_temperature'] == 1.0
        pair = [row['response']['text'], row['completion']]
        counted = tiny_tldr.invented([row['prompt']] * 2, pair).tolist()
        assert [row['score_invented_before'], row['score_invented']] == counted
        assert row['reward'] == pytest.approx(row['score_rm'], rel=1e-6)
    assert used == {'truth', 'more'}
    assert len({tuple(row['key']) for row in found}) == 3  # batches
    assert e['length_before'] == pytest.approx(
        np.mean([row['response']['tokens'] for row in found])
    )
    drawn = e['principles']
    assert drawn['truth']['drawn'] + drawn['more']['drawn'] == 2 * len(found)
    samples = rows(workdir / 'revised' / 'samples.jsonl')
    assert len(samples) == 20 and samples[0]['steps'][0]['critique']
    assert not (workdir / 'revised' / batches.ROWS).exists()
    page = (workdir / 'report.html').read_text()
    assert 'Critique by “truth”' in page and 'Scores by revision' in page


def test_a_killed_stage_goes_on_and_writes_the_same(done, finished, rules, tmp_path):
    config = config_below(finished, rules)
    config.stages = ('revised',)
    real, seen = revise._batches, []

    def killed(run, job, start):
        for number, found in enumerate(real(run, job, start), start):
            if number == 1 and 'killed' not in seen:
                with (run.stage_dir('revised') / batches.ROWS).open('ab') as file:
                    file.write(b'{"half a')
                seen.append('killed')
                raise KeyboardInterrupt
            seen.append(number)
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(revise, '_batches', killed)
        with pytest.raises(KeyboardInterrupt):
            launch(config, tmp_path)
        launch(config, tmp_path)
    assert seen == [0, 'killed', 1, 2]
    for name in ('records.jsonl', 'trails.jsonl', 'eval.json'):
        one, other = (path / 'revised' / name for path in (done[0], tmp_path))
        assert one.read_bytes() == other.read_bytes()


def test_another_constitution_in_between_is_an_error(finished, tmp_path):
    path = tmp_path / 'rules.json'
    path.write_text(json.dumps(RULES))
    config = config_below(finished, str(path))
    config.stages = ('revised',)
    real = revise._batches

    def killed(run, job, start):
        yield next(real(run, job, start))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(revise, '_batches', killed)
        with pytest.raises(KeyboardInterrupt):
            launch(config, tmp_path / 'run')
    path.write_text(json.dumps(RULES[:1]))
    fails(config, tmp_path / 'run', 'rules.json', 'has changed', 'put it back')


def scripted(*texts):
    """In the place of make_writer: writes these texts, the requests in order."""
    kept = []

    def make_writer(*_, **__):
        def write(asked, key):
            kept.append([None if one is None else one.fields for one in asked])
            return [
                None if one is None else Written(texts[i % len(texts)], 2, -1.0, True)
                for i, one in enumerate(asked)
            ]

        return write

    return make_writer, kept


def given(tmp_path, texts, **more):
    prompts = [tiny_tldr.make_example(tiny_tldr.CONFIGS[3], i) for i in range(4)]
    path = tmp_path / 'given.jsonl'
    lines = [
        {'prompt': row['prompt'], 'completion': text, **more}
        for row, text in zip(prompts, texts)
    ]
    path.write_text('\n'.join(map(json.dumps, lines)))
    return f'jsonl:{path}'


def test_pairs_of_given_responses(finished, rules, tmp_path, monkeypatch, capsys):
    """Equal ones, and a blank revision, are left out, counted and told."""
    config = config_below(finished, rules)
    config.stages = ('revised',)
    config.revised.policy, config.revised.keep = None, 'pairs'
    config.revised.rounds = 1
    config.revised.prompts = given(tmp_path, (' Anna.', ' Ben.', ' Carla.', ' Leo.'))
    make_writer, asked = scripted(' Anna.', ' David.', ' ', ' Nina.')
    monkeypatch.setattr(revise, 'make_writer', make_writer)
    e = launch(config, tmp_path / 'run')['stages']['revised']
    found = rows(tmp_path / 'run' / 'revised' / 'records.jsonl')
    assert [(row['chosen'], row['rejected']) for row in found] == [
        (' David.', ' Ben.'),
        (' Nina.', ' Leo.'),
    ]
    for row in found:
        for side in ('chosen', 'rejected'):
            counted = tiny_tldr.invented([row['prompt']], [row[side]])[0]
            assert row[f'invented_{side}'] == counted
    assert (e['equal'], e['blank'], e['records'], e['prompts']) == (1, 1, 2, 4)
    assert e['changed'] == pytest.approx(2 / 3)
    assert '1 blank, 1 equal' in capsys.readouterr().out
    critiques, revisions = asked
    assert critiques[1]['prompt'].startswith(found[0]['prompt'] + ' Ben.\n\nChecks:')
    assert '? David.\n\nTL;DR:' in revisions[1]['prompt']  # the critique is in it


def test_what_is_too_long_is_left_out_and_told(finished, rules, tmp_path, capsys):
    config = config_below(finished, rules)
    config.stages, config.revised.rounds = ('revised',), 1
    config.revised.critique_buckets = (84,)
    e = launch(config, tmp_path)['stages']['revised']
    trails = rows(tmp_path / 'revised' / 'trails.jsonl')
    tokenizer = tiny_tldr.tokenizer()
    for trail in trails:
        text = trail['prompt'] + trail['response']['text']
        text += '\n\nChecks: What is wrong?'  # or right, one token as well
        if len(tokenizer.encode(text)) > 84:
            assert trail['left_out'] == 'too_long' and not trail['steps']
    assert 0 < e['too_long'] < 20 and e['records'] + e['blank'] + e['too_long'] == 20
    assert f'{e["too_long"]} too long' in capsys.readouterr().out
    assert any('longer than critique_buckets' in x for x in e['warnings'])


# ----------------------------------------------------------------------------- messages


def test_messages_are_asked_in_further_turns():
    tokenizer = chat_tokenizer()
    templates = critique_prompt(), revision_prompt()
    principle = Principle(where='', **RULES[0])
    for prompt, opened in (
        ([{'role': 'user', 'content': 'fog'}], ' snow'),
        (
            [
                {'role': 'user', 'content': 'fog'},
                {'role': 'assistant', 'content': ' wind'},
            ],
            ' wind snow',
        ),
    ):
        source = SourceRecord({'prompt': prompt, 'other': 1}, 'x:1')
        asked = Asked(source, to_prompt(source, tokenizer))
        told = ask_critique(templates[0], asked, ' snow', principle)
        begin = f'What is fog TL;DR:{opened}</s>What is What is wrong? TL;DR:'
        begin = begin.replace('</s>', tokenizer.eos_token)
        assert to_prompt(told, tokenizer).prompt == begin
        told = ask_revision(templates, asked, ' snow', ' rain', principle)
        text = f'{begin} rain{tokenizer.eos_token}What is Again. TL;DR:'
        assert to_prompt(told, tokenizer).prompt == text
        assert to_prompt(told, tokenizer).templated


def test_messages_go_through_a_run(finished, rules, tmp_path):
    config = config_below(finished, rules)
    config.tokenizer = 'tests.stages.test_revise:chat_tokenizer'
    config.stages = ('revised', 'second')
    path = tmp_path / 'chat.jsonl'
    prompts = [[{'role': 'user', 'content': word}] for word in ('fog', 'rain') * 4]
    path.write_text('\n'.join(json.dumps({'prompt': prompt}) for prompt in prompts))
    config.revised.prompts = f'jsonl:{path}'
    config.revised.rewards = {}
    config.revised.critique_prompt = config.revised.revision_prompt = None
    launch(config, tmp_path / 'run')
    found = rows(tmp_path / 'run' / 'revised' / 'records.jsonl')
    assert found
    for row in found:
        assert row['templated'] and row['prompt'].endswith(' TL;DR:')


# ----------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'policy': None, 'critic': None}, ['set policy', 'or critic']),
        ({'policy': None}, ['no completion', 'policy is not set']),
        ({'critic': 'RUN/rm'}, ['config.revised.critic', 'no language model']),
        ({'policy': 'RUN/rm'}, ['config.revised.policy', 'no language model']),
        ({'constitution': 'nowhere.json'}, ['nowhere.json', 'cannot be read']),
        ({'critique_prompt': 'TURN'}, ['in text', 'is for the other kind']),
        ({'critique_buckets': (4096,)}, ['positions', 'critique_buckets']),
        ({'prompts': 'TEMPLATED'}, ['chat template has written', 'in messages']),
        ({'rounds': 0}, ['rounds']),
    ],
)
def test_mistakes_are_told_before_anything_compiles(
    finished,
    rules,
    tmp_path,
    never_compiled,  # noqa: F811
    changes,
    words,
):
    config = config_below(finished, rules)
    config.stages = ('revised',)
    (tmp_path / 'turn.txt').write_text('{critique_request}')
    known = {
        'TURN': str(tmp_path / 'turn.txt'),
        'TEMPLATED': given(tmp_path, [' A.'] * 4, templated=True),
    }
    with config.ignore_type():
        for name, value in changes.items():
            if isinstance(value, str):
                value = known.get(value, value.replace('RUN', str(finished)))
            config.revised[name] = value
    fails(config, tmp_path / 'run', *words)


def test_a_critic_of_another_tokenizer_is_refused(finished, rules, tmp_path):
    config = config_below(finished, rules)
    config.stages = ('revised',)
    config.tokenizer = 'tests.stages.test_revise:other_tokenizer'
    config.revised.rewards = {}
    fails(config, tmp_path, 'config.revised.critic', 'another tokenizer')


def other_tokenizer():
    """The words of the world in another order."""
    from rlhf_jax.data.tokenizer import word_tokenizer

    words = tiny_tldr.WORDS.read_text(encoding='utf-8').split()
    return word_tokenizer(words[::-1])


def test_a_record_stage_says_what_it_makes_and_takes():
    settings = revise.ReviseSettings(prompts='x', constitution='y', policy='sft')
    assert revise.makes(settings).records == 'demonstrations'
    assert revise.reads(settings) == {'prompts': 'prompts'}
    settings = revise.ReviseSettings(
        prompts='x', constitution='y', critic='sft', keep='pairs'
    )
    assert revise.makes(settings).records == 'comparisons'
    assert revise.reads(settings) == {'prompts': 'responses'}
    assert Prompt('a', None, {}, '').templated is False
