"""DPO goldens: the first five steps of TRL's DPOTrainer on tests/fixtures/tiny-chat, once a loss.

Run: .venv/bin/python -P scripts/goldens/dpo.py

Writes crates/dpo/tests/goldens/
  adapter/                   peft, r = 4, alpha = 8, all linear layers, B not zero: the policy starts away from the reference
  pairs.jsonl                prompt, chosen, rejected; the last prompt holds a reply of its own, the same for both sides
  trl.json                   token ids as TRL made them; by loss its settings and TRL's logged lines of 5 steps
  trl.safetensors            by loss the clipped gradients of step 1 (<loss>.grad.<peft key>) and, for sigmoid, the tensors after
                             5 steps (sigmoid.final.<peft key>)
All in f32 with eager attention and every pair in every step, so that the order of the data is of no consequence. Losses:
sigmoid, ipo, sigmoid_norm (TRL's loss_type), and `smoothed`: TRL's sigmoid takes no label_smoothing, but its `aot` with one pair
a micro-batch, where there is nothing to sort, is the sigmoid loss of conservative DPO.

The template is tiny-chat's without the line break after the last end of turn: TRL counts that token as the reply's, we do not.
"""

import json
import pathlib
import shutil
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parent))

import torch
from datasets import Dataset
from peft import PeftConfig, TaskType, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import common
from training import PAIRS, SCRATCH, STEPS, TINY, Recorder, assistant, make_adapter, peft_key, settings, user

FOLDER = common.ROOT / "crates/dpo/tests/goldens"

TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
LOSSES = {
    "sigmoid": {"loss_type": "sigmoid", "beta": 0.1},
    "ipo": {"loss_type": "ipo", "beta": 0.1},
    "sigmoid_norm": {"loss_type": "sigmoid_norm", "beta": 5.0},
    "smoothed": {"loss_type": "aot", "beta": 0.1, "label_smoothing": 0.1, "per_device_train_batch_size": 1},
}


def pairs() -> list[dict[str, object]]:
    rows = [
        {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
        for prompt, chosen, rejected, _ in PAIRS
    ]
    question, answer, _, _ = PAIRS[0]
    rows[-1]["prompt"] = [user(question), assistant(answer), *rows[-1]["prompt"]]
    return rows


def load() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")


def train(rows: list[dict[str, object]], more: dict[str, object]) -> tuple[Recorder, DPOTrainer]:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = TEMPLATE
    recorder = Recorder()
    together = settings("dpo") | more
    together["gradient_accumulation_steps"] = len(rows) // together["per_device_train_batch_size"]
    # With a model that has its adapter already, TRL's reference is a copy of that adapter; with `peft_config` it is the base.
    config = PeftConfig.from_pretrained(FOLDER / "adapter")
    config.inference_mode = False
    trainer = DPOTrainer(
        model=load(),
        peft_config=config,
        args=DPOConfig(**together),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    set_peft_model_state_dict(trainer.model, load_file(FOLDER / "adapter/adapter_model.safetensors"))
    trainer.train()
    assert len(recorder.lines) == STEPS, recorder.lines
    return recorder, trainer


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    make_adapter(load(), FOLDER, TaskType.CAUSAL_LM)
    rows = pairs()
    with (FOLDER / "pairs.jsonl").open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    found: dict[str, object] = {"losses": {}}
    tensors = {}
    for name, more in LOSSES.items():
        recorder, trainer = train(rows, more)
        found["losses"][name] = {"settings": more, "steps": recorder.lines}
        tensors |= {f"{name}.grad.{peft_key(n)}": gradient for n, gradient in recorder.gradients.items()}
        if name == "sigmoid":
            ids = ("prompt_ids", "chosen_ids", "rejected_ids")
            found["rows"] = [{key: row[key] for key in ids} for row in trainer.train_dataset]
            named = trainer.model.named_parameters()
            tensors |= {f"{name}.final.{peft_key(n)}": p for n, p in named if p.requires_grad}
    common.save_tensors(FOLDER / "trl.safetensors", tensors)
    common.save_json(FOLDER / "trl.json", found)
    shutil.rmtree(SCRATCH, ignore_errors=True)


if __name__ == "__main__":
    main()
