"""A small file of every dtype by the Python package `safetensors`.

    python -P scripts/goldens/safetensors_file.py

Writes `crates/model/tests/goldens/safetensors/mixed.safetensors`; the values are ramps, spelled out again in
`crates/model/src/checkpoint/safetensors/tests.rs`, which also writes them and expects the same bytes.
"""

import pathlib

import torch
from safetensors.torch import save_file

PATH = pathlib.Path(__file__).resolve().parents[2] / "crates/model/tests/goldens/safetensors/mixed.safetensors"


def ramp(n: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(n).to(dtype).view(shape)


if __name__ == "__main__":
    PATH.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "flag": torch.tensor([True, False, True]),
        "bytes": ramp(5, [5], torch.uint8),
        "small": ramp(3, [3], torch.int8),
        "half": ramp(6, [2, 3], torch.float16) / 4,
        "brain": ramp(6, [3, 2], torch.bfloat16) / 4,
        "short": ramp(2, [2], torch.int16),
        "whole": ramp(2, [2], torch.int32),
        "z.weight": ramp(4, [2, 2], torch.float32) / 8,
        "a.weight": ramp(4, [4, 1], torch.float32) / -8,
        "scalar": torch.tensor(0.5),
        "empty": torch.zeros([0, 3]),
        "double": ramp(2, [2], torch.float64) / 3,
        "long": ramp(2, [2], torch.int64),
        'ünï "x"\n': ramp(1, [1], torch.float32),
    }
    save_file(tensors, PATH, {"format": "pt"})
    PATH.chmod(0o644)
    print(f"{PATH.stat().st_size:,} bytes")
