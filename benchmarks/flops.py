"""How much arithmetic and how many bytes a work needs, whoever does it.

Only what the work needs is counted, so that a system that does more looks slower, not
busier: the logits of the tokens in the loss alone, attention to the past alone. Not
counted are embeddings, norms, softmax, the scalar head and the optimizer.

    forward of n tokens that begin at position s, with logits at k of them
        2·M·n  +  4·L·H·K·Σ_{i=s+1..s+n} i  +  2·D·V·k

M is the number of parameters in the matrices of the layers, L their number, H heads of
K entries, D the width, V the vocabulary; a token at position i attends to i keys (the
causal half: on average (T + 1)/2 of T). A backward pass is twice its forward pass.
Source: Kaplan et al. 2020, arXiv 2001.08361, §2.1; MFU: Chowdhery et al. 2022, arXiv
2204.02311, app. B. Read ``tables.py`` next.
"""

from __future__ import annotations

from benchmarks.sizes import Model, Work

BYTES = {'float32': 4, 'bfloat16': 2}


def forward(model: Model, tokens: int, logits: int) -> int:
    """FLOPs of one sequence of ``tokens`` with logits at ``logits`` of them."""
    past = tokens * (tokens + 1) // 2
    attention = 4 * model.layers * model.heads * model.head_dim * past
    return 2 * model.layer_matrices * tokens + attention + 2 * model.head * logits


def generation(model: Model, work: Work) -> int:
    """FLOPs of sampling one sequence with a cache: every token but the last goes
    through the layers once, and a response token is drawn from logits of its own.
    """
    return forward(model, work.prompt + work.response - 1, work.response)


def flops(model: Model, work: Work) -> int:
    """FLOPs of one step or iteration of a work.

    * sft: forward and backward (3×), logits before every token but the first.
    * rm: 3× two sequences a pair, no logits.
    * dpo: 3× two sequences a pair for the policy and 1× for the reference, logits
      before
      the response tokens.
    * generate: prompt and response once.
    * rloo, grpo: generate; the reference once; 3× the policy each epoch.
    * ppo: generate; reward model, reference and critic once; 3× policy and critic each
      epoch.
    """
    length, batch = work.tokens, work.batch
    scalar = forward(model, length, 0)
    if work.kind == 'sft':
        return 3 * batch * forward(model, length, length - 1)
    if work.kind == 'rm':
        return 3 * 2 * batch * scalar
    if work.kind == 'dpo':
        return 4 * 2 * batch * forward(model, length, length // 2)
    written = generation(model, work)
    if work.kind == 'generate':
        return batch * written
    scored = forward(model, length, work.response)
    if work.kind in ('rloo', 'grpo'):
        return batch * (written + scored + 3 * work.epochs * scored)
    update = 3 * work.epochs * (scored + scalar)
    return batch * (written + scored + 2 * scalar + update)


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
