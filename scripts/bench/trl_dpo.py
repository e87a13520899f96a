"""TRL's DPOTrainer at the size of `arete-dpo bench`: 16 pairs a step, 100 tokens a side of which 45 are the prompt, LoRA r16.

usage: python trl_dpo.py MODEL [f32|bf16]      MODEL: a Hugging Face directory; bf16: f32 weights under bf16 autocast

Prints RESULT trl_dpo.MODE pairs/s (mean of the steps after the first two) and RESULT trl_dpo.MODE.rss GiB. The reference's
log-probabilities are computed in every step, as TRL does unless it is told otherwise.
"""

import os
import resource
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

PAIRS, STEPS, PROMPT, SIDE = 16, 6, 45, 100
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(TrainerCallback):
    def __init__(self):
        self.stamps = []

    def on_step_begin(self, *_, **__):
        self.stamps.append(time.time())

    def on_train_end(self, *_, **__):
        self.stamps.append(time.time())


def words(tokenizer, n, seed):
    """A text of exactly `n` tokens: words that are one token each wherever they stand."""
    generator = torch.Generator().manual_seed(seed)
    text = ""
    while len(tokenizer(text)["input_ids"]) < n:
        token = int(torch.randint(500, 20000, (1,), generator=generator))
        word = tokenizer.decode([token])
        longer = text + word
        if word.startswith(" ") and len(tokenizer(longer)["input_ids"]) == len(tokenizer(text)["input_ids"]) + 1:
            text = longer
    return text


def main():
    directory, mode = sys.argv[1], (sys.argv[2:] or ["bf16"])[0]
    torch.set_num_threads(int(os.environ.get("BASELINES_THREADS", "2")))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows = []
    for i in range(PAIRS * STEPS):
        prompt, *sides = (words(tokenizer, n, 3 * i + k) for k, n in enumerate((PROMPT, SIDE - PROMPT - 1, SIDE - PROMPT - 1)))
        rows.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output, per_device_train_batch_size=PAIRS, gradient_accumulation_steps=1, max_steps=STEPS, max_length=2 * SIDE,
            learning_rate=5e-6, bf16=mode != "f32", use_cpu=True, report_to=[], gradient_checkpointing=False, save_strategy="no")
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LINEAR, task_type=TaskType.CAUSAL_LM)
        trainer = DPOTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora,
            callbacks=[clock])
        trainer.train()
    seconds = [b - a for a, b in zip(clock.stamps, clock.stamps[1:])][2:]
    print(f"RESULT trl_dpo.{mode} {PAIRS * len(seconds) / sum(seconds):.4g} pairs/s")
    print(f"RESULT trl_dpo.{mode}.rss {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.4g} GiB")


if __name__ == "__main__":
    main()
