"""Rewards of a run: models of the same and of other tokenizers, functions, mistakes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_jax import checkpoint, files, hf, sharding
from rlhf_jax.algos.ppo import ActorCritic, PPOHParams, prepare
from rlhf_jax.config import section
from rlhf_jax.data.formats import Prompt
from rlhf_jax.data.joining import decode_behind
from rlhf_jax.data.pipeline import load_comparisons
from rlhf_jax.data.tokenizer import frame
from rlhf_jax.export import export
from rlhf_jax.main import launch
from rlhf_jax.responses import Responses
from rlhf_jax.rewards import ScoreHParams, reward_model_scores, weighted_sum
from rlhf_jax.sample import sample
from rlhf_jax.sharding import ParallelConfig
from rlhf_jax.stages.rollouts import Sampled, shape_and_prepare
from rlhf_jax.stages.run import Run
from rlhf_jax.stages.scoring import check_reward, make_scorers, text_batch
from rlhf_jax.stages.settings import ModelSettings, RewardSource
from rlhf_jax.types import Generation, PPOState, PromptBatch
from tests.small_config import get_config

pytestmark = pytest.mark.usefixtures('one_device')

WORDS = 'red green blue one two three cat dog bird'.split()
SIZE = 16  # rows of a batch, of which the last two fill up


def words(pieces, template, **special):
    table = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordLevel(table, unk_token=pieces[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    named = [(piece, table[piece]) for piece in template.split() if piece in table]
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=named
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def policy_tokenizer():
    return words(['[UNK]', '</s>', *WORDS], '$A', eos_token='</s>')


def encoder_tokenizer():
    """As BERT has it: [CLS] before and [SEP] behind a text, no EOS; other ids."""
    pieces = ['[UNK]', '[CLS]', '[SEP]', *WORDS[::-1]]
    return words(pieces, '[CLS] $A [SEP]', cls_token='[CLS]', sep_token='[SEP]')


def count(prompts, responses, *, word='', scale=1.0):
    """A reward function: words of a response, or occurrences of one word."""
    counts = [len([w for w in r.split() if word in w]) for r in responses]
    return scale * np.asarray(counts)


def no_array(prompts, responses):
    return None


def too_few(prompts, responses):
    return np.zeros(len(responses) - 1)


def not_a_number(prompts, responses):
    return [float('nan') if 'cat' in text else 0 for text in responses]


def too_large(prompts, responses):
    return [1e30 if 'cat' in response else 1.0 for response in responses]


def refuses(prompts, responses):
    if any('cat' in text for text in responses):
        raise KeyError('cats')
    return np.zeros(len(responses))


def refuses_many(prompts, responses):
    if len(responses) > 1:
        raise RuntimeError('one at a time')
    return np.zeros(len(responses))


@pytest.fixture
def run(tmp_path):
    config = ConfigDict({'seed': 0, 'stages': ('ppo',)})
    config.model, config.parallel = section(ModelSettings), section(ParallelConfig)
    tokenizer = policy_tokenizer()
    tokenizer.save_pretrained(tmp_path / 'tokenizer')
    return Run(tmp_path, config, sharding.make_mesh(ParallelConfig()), tokenizer)


def make_stage(folder, params, config, tokenizer=None, members=1):
    """A finished reward model."""
    folder.mkdir(parents=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / 'tokenizer')
    checkpoint.save_params(folder, {'reward': params}, {'reward': config}, members)
    return RewardSource(model=str(folder))


@pytest.fixture
def responses(run):
    """Sixteen rows: prompts of two words, answers of one to six, some unended."""
    rng = np.random.default_rng(0)
    prompts = [' '.join(rng.choice(WORDS, 2)) for _ in range(SIZE)]
    answers = [' '.join(rng.choice(WORDS, 1 + i % 6)) for i in range(SIZE)]
    ended = np.arange(SIZE) % 3 > 0
    tokens, mask = np.zeros((SIZE, 10), np.int32), np.zeros((SIZE, 10), bool)
    for i in range(SIZE):
        ids = run.tokenizer.encode(prompts[i]) + run.tokenizer.encode(answers[i])
        ids += [1] * int(ended[i])
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    generation = Generation(
        tokens=tokens,
        mask=mask,
        response_mask=mask & (np.arange(10) >= 2),
        logprobs=np.zeros((SIZE, 10), np.float32),
        ended=ended,
    )
    order = rng.permutation(SIZE)  # rows name their prompts by index
    records = [Prompt(prompts[i], None, {}, 'here') for i in np.argsort(order)]
    index = np.where(np.arange(SIZE) < SIZE - 2, order, -1)
    batch = PromptBatch(tokens=tokens[:, :2], mask=mask[:, :2], index=index)
    result = Responses(run.tokenizer, records, batch, generation, decode_behind)
    assert (result.prompts, result.texts) == (prompts[:-2], answers[:-2])
    return result


def score(run, responses, **sources):
    rewards = {
        name: check_reward(run, f'config.ppo.rewards.{name}', source, 10)
        for name, source in sources.items()
    }
    scorers = make_scorers(run, rewards)
    return {name: scorer(responses) for name, scorer in scorers.items()}


# ------------------------------------------------------------------------ reward models


def test_two_reward_models_and_their_weights(
    run, responses, reward_model, reward_params
):
    generation = responses.generation
    expected, sources = np.zeros(SIZE), {}
    for name, scale, weight in (('a', 1.0, 0.5), ('b', 1.3, -3.0)):
        params = jax.tree.map(lambda x, scale=scale: x * scale, reward_params)
        sources[name] = make_stage(run.workdir / name, params, reward_model.config)
        alone = reward_model_scores(
            params, generation.tokens, generation.mask, model=reward_model
        )
        assert np.std(alone) > 0.1
        expected += weight * np.asarray(alone)
    scored = score(run, responses, **sources)
    assert scored['a'].truncated is None
    total = weighted_sum(
        {name: x.scores for name, x in scored.items()}, {'a': 0.5, 'b': -3.0}
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)


def assert_scores_of_texts(scored, responses, model, params):
    """Texts as an encoder's tokenizer has them, ids looked up here."""
    ids = {w: i for i, w in enumerate(['[UNK]', '[CLS]', '[SEP]', *WORDS[::-1]])}
    tokens, mask = np.zeros((SIZE - 2, 16), np.int32), np.zeros((SIZE - 2, 16), bool)
    for i, (prompt, text) in enumerate(zip(responses.prompts, responses.texts)):
        whole = ['[CLS]', *prompt.split(), *text.split()]
        whole += ['[SEP]'] * int(responses.generation.ended[i])
        tokens[i, : len(whole)] = [ids[word] for word in whole]
        mask[i, : len(whole)] = True
    alone = reward_model_scores(params, tokens, mask, model=model)
    assert np.std(alone) > 0.1
    np.testing.assert_allclose(scored.scores[:-2], alone, atol=1e-5)
    assert scored.truncated == 0


