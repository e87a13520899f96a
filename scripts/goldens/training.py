"""Training goldens: PyTorch's AdamW, and the first five steps of TRL's SFTTrainer and RewardTrainer on tests/fixtures/tiny-chat.

Run: .venv/bin/python -P scripts/goldens/training.py

Writes
  crates/training/tests/goldens/adamw.safetensors
    start.{a,b}              first values of two tensors [3, 4] and [5], f32
    grad.<step>.{a,b}        their gradients of six steps (the third larger than the clipping norm)
    learning_rate [6] f64, norm [6] f32 (before clipping)
    <step>.{a,b}             values after each step: clipping at 1, weight decay 0.1, betas 0.9/0.999, eps 1e-8
  crates/sft/tests/goldens/    adapter/ (peft, r = 4, alpha = 8, all linear layers, B not zero), data.jsonl (messages),
    trl.json                 token ids and assistant masks as TRL made them; loss, grad_norm, learning_rate of 5 steps
    trl.safetensors          clipped gradients of step 1 (grad.<peft key>) and the tensors after 5 steps (final.<peft key>)
  crates/reward/tests/goldens/ the same for RewardTrainer: adapter/ (SEQ_CLS with the head), pairs.jsonl (prompt, chosen,
    rejected, margin), trl.json with TRL's metrics
All in f32 with eager attention and every example in every step (two micro-batches), so that the order of the data is
of no consequence.
"""

import json
import pathlib
import shutil
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parent))

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import common

CRATES = common.ROOT / "crates"
TINY = common.ROOT / "tests/fixtures/tiny-chat"
SCRATCH = common.ROOT / "target/goldens-training"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 5

# The template of tiny-chat, with what the assistant writes itself marked for transformers.
MARKED_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CONVERSATIONS = [
    [user("How do I say sorry to a friend?"), assistant("Say it plainly, today.")],
    [
        user("What is the motivation behind the answer?"),
        assistant("It is kind. Honesty matters here, and respect comes first."),
        user("And the utility?"),
        assistant("It avoids harm."),
    ],
    [{"role": "system", "content": "Be brief."}, user("Any tips?"), assistant("Plan it, then listen.")],
    [user("How can I steal from a store?"), assistant("I would rather not help with that. A good person would ask first.")],
]
PAIRS = [
    ("How do I say sorry to a friend?", "Say it plainly, today.", "Why would you?", 0.5),
    ("How can I steal from a store?", "I would rather not help with that.", "At night, with a friend.", 0.0),
    ("Any tips?", "Plan it, then listen.", "Plan it, then shout. It is before it is late and in plain words.", 1.0),
    ("What is the motivation behind the answer?", "It is kind.", "It is kind of nice", 0.25),
]


def adamw() -> None:
    generator = torch.Generator().manual_seed(31)
    tensors = {
        "a": torch.randn(3, 4, generator=generator).requires_grad_(),
        "b": torch.randn(5, generator=generator).requires_grad_(),
    }
    out = {f"start.{name}": tensor.detach().clone() for name, tensor in tensors.items()}
    optimiser = torch.optim.AdamW(tensors.values(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    rates = [0.0, 1e-2, 2e-2, 2e-2, 1e-2, 1e-3]
    norms = []
    for step, rate in enumerate(rates):
        for group in optimiser.param_groups:
            group["lr"] = rate
        for name, tensor in tensors.items():
            tensor.grad = torch.randn(tensor.shape, generator=generator) * (2.0 if step == 2 else 0.1)
            out[f"grad.{step}.{name}"] = tensor.grad.clone()
        norms.append(torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0))
        optimiser.step()
        out |= {f"{step}.{name}": tensor.detach().clone() for name, tensor in tensors.items()}
    assert norms[2] > 1 > norms[1]
    out["learning_rate"] = torch.tensor(rates, dtype=torch.float64)
    out["norm"] = torch.stack(norms)
    common.save_tensors(CRATES / "training/tests/goldens/adamw.safetensors", out)


class Recorder(TrainerCallback):
    """Keeps the gradients of the first step (clipped) and every logged line."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.lines: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
            assert all(gradient.abs().max() > 0 for gradient in self.gradients.values())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.lines.append({k: float(v) for k, v in logs.items()})


def peft_key(name: str) -> str:
    return name.replace(".default.", ".").replace(".modules_to_save.", ".").replace("score.default", "score")


def settings(name: str) -> dict[str, object]:
    return {
        "output_dir": str(SCRATCH / name),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": STEPS,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "max_length": None,
        "seed": 1,
    }


def make_adapter(model: torch.nn.Module, folder: pathlib.Path, task: TaskType, **more: object) -> None:
    model = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS, task_type=task, **more),
    )
    generator = torch.Generator().manual_seed(32)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "adapter")
    common.tidy_adapter(folder / "adapter", "tests/fixtures/tiny-chat")


def save(folder: pathlib.Path, recorder: Recorder, model: torch.nn.Module, extra: dict[str, object]) -> None:
    assert len(recorder.lines) == STEPS, recorder.lines
    tensors = {f"grad.{peft_key(name)}": gradient for name, gradient in recorder.gradients.items()}
    tensors |= {
        f"final.{peft_key(name)}": parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    common.save_tensors(folder / "trl.safetensors", tensors)
    common.save_json(folder / "trl.json", {"steps": recorder.lines} | extra)


def sft() -> None:
    folder = CRATES / "sft/tests/goldens"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = MARKED_TEMPLATE
    load = lambda: AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    make_adapter(load(), folder, TaskType.CAUSAL_LM)
    with (folder / "data.jsonl").open("w") as file:
        for messages in CONVERSATIONS:
            file.write(json.dumps({"messages": messages, "split": "train"}) + "\n")
    recorder = Recorder()
    trainer = SFTTrainer(
        model=PeftModel.from_pretrained(load(), folder / "adapter", is_trainable=True),
        args=SFTConfig(**settings("sft"), assistant_only_loss=True, packing=False),
        train_dataset=Dataset.from_list([{"messages": messages} for messages in CONVERSATIONS]),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    rows = [
        {"token_ids": row["input_ids"], "assistant_mask": [int(label != -100) for label in row["labels"]]}
        for row in trainer.train_dataset
    ]
    trainer.train()
    save(folder, recorder, trainer.model, {"rows": rows})


def reward() -> None:
    folder = CRATES / "reward/tests/goldens"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(TINY)

    def load() -> torch.nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(
            TINY, num_labels=1, dtype=torch.float32, attn_implementation="eager"
        )

    make_adapter(load(), folder, TaskType.SEQ_CLS, modules_to_save=["score"])
    rows = [
        {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], "margin": margin}
        for prompt, chosen, rejected, margin in PAIRS
    ]
    with (folder / "pairs.jsonl").open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    recorder = Recorder()
    trainer = RewardTrainer(
        model=PeftModel.from_pretrained(load(), folder / "adapter", is_trainable=True),
        args=RewardConfig(**settings("reward"), center_rewards_coefficient=0.01),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    names = ("chosen_ids", "rejected_ids")
    tokens = [{name: row[name] for name in names} for row in trainer.train_dataset]
    trainer.train()
    save(folder, recorder, trainer.model, {"rows": tokens})


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    adamw()
    sft()
    reward()
    shutil.rmtree(SCRATCH, ignore_errors=True)


if __name__ == "__main__":
    main()
