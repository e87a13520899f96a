"""Loads one of our LoRA adapters in peft; compares log-probabilities or scores, and our merged model with peft's merge.

Run: .venv/bin/python scripts/referees/check_adapter.py --base DIR --adapter DIR [--merged DIR] [--logprobs FILE]
       [--scores FILE --conversations FILE] [--tolerance 1e-5] [--merged-tolerance 1e-4]

--base       the Hugging Face directory the adapter was trained over
--adapter    our directory (adapter_config.json, adapter_model.safetensors), CAUSAL_LM or SEQ_CLS
--logprobs   output of `arete-model logprobs --model BASE --adapter ADAPTER --dtype f32 --jsonl …`
--scores     output of `arete-reward score --model BASE --adapter ADAPTER --dtype f32 --input CONVERSATIONS`
--merged     our merged directory of the same adapter; for a merge stored in bf16 allow more (--merged-tolerance)
"""

import argparse
import json
import pathlib

import torch
import transformers
from peft import PeftModel
from safetensors import safe_open

import common


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=pathlib.Path, required=True)
    parser.add_argument("--adapter", type=pathlib.Path, required=True)
    parser.add_argument("--merged", type=pathlib.Path)
    parser.add_argument("--logprobs", type=pathlib.Path)
    parser.add_argument("--scores", type=pathlib.Path)
    parser.add_argument("--conversations", type=pathlib.Path)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--merged-tolerance", type=float, default=1e-4)
    arguments = parser.parse_args()

    task = json.loads((arguments.adapter / "adapter_config.json").read_text())["task_type"]
    base = common.load(arguments.base, reward=task == "SEQ_CLS")
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()
    named = dict(model.named_parameters())
    lora_b = [value for name, value in named.items() if "lora_B" in name]
    if not lora_b or not any(value.abs().max() > 0 for value in lora_b):
        common.fail(f"{arguments.adapter}: peft found no LoRA weight that is not zero")
    with safe_open(arguments.adapter / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
    wanted = {name.replace(".modules_to_save.default", "").replace(".default.", ".")
              for name in named if "lora_" in name or "modules_to_save" in name}
    if stored != wanted:
        common.fail(f"{arguments.adapter}: tensors that only one side has: {sorted(stored ^ wanted)[:4]}")
    common.passed(f"peft loads {arguments.adapter} ({task}, {len(stored)} tensors)")

    ids = common.random_ids(model.config.vocab_size)
    with_adapter = model(ids).logits
    if task != "SEQ_CLS":
        with model.disable_adapter():
            if torch.equal(with_adapter, model(ids).logits):
                common.fail(f"{arguments.adapter}: the adapter changes nothing")
    if arguments.logprobs:
        common.compare_logprobs(model, arguments.logprobs, arguments.tolerance)
    if arguments.scores:
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.base)
        common.compare_scores(model, tokenizer, arguments.conversations, arguments.scores, arguments.tolerance)
    if arguments.merged:
        ours = common.load(arguments.merged)
        difference = (ours(ids).logits - with_adapter).abs().max().item()
        what = "scores" if task == "SEQ_CLS" else "logits"
        common.require_within(f"{what} of {arguments.merged} against peft", difference, arguments.merged_tolerance)


if __name__ == "__main__":
    main()
