"""Writes a random checkpoint of Mistral-7B-Instruct-v0.2's shape, with its published configuration, tokenizer and chat template:
everything of that model but the weights.

Run: python3 scripts/bench/random_mistral.py DIR [--layers N]        (14.5 GB in bf16 with the full 32 layers)
     python3 scripts/bench/random_mistral.py DIR --no-weights        (configuration, tokenizer and template alone)
Standard library only. Weights are normal with standard deviation 0.02, from one block of 2^20 values that each tensor
reads from another place on; shards that are there with their full size are kept. Configuration, vocabulary and template come
from `crates/model/tests/goldens` (`config/mistral_7b_instruct_v0.2.json`, `tokenizer_mistral.json.gz`, `templates.json`).
"""

import argparse
import gzip
import json
import os
import pathlib
import random
import struct

GOLDENS = pathlib.Path(__file__).resolve().parents[2] / "crates/model/tests/goldens"
CONFIG = json.loads((GOLDENS / "config/mistral_7b_instruct_v0.2.json").read_text())
SHARD_BYTES = 5 << 30
UNKNOWN, CONTROL, BYTE = 2, 3, 6  # llama.cpp's token types


def shapes(layers):
    """Every tensor of the checkpoint in file order."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    keys = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    yield "model.embed_tokens.weight", [CONFIG["vocab_size"], hidden]
    for layer in range(layers):
        name = f"model.layers.{layer}."
        yield name + "input_layernorm.weight", [hidden]
        yield name + "post_attention_layernorm.weight", [hidden]
        yield name + "self_attn.q_proj.weight", [hidden, hidden]
        yield name + "self_attn.k_proj.weight", [keys, hidden]
        yield name + "self_attn.v_proj.weight", [keys, hidden]
        yield name + "self_attn.o_proj.weight", [hidden, hidden]
        yield name + "mlp.gate_proj.weight", [inner, hidden]
        yield name + "mlp.up_proj.weight", [inner, hidden]
        yield name + "mlp.down_proj.weight", [hidden, inner]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [CONFIG["vocab_size"], hidden]


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
    if path.exists() and path.stat().st_size == 8 + len(text) + offset:
        return
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


def merges(tokens, scores, types):
    """The merges a SentencePiece vocabulary implies, as transformers' `generate_merges` orders them."""
    ids = {token: i for i, token in enumerate(tokens) if types[i] not in (UNKNOWN, CONTROL, BYTE)}
    found = []
    for token, index in ids.items():
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        cuts = sorted((cut for cut in cuts if cut[0] in ids and cut[1] in ids), key=lambda cut: (ids[cut[0]], ids[cut[1]]))
        found += [(scores[index], len(left), len(right), left, right) for left, right in cuts]
    found.sort(key=lambda merge: merge[:3], reverse=True)  # a stable sort, and `reverse` keeps it so
    return [[left, right] for *_, left, right in found]


def write_tokenizer(folder):
    golden = json.loads(gzip.decompress((GOLDENS / "tokenizer_mistral.json.gz").read_bytes()))
    tokens, types, scores, score = golden["tokens"], golden["types"], [], 0.0
    for step in golden["score_steps"]:
        score += step
        scores.append(score)
    special = [
        {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i in range(3)
    ]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    sequence = [{"Sequence": {"id": part, "type_id": type_id}} for part, type_id in (("A", 0), ("B", 1))]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, sequence[0]],
            "pair": [bos, sequence[0], bos, sequence[1]],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges(tokens, scores, types),
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "clean_up_tokenization_spaces": False,
        "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}, indent=2))
    template = json.loads((GOLDENS / "templates.json").read_text())["templates"]["mistral_2024"]
    (folder / "chat_template.jinja").write_text(template)


def write_weights(folder, layers):
    shards, size = [[]], 0
    for name, shape in shapes(layers):
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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--no-weights", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments.no_weights:
        write_weights(folder, arguments.layers)
    write_tokenizer(folder)
    # Last: its presence says that the directory is complete.
    config = {**CONFIG, "num_hidden_layers": arguments.layers}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
