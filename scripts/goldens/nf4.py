"""NF4 goldens: what bitsandbytes makes of weights, and a tiny 4-bit checkpoint saved by transformers.

Run: .venv/bin/python -P scripts/goldens/nf4.py

Writes, under crates/model/tests/goldens:
  nf4.safetensors (and nf4_nested.safetensors for the tensor `nested`, without the two single-quantised
  dequantisations), for every tensor NAME in TENSORS (f32 weights whose blocks differ in scale by 100x and more):
    NAME.weight [rows, columns] f32
    NAME.codes [rows * columns / 2] u8       two codes a byte, first element in the high nibble
    NAME.absmax [blocks] f32                 one per 64 elements, row-major, blocks cross row ends
    NAME.dequantised f32, NAME.dequantised_bf16 bf16     [rows, columns]
    NAME.double.codes u8                     the same with compress_statistics: codes,
    NAME.double.absmax [blocks] u8           8-bit codes of (absmax - offset),
    NAME.double.nested_absmax f32            one per 256 blocks
    NAME.double.nested_offset [1] f32        mean of absmax
    NAME.double.dequantised f32
  and once: codebook [16] f32 (NF4), nested_codebook [256] f32 (dynamic 8-bit map)
  nf4_llama/, nf4_llama_double/   4-bit Llama checkpoints (hidden 64) saved by transformers, with
    golden.safetensors: ids [1, S] i64, logits [1, S, V] f32 (compute dtype f32)
"""

import pathlib
import shutil
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parent))

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import common


def scaled(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Normal weights whose blocks of 64 are scaled by 1e-3, 1, 30, 1e-2, 4 in turn."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(rows * columns, generator=generator)
    scales = torch.tensor([1e-3, 1.0, 30.0, 1e-2, 4.0])
    block = torch.arange(flat.numel()) // 64
    return (0.05 * flat * scales[block % 5]).reshape(rows, columns)


def edges() -> torch.Tensor:
    """Blocks of special values: all zero, one spike, the codebook itself, halfway points, constants, signs."""
    codebook = bnb.get_4bit_type("nf4", device="cpu")
    halfway = (codebook[:-1] + codebook[1:]) / 2
    rows = [
        torch.zeros(64),
        torch.cat([torch.tensor([-7.5]), torch.zeros(63)]),
        codebook.repeat(4),
        torch.cat([halfway, torch.tensor([1.0]), halfway, torch.tensor([-1.0]), halfway.repeat(2), torch.ones(2)]),
        torch.full((64,), 1e-30),
        torch.full((64,), -0.25),
        torch.linspace(-2, 2, 64),
        1e-6 * torch.linspace(-1, 1, 64),
    ]
    return torch.stack(rows)


TENSORS = {
    "square": lambda: scaled(64, 64, 1),  # 64 blocks
    "narrow": lambda: scaled(24, 32, 2),  # a block spans two rows
    "ragged": lambda: scaled(3, 50, 3),  # 150 elements: the last block has 22
    "nested": lambda: scaled(97, 175, 4),  # 16,975 elements: 266 blocks, so two nested blocks
    "edges": edges,
}


def tensors() -> None:
    codebook = bnb.get_4bit_type("nf4", device="cpu")
    stored = {"codebook": codebook}
    for name, make in TENSORS.items():
        weight = make()
        codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
        assert not state.nested and torch.equal(state.code, codebook)
        made = {"weight": weight, "codes": codes.flatten(), "absmax": state.absmax}
        if name != "nested":
            made["dequantised"] = bnb.dequantize_4bit(codes, state)
            state.dtype = torch.bfloat16
            made["dequantised_bf16"] = bnb.dequantize_4bit(codes, state)
        codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        assert state.nested and state.state2.blocksize == 256
        made |= {
            "double.codes": codes.flatten(),
            "double.absmax": state.absmax,
            "double.nested_absmax": state.state2.absmax,
            "double.nested_offset": state.offset.reshape(1),
            "double.dequantised": bnb.dequantize_4bit(codes, state),
        }
        stored["nested_codebook"] = state.state2.code
        made = {f"{name}.{key}": value for key, value in made.items()}
        if name == "nested":
            common.save_tensors(common.GOLDENS / "nf4_nested.safetensors", made)
        else:
            stored |= made
        absmax = made[f"{name}.absmax"]
        positive = absmax[absmax > 0]
        print(f"{name}: {absmax.numel()} blocks, absmax ratio {(positive.max() / positive.min()).item():.3g}")
    common.save_tensors(common.GOLDENS / "nf4.safetensors", stored)


@torch.no_grad()
def checkpoint(name: str, double: bool) -> None:
    """Quantises a tiny Llama while loading, saves it, and reads it back for the logits."""
    config = LlamaConfig(
        vocab_size=common.VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
        bos_token_id=common.BOS,
        eos_token_id=common.EOS,
        pad_token_id=common.UNKNOWN,
        tie_word_embeddings=False,
    )
    dense = common.GOLDENS / "dense.tmp-nf4"
    folder = common.GOLDENS / name
    for path in (dense, folder):
        shutil.rmtree(path, ignore_errors=True)
    model = LlamaForCausalLM(config)
    common.randomise(model, 11, std=0.15)
    model.save_pretrained(dense)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantised = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=quantisation, dtype=torch.float32, attn_implementation="eager", device_map="cpu"
    )
    quantised.save_pretrained(folder)
    common.tokenizer().save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", device_map="cpu"
    ).eval()
    for module in again.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # that kernel multiplies in bf16 whatever the compute dtype
    ids = common.token_ids(20, 12)
    logits = again(ids).logits
    # The same through plain f32 linear layers over bitsandbytes' dequantised weights.
    plain = LlamaForCausalLM(config).eval()
    plain.config._attn_implementation = "eager"
    weights = dict(model.state_dict())
    for key, weight in weights.items():
        if "_proj" in key:
            weights[key] = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4"))
    plain.load_state_dict(weights)
    gap = (plain(ids).logits - logits).abs().max().item()
    shift = (model.eval()(ids).logits - logits).abs().max().item()
    print(f"{name}: bitsandbytes against plain layers over dequantised weights {gap:.2e}; quantisation moved the logits by {shift:.2f}")
    assert gap < 1e-4 < shift
    common.save_tensors(folder / "golden.safetensors", {"ids": ids, "logits": logits})
    common.report(folder / "model.safetensors")
    shutil.rmtree(dense)


def main() -> None:
    tensors()
    checkpoint("nf4_llama", double=False)
    checkpoint("nf4_llama_double", double=True)


if __name__ == "__main__":
    main()
