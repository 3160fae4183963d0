"""Reward models exported with tokenizers that have no pad token, for the tests that
compare their scores with those of transformers 4 and 5.
"""

import numpy as np

from rlhf_jax import hf
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.rewards import reward_model_scores
from tests.hf.small_tokenizers import (
    EOS,
    TEXTS,
    byte_tokenizer,
    unknown_tokenizer,
)
from tests.hf.test_directories import make_params

TOKENIZERS = {
    'bytes': byte_tokenizer(),
    'pad is EOS': byte_tokenizer(pad_token=EOS),
    'padding on the left': byte_tokenizer(padding_side='left'),
    'reserved': byte_tokenizer(['<|reserved_special_token_0|>']),
    'unknown': unknown_tokenizer(byte_fallback=True, before=True),
}


def export_scorer(out, config, tokenizer, names=()):
    """Writes a random reward model; returns its scores of ``TEXTS`` without bias."""
    params = make_params(config, 'scalar')
    model = ScalarModel(config, tuple(names))
    if names:
        kernel = np.random.default_rng(3).normal(0, 0.3, (config.width, len(names)))
        head = {'kernel': kernel.astype(np.float32)}
        params = {**params, 'head': {**head, 'bias': np.zeros(len(names), np.float32)}}
    hf.save(
        out,
        params,
        config,
        head='scalar',
        score_names=names,
        tokenizer=tokenizer,
        eos_token_id=[tokenizer.eos_token_id],
    )
    scores = []
    for row in tokenizer(TEXTS)['input_ids']:
        tokens, mask = np.array([row]), np.ones((1, len(row)), bool)
        scores.append(reward_model_scores(params, tokens, mask, model=model)[0])
    return np.stack(scores) - np.asarray(params['head']['bias'])