def test_a_model_of_another_tokenizer_scores_the_text(
    run, responses, reward_model, reward_params
):
    source = make_stage(
        run.workdir / 'other', reward_params, reward_model.config, encoder_tokenizer()
    )
    scored = score(run, responses, rm=source)
    assert_scores_of_texts(scored['rm'], responses, reward_model, reward_params)


def test_the_tokenizer_can_be_named_and_may_be_the_same(
    run, responses, reward_model, reward_params
):
    source = make_stage(run.workdir / 'plain', reward_params, reward_model.config)
    encoder_tokenizer().save_pretrained(run.workdir / 'named')
    named = dataclasses.replace(source, tokenizer=str(run.workdir / 'named'))
    same = dataclasses.replace(source, tokenizer=str(run.workdir / 'tokenizer'))
    scored = score(run, responses, rm=source, named=named, same=same)
    assert_scores_of_texts(scored['named'], responses, reward_model, reward_params)
    assert scored['same'].truncated is None  # read as tokens, not as text
    np.testing.assert_array_equal(scored['rm'].scores, scored['same'].scores)


def test_a_hugging_face_model_brings_its_tokenizer(
    run, responses, reward_model, reward_params
):
    sources = {}
    for name, tokenizer in (('own', encoder_tokenizer()), ('same', run.tokenizer)):
        folder = run.workdir / name
        special = {'head': 'scalar', 'eos_token_id': 1, 'pad_token_id': 0}
        hf.save(folder, reward_params, reward_model.config, **special)
        tokenizer.save_pretrained(folder)
        sources[name] = RewardSource(model=str(folder))
    scored = score(run, responses, **sources)
    assert_scores_of_texts(scored['own'], responses, reward_model, reward_params)
    assert scored['same'].truncated is None


