"""Sampling: what is drawn, where it stops, what it depends on and what it compiles."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos.rollout import policy_logprobs
from rlhf_jax.continuous_batching import generate_continuously
from rlhf_jax.generate import draw_from, generate, sample_tokens, sampling
from rlhf_jax.models.heads import CausalLM
from rlhf_jax.ops import cpu
from rlhf_jax.ops.stop_table import stop_table

V = 8  # vocabulary of the table policies
# Token t is followed by t + 1 with near certainty: 0 → 1 → 2 → … → 7 → 0.
CHAIN = {'table': 50.0 * jnp.roll(jnp.eye(V), 1, axis=1)}
KEY = jax.random.PRNGKey(3)


@pytest.fixture(scope='module')
def chain(bigram):
    """chain(start, …): the responses as lists, and the Generation they are from."""
    run = jax.jit(functools.partial(generate, model=bigram, max_new_tokens=6))

    def responses(start, **how):
        rows = jnp.array(
            start + [0] * (3 - len(start))
        )  # always three: one compilation
        tokens = jnp.stack([jnp.full(3, 3), rows], 1)
        mask, ids = jnp.ones_like(tokens, bool), jnp.arange(3)
        out = run(CHAIN, tokens, mask, ids, KEY, sampling(**how))
        out = jax.tree.map(lambda x: np.asarray(x)[: len(start)], out)
        return [row[m].tolist() for row, m in zip(out.tokens, out.response_mask)], out

    return responses


def test_eos_is_kept_and_nothing_follows_it(chain):
    written, out = chain([0, 2, 6], eos_ids=[4])
    assert written == [[1, 2, 3, 4], [3, 4], [7, 0, 1, 2, 3, 4]]
    assert out.ended.tolist() == [True] * 3
    # EOS on the very last place counts as ended; a full response without it does not.
    written, out = chain([0, 5, 6], eos_ids=[4])
    assert written == [[1, 2, 3, 4], [6, 7, 0, 1, 2, 3], [7, 0, 1, 2, 3, 4]]
    assert out.ended.tolist() == [True, False, True]
    # The response is contiguous and the mask of the whole is prompt plus response.
    assert out.response_mask.tolist()[0] == [False] * 2 + [True] * 4 + [False] * 2
    assert out.mask.tolist()[0] == [True] * 6 + [False] * 2
    assert np.all(out.logprobs[~out.response_mask] == 0)


def test_any_of_several_eos_ids_ends(chain):
    written, out = chain([0, 3, 5], eos_ids=[2, 7])
    assert written == [[1, 2], [4, 5, 6, 7], [6, 7]]
    assert out.ended.all()


def test_an_eos_in_the_prompt_ends_nothing(chain):
    assert chain([3], eos_ids=[3])[0] == [[4, 5, 6, 7, 0, 1]]


def stops(*sequences, vocabulary=V):
    """A table in which the text of a token is a byte with its id."""
    pieces = [bytes([i]) for i in range(vocabulary)]
    return stop_table(pieces, [bytes(sequence) for sequence in sequences])


def test_stop_sequences(chain):
    how = {'eos_ids': [], 'stop_table': stops([3, 4], [7])}
    written, out = chain([0, 2, 4], **how)
    assert written == [[1, 2, 3, 4], [3, 4], [5, 6, 7]]
    assert out.ended.all()
    # The policy must have written all of it: a prompt that ends in 3 does not end at 4.
    assert chain([3], **how)[0] == [[4, 5, 6, 7]]


def test_a_stop_sequence_counts_only_from_stop_after_on(chain):
    stop = {'eos_ids': [], 'stop_table': stops([2], [5])}
    assert chain([0], **stop)[0] == [[1, 2]]
    assert chain([0], **stop, stop_after=2)[0] == [[1, 2]]
    assert chain([0], **stop, stop_after=3)[0] == [[1, 2, 3, 4, 5]]
    # EOS ends at any place.
    assert chain([0], **{**stop, 'eos_ids': [1]}, stop_after=3)[0] == [[1]]


# --------------------------------------------------------------------- the distribution


def _slow_allowed(logits, top_k, top_p):
    """The allowed set of one row, token by token in falling order."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
    p = np.exp(np.array([logits[i] for i in order], np.float64))
    allowed, reached = set(), 0.0
    for token, probability in zip(order, p / p.sum()):
        if reached >= top_p:
            break
        allowed.add(token)
        reached += probability
    return allowed


