"""Writes ``fixtures/``: one small model of every family, and what transformers makes
of it, so that the plain tests check every family without torch.

    pip install -e '.[parity]' && python -m tests.hf.make_fixtures

``<family>/`` is the directory that transformers saves; ``<family>/expected.npz`` holds,
computed in float32 by PyTorch for one sequence at a time, without any padding: logits,
greedy continuations, scores, and for the gradient of the mean loss of every tensor its
norm and its projection on cos(0), cos(1), cos(2), …
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers

from tests.hf.small_families import ENCODERS, FAMILIES

HERE = pathlib.Path(__file__).parent / 'fixtures'
LENGTHS = (11, 6, 3)
NEW_TOKENS = 12


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` with the weights that are made as zeros and ones moved off them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def build(name: str, kind: str) -> torch.nn.Module:
    """A random model of a family: kind 'CausalLM' or 'SequenceClassification'."""
    config_class, arguments = FAMILIES[name]
    torch.manual_seed(len(name))
    if kind == 'SequenceClassification':
        arguments = {**arguments, 'num_labels': 1}
    config = getattr(transformers, config_class)(**arguments)
    reader = getattr(transformers, f'AutoModelFor{kind}')
    return randomised(reader.from_config(config, attn_implementation='eager'))


def classifier(name: str, policy: torch.nn.Module) -> torch.nn.Module:
    """A classifier with one label on the body of ``policy``."""
    model = build(name, 'SequenceClassification')
    body = model.base_model_prefix
    getattr(model, body).load_state_dict(getattr(policy, body).state_dict())
    return model


def sequences() -> list[torch.Tensor]:
    """Token rows without special tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 37, (1, n), generator=generator) for n in LENGTHS]


def gradients(
    model: torch.nn.Module, rows: list[torch.Tensor]
) -> dict[str, np.ndarray]:
    """Norm and projection of the gradient of the mean loss over predicted tokens."""
    losses = [model(row, labels=row).loss * (row.shape[1] - 1) for row in rows]
    (sum(losses) / sum(row.shape[1] - 1 for row in rows)).backward()
    result = {}
    for name, parameter in model.named_parameters():
        if model.config.model_type == 'gpt_neox':  # saved under its older name
            name = name.replace('lm_head', 'embed_out')
        g = parameter.grad.double().numpy().ravel()
        result[f'gradient/{name}'] = np.array(
            [np.linalg.norm(g), g @ np.cos(np.arange(g.size))]
        )
    return result


def main() -> None:
    for name in FAMILIES:
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        rows = sequences()
        expected = {f'tokens/{i}': row[0].numpy() for i, row in enumerate(rows)}
        if name in ENCODERS:
            model = scorer = build(name, 'SequenceClassification')
        else:
            model = build(name, 'CausalLM')
            expected |= gradients(model, rows)
            scorer = classifier(name, model)
            expected['score.weight'] = scorer.score.weight.detach().numpy()
            for i, row in enumerate(rows):
                expected[f'logits/{i}'] = model(row).logits[0].detach().numpy()
                out = model.generate(
                    row, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
                )
                expected[f'greedy/{i}'] = out[0, row.shape[1] :].numpy()
        expected['scores'] = np.array([scorer(row).logits.item() for row in rows])
        model.save_pretrained(folder)
        np.savez_compressed(folder / 'expected.npz', **expected)


if __name__ == '__main__':
    main()
