"""What the checks share: reporting, loading, and the comparison with `arete-model logprobs`."""

import json
import os
import pathlib
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
OPTIONS = dict(dtype=torch.float32, attn_implementation="eager")


def passed(text: str) -> None:
    print(f"ok      {text}", flush=True)


def fail(text: str) -> None:
    sys.exit(f"FAILED  {text}")


def skipped(text: str) -> None:
    print(f"skipped {text}", flush=True)


def require_within(what: str, difference: float, tolerance: float) -> None:
    """Reports a difference and ends the program if it is too large (or not a number)."""
    text = f"{what}: max |difference| {difference:.2e}, allowed {tolerance:.0e}"
    passed(text) if difference <= tolerance else fail(text)


def is_reward_model(folder: pathlib.Path) -> bool:
    config = json.loads((folder / "config.json").read_text())
    return config["architectures"][0].endswith("ForSequenceClassification")


def load(folder: pathlib.Path, reward: bool | None = None) -> torch.nn.Module:
    """A model directory in f32 on the CPU; `reward` puts a scalar head on a language model."""
    reward = is_reward_model(folder) if reward is None else reward
    if reward:
        made = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **OPTIONS)
    else:
        made = transformers.AutoModelForCausalLM.from_pretrained(folder, **OPTIONS)
    return made.eval()


def random_ids(vocabulary_size: int, length: int = 24, seed: int = 0) -> torch.Tensor:
    """`[1, length]` i64, none of them 0 (often padding)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(3, vocabulary_size - 1), vocabulary_size, (1, length), generator=generator)


@torch.no_grad()
def logprobs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """log P(ids[t] | ids[..t]) for t = 1.., f32."""
    tokens = torch.tensor([ids])
    table = torch.log_softmax(model(tokens).logits[0, :-1].float(), -1)
    return table.gather(1, tokens[0, 1:, None])[:, 0]


def compare_logprobs(model: torch.nn.Module, path: pathlib.Path, tolerance: float) -> None:
    """Compares with the lines of `arete-model logprobs --jsonl`: token_ids and logprobs, the first of them null."""
    largest, tokens = 0.0, 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        row = json.loads(line)
        ids, ours = row["token_ids"], row["logprobs"]
        if len(ids) != len(ours) or ours[0] is not None:
            fail(f"{path}:{number}: {len(ids)} token_ids, {len(ours)} logprobs, the first {ours[0]} (null expected)")
        difference = (torch.tensor(ours[1:]) - logprobs(model, ids)).abs()
        largest = max(largest, difference.max().item()) if torch.isfinite(difference).all() else float("nan")
        tokens += len(ids) - 1
    if tokens == 0:
        fail(f"{path}: no tokens to compare")
    require_within(f"log-probabilities of {tokens} tokens against transformers ({path.name})", largest, tolerance)
