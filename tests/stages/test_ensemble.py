"""An ensemble through a whole run: trained, resumed, optimised against, exported."""

import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoint, hf
from rlhf_jax.algos.ensemble import member_seed
from rlhf_jax.algos.rm import RMHParams, rm_step
from rlhf_jax.data import pipeline
from rlhf_jax.data.tokenizer import stage_tokenizer
from rlhf_jax.export import export
from rlhf_jax.main import launch
from rlhf_jax.optim import make_optimizer
from rlhf_jax.rewards import ensemble_scores
from rlhf_jax.sample import load_part, sample
from rlhf_jax.sharding import ParallelConfig, make_mesh
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.sources import load_scalar
from rlhf_jax.types import TrainState
from tests.small_config import get_config

MEMBERS = 3


def ensemble_config(finished, stages=('rm',), steps='4'):
    config = get_config(steps)
    config.stages = stages
    config.rm.init = config.ppo.init = str(finished / 'sft')
    config.rm.members = MEMBERS
    # Adam with a smaller one makes whole steps of the rounding of small gradients.
    config.rm.optim.eps = 1e-5
    config.rm.loop.save_every_steps = config.rm.loop.eval_every_steps = 2
    return config


@pytest.fixture(scope='module')
def trained(finished, tmp_path_factory):
    """rm and ppo of an ensemble, on all devices."""
    workdir = tmp_path_factory.mktemp('runs') / 'ensemble'
    config = ensemble_config(finished, ('rm', 'ppo'))
    config.ppo.rewards.rm.combine = 'uncertainty'
    config.ppo.num_rollouts = 1
    launch(config, workdir)
    return workdir


def rows(folder):
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    clock = ('seconds', 'train/tokens_per_second')
    return [{k: v for k, v in json.loads(x).items() if k not in clock} for x in lines]


def test_what_a_run_leaves_behind(trained):
    report = json.loads((trained / 'rm' / 'eval.json').read_text())
    assert len(report['members']) == MEMBERS
    assert all(len(member['interval']) == 2 for member in report['members'])
    assert len({member['loss'] for member in report['members']}) == MEMBERS
    assert report['spread'] > 0 and report['pairs'] == 16
    assert abs(report['mean_reference_score']) < 1e-5
    assert checkpoint.load_members(trained / 'rm', 'reward') == MEMBERS
    assert rows(trained / 'rm')[-1].keys() >= {'eval/spread', 'eval/accuracy'}
    deviations = [row['reward/rm/std'] for row in rows(trained / 'ppo')]
    assert all(deviation > 0 for deviation in deviations)


def test_every_member_scores_the_references_with_0_on_average(trained):
    """Not only all together: their zeros must agree where they are compared."""
    config = get_config()
    data = pipeline.load_demonstrations(
        config.rm.references, stage_tokenizer(trained / 'rm'), max_length=88
    )
    [batch] = pipeline.eval_batches(data, 16, (88,))
    model, params = load_part(trained, 'rm', 'reward')
    scores = ensemble_scores(params, batch.tokens, batch.mask, model=model)
    assert scores.shape == (16, MEMBERS) and float(scores.std()) > 0
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-5)


def test_a_resumed_ensemble_is_bit_identical(trained, finished, tmp_path):
    """Back to step 2 of 4, as a run that was killed there."""
    workdir = tmp_path / 'again'
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / 'rm' / 'checkpoints' / '4')
    shutil.rmtree(workdir / 'rm' / 'params')
    for name in ('done.json', 'model.json', 'eval.json'):
        (workdir / 'rm' / name).unlink()
    config = ensemble_config(finished, ('rm', 'ppo'))
    config.ppo.rewards.rm.combine = 'uncertainty'
    config.ppo.num_rollouts = 1
    launch(config, workdir)
    again, once = (load_part(where, 'rm', 'reward')[1] for where in (workdir, trained))
    jax.tree.map(np.testing.assert_array_equal, again, once)
    assert rows(workdir / 'rm') == rows(trained / 'rm')
    assert len({row['step'] for row in rows(workdir / 'rm')}) == 4


