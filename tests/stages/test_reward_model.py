"""Reward models of every kind: trained, reported on, exported, used as rewards."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax import checkpoint, hf, sharding
from rlhf_jax.config import section
from rlhf_jax.data.formats import Prompt
from rlhf_jax.data.joining import decode_behind
from rlhf_jax.datasets import tiny_tldr
from rlhf_jax.export import export
from rlhf_jax.main import launch
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.responses import Responses
from rlhf_jax.rewards import combine_steps, reward_model_scores
from rlhf_jax.sample import load_part
from rlhf_jax.sharding import ParallelConfig
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.scoring import check_reward, make_scorers, step_batch, text_batch
from rlhf_jax.stages.settings import ModelSettings, RewardSource, StepReading
from rlhf_jax.stages.sources import check_single_score, load_scalar, resolve
from rlhf_jax.types import Generation, PromptBatch
from tests.small_config import config_file

pytestmark = pytest.mark.usefixtures('one_device')

HEADS = ('coverage', 'faithfulness', 'brevity')


def rm_config(kind, **settings):
    """``configs/reward_model.py`` for a rm stage alone, on a few records."""
    config = config_file('reward_model').get_config(f'kind={kind},smoke')
    config.stages = ('rm',)
    rm = config.rm
    rm.init, rm.num_steps, rm.loop.log_every_steps = 'scratch', 2, 1
    rm.train, rm.eval = f'{rm.train}[:40]', f'{rm.eval}[:24]'
    if rm.references is not None:
        rm.references = f'{rm.references}[:16]'
    for name, value in settings.items():
        with config.ignore_type():
            rm[name] = value
    return config


@pytest.mark.parametrize('members', [1, 2])
def test_soft_labels_and_ties_train_and_are_measured(tmp_path, members):
    p = np.linspace(0, 1, 16).round(2).tolist()
    rows = [
        {'prompt': f'p {i} ', 'chosen': f' a {i}', 'rejected': ' b c'}
        for i in range(16)
    ]
    rows = [row | {'probability': p[i]} for i, row in enumerate(rows)]
    rows[3] |= {'probability': None, 'tie': True}
    path = tmp_path / 'a.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    config = rm_config('comparisons', members=members, references=None, batch_size=8)
    config.rm.train = config.rm.eval = f'jsonl:{path}'
    launch(config, tmp_path / 'run')
    report = json.loads((tmp_path / 'run/rm/eval.json').read_text())
    assert report['pairs'] == 15 and report['ties'] == pytest.approx(1 / 16)
    ceiling = np.mean([max(x, 1 - x) for x in p[:3] + p[4:]])
    assert report['accuracy'] <= report['label_ceiling'] == pytest.approx(ceiling)


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
    """A finished run of every kind, made when it is first asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp('runs') / kind
            launch(rm_config(kind), made[kind])
        return made[kind]

    return get


def read(path):
    return json.loads(path.read_text(encoding='utf-8'))


@pytest.mark.parametrize(
    'kind, name, shape',
    [
        ('rankings', 'kendall_tau', ()),
        ('ratings', 'rmse', (3,)),
        ('steps', 'steps', ()),
    ],
)
def test_a_kind_leaves_its_report(workdirs, kind, name, shape):
    workdir = workdirs(kind)
    evaluation = read(workdir / 'rm' / 'eval.json')
    assert evaluation['kind'] == kind and np.isfinite(evaluation[name])
    stage = read(workdir / 'report.json')['stages']['rm']
    assert stage['verdict'] in ('pass', 'fail') and stage['finished']
    page = (workdir / 'report.html').read_text(encoding='utf-8')
    assert 'Reward model' in page and '<svg' in page
    rows = (workdir / 'rm' / 'metrics.jsonl').read_text().splitlines()
    assert len(rows) == 2 and np.isfinite(json.loads(rows[-1])['train/loss'])
    _, params = load_part(workdir, 'rm', 'reward')
    assert params['head']['bias'].shape == shape
    if kind == 'rankings':
        assert abs(evaluation['mean_reference_score']) < 1e-4  # centred


def test_model_json_says_what_the_scores_mean(workdirs):
    facts = {
        k: checkpoint.load_score_facts(workdirs(k) / 'rm', 'reward') for k in KINDS
    }
    assert facts['rankings'] == checkpoint.ScoreFacts()
    assert facts['ratings'] == checkpoint.ScoreFacts(HEADS)
    assert facts['steps'] == checkpoint.ScoreFacts((), '\n')
    names = read(workdirs('rankings') / 'rm' / 'model.json')['reward']
    assert not {'heads', 'step_separator', 'members'} & set(names)  # as it always was


KINDS = ('rankings', 'ratings', 'steps')


# ------------------------------------------------------------------------- as a reward


@pytest.fixture(scope='module')
def tokenizer():
    return tiny_tldr.tokenizer()