def test_an_exported_reward_model_reads_the_policys_tokens(
    run, responses, reward_model, reward_params
):
    """Its tokenizer got a pad token of its own, which stands in no text."""
    config, folder = reward_model.config, run.workdir / 'exported'
    given = {'head': 'scalar', 'tokenizer': run.tokenizer, 'eos_token_id': [1]}
    hf.save(folder, reward_params, config, **given)
    assert run.tokenizer.pad_token is None
    assert AutoTokenizer.from_pretrained(folder).pad_token == '<|pad|>'
    plain = make_stage(run.workdir / 'plain', reward_params, config)
    scored = score(run, responses, exported=RewardSource(model=str(folder)), rm=plain)
    assert scored['exported'].truncated is None  # read as tokens, not as text
    np.testing.assert_array_equal(scored['rm'].scores, scored['exported'].scores)


def test_texts_are_read_as_in_training(tmp_path):
    """The rows of ``text_batch`` are those of ``load_comparisons``, cut alike."""
    rng = np.random.default_rng(1)
    records = [
        {
            'prompt': ' '.join(rng.choice(WORDS, rng.integers(1, 30))),
            'chosen': ' '.join(rng.choice(WORDS, rng.integers(2, 30))),
            'rejected': 'cat',
        }
        for _ in range(40)
    ]
    path = tmp_path / 'pairs.jsonl'
    path.write_text('\n'.join(map(json.dumps, records)))
    for tokenizer in (policy_tokenizer(), encoder_tokenizer()):
        data = load_comparisons(
            f'jsonl:{path}', tokenizer, max_length=24, overlong='truncate'
        )
        texts = [[r[part] for r in records] for part in ('prompt', 'chosen')]
        tokens, mask, truncated = text_batch(tokenizer, *texts, [True] * 40, 24)
        assert truncated == data.counts.truncated and 0 < truncated < 40
        assert tokens.shape == mask.shape == (40, 24)
        for i, example in enumerate(data.examples):
            row = np.concatenate([example.prompt, example.answers[0]])
            np.testing.assert_array_equal(tokens[i, mask[i]], row)
        still, still_mask, _ = text_batch(tokenizer, *texts, [False] * 40, 24)
        for i in range(40):  # the same row, but for the token that ends it
            whole = tokens[i, mask[i]]
            np.testing.assert_array_equal(still[i, still_mask[i]], whole[:-1])


def test_what_stands_around_a_text():
    assert frame(policy_tokenizer()) == ([], 1)  # EOS, where nothing is appended
    assert frame(encoder_tokenizer()) == ([1], 2)
    with pytest.raises(ValueError, match=r"appends \['red', 'red'\].*at most one"):
        frame(words(['[UNK]', 'red'], '$A red red'))
    with pytest.raises(ValueError, match='no EOS token'):
        frame(words(['[UNK]', 'red'], '$A'))


def test_texts_are_padded_to_few_lengths():
    texts = ['cat ' * n for n in (1, 20, 70, 300)]
    shapes = [
        text_batch(policy_tokenizer(), ['red'], [text], [True], 128)[0].shape[1]
        for text in texts
    ]
    assert shapes == [32, 32, 128, 128]


# ---------------------------------------------------------------------------- functions


