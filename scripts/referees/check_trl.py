"""Trains two steps with TRL on our files, unchanged: RewardTrainer on preferences, SFTTrainer on demonstrations.

Run: .venv/bin/python scripts/referees/check_trl.py --model DIR [--preferences DIR...] [--demonstrations FILE]

--model          a small Hugging Face directory with a chat template (tests/fixtures/tiny-chat)
--preferences    folders with train.parquet, one an aspect
"""

import argparse
import pathlib
import tempfile

import common  # first: it turns the hub off

import datasets
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

datasets.disable_progress_bars()
SETTINGS = dict(
    max_steps=2, per_device_train_batch_size=2, max_length=None, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
    logging_steps=1, disable_tqdm=True, gradient_checkpointing=False,
)


def finite_losses(trainer, what: str) -> None:
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if len(losses) != 2 or any(loss != loss or loss in (float("inf"), 0.0) for loss in losses):
        common.fail(f"{what}: losses {losses}")
    common.passed(f"TRL trains on {what}, losses {losses}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--preferences", type=pathlib.Path, nargs="*", default=[])
    parser.add_argument("--demonstrations", type=pathlib.Path)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with tempfile.TemporaryDirectory() as temporary:
        for folder in arguments.preferences:
            data = datasets.load_dataset(str(folder), split="train", cache_dir=temporary)
            model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=1, dtype="float32")
            trainer = RewardTrainer(
                model=model, processing_class=tokenizer, train_dataset=data,
                args=RewardConfig(output_dir=temporary, **SETTINGS),
            )
            trainer.train()
            finite_losses(trainer, str(folder))
        if arguments.demonstrations:
            data = datasets.load_dataset(
                "parquet", data_files=str(arguments.demonstrations), split="train", cache_dir=temporary
            )
            trainer = SFTTrainer(
                model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32"),
                processing_class=tokenizer, train_dataset=data, args=SFTConfig(output_dir=temporary, **SETTINGS),
            )
            trainer.train()
            finite_losses(trainer, str(arguments.demonstrations))


if __name__ == "__main__":
    main()