def _frequencies(logits, count, **how):
    """Shares [V] of so many draws from one row of logits."""
    keys = jax.random.split(jax.random.PRNGKey(0), count)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    tokens, _ = _draw(rows, keys, sampling(eos_ids=[], **how))
    return np.bincount(tokens, minlength=len(logits)) / count


_draw = jax.jit(sample_tokens)


@pytest.mark.parametrize('top_k', [None, 1, 3, 10, 50])
@pytest.mark.parametrize('top_p', [None, 0.9, 0.5, 1e-6])
def test_top_k_and_top_p_against_a_slow_reference(top_k, top_p):
    """What is drawn are the allowed tokens, in their own proportions."""
    count = 4000
    for logits in np.random.default_rng(0).normal(0, 2, size=(4, 37)):
        allowed = list(_slow_allowed(logits, top_k, top_p or 2.0))
        expected = np.zeros(37)
        expected[allowed] = np.exp(logits[allowed])
        expected /= expected.sum()
        seen = _frequencies(logits, count, top_k=top_k, top_p=top_p)
        assert not seen[expected == 0].any()
        error = np.sqrt(expected * (1 - expected) / count)
        assert np.all(np.abs(seen - expected) <= 4.5 * error)


def test_top_p_by_hand():
    logits = np.log([0.15, 0.5, 0.05, 0.3])

    def kept(top_k, top_p):
        drawn = _frequencies(logits, 2000, top_k=top_k, top_p=top_p)
        return np.flatnonzero(drawn).tolist()

    assert kept(None, 0.45) == [1]  # the token that crosses is kept
    assert kept(None, 0.7) == [1, 3]  # 0.5 < 0.7 ≤ 0.8
    assert kept(None, 0.9) == [0, 1, 3]
    assert kept(2, 0.7) == [1, 3]  # of what top-k left, token 1 is 0.625 < 0.7
    assert kept(2, 0.6) == [1]  # 0.5 alone would not have reached 0.6; 0.625 does


def test_ties_with_the_last_kept_token_are_kept():
    logits = np.log([0.4, 0.2, 0.2, 0.2])
    for how in ({'top_k': 2}, {'top_p': 0.5}):
        np.testing.assert_allclose(
            _frequencies(logits, 4000, **how), np.exp(logits), atol=0.03
        )


def test_a_large_vocabulary_is_drawn_from_in_proportion():
    """Blocks that the vocabulary does not fill, weights from 0 to very large."""
    weights = np.random.default_rng(0).gamma(0.3, size=1003).astype(np.float32)
    weights[::7] = 0
    keys = jax.random.split(jax.random.PRNGKey(1), 100_000)
    rows = jnp.broadcast_to(weights, (100_000, 1003))
    seen = np.bincount(jax.jit(draw_from)(rows, keys), minlength=1003)
    expected = 100_000 * weights / weights.sum()
    assert not seen[weights == 0].any()
    assert np.all(np.abs(seen - expected) <= 4.5 * np.sqrt(expected) + 1)


def test_sampled_frequencies_are_the_tempered_probabilities():
    logits = jnp.array([1.0, 0.0, -1.0, 2.0])
    keys = jax.random.split(jax.random.PRNGKey(0), 20_000)
    rows = jnp.broadcast_to(logits, (20_000, 4))
    draw = jax.jit(lambda how: sample_tokens(rows, keys, how))

    def frequencies(**how):
        tokens, logprobs = draw(sampling(eos_ids=[], **how))
        return np.bincount(tokens, minlength=4) / 20_000, tokens, logprobs

    for temperature in (1.0, 0.5):
        p = np.asarray(jax.nn.softmax(logits / temperature))
        seen, tokens, logprobs = frequencies(temperature=temperature)
        np.testing.assert_allclose(seen, p, atol=0.012)  # three standard errors
        np.testing.assert_allclose(logprobs, np.log(p)[tokens], atol=1e-5)
    p = np.exp([1, 0, -np.inf, 2]) / np.exp([1, 0, -np.inf, 2]).sum()
    seen, tokens, logprobs = frequencies(top_k=3)
    np.testing.assert_allclose(seen, p, atol=0.012)
    # The log-probability is that before the filter, as training passes compute it.
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[tokens], atol=1e-5)
    assert frequencies(temperature=0.0)[0].tolist() == [0, 0, 0, 1]


