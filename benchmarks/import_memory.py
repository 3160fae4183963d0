"""Peak host memory of importing a Hugging Face directory, over its parameters' size.

    python -m benchmarks.import_memory --size 8b --dtype bfloat16

Writes a Llama directory of the given size whose weights are holes in sparse files (no
disk is used; a hole reads as zeros, through the same code), imports it in a process of
its own, and prints what that process took at its peak, imports of Python included.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

SHAPES = {  # Llama 3.2 1B and Llama 3.1 8B (Meta 2024)
    '1b': dict(layers=16, width=2048, heads=32, mlp=8192, head_dim=64, tied=True),
    '8b': dict(layers=32, width=4096, heads=32, mlp=14336, head_dim=128, tied=False),
}
VOCABULARY, KV_HEADS, SHARD = 128_256, 8, 5 * 10**9


def tensors(shape: dict) -> dict[str, list[int]]:
    """Tensor name → shape, in the order of the files."""
    width, kv = shape['width'], KV_HEADS * shape['head_dim']
    result = {'model.embed_tokens.weight': [VOCABULARY, width]}
    for layer in range(shape['layers']):
        parts = {
            'self_attn.q_proj': [width, width],
            'self_attn.k_proj': [kv, width],
            'self_attn.v_proj': [kv, width],
            'self_attn.o_proj': [width, width],
            'mlp.gate_proj': [shape['mlp'], width],
            'mlp.up_proj': [shape['mlp'], width],
            'mlp.down_proj': [width, shape['mlp']],
            'input_layernorm': [width],
            'post_attention_layernorm': [width],
        }
        for name, size in parts.items():
            result[f'model.layers.{layer}.{name}.weight'] = size
    result['model.norm.weight'] = [width]
    if not shape['tied']:
        result['lm_head.weight'] = [VOCABULARY, width]
    return result


def size_of(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def write(directory: pathlib.Path, shape: dict) -> int:
    """Writes the directory in bfloat16; returns the number of parameters."""
    shards, used, total = [{}], 0, 0
    for name, dims in tensors(shape).items():
        nbytes = 2 * size_of(dims)
        if used + nbytes > SHARD:
            shards.append({})
            used = 0
        shards[-1][name] = {
            'dtype': 'BF16',
            'shape': dims,
            'data_offsets': [used, used + nbytes],
        }
        used += nbytes
        total += size_of(dims)
    weight_map = {}
    for i, header in enumerate(shards, start=1):
        file = f'model-{i:05d}-of-{len(shards):05d}.safetensors'
        weight_map |= dict.fromkeys(header, file)
        text = json.dumps(header).encode()
        text += b' ' * (-len(text) % 8)
        end = max(entry['data_offsets'][1] for entry in header.values())
        with (directory / file).open('wb') as out:
            out.write(len(text).to_bytes(8, 'little') + text)
            out.truncate(8 + len(text) + end)
    index = {'metadata': {'total_size': 2 * total}, 'weight_map': weight_map}
    (directory / 'model.safetensors.index.json').write_text(json.dumps(index))
    entries = {
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        'vocab_size': VOCABULARY,
        'num_hidden_layers': shape['layers'],
        'hidden_size': shape['width'],
        'num_attention_heads': shape['heads'],
        'num_key_value_heads': KV_HEADS,
        'head_dim': shape['head_dim'],
        'intermediate_size': shape['mlp'],
        'max_position_embeddings': 131_072,
        'tie_word_embeddings': shape['tied'],
    }
    (directory / 'config.json').write_text(json.dumps(entries))
    return total


def load(directory: str, dtype: str) -> None:
    """In the child: imports, and prints seconds, parameter bytes and peak bytes."""
    import jax
    import jax.numpy as jnp

    from rlhf_jax import hf

    start = time.monotonic()
    config = hf.load_config(directory)
    params = hf.load_params(directory, config, head='lm', dtype=jnp.dtype(dtype))
    jax.block_until_ready(params)
    seconds = time.monotonic() - start
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    status = pathlib.Path('/proc/self/status').read_text()
    peak = int(status.split('VmHWM:')[1].split()[0]) * 1024
    print(json.dumps({'seconds': seconds, 'parameters': size, 'peak': peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--size', choices=SHAPES, default='1b')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--directory', help='import this one (used for the child)')
    args = parser.parse_args()
    if args.directory is not None:
        load(args.directory, args.dtype)
        return
    with tempfile.TemporaryDirectory() as directory:
        count = write(pathlib.Path(directory), SHAPES[args.size])
        command = [sys.executable, '-m', 'benchmarks.import_memory']
        command += ['--directory', directory, '--dtype', args.dtype]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    gib = {name: result[name] / 2**30 for name in ('parameters', 'peak')}
    print(
        f'{args.size} in {args.dtype}: {count / 1e9:.2f} billion parameters, '
        f'{gib["parameters"]:.2f} GiB; peak {gib["peak"]:.2f} GiB, '
        f'{gib["peak"] / gib["parameters"]:.2f} × the parameters'
    )


if __name__ == '__main__':
    main()
