"""Tables that say how each Hugging Face model family spells its config and weights.

A family is data: adding one is adding a :class:`Family` to ``FAMILIES`` and a fixture
to the tests (``docs/models.md``). What the tables are made of stands in
``schema.py``; ``reader.py`` reads and writes directories by them. Read it next.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rlhf_jax.hf.codecs import (
    all_but_every,
    derived_head_dim,
    from_layer,
    layer_windows,
    one_window,
    padded_positions,
    rope_codec,
    rope_per_kind,
)
from rlhf_jax.hf.schema import (
    ACTIVATIONS,
    RUNTIME,
    Codec,
    Family,
    Field,
    Weight,
    read_config,
    table,
    write_config,
)
from rlhf_jax.models.config import TransformerConfig

HEAD = Weight(('lm_head',), 'lm_head.weight', 'transpose')
SCORE = Weight(('head/kernel',), 'score.weight', 'row')


# -------------------------------------------------------------------- Llama and its kin

LLAMA_FIELDS = (
    Field('vocab_size', ('vocab_size',)),
    Field('num_hidden_layers', ('num_layers',)),
    Field('hidden_size', ('width',)),
    Field('num_attention_heads', ('num_heads',)),
    Field(
        'num_key_value_heads', ('num_kv_heads',), lambda hf: hf['num_attention_heads']
    ),
    Field('intermediate_size', ('mlp_width',)),
    Field('initializer_range', ('init_std',), 0.02),
)
WIDTH_PER_HEAD = Field(
    'head_dim',
    ('head_dim',),
    lambda hf: hf['hidden_size'] // hf['num_attention_heads'],
)
ACTIVATION = Field('hidden_act', ('activation',), 'silu', ACTIVATIONS)
UNTIED = Field('tie_word_embeddings', ('tied_embeddings',), False)
BIASES = Field('attention_bias', ('attention_bias', 'attention_out_bias'), False)


def _llama_body(norms: str) -> tuple[Weight, ...]:
    body = """
        embed/tokens            embed_tokens     table
        layers/attention/query  self_attn.q_proj heads_in
        layers/attention/key    self_attn.k_proj heads_in
        layers/attention/value  self_attn.v_proj heads_in
        layers/attention/out    self_attn.o_proj heads_out
        layers/mlp/gate         mlp.gate_proj    transpose
        layers/mlp/up           mlp.up_proj      transpose
        layers/mlp/down         mlp.down_proj    transpose
        final_norm              norm             norm"""
    return (*table('model.', 'layers.{layer}.', body + norms), HEAD, SCORE)


PRE_NORMS = """
    layers/attention_norm       input_layernorm             norm
    layers/mlp_norm             post_attention_layernorm    norm"""
POST_NORMS = """
    layers/attention_out_norm   post_attention_layernorm    norm
    layers/mlp_out_norm         post_feedforward_layernorm  norm"""
GEMMA_NORMS = f"""{POST_NORMS}
    layers/attention_norm       input_layernorm             norm
    layers/mlp_norm             pre_feedforward_layernorm   norm"""
QK_NORMS = """
    layers/attention/query_norm self_attn.q_norm            norm
    layers/attention/key_norm   self_attn.k_norm            norm"""


def _llama_like(name: str, **changes: Any) -> Family:
    """A family of the ``model.layers.N.self_attn`` naming."""
    settings = {
        'model_type': name.lower(),
        'architectures': {
            'lm': f'{name}ForCausalLM',
            'scalar': f'{name}ForSequenceClassification',
        },
        'fixed': {'norm': 'rms'},
        'codecs': (rope_codec(),),
        'weights': _llama_body(PRE_NORMS),
        'ignored': (r'.*\.rotary_emb\.inv_freq',),
        'prefix': 'model.',
        **changes,
    }
    return Family(**settings)


LLAMA = _llama_like(
    'Llama',
    fields=(
        *LLAMA_FIELDS,
        WIDTH_PER_HEAD,
        Field('max_position_embeddings', ('max_positions',), 2048),
        Field('rms_norm_eps', ('norm_eps',), 1e-6),
        ACTIVATION,
        UNTIED,
        BIASES,
        Field('mlp_bias', ('mlp_bias',), False),
    ),
)
MISTRAL = _llama_like(
    'Mistral',
    fields=(
        *LLAMA_FIELDS,
        WIDTH_PER_HEAD,
        Field('max_position_embeddings', ('max_positions',), 131_072),
        Field('rms_norm_eps', ('norm_eps',), 1e-6),
        ACTIVATION,
        UNTIED,
    ),
    codecs=(rope_codec(), one_window()),
)
QWEN2 = _llama_like(
    'Qwen2',
    fixed={'norm': 'rms', 'attention_bias': True},
    fields=(
        *LLAMA_FIELDS,
        WIDTH_PER_HEAD,
        Field('max_position_embeddings', ('max_positions',), 32_768),
        Field('rms_norm_eps', ('norm_eps',), 1e-6),
        ACTIVATION,
        UNTIED,
    ),
    codecs=(rope_codec(), layer_windows(from_layer, 'use_sliding_window')),
)
QWEN3 = _llama_like(
    'Qwen3',
    fixed={'norm': 'rms', 'qk_norm': 'head'},
    fields=(
        *LLAMA_FIELDS,
        Field('head_dim', ('head_dim',), 128),
        Field('max_position_embeddings', ('max_positions',), 32_768),
        Field('rms_norm_eps', ('norm_eps',), 1e-6),
        ACTIVATION,
        UNTIED,
        BIASES,
    ),
    codecs=(rope_codec(), layer_windows(from_layer, 'use_sliding_window')),
    weights=_llama_body(PRE_NORMS + QK_NORMS),
)
OLMO2 = _llama_like(
    'Olmo2',
    fixed={'norm': 'rms', 'residual': 'post', 'qk_norm': 'all'},
    fields=(
        *LLAMA_FIELDS,
        WIDTH_PER_HEAD,
        Field('max_position_embeddings', ('max_positions',), 2048),
        Field('rms_norm_eps', ('norm_eps',), 1e-5),
        ACTIVATION,
        UNTIED,
        BIASES,
    ),
    codecs=(rope_codec(kind='type'),),
    weights=_llama_body(POST_NORMS + QK_NORMS),
)
GEMMA_FIXED = {
    'norm': 'rms',
    'norm_offset': 1.0,
    'residual': 'both',
    'scale_embeddings': True,
}
GEMMA_FIELDS = (
    *LLAMA_FIELDS,
    Field('head_dim', ('head_dim',), 256),
    Field('rms_norm_eps', ('norm_eps',), 1e-6),
    Field('hidden_activation', ('activation',), 'gelu_pytorch_tanh', ACTIVATIONS),
    Field('tie_word_embeddings', ('tied_embeddings',), True),
    BIASES,
    Field('query_pre_attn_scalar', ('query_scalar',), 256),
    Field('use_bidirectional_attention', (), False, {False: None}),
)
GEMMA2 = _llama_like(
    'Gemma2',
    fixed=GEMMA_FIXED,
    fields=(
        *GEMMA_FIELDS,
        Field('max_position_embeddings', ('max_positions',), 8192),
        Field('attn_logit_softcapping', ('attention_softcap',), None),
        Field('final_logit_softcapping', ('logit_softcap',), None),
    ),
    codecs=(rope_codec(), layer_windows(all_but_every(2))),
    weights=_llama_body(GEMMA_NORMS),
)
GEMMA3 = _llama_like(
    'Gemma3',
    model_type='gemma3_text',
    architectures={
        'lm': 'Gemma3ForCausalLM',
        'scalar': 'Gemma3TextForSequenceClassification',
    },
    fixed={**GEMMA_FIXED, 'qk_norm': 'head'},
    fields=(
        *GEMMA_FIELDS,
        Field('max_position_embeddings', ('max_positions',), 131_072),
        Field('final_logit_softcapping', ('logit_softcap',), None),
        Field('attn_logit_softcapping', (), 0.0, {None: None, 0.0: None}),
    ),
    codecs=(rope_per_kind(), layer_windows(all_but_every(6))),
    weights=_llama_body(GEMMA_NORMS + QK_NORMS),
)


# --------------------------------------------------------------- GPT-2, GPT-NeoX, BERT

ALL_BIASED = {
    'norm': 'layer',
    'gated_mlp': False,
    'attention_bias': True,
    'attention_out_bias': True,
    'mlp_bias': True,
}
MHA = (
    Field('vocab_size', ('vocab_size',)),
    Field('hidden_size', ('width',)),
    Field('num_hidden_layers', ('num_layers',)),
    Field('num_attention_heads', ('num_heads', 'num_kv_heads')),
    Field('intermediate_size', ('mlp_width',)),
    Field('initializer_range', ('init_std',), 0.02),
)


GPT2 = Family(
    model_type='gpt2',
    architectures={'lm': 'GPT2LMHeadModel', 'scalar': 'GPT2ForSequenceClassification'},
    fixed={**ALL_BIASED, 'position': 'learned'},
    fields=(
        Field('vocab_size', ('vocab_size',)),
        Field('n_layer', ('num_layers',)),
        Field('n_embd', ('width',)),
        Field('n_head', ('num_heads', 'num_kv_heads')),
        Field('n_inner', ('mlp_width',), lambda hf: 4 * hf['n_embd']),
        Field('n_positions', ('max_positions',), 1024),
        Field('layer_norm_epsilon', ('norm_eps',), 1e-5),
        Field('activation_function', ('activation',), 'gelu_new', ACTIVATIONS),
        Field('tie_word_embeddings', ('tied_embeddings',), True),
        Field('initializer_range', ('init_std',), 0.02),
        Field('scale_attn_weights', (), True, {True: None}),
        Field('scale_attn_by_inverse_layer_idx', (), False, {False: None}),
        Field('add_cross_attention', (), False, {False: None}),
    ),
    codecs=(derived_head_dim('n_embd', 'n_head'),),
    weights=(
        *table('transformer.', 'h.{layer}.', """
            embed/tokens                      wte          table
            embed/positions                   wpe          table
            layers/attention_norm             ln_1         norm
            layers/attention/query,key,value  attn.c_attn  columns
            layers/attention/out              attn.c_proj  rows
            layers/mlp_norm                   ln_2         norm
            layers/mlp/up                     mlp.c_fc     copy
            layers/mlp/down                   mlp.c_proj   copy
            final_norm                        ln_f         norm"""),
        HEAD,
        SCORE,
    ),
    ignored=(r'.*\.attn\.(masked_)?bias',),
    prefix='transformer.',
)  # fmt: skip

PARALLEL = {True: 'parallel', False: 'pre'}
GPT_NEOX = Family(
    model_type='gpt_neox',
    architectures={
        'lm': 'GPTNeoXForCausalLM',
        'scalar': 'GPTNeoXForSequenceClassification',
    },
    fixed={'norm': 'layer', 'gated_mlp': False, 'mlp_bias': True},
    fields=(
        *MHA,
        Field('max_position_embeddings', ('max_positions',), 2048),
        Field('layer_norm_eps', ('norm_eps',), 1e-5),
        Field('hidden_act', ('activation',), 'gelu', ACTIVATIONS),
        Field('use_parallel_residual', ('residual',), True, PARALLEL),
        Field('attention_bias', ('attention_bias', 'attention_out_bias'), True),
        UNTIED,
    ),
    codecs=(
        derived_head_dim('hidden_size', 'num_attention_heads'),
        rope_codec(fraction=0.25),
    ),
    weights=(
        *table('gpt_neox.', 'layers.{layer}.', """
            embed/tokens                      embed_in                  table
            layers/attention_norm             input_layernorm           norm
            layers/attention/query,key,value  attention.query_key_value interleaved
            layers/attention/out              attention.dense           heads_out
            layers/mlp_norm                   post_attention_layernorm  norm
            layers/mlp/up                     mlp.dense_h_to_4h         transpose
            layers/mlp/down                   mlp.dense_4h_to_h         transpose
            final_norm                        final_layer_norm          norm"""),
        Weight(('lm_head',), 'embed_out.weight', 'transpose'),
        SCORE,
    ),
    ignored=(r'.*\.attention\.(masked_)?bias', r'.*\.rotary_emb\.inv_freq'),
    prefix='gpt_neox.',
)  # fmt: skip


def _bert(
    name: str,
    head: tuple[Weight, ...],
    fields: tuple[Field, ...] = (),
    codecs: tuple[Codec, ...] = (),
) -> Family:
    """An encoder of BERT's build: a scalar model's body, never a policy."""
    body = name.lower()
    return Family(
        model_type=body,
        architectures={
            'scalar': f'{name}ForSequenceClassification',
            'base': f'{name}ForMaskedLM',
        },
        fixed={
            **ALL_BIASED,
            'attention': 'bidirectional',
            'residual': 'outer',
            'position': 'learned',
            'embed_norm': True,
        },
        fields=(
            *MHA,
            Field('type_vocab_size', ('token_types',), 2),
            Field('layer_norm_eps', ('norm_eps',), 1e-12),
            Field('hidden_act', ('activation',), 'gelu', ACTIVATIONS),
            Field('tie_word_embeddings', ('tied_embeddings',), True),
            Field('is_decoder', (), False, {False: None}),
            Field('position_embedding_type', (), 'absolute', {'absolute': None}),
            *fields,
        ),
        codecs=(derived_head_dim('hidden_size', 'num_attention_heads'), *codecs),
        weights=(
            *table(f'{body}.', 'encoder.layer.{layer}.', """
                embed/tokens               embeddings.word_embeddings        table
                embed/positions            embeddings.position_embeddings    table
                embed/types                embeddings.token_type_embeddings  table
                embed/norm                 embeddings.LayerNorm              norm
                layers/attention/query     attention.self.query              heads_in
                layers/attention/key       attention.self.key                heads_in
                layers/attention/value     attention.self.value              heads_in
                layers/attention/out       attention.output.dense            heads_out
                layers/attention_out_norm  attention.output.LayerNorm        norm
                layers/mlp/up              intermediate.dense                transpose
                layers/mlp/down            output.dense                      transpose
                layers/mlp_out_norm        output.LayerNorm                  norm"""),
            *head,
        ),
        ignored=(r'.*\.position_ids', r'cls\..*', r'lm_head\..*', r'bert\.pooler\..*'),
        prefix=f'{body}.',
    )  # fmt: skip


def _head(dense: str, out: str) -> tuple[Weight, ...]:
    return (
        Weight(('head/dense_kernel',), f'{dense}.weight', 'transpose'),
        Weight(('head/dense_bias',), f'{dense}.bias'),
        Weight(('head/kernel',), f'{out}.weight', 'row'),
        Weight(('head/bias',), f'{out}.bias', 'scalar'),
    )


BERT = _bert(
    'Bert',
    _head('bert.pooler.dense', 'classifier'),
    fields=(Field('max_position_embeddings', ('max_positions',), 512),),
)
ROBERTA = _bert(
    'Roberta',
    _head('classifier.dense', 'classifier.out_proj'),
    codecs=(padded_positions(),),
)

FAMILIES = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    OLMO2,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_NEOX,
    BERT,
    ROBERTA,
)


def family_of(architecture: str) -> tuple[Family, str]:
    """The family and head ('lm', 'scalar' or 'base') of a class name in transformers.

    Raises:
        ValueError: no family has it, listing those supported.
    """
    for family in FAMILIES:
        for head, name in family.architectures.items():
            if name == architecture:
                return family, head
    known = [name for family in FAMILIES for name in family.architectures.values()]
    raise ValueError(
        f'architecture {architecture!r} is not supported; '
        f'supported are {", ".join(known)}'
    )


def family_for(config: TransformerConfig) -> Family:
    """The first family whose config.json, read back, gives ``config`` again.

    Raises:
        ValueError: no family does, naming the fields that the nearest would change.
    """
    nearest: tuple[Family, list[str]] | None = None
    for family in FAMILIES:
        try:
            again = read_config(family, write_config(family, config))
        except ValueError:  # such as no token types, which this family must have
            continue
        lost = [
            f'{field.name}={getattr(config, field.name)!r}'
            for field in dataclasses.fields(config)
            if field.name not in RUNTIME
            and getattr(config, field.name) != getattr(again, field.name)
        ]
        if not lost:
            return family
        if nearest is None or len(lost) < len(nearest[1]):
            nearest = family, lost
    near = 'a value is out of range for all of them'
    if nearest is not None:
        family, lost = nearest
        near = f'{family.model_type}, the nearest, has no {", ".join(lost)}'
    raise ValueError(f'no Hugging Face family can hold this model: {near}')
