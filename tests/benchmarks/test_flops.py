"""FLOPs, bytes and parameters of a work, by hand and against the models themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks.flops import decode_bytes, flops, forward, generation
from benchmarks.ours import config_of
from benchmarks.sizes import MODELS, WORKS, Model, Work
from rlhf_jax import CausalLM, ScalarModel

# One layer of two heads of two entries: query 4·4, key and value 4·2 each, out 4·4,
# three matrices of 4·3, so M = 48 + 36 = 84; head and embeddings 4·7 = 28.
SMALL = Model(vocab=7, layers=1, width=4, heads=2, kv_heads=1, mlp=3)


def test_parameters_by_hand():
    assert (SMALL.head_dim, SMALL.layer_matrices, SMALL.head) == (2, 84, 28)
    assert SMALL.backbone == 28 + 84 + 3 * 4  # two norms of the layer, one at the end
    assert SMALL.policy == 28 + 84 + 12 + 28
    assert dataclasses.replace(SMALL, tied=True).policy == 28 + 84 + 12


@pytest.mark.parametrize('model', [SMALL, *MODELS.values()])
def test_parameters_are_those_of_the_models(model):
    config = config_of(model, 8)
    row = jnp.zeros((1, 2), jnp.int32)

    def count(module):
        shapes = jax.eval_shape(module.init, jax.random.PRNGKey(0), row, row > 0)
        return sum(x.size for x in jax.tree.leaves(shapes))

    assert count(CausalLM(config)) == model.policy
    assert count(ScalarModel(config)) == model.backbone + model.width + 1


def test_a_forward_pass_by_hand():
    # Matrices 2·84·3 = 504; tokens see 1 + 2 + 3 = 6 keys, each 4·(2 heads · 2) = 16
    # FLOPs for scores and values; logits at two tokens 2·28·2 = 112. The first token is
    # not read: of 84 parameters it needs the 16 of key and value, and attends to none.
    assert forward(SMALL, 3, 2) == 504 + 96 + 112 - (2 * 68 + 16)
    assert forward(SMALL, 3, 3) == 504 + 96 + 168
    assert forward(SMALL, 3, 3, with_logits=False) == 504 + 96
    # With a second layer, the first runs for all tokens.
    two = dataclasses.replace(SMALL, layers=2)
    assert forward(two, 3, 2) == forward(SMALL, 3, 2) + 504 + 96


def test_decoding_with_a_cache_is_the_causal_forward_pass():
    work = Work(kind='generate', batch=1, prompt=3, response=2)
    # Two tokens are drawn; the last one is not read any more, so 4 are, and from two of
    # them nothing is drawn.
    assert generation(SMALL, work) == forward(SMALL, 4, 2)
    slow = 2 * 2 * 16
    for position in (3, 4):  # a token attends to those before it and to itself
        slow += 2 * 84 + 16 * position
    assert generation(SMALL, work) == slow + 2 * 2 * 28


def test_works_by_hand():
    """Forward of 4 tokens without logits: 2·84·4 + 16·10 = 832; a token's logits 56.
    Not read are 1, 2 or 3 tokens: less 136 each, and 16·1, 16·3 or 16·6.
    """
    but_1, but_2, but_3 = 832 - 136 - 16, 832 - 272 - 48, 832 - 408 - 96
    offline = {'batch': 2, 'length': 4}
    assert flops(SMALL, Work(kind='sft', **offline)) == 3 * 2 * (but_1 + 3 * 56)
    assert flops(SMALL, Work(kind='rm', **offline)) == 3 * 4 * but_3
    # Policy forward and backward, reference forward; half of the tokens are responses.
    assert flops(SMALL, Work(kind='dpo', **offline)) == (3 + 1) * 4 * (but_2 + 2 * 56)
    online = {'batch': 2, 'prompt': 2, 'response': 2, 'epochs': 4}
    written = 2 * 84 * 3 + 16 * 6 - 136 - 16 + 2 * 56
    scored = but_2 + 2 * 56
    assert flops(SMALL, Work(kind='generate', **online)) == 2 * written
    grpo = 2 * (written + scored + 3 * 4 * scored)
    assert flops(SMALL, Work(kind='grpo', **online)) == grpo
    assert flops(SMALL, Work(kind='rloo', **online)) == grpo
    # Reward model, reference and critic once; policy and critic in four epochs.
    ppo = 2 * (written + scored + but_2 + but_3 + 4 * 3 * (scored + but_2))
    assert flops(SMALL, Work(kind='ppo', **online)) == ppo


def test_bytes_of_decoding_by_hand():
    work = Work(kind='generate', batch=5, prompt=3, response=2)
    # Two tokens read 84 + 28 weights each; the cache holds 3, then 4 tokens of one
    # head of two entries, keys and values, in each of five rows.
    entries = 2 * (84 + 28) + 5 * (3 + 4) * 2 * 2
    assert decode_bytes(SMALL, work) == 4 * entries
    half = dataclasses.replace(SMALL, dtype='bfloat16')
    assert decode_bytes(half, work) == 2 * entries


def test_all_works_have_flops():
    for size, works in WORKS.items():
        for work in works.values():
            assert flops(MODELS[size], work) > 0
            assert work.batch % (work.group * work.microbatches) == 0 or work.group > 1
            assert work.batch % work.microbatches == 0
            assert work.batch % work.group == 0
