"""The online stages without a critic: what they leave, resume, redraw, and refuse."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rlhf_jax.main import launch
from rlhf_jax.rewards import ScoreHParams
from rlhf_jax.sample import sample
from rlhf_jax.stages import rollouts
from tests.small_config import ROOT, config_file
from tests.stages.kills import killed_behind
from tests.test_main import fails, never_compiled  # noqa: F401

pytestmark = pytest.mark.usefixtures('one_device')


def get_config(name, **values):
    """Four rollouts of a small fresh policy; the reward is a function of the texts."""
    if (ROOT / 'configs' / f'{name}.py').exists():
        config = config_file(name).get_config('smoke')
    else:
        config = config_file('policy_gradient').get_config(f'name={name},smoke')
    stage = config.stages[-1]
    config.stages = (stage,)
    settings = config[stage]
    settings.init = 'scratch'
    settings.prompts = settings.prompts.split('[')[0] + '[:64]'
    settings.eval_prompts = settings.eval_prompts.split('[')[0] + '[:16]'
    settings.eval_batch_size, settings.max_new_tokens = 16, 8
    settings.loop.save_every_steps = 2
    values = {'rewards': {'letters': {'fn': f'{__name__}:letters'}}} | values
    for key, value in values.items():
        with settings.ignore_type():
            settings[key] = value
    return config


def letters(prompts, responses):
    """A reward that hardly two responses share."""
    return [sum(map(ord, text)) / 1000 for text in responses]


def mostly_equal(prompts, responses):
    """A reward of which most groups have a single value."""
    return [float(sum(map(ord, text)) % 6 == 0) for text in responses]


def never(prompts, responses):
    """A reward that tells nothing apart."""
    return [1.0] * len(responses)


def rows(workdir):
    (path,) = workdir.glob('*/metrics.jsonl')
    return [json.loads(line) for line in path.read_text().splitlines()]


def params(workdir):
    (path,) = workdir.glob('*/params')
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path)


SAMPLES = Path('policy_gradient', 'samples.jsonl')
# What the stage treats differently; the losses are tested in tests/algos.
NAMES = ('rloo', 'dapo', 'remax', 'gspo')


@pytest.fixture(scope='module')
def grpo(tmp_path_factory, launch_on_all):
    """A finished run on all devices and what its report says of it."""
    workdir = tmp_path_factory.mktemp('runs') / 'grpo'
    report = launch_on_all(get_config('grpo'), workdir)
    return workdir, report['stages']['policy_gradient']


def test_it_is_measured_as_ppo_is(grpo, finished):
    workdir, report = grpo
    assert report['finished'] and report['steps'] == 4
    ppo = json.loads((finished / 'ppo' / 'eval.json').read_text())
    assert ppo.keys() <= report.keys()
    assert report['kl'] != 0 and 0 <= report['win_rate'] <= 1
    page = (workdir / 'report.html').read_text()
    for part in ('policy_gradient-frontier', 'policy_gradient-updates'):
        assert part in page
    [(text, *_)] = sample(workdir, 'policy_gradient', 'The mayor', num=1)
    assert isinstance(text, str)


def test_its_metrics_are_those_people_plot(grpo):
    table = rows(grpo[0])
    assert [row['step'] for row in table] == [1, 2, 3, 4]
    names = {'objective/kl', 'objective/scores', 'objective/gold', 'reward/letters'}
    names |= {'policy/clipfrac', 'policy/approxkl', 'rollout/equal_groups'}
    assert names <= table[0].keys() and 'val/mean' not in table[0]
    assert table[0]['objective/kl'] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize('name', NAMES)
def test_every_method_learns_something(tmp_path, name):
    report = launch(get_config(name, num_rollouts=2), tmp_path)['stages']
    assert report['policy_gradient']['finished']
    first, second = rows(tmp_path)
    assert first['policy/grad_norm'] > 0 and second['objective/kl'] != 0
    assert ('rollout/draws' in first) == (name == 'dapo')


def test_several_rewards_are_normalised_by_themselves(tmp_path):
    rewards = {'letters': {'fn': f'{__name__}:letters'}}
    rewards['equal'] = {'fn': f'{__name__}:mostly_equal', 'weight': -2.0}
    launch(get_config('gdpo', rewards=rewards, num_rollouts=2), tmp_path)
    first, second = rows(tmp_path)
    assert first['policy/grad_norm'] > 0 and second['objective/kl'] != 0
    assert {'reward/letters', 'reward/equal'} <= first.keys()


def test_continuous_batching_writes_the_same_samples(grpo, all_devices, tmp_path):
    """Each device keeps two rows of its four at work; on the same eight devices the
    plain loop of the other backend runs every prompt twice for groups of four.
    """
    config = get_config('grpo', decode_rows=2)
    config.parallel.backend = 'pmap'
    launch(config, str(tmp_path))  # a path or its text
    ours, theirs = (
        list(map(json.loads, (workdir / SAMPLES).read_text().splitlines()))
        for workdir in (tmp_path, grpo[0])
    )
    for text in ('prompt', 'before', 'after'):
        assert [row[text] for row in ours] == [row[text] for row in theirs]


@pytest.mark.parametrize(
    ('name', 'values'),
    [
        # Draws, from a stream of prompts, as often as it must.
        ('dapo', {'rewards': {'mine': {'fn': f'{__name__}:mostly_equal'}}}),
        ('online_dpo', {}),
        ('expert_iteration', {}),
        ('ppo_lagrangian', {'critic': 'scratch', 'cost_critic': 'scratch'}),
    ],
)
def test_a_resumed_run_is_bit_identical(tmp_path, name, values):
    values = {'num_rollouts': 4, **values}
    launch(get_config(name, **values), tmp_path / 'undisturbed')
    with killed_behind(2):
        launch(get_config(name, **values), tmp_path / 'killed')
    launch(get_config(name, **values), tmp_path / 'killed')
    both = params(tmp_path / 'undisturbed'), params(tmp_path / 'killed')
    jax.tree.map(np.testing.assert_array_equal, *both)
    times = ('seconds', 'train/tokens_per_second')
    tables = (
        [{k: v for k, v in row.items() if k not in times} for row in rows(workdir)]
        for workdir in (tmp_path / 'undisturbed', tmp_path / 'killed')
    )
    assert next(tables) == next(tables)


@pytest.mark.parametrize(
    ('name', 'stage', 'metric'),
    [
        ('online_dpo', 'online_preference', 'rewards/accuracies'),
        ('expert_iteration', 'expert_iteration', 'objective/best_scores'),
        ('ppo_lagrangian', 'ppo_lagrangian', 'objective/lambda'),
    ],
)
def test_other_stages_run_in_the_same_loop(tmp_path, all_devices, name, stage, metric):
    # Every second response is trained on, in two minibatches on eight devices.
    values = {'num_rollouts': 2, 'batch_size': 32}
    if name == 'ppo_lagrangian':
        values |= {'critic': 'scratch', 'cost_critic': 'scratch'}
    report = launch(get_config(name, **values), tmp_path)['stages'][stage]
    assert report['finished'] and report['kl'] != 0
    first, second = rows(tmp_path)
    assert first['policy/grad_norm'] > 0 and metric in first
    if name == 'ppo_lagrangian':
        # Fresh policies write more words than the limit: λ has to rise.
        assert first['objective/cost'] == first['reward/cost']
        rises = second['objective/lambda'] > first['objective/lambda']
        assert rises == (second['objective/cost'] > 0)
        assert {'cost_before', 'cost_after'} <= report.keys()
        assert set(params(tmp_path)) == {'policy', 'critic', 'cost_critic'}


def test_the_average_is_what_is_kept_and_the_reference_moves(tmp_path):
    config = get_config('rloo', num_rollouts=2, group_size=2)
    config.policy_gradient.ref_sync_rollouts = 1
    launch(config, tmp_path / 'moved')
    # Measured from a reference that has caught up.
    assert rows(tmp_path / 'moved')[1]['objective/kl'] == pytest.approx(0, abs=1e-4)
    config = get_config('rloo', num_rollouts=1, group_size=2)
    launch(config, tmp_path / 'last')
    config.policy_gradient.ema_decay = 0.75
    launch(config, tmp_path / 'average')
    config.policy_gradient.ema_decay = 0.5
    launch(config, tmp_path / 'half')
    last, average, half = (
        params(tmp_path / name)['policy'] for name in ('last', 'average', 'half')
    )
    # θ_0 + ¼·(θ_1 − θ_0) and θ_0 + ½·(θ_1 − θ_0): the same line.
    jax.tree.map(
        lambda one, two, four: np.testing.assert_allclose(
            four - two, 2 * (two - one), atol=1e-6
        ),
        average,
        half,
        last,
    )


def test_prompts_that_teach_nothing_are_drawn_again(tmp_path):
    rewards = {'mine': {'fn': f'{__name__}:mostly_equal'}}
    launch(get_config('dapo', rewards=rewards, max_draws=8), tmp_path / 'many')
    launch(get_config('dapo', rewards=rewards, max_draws=1), tmp_path / 'one')
    many, one = rows(tmp_path / 'many')[0], rows(tmp_path / 'one')[0]
    assert one['rollout/kept'] < 1 and 'rollout/draws' not in one
    assert many['rollout/draws'] > 1 and many['rollout/kept'] > one['rollout/kept']
    # Of the same first draw, so the share of its prompts is near.
    assert 0 < many['rollout/useful_prompts'] < 1


def test_a_rollout_that_teaches_nothing_is_counted_and_moves_nothing(tmp_path):
    rewards = {'mine': {'fn': f'{__name__}:never'}}
    config = get_config('dapo', rewards=rewards, num_rollouts=2)
    # The rule for responses without EOS would tell them apart.
    config.policy_gradient.missing_eos_penalty = None
    config.policy_gradient.overlong_buffer = None
    launch(config, tmp_path)
    for row in rows(tmp_path):
        assert row['rollout/draws'] == 4 and row['rollout/kept'] == 0
        assert row['rollout/useful_prompts'] == 0 and row['policy/grad_norm'] == 0
        assert row['objective/kl'] == pytest.approx(0, abs=1e-4)


def test_the_rows_of_a_draw_are_its_useful_groups_first():
    class Stub:
        pass

    scores = np.array([0.0, 0, 1, 2, 5, 5, 3, 4])
    generation = jax.tree.map(
        np.asarray,
        {'ended': np.ones(8, bool), 'response_mask': np.ones((8, 1), bool)},
    )
    stub = Stub()
    stub.settings = Stub()
    stub.weights, stub.shaping = {'a': 2.0}, ScoreHParams()
    stub.settings.max_new_tokens = 1
    drawn = rollouts.Sampled(type('G', (), generation), {'a': scores})
    differ = rollouts.Rollouts._differ(stub, drawn, 2)
    np.testing.assert_array_equal(differ, [False, True, False, True])


def test_a_rollout_can_be_learned_from_twice(tmp_path):
    config = config_file('quickstart').get_config('smoke')
    config.stages = ('ppo',)
    ppo = config.ppo
    ppo.init = ppo.critic = 'scratch'
    ppo.rewards = {'letters': dict(fn=f'{__name__}:letters')}
    ppo.prompts = ppo.prompts.split('[')[0] + '[:64]'
    ppo.eval_prompts = ppo.eval_prompts.split('[')[0] + '[:16]'
    ppo.eval_batch_size, ppo.max_new_tokens, ppo.num_rollouts = 16, 8, 2
    ppo.optim.schedule = 'constant'  # the same rates for twice the updates
    launch(config, tmp_path / 'once')
    config.ppo.rollout_passes = 2
    launch(config, tmp_path / 'twice')
    once, twice = rows(tmp_path / 'once'), rows(tmp_path / 'twice')
    assert [row['step'] for row in twice] == [1, 2]
    # The first pass is the same; the second moves the policy before the next rollout.
    for name in ('objective/scores', 'loss/policy', 'val/mean'):
        assert once[0][name] == pytest.approx(twice[0][name], rel=1e-5), name
    assert once[1]['objective/kl'] != pytest.approx(twice[1]['objective/kl'], rel=1e-3)


@pytest.mark.parametrize(
    ('name', 'changes', 'parts'),
    [
        ('grpo', {'group_size': 1}, ["name='grpo'", 'group_size=1', '2 or more']),
        ('rloo', {'group_size': 1}, ["name='rloo'", 'group_size=1', '2 or more']),
        ('rloo', {'name': 'rlo'}, ["config.policy_gradient.name='rlo'", "'rloo'"]),
        ('rloo', {'epsilon': 1.0}, ['config.policy_gradient.epsilon=1.0', "'rloo'"]),
        ('grpo', {'batch_size': 24}, ['batch_size=24', '8 devices', 'use 16 or 32']),
        ('grpo', {'group_size': 3}, ['groups of', 'group_size=3 on 8', 'use 24']),
        ('grpo', {'max_draws': 4}, ['max_draws=4', "name='dapo'", 'leaves no prompt']),
        ('dapo', {'max_draws': 0}, ['max_draws=0', '1 or more']),
        ('dr_grpo', {'fixed_length': None}, ['fixed_length=None', 'fixed_length']),
        ('grpo', {'decode_rows': 0}, ['decode_rows=0', '1 or more']),
        ('grpo', {'decode_rows': 2}, ['decode_rows=2', "backend='pmap' on 8 devices"]),
        ('grpo', {'num_length_buckets': 0}, ['num_length_buckets=0', '1 or more']),
        ('grpo', {'num_microbatches': 0}, ['num_microbatches=0', '1 or more']),
        ('grpo', {'rewards': {}}, ['config.policy_gradient.rewards is empty']),
        ('grpo', {'init': 'rm'}, ['config.policy_gradient.init', 'rm']),
        ('online_dpo', {'name': 'kto'}, ["name='kto'", 'single responses', "'dpo'"]),
        ('online_dpo', {'name': 'tdpo'}, ["name='tdpo'", 'single tokens', "'dpo'"]),
        ('online_dpo', {'group_size': 1}, ['group_size=1', '2 or more']),
        ('online_dpo', {'num_minibatches': 16}, ['batch_size/group_size', '16']),
        ('expert_iteration', {'keep': 3}, ['keep=3 of group_size=2', '1 to 2']),
        ('expert_iteration', {'keep': 2}, ['keep=2', 'selects nothing']),
        ('gdpo', {'score_clip': 1.0}, ['score_clip=1.0', "name='gdpo' normalises"]),
        ('maxrl', {}, ["name='maxrl'", 'kl_coef=0.2', 'kl_loss_coef']),
        (
            'maxrl',
            {'kl_coef': 0.0},
            ['missing_eos_penalty=1.0', "name='maxrl' needs a reward of 0 or 1"],
        ),
        ('grpo', {'ref_mix': 0.0}, ['ref_mix=0.0', '(0, 1]']),
        ('grpo', {'overlong_buffer': 9}, ['overlong_buffer', 'max_new_tokens=8']),
    ],
)
def test_mistakes_are_named_before_compilation(
    tmp_path,
    never_compiled,  # noqa: F811
    all_devices,
    name,
    changes,
    parts,
):
    config = get_config(name)
    with config.unlocked(), config.ignore_type():
        for key, value in changes.items():
            config[config.stages[-1]][key] = value
    fails(config, tmp_path, *parts)
