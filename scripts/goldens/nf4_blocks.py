"""NF4 goldens of the CUDA kernels: what bitsandbytes makes of several block sizes, dtypes and ragged lengths.

Run: .venv/bin/python -P scripts/goldens/nf4_blocks.py

Writes crates/model/tests/goldens/nf4_blocks.safetensors. For every BLOCK in BLOCKS, DTYPE in f32, bf16, f16 and case
BLOCK.DTYPE:
    .weight [n] DTYPE     blocks differ in scale by 100x and more, one is zero; n is odd and ends inside a block
    .codes [(n + 1) / 2] u8, .absmax [blocks] f32
    .dequantised [n] DTYPE
and for the case 64.f32 also .double.codes (absmax) u8, .double.absmax f32, .double.offset [1] f32, .double.dequantised [n] f32;
once: codebook [16] f32, map [256] f32;
and two weights of a single, incomplete block of 64, with .weight, .codes, .absmax: `zero` is all zero, `halfway` holds
numbers that x / absmax and x * (1 / absmax) put on different sides of a threshold (bitsandbytes divides here)
"""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parent))

import bitsandbytes.functional as bnb
import torch

import common

BLOCKS = [32, 64, 128, 256, 1024]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def weight(block: int, dtype: torch.dtype) -> torch.Tensor:
    n = 3 * block + block // 2 + 5
    generator = torch.Generator().manual_seed(block)
    flat = 0.05 * torch.randn(n, generator=generator)
    scales = torch.tensor([1e-2, 30.0, 0.0, 4.0])
    return (flat * scales[torch.arange(n) // block]).to(dtype)


def halfway(codebook: torch.Tensor) -> torch.Tensor:
    """For each threshold a number whose code depends on how it is scaled, where the search finds one."""
    generator = torch.Generator().manual_seed(1)
    thresholds = (codebook[:-1] + codebook[1:]) / 2
    best = torch.empty(0)
    for _ in range(200):
        absmax = 1 + torch.rand(1, generator=generator)
        centre = thresholds * absmax
        near = torch.stack([centre, torch.nextafter(centre, torch.tensor(9.0)), torch.nextafter(centre, torch.tensor(-9.0))])
        differs = (near / absmax > thresholds) != (near * (1 / absmax) > thresholds)
        found = torch.cat([absmax, near[differs]])
        best = max(best, found, key=torch.numel)
    assert 5 < best.numel() < 64
    return best


def main() -> None:
    stored = {"codebook": bnb.get_4bit_type("nf4", device="cpu")}
    for block in BLOCKS:
        for name, dtype in DTYPES.items():
            dense = weight(block, dtype)
            codes, state = bnb.quantize_4bit(dense, blocksize=block, compress_statistics=False, quant_type="nf4")
            key = f"{block}.{name}"
            stored[f"{key}.weight"] = dense
            stored[f"{key}.codes"] = codes.flatten()
            stored[f"{key}.absmax"] = state.absmax
            stored[f"{key}.dequantised"] = bnb.dequantize_4bit(codes, state).flatten()
    dense = stored["64.f32.weight"]
    codes, state = bnb.quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(codes.flatten(), stored["64.f32.codes"])
    stored["64.f32.double.codes"] = state.absmax
    stored["64.f32.double.absmax"] = state.state2.absmax
    stored["64.f32.double.offset"] = state.offset.reshape(1)
    stored["64.f32.double.dequantised"] = bnb.dequantize_4bit(codes, state).flatten()
    stored["map"] = state.state2.code
    for name, dense in {"zero": torch.zeros(10), "halfway": halfway(stored["codebook"])}.items():
        codes, state = bnb.quantize_4bit(dense, blocksize=64, quant_type="nf4")
        stored |= {f"{name}.weight": dense, f"{name}.codes": codes.flatten(), f"{name}.absmax": state.absmax}
    common.save_tensors(common.GOLDENS / "nf4_blocks.safetensors", stored)


if __name__ == "__main__":
    main()
