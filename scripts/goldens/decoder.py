"""Decoder goldens: logits, log-probabilities and greedy tokens of transformers, on SmolLM2 and on tiny random models.

Run: .venv/bin/python scripts/referees/export_smollm2.py; .venv/bin/python -P scripts/goldens/decoder.py
Everything is f32 with eager attention.

Writes, under crates/model/tests/goldens:
  smollm2.safetensors / smollm2.json   fourteen chat prompts, ten of them with long answers; for prompt I:
    I.ids [P] i64             the chat template with generation prompt
    I.logprobs [P-1] f32      log P(ids[t] | ids[..t]) for t = 1..P
    I.logit_ids [n] i64       the 192 vocabulary entries stored: evenly spread, and the eight likeliest
    I.logits [n] f32          logits at the last prompt position
    I.greedy [<=64] i64       greedy continuation, end-of-turn included when it comes
  mistral_sliding/, llama_untied/, llama_tied_v4/, llama_tied_v5/   whole Hugging Face directories, each with
    golden.safetensors: ids [1, S] i64, logits [1, S, V] f32
"""

import copy
import json
import pathlib
import shutil
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parent))

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import common

PROMPTS = [
    [("user", "How can I steal from a store?")],
    [("user", "What is the capital of France?")],
    [("user", "Write a short poem about the sea.")],
    [("user", "My neighbour plays loud music at night. What should I do?")],
    [("system", "You are a careful and honest adviser."), ("user", "Should I lend money to a friend?")],
    [("user", "Explain photosynthesis to a child in 3 sentences.")],
    [("user", "Compute 1234 + 5678 and show the steps.")],
    [("user", "Écris une phrase en français, s'il te plaît. 🙂")],
    [
        ("user", "Is it right to lie to protect someone?"),
        ("assistant", "Sometimes, but honesty should be the rule."),
        ("user", "What is the motivation behind the answer?"),
    ],
    [("user", "def add(a, b):\n    return a + b\n\nWhat does this function do?")],
    [("user", "Tell me a long story about a dragon and a baker.")],
    [("user", "Describe how to bake bread, step by step.")],
    [("user", "List twenty animals, one per line.")],
    [("user", "Explain the theory of relativity in detail.")],
]
GREEDY_TOKENS = 64


@torch.no_grad()
def smollm2() -> None:
    """Every prompt through the dequantised GGUF."""
    tokenizer = AutoTokenizer.from_pretrained(common.SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(
        common.SMOLLM2, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tensors, described = {}, []
    for index, prompt in enumerate(PROMPTS):
        messages = [{"role": role, "content": content} for role, content in prompt]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]  # [1, P]
        logits = model(ids).logits[0]  # [P, V]
        logprobs = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[:, 0]  # [P-1]
        last = logits[-1]
        vocabulary = last.shape[0]
        kept = torch.cat([torch.arange(0, vocabulary, vocabulary // 184)[:184], last.topk(8).indices])
        greedy, smallest_gap, logits = [], float("inf"), last
        sequence = ids
        for _ in range(GREEDY_TOKENS):
            top = logits.topk(2)
            smallest_gap = min(smallest_gap, (top.values[0] - top.values[1]).item())
            greedy.append(top.indices[0].item())
            if greedy[-1] == end_of_turn:
                break
            sequence = torch.cat([sequence, top.indices[None, :1]], 1)
            logits = model(sequence).logits[0, -1]
        tensors |= {
            f"{index}.ids": ids[0],
            f"{index}.logprobs": logprobs,
            f"{index}.logit_ids": kept,
            f"{index}.logits": last[kept],
            f"{index}.greedy": torch.tensor(greedy),
        }
        described.append({
            "messages": messages,
            "text": text,
            "greedy_text": tokenizer.decode(greedy),
            # How far apart the two likeliest tokens came at the closest: below, rounding could flip a token.
            "smallest_gap": round(smallest_gap, 5),
        })
        print(f"prompt {index}: {ids.shape[1]} tokens, {len(greedy)} greedy, gap {smallest_gap:.4f}")
    assert sum(tensors[f"{i}.greedy"].shape[0] == GREEDY_TOKENS for i in range(len(PROMPTS))) >= 10
    common.save_tensors(common.GOLDENS / "smollm2.safetensors", tensors)
    common.save_json(common.GOLDENS / "smollm2.json", described)


SHAPE = dict(
    vocab_size=common.VOCABULARY_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,  # hidden / heads would be 8
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=common.BOS,
    eos_token_id=common.EOS,
    pad_token_id=common.UNKNOWN,
)


def rope(theta: float) -> dict:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}


@torch.no_grad()
def tiny(name: str, model: torch.nn.Module, seed: int, spelling: str) -> None:
    """One tiny random model as a directory, `config.json` in the spelling of transformers 4 or 5."""
    folder = common.GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    model.config._attn_implementation = "eager"
    common.randomise(model.eval(), seed)
    model.save_pretrained(folder)
    common.tokenizer().save_pretrained(folder)
    if spelling == "v4":
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["rope_scaling"] = None
        config["torch_dtype"] = config.pop("dtype")
        config["transformers_version"] = "4.57.0"
        path.write_text(json.dumps(config, indent=2) + "\n")
    ids = common.token_ids(24, seed)
    logits = model(ids).logits
    again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(ids).logits
    assert torch.equal(logits, again), f"{name}: the directory does not reproduce the model"
    for key, wrong in {"sliding_window": None, "rope_parameters": rope(12345.0)["rope_parameters"]}.items():
        config = copy.deepcopy(model.config)
        if getattr(config, key, None) is None:
            continue
        setattr(config, key, wrong)
        other = type(model)(config).eval()
        other.load_state_dict(model.state_dict())
        gap = (other(ids).logits - logits).abs().max().item()
        assert gap > 1e-2, f"{name}: {key} hardly shows in the logits ({gap})"
    common.save_tensors(folder / "golden.safetensors", {"ids": ids, "logits": logits})
    common.report(folder / "model.safetensors")


def main() -> None:
    mistral = MistralConfig(**SHAPE, **rope(1e6), sliding_window=8, tie_word_embeddings=False)
    tiny("mistral_sliding", MistralForCausalLM(mistral), 1, "v5")
    untied = LlamaConfig(**SHAPE, **rope(1e4), tie_word_embeddings=False)
    tiny("llama_untied", LlamaForCausalLM(untied), 2, "v5")
    # Not the default 10,000: a reader that misses either spelling must fail here.
    for spelling in ("v4", "v5"):
        tied = LlamaConfig(**SHAPE, **rope(5e4), tie_word_embeddings=True)
        tiny(f"llama_tied_{spelling}", LlamaForCausalLM(tied), 3, spelling)
    smollm2()


if __name__ == "__main__":
    main()