# ---------------------------------------------------------- the real model, row by row


@pytest.fixture(scope='module')
def prompts():
    rng = np.random.default_rng(1)
    mask = np.arange(5) >= 5 - np.array([5, 2, 1, 4])[:, None]
    return (
        rng.integers(0, 64, size=(4, 5)).astype(np.int32),
        mask,
        np.array([7, 3, 11, 0]),
    )


@pytest.fixture(scope='module')
def write(policy, policy_params):
    run = jax.jit(functools.partial(generate, model=policy, max_new_tokens=7))

    def written(tokens, mask, rows, key=KEY, **how):
        how = {'eos_ids': [63], 'temperature': 0.7, **how}
        return run(policy_params, tokens, mask, jnp.asarray(rows), key, sampling(**how))

    written.cache_size = run._cache_size
    return written


def test_changing_the_sampling_compiles_nothing(write, prompts):
    write(*prompts)
    compiled = write.cache_size()
    for how in (
        {'temperature': 0.0},
        {'temperature': 1.3},
        {'top_k': 5},
        {'top_p': 0.5},
        {'eos_ids': [12]},
    ):
        write(*prompts, **how)
    assert write.cache_size() == compiled
    for table in (stops([9], vocabulary=64), stops([3, 4], [5, 7, 8], vocabulary=64)):
        write(*prompts, stop_table=table, stop_after=2)
    assert write.cache_size() == compiled + 1


def test_greedy_is_the_argmax_of_repeated_full_forward_passes(
    write, prompts, policy, policy_params
):
    out = write(*prompts, temperature=0.0, eos_ids=[])
    tokens = np.concatenate([prompts[0], np.zeros((4, 7), np.int32)], 1)
    mask = np.concatenate([prompts[1], np.zeros((4, 7), bool)], 1)
    full = jax.jit(
        lambda t, m: (
            policy.apply({'params': policy_params}, t, m)
            @ policy.unembedding(policy_params)
        )
    )
    for place in range(5, 12):
        logits = full(tokens, mask)[:, place - 1]
        tokens[:, place], mask[:, place] = jnp.argmax(logits, -1), True
    np.testing.assert_array_equal(out.tokens[:, 5:], tokens[:, 5:])
    assert len(set(tokens[:, 5:].ravel().tolist())) > 3  # not one token over and over


def test_behaviour_logprobs_are_those_of_a_full_forward_pass(
    write, prompts, policy, policy_params
):
    score = jax.jit(functools.partial(policy_logprobs, model=policy, temperature=0.7))
    for top_k in (None, 5):
        out = write(*prompts, top_k=top_k)
        logprobs, _ = score(policy_params, out.tokens, out.mask)
        expected = jnp.where(out.response_mask, logprobs, 0)
        assert float(jnp.abs(expected).max()) > 0.5
        np.testing.assert_allclose(out.logprobs, expected, atol=1e-5)


@pytest.mark.parametrize('how', [{}, {'top_k': 5}, {'temperature': 0.0}])
def test_ids_that_the_tokenizer_lacks_are_never_written(
    config, policy_params, prompts, how
):
    """And learner and sampler have the same distribution: the first ratio is 1."""
    model = CausalLM(dataclasses.replace(config, num_tokens=40, tied_embeddings=False))
    tokens, mask, rows = prompts[0] % 40, *prompts[1:]
    head = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    head[:, 40:] *= 4  # without the bound these are most of what is written
    params = {**policy_params, 'lm_head': jnp.asarray(head)}
    parts = {'model': model, 'max_new_tokens': 12}
    rest = (jnp.asarray(rows), KEY, sampling(eos_ids=[], **how))
    for function in (generate, functools.partial(generate_continuously, num_rows=3)):
        out = jax.jit(functools.partial(function, **parts))(params, tokens, mask, *rest)
        written = np.asarray(out.tokens)[np.asarray(out.response_mask)]
        assert written.max() < 40 and len(set(written.tolist())) > 3
        logprobs, _ = jax.jit(
            functools.partial(policy_logprobs, model=model, temperature=1.0)
        )(params, out.tokens, out.mask)
        ratio = jnp.exp(jnp.where(out.response_mask, logprobs - out.logprobs, 0))
        np.testing.assert_allclose(ratio, 1, atol=1e-4)
    unbound = model.clone(config=dataclasses.replace(model.config, num_tokens=None))
    out = jax.jit(functools.partial(generate, model=unbound, max_new_tokens=12))(
        params, tokens, mask, *rest
    )
    assert np.asarray(out.tokens).max() >= 40