def test_scores_of_a_function_reach_the_rollout(
    run, responses, bigram, token_scores, generation
):
    """Neither cast to integers nor reordered; with λ = 1 and β = 0 the return at every
    token is the score.
    """
    source = RewardSource(fn=f'{__name__}:count', args={'scale': 0.25})
    scored = score(run, responses, length=source)['length']
    expected = [0.25 * len(text.split()) for text in responses.texts]
    np.testing.assert_array_equal(scored.scores[:-2], expected)
    assert len(set(expected)) == 6 and scored.scores.shape == (SIZE,)
    params = {
        'policy': {'table': jnp.zeros((64, 64))},
        'critic': {'table': jnp.zeros(64)},
    }
    state = PPOState(
        step=0, rng=None, params=params, opt_state=None, kl_coef=jnp.float32(0)
    )
    models = ActorCritic(bigram, token_scores)
    hp = PPOHParams(lam=1.0, whiten_advantages=False)

    def prepared(state, ref_params, generation, scores, axis_name):
        assert scores.baseline is None and scores.each.keys() == {'length', 'gold', 'b'}
        how = {'model': models, 'hp': hp, 'axis_name': axis_name}
        return prepare(state, ref_params, generation, scores, **how)

    scores = {'length': scored.scores, 'gold': np.full(SIZE, 7.0), 'b': np.ones(SIZE)}
    rollout, metrics, moments = shape_and_prepare(
        state,
        params['policy'],
        Sampled(responses.generation, scores),
        None,
        prepare=prepared,
        weights={'length': 2.0, 'b': -1.0},
        shaping=ScoreHParams(missing_eos_penalty=10.0),
        max_length=6,
    )
    assert moments is None
    shaped = 2 * scored.scores - 1 - 10 * ~responses.generation.ended
    mask = responses.generation.response_mask
    np.testing.assert_allclose(rollout.returns, shaped[:, None] * mask, atol=1e-6)
    values = {name: float(metric.value()) for name, metric in metrics.items()}
    assert values['reward/length'] == pytest.approx(scored.scores.mean())
    assert values['reward/b'] == 1 and values['objective/gold'] == 7
    assert values['objective/scores'] == pytest.approx(shaped.mean())
    assert values['objective/scores_min'] == pytest.approx(shaped.min())
    assert values['objective/scores_max'] == pytest.approx(shaped.max())
    assert values['objective/proxy_reward'] == pytest.approx(
        (2 * scored.scores - 1).mean()
    )
    assert 'reward/gold' not in values


def test_a_function_sees_the_real_rows_alone(run, responses):
    seen = []

    def spy(prompts, responses):
        seen.append((prompts, responses))
        return np.arange(len(responses))

    source = RewardSource(fn=f'{__name__}:count')
    reward = check_reward(run, 'config.ppo.rewards.spy', source, 10)
    spied = dataclasses.replace(reward.fn, fn=spy)
    reward = dataclasses.replace(reward, fn=spied)
    scored = make_scorers(run, {'spy': reward})['spy'](responses)
    assert seen == [(responses.prompts, responses.texts)]
    assert len(responses.texts) == SIZE - 2
    np.testing.assert_array_equal(scored.scores[:-2], np.arange(SIZE - 2))


@pytest.mark.parametrize(
    ('name', 'parts'),
    [
        ('too_few', ['shape [13]', '14 responses', 'one number per response']),
        ('no_array', ['shape []', '14 responses']),
        ('not_a_number', ['gave nan', 'cat', 'prompt', 'finite']),
        ('too_large', ['gave 1e+30', 'cat', 'float32 can square; scale it']),
        ('refuses', ["failed with KeyError: 'cats'", 'prompt', 'cat']),
        ('refuses_many', ['RuntimeError: one at a time', '14 responses together']),
    ],
)
def test_a_function_that_fails_is_named_with_the_text(run, responses, name, parts):
    source = RewardSource(fn=f'{__name__}:{name}')
    with pytest.raises(ValueError) as caught:
        score(run, responses, mine=source)
    text = str(caught.value)
    for part in ('config.ppo.rewards.mine', source.fn, *parts):
        assert part in text, text
    if 'prompt' in parts:
        row = next(i for i, t in enumerate(responses.texts) if 'cat' in t)
        assert repr(responses.prompts[row]) in text
        assert repr(responses.texts[row]) in text
    if name.startswith('refuses'):
        assert type(caught.value.__cause__) in (KeyError, RuntimeError)