@pytest.fixture
def run(tmp_path, tokenizer):
    config = ConfigDict({'seed': 0, 'stages': ('ppo',)})
    config.model, config.parallel = section(ModelSettings), section(ParallelConfig)
    return Run(tmp_path, config, sharding.make_mesh(ParallelConfig()), tokenizer)


@pytest.fixture
def responses(tokenizer):
    texts = [' 1 + 2 = 3\n3 + 1 = 5', ' 4 + 4 = 8', '\n\n', ' 2 + 1 = 3\n\n3 + 3 = 6\n']
    texts *= 2
    prompts, ended = ['What is it?\n'] * 8, np.arange(8) % 3 > 0
    rows = [tokenizer(p + t)['input_ids'] for p, t in zip(prompts, texts)]
    start = len(tokenizer(prompts[0])['input_ids'])
    length = max(map(len, rows)) + 1
    tokens, mask = np.zeros((8, length), np.int32), np.zeros((8, length), bool)
    for i, row in enumerate(rows):
        row = [*row, *[1] * int(ended[i])]
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    generation = Generation(
        tokens=tokens,
        mask=mask,
        response_mask=mask & (np.arange(length) >= start),
        logprobs=np.zeros(mask.shape, np.float32),
        ended=ended,
    )
    records = [Prompt(prompt, None, {}, 'here') for prompt in prompts]
    batch = PromptBatch(
        tokens=tokens[:, :start], mask=mask[:, :start], index=np.arange(8)
    )
    return Responses(tokenizer, records, batch, generation, decode_behind)


def scored(run, responses, source):
    reward = check_reward(run, 'config.ppo.rewards.rm', source, 40)
    return np.asarray(make_scorers(run, {'rm': reward})['rm'](responses).scores)


def test_named_scores_add_up_by_their_weights(run, workdirs, responses):
    folder = str(workdirs('ratings') / 'rm')
    weights = {'coverage': 1.0, 'brevity': -0.5}
    found = scored(run, responses, RewardSource(model=folder, heads=weights))
    model, params = load_part(workdirs('ratings'), 'rm', 'reward')
    each = reward_model_scores(
        params, responses.generation.tokens, responses.generation.mask, model=model
    )
    assert each.shape == (8, 3) and float(jnp.std(each)) > 0.01
    np.testing.assert_allclose(found, each @ np.array([1, 0, -0.5]), atol=1e-5)


@pytest.mark.parametrize('combine', ['min', 'product', 'mean', 'last'])
def test_steps_become_one_score(run, workdirs, responses, tokenizer, combine):
    source = RewardSource(
        model=str(workdirs('steps') / 'rm'), steps=StepReading(combine=combine)
    )
    found = scored(run, responses, source)
    model, params = load_part(workdirs('steps'), 'rm', 'reward')
    for i in range(8):  # one by one, from the tokens
        ids = list(tokenizer('What is it?\n')['input_ids'])
        logits, steps = [], [s for s in responses.texts[i].split('\n') if s.strip()]
        ended = bool(responses.generation.ended[i])
        for k, step in enumerate(steps or ['']):
            ids += tokenizer(step)['input_ids'] if step else []
            if k < len(steps) - 1:
                ids += tokenizer('\n')['input_ids']
            elif ended or not step:
                ids += [1]
            tokens = jnp.array([ids])
            values = model.apply({'params': params}, tokens, tokens >= 0)
            logits.append(float(values[0, -1]))
        right = 1 / (1 + np.exp(-np.array(logits)))
        by_hand = {'min': right.min(), 'product': right.prod(), 'mean': right.mean()}
        wanted = by_hand | {'last': right[-1]}
        assert found[i] == pytest.approx(wanted[combine], abs=1e-5), i


def test_combined_steps_by_hand():
    values = jnp.array([[0.0, 9.0, jnp.log(3.0), jnp.nan]])  # ½ and ¾
    ends = jnp.array([[True, False, True, False]])
    wanted = {'min': 0.5, 'product': 0.375, 'mean': 0.625, 'last': 0.75}
    for how, value in wanted.items():
        assert float(combine_steps(values, ends, how)[0]) == pytest.approx(value)
    with pytest.raises(ValueError, match='use min, product, mean, last'):
        combine_steps(values, ends, 'max')


