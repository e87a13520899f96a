"""Writes a random checkpoint of Mistral-7B's shape, to measure loading, NF4 and decoding without downloading one.

Run: python3 scripts/bench/random_mistral.py DIR [--layers N]        (14.5 GB in bf16 with the full 32 layers)
Standard library only. Weights are normal with standard deviation 0.02, from one block of 2^20 values that each tensor
reads from another place on; the tokenizer is a small byte-level one, since nothing it says matters here.
"""

import argparse
import json
import os
import pathlib
import random
import struct

VOCABULARY, HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, HEAD_SIZE = 32000, 4096, 14336, 32, 8, 128
SHARD_BYTES = 5 << 30


def shapes(layers):
    """Every tensor of the checkpoint in file order."""
    yield "model.embed_tokens.weight", [VOCABULARY, HIDDEN]
    for layer in range(layers):
        name = f"model.layers.{layer}."
        yield name + "input_layernorm.weight", [HIDDEN]
        yield name + "post_attention_layernorm.weight", [HIDDEN]
        yield name + "self_attn.q_proj.weight", [HEADS * HEAD_SIZE, HIDDEN]
        yield name + "self_attn.k_proj.weight", [KEY_VALUE_HEADS * HEAD_SIZE, HIDDEN]
        yield name + "self_attn.v_proj.weight", [KEY_VALUE_HEADS * HEAD_SIZE, HIDDEN]
        yield name + "self_attn.o_proj.weight", [HIDDEN, HEADS * HEAD_SIZE]
        yield name + "mlp.gate_proj.weight", [INTERMEDIATE, HIDDEN]
        yield name + "mlp.up_proj.weight", [INTERMEDIATE, HIDDEN]
        yield name + "mlp.down_proj.weight", [HIDDEN, INTERMEDIATE]
    yield "model.norm.weight", [HIDDEN]
    yield "lm_head.weight", [VOCABULARY, HIDDEN]


def n_bytes(shape):
    size = 2
    for length in shape:
        size *= length
    return size


def normal_block(n_values):
    """bf16 values of a normal distribution: the upper halves of f32 values."""
    source = random.Random(0)
    block = bytearray()
    for _ in range(n_values):
        block += struct.pack("<f", source.gauss(0.0, 0.02))[2:]
    return bytes(block)


def write_shard(path, tensors, block):
    header, offset = {}, 0
    for name, shape in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + n_bytes(shape)]}
        offset += n_bytes(shape)
    header["__metadata__"] = {"format": "pt"}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    source = random.Random(path.name)
    temporary = path.with_name(path.name + ".tmp-write")
    with open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors:
            left = n_bytes(shape)
            if name.endswith("norm.weight"):
                file.write(struct.pack("<f", 1.0)[2:] * (left // 2))
                continue
            start = 2 * source.randrange(len(block) // 2)
            while left:
                piece = block[start : start + left]
                file.write(piece)
                left -= len(piece)
                start = 0
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def byte_characters():
    """GPT-2's mapping of bytes to printable characters, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_tokenizer(folder):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary.update({character: 3 + byte for byte, character in enumerate(byte_characters())})
    special = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for text, i in [("<unk>", 0), ("<s>", 1), ("</s>", 2)]
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary, "merges": []},
    }
    template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "chat_template": template}, indent=2))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)

    shards, size = [[]], 0
    for name, shape in shapes(arguments.layers):
        if shards[-1] and size + n_bytes(shape) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += n_bytes(shape)
    block = normal_block(1 << 20)
    weight_map, total = {}, 0
    for index, tensors in enumerate(shards, 1):
        path = folder / f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        print(f"{path}: {sum(n_bytes(s) for _, s in tensors) / 1e9:.1f} GB", flush=True)
        write_shard(path, tensors, block)
        weight_map.update({name: path.name for name, _ in tensors})
        total += sum(n_bytes(shape) for _, shape in tensors)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    write_tokenizer(folder)
    # Last: its presence says that the directory is complete.
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": arguments.layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_VALUE_HEADS, "head_dim": HEAD_SIZE,
        "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": "bfloat16"}, indent=2))
    print(f"{folder}: {total / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
