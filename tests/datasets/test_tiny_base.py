"""The base model that the package ships: small, loaded like any other, and able."""

import functools

import jax
import numpy as np
import pytest

from rlhf_jax import hf
from rlhf_jax.data import pipeline
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.datasets import tiny_tldr, tiny_world
from rlhf_jax.evals import language_model
from rlhf_jax.models.heads import CausalLM

FOLDER = hf.resolve('tiny')


@pytest.fixture(scope='module')
def base():
    model = CausalLM(hf.load_config('tiny'))
    return model, hf.load_params('tiny', model.config, head='lm')


def test_it_is_a_small_directory_with_a_card():
    names = {path.name for path in FOLDER.iterdir()}
    assert {'config.json', 'model.safetensors', 'tokenizer.json', 'README.md'} <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4e6
    assert 'experiments.pretrain_base' in (FOLDER / 'README.md').read_text('utf-8')


def test_its_tokenizer_is_that_of_the_data():
    shipped = load_tokenizer(str(FOLDER))
    assert shipped.get_vocab() == tiny_tldr.tokenizer().get_vocab()


def test_it_knows_the_texts(base):
    model, params = base
    data = pipeline.load_texts(
        'tfds:tiny_tldr/articles:test[:100]', tiny_tldr.tokenizer(), max_length=112
    )
    loss = jax.jit(functools.partial(language_model.batch_loss, model=model))
    batches = pipeline.eval_batches(data, 50, (112,))
    assert language_model.evaluate_loss(loss, params, batches)['loss'] < 0.95


def test_it_copies_facts_and_tells_them_from_inventions(base):
    """Greedy, behind 'Facts: Anna the' comes her job; a checked fact gets the right
    verdict.
    """
    model, params = base
    tokenizer = tiny_tldr.tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    right, wrong = ids('Ġright'), ids('Ġwrong')
    texts, wanted, among = [], [], []
    for i in range(100):
        rng = np.random.default_rng((1, i))
        article = tiny_world.make_article(rng)
        main = article.main
        texts.append(f'{article.text}\n\nFacts: {main.facts["who"]} the')
        wanted.append(ids(f'Ġ{main.facts["job"]}'))
        among.append(None)
        for is_right in (True, False):
            value = main.facts['job']
            if not is_right:
                value = tiny_world.wrong_value(main, article, 'job', rng)
            texts.append(f'{article.text}\n\nChecks: the {value}')
            wanted.append(right if is_right else wrong)
            among.append([right, wrong])
    rows = [tokenizer(text)['input_ids'] for text in texts]
    mask = np.arange(max(map(len, rows))) < np.asarray([[len(r)] for r in rows])
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(rows)
    hidden = jax.jit(lambda p, *x: model.apply({'params': p}, *x))(params, tokens, mask)
    last = np.asarray(hidden)[np.arange(len(rows)), [len(r) - 1 for r in rows]]
    logits = last @ np.asarray(model.unembedding(params))
    found = np.asarray(
        [
            row.argmax() if choice is None else choice[int(row[choice].argmax())]
            for row, choice in zip(logits, among)
        ]
    )
    hits = found == np.asarray(wanted)
    assert hits[::3].mean() > 0.75  # copied
    assert hits[1::3].mean() > 0.9 and hits[2::3].mean() > 0.8
