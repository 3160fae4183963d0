"""How much arithmetic and how many bytes a work needs, whoever does it.

Only what the work needs is counted, so that a system that does more looks slower, not
busier: the last layer and the logits of the tokens that a loss reads alone, attention
to the past alone. Not counted are embeddings, norms, softmax, the scalar head and the
optimizer.

    forward of n tokens, of which the last k are read, with or without logits
        2·M·n + 4·L·H·K·Σ_{i=1..n} i + 2·D·V·k
          − 2·(M/L − M_kv)·(n − k) − 4·H·K·Σ_{i=1..n−k} i

M is the number of parameters in the matrices of the layers, L their number, M_kv that
of a layer's keys and values, H heads of K entries, D the width, V the vocabulary; a
token at position i attends to i keys (the causal half: on average (T + 1)/2 of T). Of a
token that is not read the last layer needs its key and its value. A backward pass is
twice its forward pass.
Source: Kaplan et al. 2020, arXiv 2001.08361, §2.1; MFU: Chowdhery et al. 2022, arXiv
2204.02311, app. B. Read ``tables.py`` next.
"""

from __future__ import annotations

from benchmarks.sizes import Model, Work

BYTES = {'float32': 4, 'bfloat16': 2}


def forward(model: Model, tokens: int, read: int, with_logits: bool = True) -> int:
    """FLOPs of one sequence of ``tokens`` of which the last ``read`` are read."""
    past = tokens * (tokens + 1) // 2
    attention = 4 * model.heads * model.head_dim
    whole = 2 * model.layer_matrices * tokens + model.layers * attention * past
    unread = tokens - read
    spared = model.layer_matrices // model.layers - model.key_value_matrices
    whole -= 2 * spared * unread + attention * unread * (unread + 1) // 2
    return whole + with_logits * 2 * model.head * read


def generation(model: Model, work: Work) -> int:
    """FLOPs of sampling one sequence with a cache: every token but the last goes
    through the layers once, and a response token is drawn from logits of its own.
    """
    return forward(model, work.prompt + work.response - 1, work.response)


def flops(model: Model, work: Work) -> int:
    """FLOPs of one step or iteration of a work.

    * sft: forward and backward (3×), all tokens but the last are read.
    * rm: 3× two sequences a pair, read at one token.
    * dpo: 3× two sequences a pair for the policy and 1× for the reference, read before
      the response tokens.
    * generate: prompt and response once.
    * rloo, grpo: generate; the reference once; 3× the policy each epoch.
    * ppo: generate; reward model, reference and critic once; 3× policy and critic each
      epoch.
    """
    length, batch = work.tokens, work.batch
    score = forward(model, length, 1, with_logits=False)
    if work.kind == 'sft':
        return 3 * batch * forward(model, length, length - 1)
    if work.kind == 'rm':
        return 3 * 2 * batch * score
    if work.kind == 'dpo':
        return 4 * 2 * batch * forward(model, length, length // 2)
    written = generation(model, work)
    if work.kind == 'generate':
        return batch * written
    scored = forward(model, length, work.response)
    if work.kind in ('rloo', 'grpo'):
        return batch * (written + scored + 3 * work.epochs * scored)
    values = forward(model, length, work.response, with_logits=False)
    update = 3 * work.epochs * (scored + values)
    return batch * (written + scored + values + score + update)


def decode_bytes(model: Model, work: Work) -> int:
    """Bytes that the decoding of a batch reads at least.

    Every response token reads the matrices of the layers and the head once for the
    whole batch, and for every sequence the keys and values that are there: 2·L·K·H_kv
    entries a position. All in the dtype of the matrix products.
    """
    size = BYTES[model.dtype]
    weights = work.response * (model.layer_matrices + model.head)
    first, last = work.prompt, work.prompt + work.response - 1
    positions = (first + last) * work.response // 2
    cache = 2 * model.layers * model.kv_heads * model.head_dim * positions
    return size * (weights + work.batch * cache)