@pytest.mark.parametrize('member', [0, 2])
def test_a_member_is_a_run_of_its_own(trained, finished, member):
    """Trained by hand, from its own head, on its own order; but for the bias, which is
    set at the end.
    """
    config = ensemble_config(finished)
    mesh, tokenizer = make_mesh(ParallelConfig()), stage_tokenizer(trained / 'rm')
    run = Run(trained, config, mesh, tokenizer)
    key = jax.random.fold_in(run.key('rm'), member)
    model, params = load_scalar(run, config.rm.init, key, 'reward')
    _, policy = load_part(finished, 'sft', 'policy')
    jax.tree.map(np.testing.assert_array_equal, params['backbone'], policy['backbone'])
    settings = run.settings('rm')[0]
    tx = make_optimizer(settings.optim, 4)
    state = TrainState(
        step=jnp.int32(0), rng=key, params=params, opt_state=tx.init(params)
    )
    step = jax.jit(functools.partial(rm_step, model=model, tx=tx, hp=RMHParams()))
    data = pipeline.load_comparisons(settings.train, tokenizer, max_length=88)
    seed = member_seed(config.seed, member)
    order = pipeline.batches(data, 8, seed=seed, buckets=settings.buckets)
    for batch in itertools.islice(order, 4):
        state, _ = step(state, batch)
    _, members = load_part(trained, 'rm', 'reward')
    for head in (members['head'], state.params['head']):
        head.pop('bias')
    for many, one in zip(jax.tree.leaves(members), jax.tree.leaves(state.params)):
        np.testing.assert_allclose(many[member], one, atol=1e-5)


@pytest.mark.parametrize('member', [None, 2])
def test_members_are_exported_one_by_one(trained, tmp_path, member):
    out = tmp_path / 'out'
    export(trained, 'rm', out, member=member)
    _, params = load_part(trained, 'rm', 'reward')
    for i in range(MEMBERS) if member is None else [member]:
        place = out / f'member_{i}' if member is None else out
        again = hf.load_params(place, hf.load_config(place), head='scalar')
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_array_equal(a, b[i]), again, params
        )
    if member is None:
        assert len(list(out.iterdir())) == MEMBERS
        with pytest.raises(ValueError, match='exists already'):
            export(trained, 'rm', out)


def test_a_member_that_is_not_there(trained, finished, tmp_path):
    with pytest.raises(ValueError, match='--member=3, .* has members 0 to 2'):
        export(trained, 'rm', tmp_path / 'out', member=3)
    with pytest.raises(ValueError, match='--member=0, .* is no ensemble'):
        export(finished, 'rm', tmp_path / 'out', member=0)
    assert not (tmp_path / 'out').exists()


def test_the_critic_of_an_ensemble_is_its_first_member(trained, finished, tmp_path):
    """At learning rate 0 the critic stays what it started from."""
    config = ensemble_config(finished, ('ppo',), '1')
    config.ppo.rewards.rm.model = config.ppo.critic = str(trained / 'rm')
    config.ppo.critic_optim.learning_rate = 0.0
    launch(config, tmp_path / 'run')
    _, critic = load_part(tmp_path / 'run', 'ppo', 'critic')
    _, members = load_part(trained, 'rm', 'reward')
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), critic, members)


def test_samples_show_the_mean_of_the_members(trained, finished, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(trained, workdir)
    prompt = 'the mayor opened a bridge\n\nTL;DR:'
    [(text, _, scores)] = sample(workdir, 'ppo', prompt, num=1, max_new_tokens=4)
    assert isinstance(text, str) and np.isfinite(scores['rm'])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'rm.members': 0}, 'config.rm.members=0: use 1 or more'),
        ({'sft.members': 2}, 'config.sft.members is unknown'),
        ({'rm.init': 'ensemble'}, 'is an ensemble; start from a single model'),
        (
            {'rm.members': 1, 'ppo.rewards.rm.combine': 'uncertainty'},
            "combine='uncertainty' is for the members of an ensemble, and 'rm' is a",
        ),
    ],
)
def test_mistakes(trained, finished, tmp_path, change, message):
    config = ensemble_config(finished, ('sft', 'rm', 'ppo'))
    config.sft.init = 'scratch'
    config.rm.init = 'sft'
    for name, value in change.items():
        value = str(trained / 'rm') if value == 'ensemble' else value
        with config.ignore_type():
            config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=message):
        launch(config, tmp_path / 'run')