# ----------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ('source', 'parts'),
    [
        ({}, ['exactly one']),
        ({'model': 'rm', 'fn': 'a:b'}, ["model='rm'", "fn='a:b'", 'exactly one']),
        ({'fn': 'no.such:thing'}, ["config.ppo.rewards.x.fn='no.such:thing'"]),
        ({'fn': f'{__name__}:count', 'args': {'scala': 2}}, ['scala', 'args=']),
        ({'fn': f'{__name__}:count', 'tokenizer': 'd'}, ['x.tokenizer', 'gets texts']),
        ({'model': 'plain', 'args': {'k': 1}}, ["args={'k': 1}", 'takes none']),
        ({'model': '/no/where'}, ['/no/where']),
        ({'model': 'plain', 'tokenizer': '/no/where'}, ['/no/where', 'loaded']),
        ({'model': 'bare'}, ["model='", 'no trained score']),
        ({'model': 'small'}, ['the model has 3 embeddings']),
        ({'model': 'short'}, ['exceed the 5 positions', 'max_new_tokens']),
        (
            {'model': 'plain', 'combine': 'uncertainty'},
            ["x.combine='uncertainty'", 'is a single model', '--config.rm.members=5'],
        ),
        ({'fn': f'{__name__}:count', 'combine': 'mean'}, ['count is a function']),
    ],
)
def test_a_source_is_checked(run, config, source, parts):
    changes = {'small': {'vocab_size': 3}, 'short': {'max_positions': 5}}
    name = source.get('model')
    if name in ('plain', 'bare', *changes):
        stage = run.workdir / name
        stage.mkdir()
        changed = dataclasses.asdict(config) | changes.get(name, {})
        parts_there = {'policy' if name == 'bare' else 'reward': changed}
        files.write_json(stage / 'model.json', parts_there)
        source = {**source, 'model': str(stage)}
    with pytest.raises(ValueError) as caught:
        check_reward(run, 'config.ppo.rewards.x', RewardSource(**source), 10)
    for part in ('config.ppo.rewards.x', *parts):
        assert part in str(caught.value), str(caught.value)


def test_texts_are_scored_in_one_process_alone(run, monkeypatch):
    monkeypatch.setattr('jax.process_count', lambda: 2)
    with pytest.raises(ValueError, match='one process alone.*this run has 2'):
        check_reward(run, 'x', RewardSource(fn=f'{__name__}:count'), 10)


def test_an_ensemble_scores_as_its_members_do(run, responses, config, reward_model):
    """Its members one by one, on the policy's tokens; on texts, the same of texts."""
    tokens = np.zeros((1, 2), np.int32)
    keys = jax.random.split(jax.random.PRNGKey(8), 3)
    members = [
        jax.jit(reward_model.init)(key, tokens, tokens == 0)['params'] for key in keys
    ]
    sources = {
        f'member {i}': make_stage(run.workdir / f'member {i}', params, config)
        for i, params in enumerate(members)
    }
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
    for name, tokenizer in (('all', None), ('texts', encoder_tokenizer())):
        sources[name] = make_stage(run.workdir / name, stacked, config, tokenizer, 3)
    sources |= {
        how: dataclasses.replace(sources['all'], combine=how, uncertainty_coef=0.5)
        for how in ('worst', 'uncertainty')
    }
    scored = score(run, responses, **sources)
    each = np.stack([scored[f'member {i}'].scores for i in range(3)])
    penalty = 0.5 * each.var(0)
    wanted = {'all': each.mean(0), 'worst': each.min(0)}
    for name, scores in (wanted | {'uncertainty': each.mean(0) - penalty}).items():
        np.testing.assert_allclose(scored[name].scores, scores, atol=1e-5)
        np.testing.assert_allclose(scored[name].deviation, each.std(0), atol=1e-5)
    assert scored['member 0'].deviation is None and scored['all'].truncated is None
    assert scored['texts'].truncated == 0 and scored['texts'].deviation.shape == (SIZE,)


