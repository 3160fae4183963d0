"""A small random model of every family: what transformers is told to build.

``make_fixtures.py`` saves one of each, and ``test_families_parity.py`` builds them
live. Sizes are small and odd on purpose: no two that could be mixed up are equal.
"""

SIZES = {
    'vocab_size': 37,
    'hidden_size': 24,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'intermediate_size': 20,
    'max_position_embeddings': 64,
    'initializer_range': 0.25,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'pad_token_id': 0,
}
MHA = {name: size for name, size in SIZES.items() if name != 'num_key_value_heads'}
LINEAR = {'rope_type': 'linear', 'rope_theta': 10_000.0, 'factor': 3.0}
LLAMA3 = {
    'rope_type': 'llama3',
    'rope_theta': 10_000.0,
    'factor': 4.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 3.0,
    'original_max_position_embeddings': 16,
}

# name → (config class, its arguments)
FAMILIES = {
    'llama': (
        'LlamaConfig',
        {**SIZES, 'attention_bias': True, 'mlp_bias': True, 'rope_parameters': LINEAR},
    ),
    'llama3': (
        'LlamaConfig',
        {**SIZES, 'rope_parameters': LLAMA3, 'tie_word_embeddings': True},
    ),
    'mistral': ('MistralConfig', {**SIZES, 'sliding_window': 4, 'head_dim': 8}),
    'qwen2': (
        'Qwen2Config',
        {
            **SIZES,
            'use_sliding_window': True,
            'sliding_window': 3,
            'max_window_layers': 1,
            'tie_word_embeddings': True,
        },
    ),
    'qwen3': ('Qwen3Config', {**SIZES, 'head_dim': 10}),
    'olmo2': ('Olmo2Config', SIZES),
    'gemma2': (
        'Gemma2Config',
        {
            **SIZES,
            'head_dim': 8,
            'query_pre_attn_scalar': 5,
            'sliding_window': 4,
            'attn_logit_softcapping': 2.0,
            'final_logit_softcapping': 3.0,
        },
    ),
    'gemma3': (
        'Gemma3TextConfig',
        {
            **SIZES,
            'head_dim': 8,
            'query_pre_attn_scalar': 7,
            'sliding_window': 4,
            'layer_types': ['sliding_attention', 'full_attention', 'sliding_attention'],
            'rope_parameters': {
                'full_attention': {
                    'rope_type': 'linear',
                    'factor': 4.0,
                    'rope_theta': 50_000.0,
                },
                'sliding_attention': {'rope_type': 'default', 'rope_theta': 500.0},
            },
        },
    ),
    'gpt2': (
        'GPT2Config',
        {
            'vocab_size': 37,
            'n_embd': 24,
            'n_layer': 3,
            'n_head': 4,
            'n_inner': 20,
            'n_positions': 64,
            'initializer_range': 0.25,
            'bos_token_id': 1,
            'eos_token_id': 2,
            'pad_token_id': 0,
        },
    ),
    'gpt_neox': (
        'GPTNeoXConfig',
        {
            **MHA,
            'hidden_size': 32,
            'rope_parameters': {
                'rope_type': 'default',
                'rope_theta': 10_000.0,
                'partial_rotary_factor': 0.25,
            },
        },
    ),
    'gpt_neox_sequential': (
        'GPTNeoXConfig',
        {
            **MHA,
            'use_parallel_residual': False,
            'attention_bias': False,
            'tie_word_embeddings': True,
            'rope_parameters': {
                'rope_type': 'default',
                'rope_theta': 500.0,
                'partial_rotary_factor': 1.0,
            },
        },
    ),
    'bert': ('BertConfig', MHA),
    'roberta': ('RobertaConfig', {**MHA, 'pad_token_id': 1, 'bos_token_id': 0}),
}
ENCODERS = ('bert', 'roberta')
