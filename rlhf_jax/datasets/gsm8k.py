"""GSM8K: grade-school word problems with worked answers, for SFT and for RLVR.

A problem is ``{'question': …, 'answer': …}``; the answer is worked and ends in a line
``#### 72``, and its calculations are annotated: ``48/2 = <<48/2=24>>24``. It becomes
``prompt``, ``completion`` (the worked answer) and ``reference`` (the final number), so
that one spec serves SFT and a stage that is rewarded for right answers:

    python:rlhf_jax.datasets.gsm8k:records?data=jsonl:train.jsonl&annotations=strip

Source: Cobbe et al. 2021, arXiv 2110.14168, and its released files ``train.jsonl`` and
``test.jsonl``; the Parquet files of ``openai/gsm8k`` have the same fields. Read
``sources.py`` for the specs, and ``rlhf_jax/verify.py``, which reads the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlhf_jax.data.sources import SourceRecord, read
from rlhf_jax.verify import read_number

TEMPLATE = 'Question: {question}\nAnswer:'
MARK = '####'
ANNOTATION = re.compile(r'<<[^<>]*>>')


def records(
    data: str, template: str = TEMPLATE, shots: str = '', annotations: str = 'keep'
) -> Iterator[dict[str, str]]:
    """Problems as records that are demonstrations and prompts at once.

    Args:
        data: data spec of the problems.
        template: of a prompt, with ``{question}`` in it; answers open with a space.
        shots: data spec of worked examples, put before every prompt with empty lines
            between them, such as ``jsonl:train.jsonl[:4]``; '' for none.
        annotations: 'keep' or 'strip' the calculator's ``<<…>>``.

    Returns:
        Records of ``prompt``, ``completion``, ``reference``.

    Raises:
        ValueError: an argument of another kind, a problem without question, answer or
            final number, or one that is among its own examples, with its place.
    """
    if '{question}' not in template:
        raise ValueError(f'template={template!r} has no {{question}}')
    if annotations not in ('keep', 'strip'):
        raise ValueError(f"annotations={annotations!r}; use 'keep' or 'strip'")
    prefix, shown = '', {}
    for record in read(shots) if shots else ():
        question, answer, _ = _problem(record, annotations)
        prefix += template.replace('{question}', question) + f' {answer}\n\n'
        shown[question] = record.where
    for record in read(data):
        question, answer, number = _problem(record, annotations)
        if question in shown:
            raise ValueError(
                f'{record.where}: this problem is also an example of every prompt '
                f'({shown[question]}); take shots from other problems (a slice inside '
                'the spec is quoted: data=jsonl:train.jsonl%5B4:%5D)'
            )
        yield {
            'prompt': prefix + template.replace('{question}', question),
            'completion': f' {answer}',
            'reference': number,
        }


def _problem(record: SourceRecord, annotations: str) -> tuple[str, str, str]:
    """Question, worked answer and final number, without the commas in it."""
    for name in ('question', 'answer'):
        value = record.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            found = ', '.join(record.fields) or 'none'
            raise ValueError(
                f'{record.where}: the field {name!r} is missing, empty or no text; '
                f'found: {found}'
            )
    question, answer = record.fields['question'], record.fields['answer']
    _, mark, final = answer.rpartition(MARK)
    number = final.strip().replace(',', '')
    if not mark or read_number(number) is None:
        raise ValueError(
            f"{record.where}: the answer does not end in a line like '{MARK} 72', but "
            f'in {answer[-40:]!r}'
        )
    if annotations == 'strip':
        answer = ANNOTATION.sub('', answer)
    return question.strip(), answer.strip(), number