# --------------------------------------------------------------------------- whole runs


def letters_tokenizer():
    """A reward model's own: bytes, [CLS] before and [SEP] behind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {piece: i for i, piece in enumerate(['[CLS]', '[SEP]', '[PAD]', *alphabet])}
    backend = Tokenizer(models.BPE(vocab=table, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 0), ('[SEP]', 1)]
    )
    special = {'cls_token': '[CLS]', 'sep_token': '[SEP]', 'pad_token': '[PAD]'}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture
def own_tokenizer(finished):
    """A run whose reward model has its own tokenizer and starts from nothing."""
    config = get_config('1')
    config.stages = ('rm', 'ppo')
    config.rm.init = 'scratch'
    config.rm.tokenizer = f'{__name__}:letters_tokenizer'
    config.rm.overlong = 'truncate'
    config.ppo.init = config.ppo.critic = str(finished / 'sft')
    return config


def test_a_critic_cannot_start_from_a_model_of_another_tokenizer(
    own_tokenizer, tmp_path
):
    own_tokenizer.ppo.critic = 'rm'
    init = own_tokenizer.ppo.init
    with pytest.raises(ValueError, match=f"critic='rm' has another.*critic='{init}'"):
        launch(own_tokenizer, tmp_path)


def test_a_reward_model_cannot_change_the_tokenizer_it_starts_with(
    own_tokenizer, finished, tmp_path
):
    own_tokenizer.rm.init = str(finished / 'sft')
    with pytest.raises(ValueError, match='config.rm.init=.*another tokenizer'):
        launch(own_tokenizer, tmp_path)


def test_a_run_with_a_tokenizer_for_its_reward_model(own_tokenizer, tmp_path):
    config = own_tokenizer
    config.ppo.rewards = {
        'rm': {'model': 'rm', 'weight': 0.5},
        'words': {'fn': f'{__name__}:count', 'weight': 2.0, 'args': {'word': 'a'}},
    }
    launch(config, tmp_path)
    assert (tmp_path / 'rm' / 'tokenizer').exists()
    assert not (tmp_path / 'ppo' / 'tokenizer').exists()
    [row] = map(json.loads, (tmp_path / 'ppo' / 'metrics.jsonl').open())
    total = 0.5 * row['reward/rm'] + 2 * row['reward/words']
    shaped = total - config.ppo.missing_eos_penalty * (1 - row['rollout/ended'])
    assert row['objective/scores'] == pytest.approx(shaped, abs=1e-4)
    assert row['objective/proxy_reward'] == pytest.approx(total, abs=1e-4)
    assert row['reward/rm/truncated'] == 0 and 'reward/words/truncated' not in row
    result = json.loads((tmp_path / 'ppo' / 'eval.json').read_text())
    for when in ('before', 'after'):
        rewards = result[f'rewards_{when}']
        assert rewards.keys() == {'rm', 'words'}
        total = 0.5 * rewards['rm'] + 2 * rewards['words']
        assert result[f'proxy_reward_{when}'] == pytest.approx(total, abs=1e-4)
        assert result[f'rewards_truncated_{when}'] == {'rm': 0}
        assert result[f'ref_logprob_{when}'] < 0
    for line in map(json.loads, (tmp_path / 'ppo' / 'samples.jsonl').open()):
        counted = count([''], [line['after']], word='a')[0]
        assert line['rewards_after']['words'] == counted
        assert np.isfinite(line['gold_after'])
    written = sample(tmp_path, 'ppo', 'ARTICLE: a\n\nTL;DR:', num=2, max_new_tokens=4)
    assert all(np.isfinite(scores['rm']) for _, _, scores in written)
    export(tmp_path, 'rm', tmp_path / 'out')
    table = json.loads((tmp_path / 'out' / 'tokenizer.json').read_text())
    assert table['model']['vocab']['[SEP]'] == 1