def test_a_sample_depends_on_its_row_id_alone(write, prompts):
    tokens, mask, rows = prompts
    out = write(*prompts)
    order = np.array([2, 0, 3, 1])
    permuted = write(tokens[order], mask[order], rows[order])
    np.testing.assert_array_equal(permuted.tokens, out.tokens[order])
    for i in range(4):
        alone = write(tokens[i : i + 1], mask[i : i + 1], rows[i : i + 1])
        np.testing.assert_array_equal(alone.tokens[0], out.tokens[i])
        np.testing.assert_allclose(alone.logprobs[0], out.logprobs[i], atol=1e-5)


@pytest.mark.parametrize('unroll', [1, 2])
def test_samples_of_a_prompt_are_those_of_the_prompt_repeated(
    policy, policy_params, prompts, unroll
):
    """One prefill for all of them, under scanned layers and under layers apart."""
    model = policy.clone(config=dataclasses.replace(policy.config, scan_unroll=unroll))
    run = jax.jit(functools.partial(generate, model=model, max_new_tokens=7))
    tokens, mask, _ = prompts
    how, rows = sampling(eos_ids=[63]), jnp.arange(12)
    out = run(policy_params, tokens, mask, rows, KEY, how)
    each = run(
        policy_params, np.repeat(tokens, 3, 0), np.repeat(mask, 3, 0), rows, KEY, how
    )
    assert out.tokens.shape == (12, 12) and out.response_length == 7
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(each)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match='6 row ids do not divide over 4 prompts'):
        run(policy_params, tokens, mask, jnp.arange(6), KEY, how)


def test_a_cache_that_grows_changes_nothing(
    policy, policy_params, prompts, write, monkeypatch
):
    module = importlib.import_module('rlhf_jax.generate')
    expected = write(*prompts, eos_ids=[])
    monkeypatch.setattr(module, 'MIN_STRETCH', 2)
    assert module._stretches(7) == [(0, 2), (2, 4), (4, 7)]
    run = jax.jit(functools.partial(generate, model=policy, max_new_tokens=7))
    how = sampling(eos_ids=[], temperature=0.7)
    out = run(policy_params, *prompts, KEY, how)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize('tied', [False, True])
def test_a_large_vocabulary_read_by_its_tokens_changes_nothing(
    monkeypatch, config, prompts, tied
):
    model = CausalLM(dataclasses.replace(config, tied_embeddings=tied))
    parts = {'model': model, 'max_new_tokens': 6}
    tokens, mask = prompts[:2]
    params = jax.jit(model.init)(jax.random.PRNGKey(0), tokens, mask)['params']
    args = (params, tokens, mask, jnp.arange(len(tokens)), KEY, sampling(eos_ids=[]))
    for function in (generate, functools.partial(generate_continuously, num_rows=3)):
        expected = jax.jit(functools.partial(function, **parts))(*args)
        with monkeypatch.context() as context:
            context.setattr(cpu, 'LARGE_VOCABULARY', 1)
            written = jax.jit(functools.partial(function, **parts))(*args)
        np.testing.assert_array_equal(written.tokens, expected.tokens)
        np.testing.assert_allclose(written.logprobs, expected.logprobs, atol=2e-5)


