"""Tokenizers with and without tokens to pad with."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

EOS = '<|end|>'
TEXTS = [
    'a cat',
    f'a cat{EOS}',
    f'the cat sat on the mat{EOS}',
    f'no{EOS}{EOS}',
    'unheard-of words',
]


def byte_tokenizer(special=(), **tokens):
    """The 256 bytes, an EOS token, and ``special`` tokens, in this order."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), EOS, *special]
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        additional_special_tokens=list(special),
        **tokens,
    )


def unknown_tokenizer(byte_fallback, before=False):
    """Words and ``<unk>``, which byte fallback keeps from ever being written.

    Args:
        byte_fallback: whether other characters are spelt in bytes.
        before: whether ``<s>`` stands before every text.
    """
    names = ['<unk>', '<s>', EOS, *(f'<0x{i:02X}>' for i in range(256)), *'▁acthe']
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=[], unk_token='<unk>', byte_fallback=byte_fallback
        )
    )
    if before:
        backend.post_processor = processors.TemplateProcessing(
            single='<s> $A', special_tokens=[('<s>', 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token='<unk>', bos_token='<s>', eos_token=EOS
    )
