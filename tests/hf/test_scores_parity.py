"""Exported reward models in transformers, from texts: batches that the exported
tokenizer pads, and the pipeline. The tokenizers they start from have no pad token, or
pad by EOS; some texts end in EOS, others do not.
"""

from dataclasses import replace

import numpy as np
import pytest

from tests.hf.scored_texts import TOKENIZERS, export_scorer
from tests.hf.small_families import ENCODERS, FAMILIES
from tests.hf.small_tokenizers import TEXTS
from tests.hf.test_directories import make_config
from tests.hf.test_families import FIXTURES

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.parity

DECODERS = [name for name in FAMILIES if name not in ENCODERS]


def their_scores(out, **options):
    """Logits [N, H] of one padded batch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    reader = transformers.AutoModelForSequenceClassification
    model, info = reader.from_pretrained(out, output_loading_info=True, **options)
    assert not any(info.values()), info
    batch = tokenizer(TEXTS, padding=True, return_tensors='pt')
    with torch.no_grad():
        return model.eval()(**batch).logits.numpy()


@pytest.mark.parametrize('rows', [0, 4], ids=['no spare row', 'spare rows'])
@pytest.mark.parametrize('name', list(TOKENIZERS))
def test_a_padded_batch_and_the_pipeline_read_the_last_token(tmp_path, name, rows):
    tokenizer, out = TOKENIZERS[name], tmp_path / 'rm'
    config = replace(make_config(), vocab_size=len(tokenizer) + rows)
    ours = export_scorer(out, config, tokenizer)
    assert np.std(ours) > 0.01
    np.testing.assert_allclose(their_scores(out)[:, 0], ours, rtol=0, atol=1e-4)
    pipeline = transformers.pipeline('text-classification', model=str(out))
    for size in (1, 3):
        labels = pipeline(TEXTS, batch_size=size)
        scores = [label['score'] for label in labels]
        np.testing.assert_allclose(scores, ours, rtol=0, atol=1e-4)


def test_named_scores(tmp_path):
    tokenizer, out = TOKENIZERS['bytes'], tmp_path / 'rm'
    config = replace(make_config(), vocab_size=len(tokenizer))
    ours = export_scorer(out, config, tokenizer, ('helpful', 'brief'))
    np.testing.assert_allclose(their_scores(out), ours, rtol=0, atol=1e-4)
    pipeline = transformers.pipeline('text-classification', model=str(out), top_k=None)
    for row, labels in zip(ours, pipeline(TEXTS, batch_size=3), strict=True):
        scores = {label['label']: label['score'] for label in labels}
        expected = dict(zip(('helpful', 'brief'), row.tolist(), strict=True))
        assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize('name', DECODERS)
def test_every_family(tmp_path, name):
    from rlhf_jax import hf

    tokenizer, out = TOKENIZERS['bytes'], tmp_path / 'rm'
    config = replace(hf.load_config(FIXTURES / name), vocab_size=len(tokenizer))
    ours = export_scorer(out, config, tokenizer)
    theirs = their_scores(out, attn_implementation='eager')
    np.testing.assert_allclose(theirs[:, 0], ours, rtol=0, atol=1e-4)
