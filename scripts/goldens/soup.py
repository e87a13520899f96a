"""Soup goldens: peft's own weighted sum of two adapters of unlike rank, scale and layers.

Run: .venv/bin/python -P scripts/goldens/soup.py
Needs the packages of scripts/referees/requirements.txt.

Writes crates/model/tests/goldens/soup/
  honest/, prudent/   peft adapters for tests/fixtures/tiny-chat: r 2, alpha 4, q and down; r 3, alpha 3, q and v; B not zero
  sum/                add_weighted_adapter([honest, prudent], [0.3, 0.7], combination_type="cat"), saved by peft
  logits.safetensors  ids [1, 12] i64, logits [12, V] f32 of the base with that sum, eager attention
"""

import pathlib
import shutil
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parent))

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM

import common

GOLDENS = common.GOLDENS / "soup"
TINY = common.ROOT / "tests/fixtures/tiny-chat"


def adapter(name: str, rank: int, alpha: int, targets: list[str], seed: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type=TaskType.CAUSAL_LM)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(GOLDENS / name)
    common.tidy_adapter(GOLDENS / name, "tests/fixtures/tiny-chat")


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shutil.rmtree(GOLDENS, ignore_errors=True)
    adapter("honest", 2, 4, ["q_proj", "down_proj"], 71)
    adapter("prudent", 3, 3, ["q_proj", "v_proj"], 72)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, GOLDENS / "honest", adapter_name="honest")
    model.load_adapter(GOLDENS / "prudent", adapter_name="prudent")
    model.add_weighted_adapter(["honest", "prudent"], [0.3, 0.7], "sum", combination_type="cat")
    model.set_adapter("sum")
    ids = torch.randint(3, 512, (1, 12), generator=torch.Generator().manual_seed(73))
    with torch.no_grad():
        logits = model(ids).logits[0]
    common.save_tensors(GOLDENS / "logits.safetensors", {"ids": ids, "logits": logits})
    model.save_pretrained(GOLDENS / "all", selected_adapters=["sum"])
    shutil.move(GOLDENS / "all/sum", GOLDENS / "sum")
    shutil.rmtree(GOLDENS / "all")
    common.tidy_adapter(GOLDENS / "sum", "tests/fixtures/tiny-chat")


if __name__ == "__main__":
    main()