def test_a_text_in_steps_is_cut_and_its_last_step_still_read(tokenizer):
    text = ['1 + 2 = 3\n3 + 4 = 7\n7 + 1 = 8']
    whole = step_batch(tokenizer, ['Sum'], text, [True], 200, '\n')
    cut = step_batch(tokenizer, ['Sum'], text, [True], 20, '\n')
    assert (whole[3], cut[3]) == (0, 1) and cut[1].sum() == 20
    assert whole[2].sum() == 3 and cut[2].sum() == 2 and cut[2][0, 19]
    one = text_batch(tokenizer, ['Sum'], ['1 + 2 = 3'], [False], 200)
    same = step_batch(tokenizer, ['Sum'], ['1 + 2 = 3'], [False], 200, '\n')
    for a, b in zip(one[:2], same[:2]):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    'kind, source, message',
    [
        ('ratings', {}, r'has the scores coverage, .*heads=\{'),
        ('ratings', {'heads': {'coverige': 1.0}}, "no score 'coverige'; did you mean"),
        ('ratings', {'steps': StepReading()}, 'say how they add up'),
        ('rankings', {'heads': {'x': 1.0}}, "no score 'x'; it has one score"),
        ('rankings', {'steps': StepReading()}, 'does not say what separates them'),
        ('steps', {}, 'scores the steps of a response'),
        ('steps', {'steps': StepReading(separator=';')}, r"was trained with '\\n'"),
    ],
)
def test_what_is_said_must_fit_the_scores(run, workdirs, kind, source, message):
    source = RewardSource(model=str(workdirs(kind) / 'rm'), **source)
    with pytest.raises(ValueError, match=message):
        check_reward(run, 'config.ppo.rewards.rm', source, 40)


def test_a_critic_has_one_score(run, workdirs):
    with pytest.raises(ValueError, match='a critic has one'):
        check_single_score(resolve(run, str(workdirs('ratings') / 'rm')), 'critic')
    check_single_score(resolve(run, str(workdirs('steps') / 'rm')), 'critic')


# ------------------------------------------------------------------- export and import


def test_named_scores_go_to_hugging_face_and_back(run, workdirs, tmp_path, responses):
    out = tmp_path / 'exported'
    export(workdirs('ratings'), 'rm', out)
    config = read(out / 'config.json')
    assert config['id2label'] == {str(i): name for i, name in enumerate(HEADS)}
    assert hf.load_score_names(out) == HEADS and hf.load_head(out) == 'scalar'
    params = hf.load_params(out, hf.load_config(out), head='scalar')
    _, ours = load_part(workdirs('ratings'), 'rm', 'reward')
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(ours))
    source = {'heads': dict.fromkeys(HEADS, 1.0)}
    both = [
        scored(run, responses, RewardSource(model=str(folder), **source))
        for folder in (out, workdirs('ratings') / 'rm')
    ]
    np.testing.assert_allclose(*both, atol=1e-6)


def test_scores_of_steps_are_no_classifier(workdirs, tmp_path):
    with pytest.raises(ValueError, match='scores the steps of a response'):
        export(workdirs('steps'), 'rm', tmp_path / 'exported')


def test_other_heads_get_a_fresh_head_on_the_same_backbone(run, workdirs):
    folder, key = str(workdirs('ratings') / 'rm'), jax.random.PRNGKey(0)
    same, kept = load_scalar(run, folder, key, 'reward')
    assert same.heads == HEADS
    other, params = load_scalar(run, folder, key, 'reward', ('coverage',))
    assert isinstance(other, ScalarModel) and params['head']['bias'].shape == (1,)
    jax.tree.map(np.testing.assert_array_equal, params['backbone'], kept['backbone'])


# --------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    'kind, settings, message',
    [
        ('rankings', {'loss': 'davidsen'}, "did you mean 'davidson'"),
        ('rankings', {'loss': 'squared', 'references': None}, 'declare the lowest'),
        ('rankings', {'theta': 2.0}, "no setting of the stage, nor of .*='davidson'"),
        ('ratings', {'rating_range': (4, 0)}, 'declare the lowest and the highest'),
        ('ratings', {'heads': ('a', 'a')}, 'names a dimension twice'),
        ('ratings', {'references': 'x'}, 'set config.rm.references=None'),
        ('ratings', {'loss': 'stepwise'}, 'scores steps, which heads='),
        ('steps', {'loss': 'bradley_terry'}, "needs chosen or ranks .*'stepwise'"),
        ('rankings', {'members': 2}, 'an ensemble learns from plain comparisons'),
    ],
)
def test_a_wrong_setting_is_told(tmp_path, tokenizer, kind, settings, message):
    config = rm_config(kind, **settings)
    run = Run(tmp_path, config, sharding.make_mesh(ParallelConfig()), tokenizer)
    with pytest.raises(ValueError, match=message):
        run.kind('rm').load(run, 'rm', *run.settings('rm'))


def test_a_loss_of_a_users_own(tmp_path, tokenizer):
    config = rm_config('rankings', loss='tests.own_reward_loss', width=0.5)
    run = Run(tmp_path, config, sharding.make_mesh(ParallelConfig()), tokenizer)
    job = run.kind('rm').load(run, 'rm', *run.settings('rm'))
    assert job.loss_hp.width == 0.5 and job.loss.__name__ == 'tests.own_reward_loss'
