"""Adapter goldens: peft directories over the tiny `llama_untied` model, and a merged reward model.

Run after decoder.py: .venv/bin/python -P scripts/goldens/peft_adapters.py

Writes, under crates/model/tests/goldens/peft:
  causal/    peft adapter (CAUSAL_LM, r = 4, alpha = 6, all seven linear layers, B not zero) and
             golden.safetensors: ids [1, 20] i64, logits [1, 20, V] f32, base_logits (adapter off)
  partial/   the same with rank-stabilised scaling (alpha / sqrt(r)), r = 3, q_proj and v_proj only
  reward/    peft adapter (SEQ_CLS, modules_to_save = score, r = 4, alpha = 8) and
             golden.safetensors: ids.I [n] i64 and scores [3] f32, one per sequence; stored without padding, and
             the scores checked here to be the same for a batch padded on the right
  merged/    the reward adapter merged by peft: a LlamaForSequenceClassification directory with `score.weight`;
             golden.safetensors: the same ids.I and its own scores
All in f32 with eager attention.
"""

import pathlib
import shutil
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parent))

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import common

FOLDER = common.GOLDENS / "peft"
BASE = common.GOLDENS / "llama_untied"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = dict(dtype=torch.float32, attn_implementation="eager")


def randomise_adapter(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def causal(name: str, seed: int, **lora: object) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **lora)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE, **OPTIONS), config)
    randomise_adapter(model, seed)
    model.save_pretrained(FOLDER / name)
    common.tidy_adapter(FOLDER / name, "llama_untied")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, **OPTIONS), FOLDER / name).eval()
    ids = common.token_ids(20, seed)
    logits = again(ids).logits
    with again.disable_adapter():
        base_logits = again(ids).logits
    print(f"{name}: the adapter moves the logits by {(logits - base_logits).abs().max().item():.2f}")
    common.save_tensors(
        FOLDER / name / "golden.safetensors", {"ids": ids, "logits": logits, "base_logits": base_logits}
    )


@torch.no_grad()
def reward() -> None:
    def base() -> torch.nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1, **OPTIONS)

    config = LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS, modules_to_save=["score"]
    )
    model = get_peft_model(base(), config)
    randomise_adapter(model, 33)
    model.save_pretrained(FOLDER / "reward")
    common.tidy_adapter(FOLDER / "reward", "llama_untied")
    again = PeftModel.from_pretrained(base(), FOLDER / "reward").eval()
    sequences = [common.token_ids(length, 40 + length)[0] for length in (18, 7, 13)]
    inputs = {f"ids.{i}": ids for i, ids in enumerate(sequences)}
    scores = torch.cat([again(ids[None]).logits[0] for ids in sequences])  # [3]
    batch = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=common.UNKNOWN)
    padded = again(batch, attention_mask=(batch != common.UNKNOWN).long()).logits[:, 0]
    assert (padded - scores).abs().max() < 1e-5
    common.save_tensors(FOLDER / "reward/golden.safetensors", {**inputs, "scores": scores})

    merged = again.merge_and_unload()
    merged.save_pretrained(FOLDER / "merged")
    common.tokenizer().save_pretrained(FOLDER / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER / "merged", **OPTIONS).eval()
    merged_scores = torch.cat([model(ids[None]).logits[0] for ids in sequences])
    print(f"reward: {scores.tolist()}; merged differs by {(merged_scores - scores).abs().max().item():.1e}")
    assert (merged_scores - scores).abs().max() < 1e-5
    common.save_tensors(FOLDER / "merged/golden.safetensors", {**inputs, "scores": merged_scores})
    common.report(FOLDER / "merged/model.safetensors")


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    causal("causal", 31, r=4, lora_alpha=6, target_modules=TARGETS)
    causal("partial", 32, r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True)
    reward()


if __name__ == "__main__":
    main()
