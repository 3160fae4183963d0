"""What transformers 4 makes of exported directories; runs in an environment with torch
and transformers 4 alone, started by ``test_transformers4.py``.

    python transformers4_side.py FOLDER

For each ``FOLDER/NAME``, a directory with ``inputs.json``, it writes ``outputs.json``.
"""

import json
import pathlib
import sys

import torch
import transformers

HEADS = {
    'lm': transformers.AutoModelForCausalLM,
    'scalar': transformers.AutoModelForSequenceClassification,
}


def outputs(folder: pathlib.Path, inputs: dict) -> dict:
    """Logits of ``tokens``, or of ``texts`` as a batch and through the pipeline."""
    model, info = HEADS[inputs['head']].from_pretrained(
        folder, output_loading_info=True, attn_implementation='eager'
    )
    result = {'info': {key: sorted(map(str, info[key])) for key in info}}
    if 'tokens' in inputs:
        with torch.no_grad():
            rows = [
                model.eval()(torch.tensor([row])).logits for row in inputs['tokens']
            ]
        return {**result, 'logits': [row[0].tolist() for row in rows]}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    result['class'] = type(tokenizer).__name__
    result['ids'] = tokenizer(inputs['texts'])['input_ids']
    if inputs['head'] == 'lm':
        return result
    batch = tokenizer(inputs['texts'], padding=True, return_tensors='pt')
    with torch.no_grad():
        result['batch'] = model.eval()(**batch).logits[:, 0].tolist()
    pipeline = transformers.pipeline(
        'text-classification', model=model, tokenizer=tokenizer
    )
    labels = pipeline(inputs['texts'], batch_size=3)
    return {**result, 'pipeline': [label['score'] for label in labels]}


def main(root: pathlib.Path) -> None:
    for path in sorted(root.glob('*/inputs.json')):
        result = outputs(path.parent, json.loads(path.read_text()))
        (path.parent / 'outputs.json').write_text(json.dumps(result))
    print(transformers.__version__)


if __name__ == '__main__':
    main(pathlib.Path(sys.argv[1]))