def test_responses_beyond_learned_positions_are_refused(config, prompts):
    """Shapes are static: nothing is compiled, let alone run with clamped positions."""
    learned = dataclasses.replace(config, position='learned', max_positions=11)
    tokens, mask, _ = prompts
    rest = (tokens, mask, jnp.arange(4), KEY, sampling(eos_ids=[]))
    params = jax.eval_shape(CausalLM(learned).init, KEY, tokens, mask)['params']
    for function in (generate, functools.partial(generate_continuously, num_rows=2)):
        run = functools.partial(function, model=CausalLM(learned))
        fits = jax.eval_shape(functools.partial(run, max_new_tokens=6), params, *rest)
        assert fits.tokens.shape == (4, 11)
        with pytest.raises(
            ValueError, match='12 tokens exceed the 11 learned positions'
        ):
            jax.eval_shape(functools.partial(run, max_new_tokens=7), params, *rest)
    # Rotary positions have no table that ends.
    rotary = CausalLM(dataclasses.replace(config, max_positions=11))
    run = functools.partial(generate, model=rotary, max_new_tokens=7)
    params = jax.eval_shape(rotary.init, KEY, tokens, mask)['params']
    assert jax.eval_shape(run, params, *rest).tokens.shape == (4, 12)


def test_other_rows_and_other_keys_give_other_samples(write, prompts):
    tokens, mask, rows = prompts
    same = np.repeat(tokens[:1], 4, 0), np.repeat(mask[:1], 4, 0)
    out = write(*same, rows, eos_ids=[], temperature=1.0)
    responses = {tuple(row) for row in np.asarray(out.tokens[:, 5:]).tolist()}
    assert len(responses) == 4
    for step in range(3):
        key = jax.random.fold_in(KEY, step)
        again = write(*same, rows, key=key, eos_ids=[], temperature=1.0)
        more = {tuple(row) for row in np.asarray(again.tokens[:, 5:]).tolist()}
        assert not more & responses
        responses |= more
    repeated = write(*same, rows, eos_ids=[], temperature=1.0)
    np.testing.assert_array_equal(repeated.tokens, out.tokens)


def test_garbage_under_the_prompt_mask_changes_nothing(write, prompts):
    tokens, mask, rows = prompts
    out = write(*prompts)
    for garbage in (63, -1, 10**6):
        dirty = write(np.where(mask, tokens, garbage), mask, rows)
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(dirty)):
            np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------- keys and the loop


def test_every_token_of_every_row_has_a_key_of_its_own(bigram):
    """A policy without preferences writes its noise, which no row or place repeats."""
    params = {'table': jnp.zeros((1000, 1000))}
    tokens = jnp.zeros((8, 1), jnp.int32)
    out = generate(
        params,
        tokens,
        tokens == 0,
        jnp.arange(8),
        KEY,
        sampling(eos_ids=[]),
        model=bigram,
        max_new_tokens=8,
    )
    # 64 draws of 1,000: two chance repeats are expected; a shared key repeats 8 times.
    values, counts = np.unique(out.tokens[:, 1:], return_counts=True)
    assert counts.max() <= 3 and len(values) > 50


def test_no_key_is_used_twice(bigram):
    with jax.debug_key_reuse(True):
        tokens = jnp.zeros((2, 1), jnp.int32)
        jax.jit(functools.partial(generate, model=bigram, max_new_tokens=3))(
            CHAIN,
            tokens,
            tokens == 0,
            jnp.arange(2),
            jax.random.key(0),
            sampling(eos_ids=[]),
        )


def test_the_loop_stops_when_every_row_has_ended(counted):
    model, calls = counted
    run = jax.jit(functools.partial(generate, model=model, max_new_tokens=5000))
    tokens = jnp.array([[0], [2]])
    out = run(CHAIN, tokens, tokens >= 0, jnp.arange(2), KEY, sampling(eos_ids=[3]))
    jax.block_until_ready(out)
    jax.effects_barrier()
    # 0 → 1, 2, 3 is the longer of the two, and what follows 3 is not asked.
    assert len(calls) == 2
    assert out.response_mask.sum(-1).tolist() == [3, 1]
    assert out.tokens.shape == (2, 5001)


@pytest.mark.parametrize(
    'how, message',
    [
        ({'temperature': -1.0}, 'temperature=-1.0 is negative'),
        ({'top_k': 0}, 'top_k=0 keeps no token'),
        ({'top_p': 0.0}, r'top_p=0.0 is outside \(0, 1\]'),
        ({'top_p': 1.1}, r'top_p=1.1 is outside \(0, 1\]'),
    ],
)
def test_settings_that_cannot_be(how, message):
    with pytest.raises(ValueError, match=message):
        sampling(eos_ids=[0], **how)
