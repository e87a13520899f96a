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


@torch.no_grad()
def compare_scores(model: torch.nn.Module, tokenizer, conversations: pathlib.Path, path: pathlib.Path, tolerance: float) -> None:
    """Compares with the lines of `arete-reward score --input CONVERSATIONS`: the score at the template's last token."""
    largest, rows = 0.0, 0
    ours = [json.loads(line) for line in path.read_text().splitlines()]
    theirs = [json.loads(line) for line in conversations.read_text().splitlines()]
    if len(ours) != len(theirs) or not ours:
        fail(f"{path}: {len(ours)} scores of {len(theirs)} conversations")
    for row, conversation in zip(ours, theirs):
        text = tokenizer.apply_chat_template(conversation["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if ids.shape[1] != row["n_tokens"]:
            fail(f"{path}: row {row['row']} has {row['n_tokens']} tokens, transformers finds {ids.shape[1]}")
        difference = abs(model(ids).logits[0, 0].item() - row["score"])
        largest = max(largest, difference) if difference == difference else float("nan")
        rows += 1
    require_within(f"scores of {rows} conversations against transformers ({path.name})", largest, tolerance)
