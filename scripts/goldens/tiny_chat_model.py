"""A chat model small enough for the repository, so that tests can run whole stages: tests/fixtures/tiny-chat.

Run: .venv/bin/python -P scripts/goldens/tiny_chat_model.py    (three minutes of CPU)

A Llama of two layers (hidden 64, heads 4/2, tied embeddings) with a byte-level BPE of 512 tokens trained on the
project's own prompts and the replies below, ChatML template, bf16 weights, < 500 kB in all. It is trained for a few
hundred steps on made-up three-turn conversations, just enough to end its turns (most replies end within 32 tokens)
and to prefer words over noise; what it says means nothing.
"""

import json
import pathlib
import random
import shutil

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests/fixtures/tiny-chat"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END, START, STOP = 0, 1, 2
VOCABULARY_SIZE = 512
STEPS = 400

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTIONS = [
    "What is the motivation behind the answer?",
    "What is the utility of the action towards promoting your virtuous character?",
]
SUBJECTS = ["I", "We", "You", "A friend", "A good person"]
VERBS = ["can help", "would wait", "should ask first", "could say sorry", "would tell the truth", "might plan it"]
ENDS = ["with care.", "before it is late.", "and listen.", "today.", "in plain words.", "without harm."]
REASONS = ["Honesty matters here.", "It is kind.", "Respect comes first.", "I may be wrong.", "It avoids harm."]


def prompts() -> list[str]:
    lines = [line for path in sorted((ROOT / "data/prompts").glob("*.jsonl")) for line in path.open()]
    return [json.loads(line)["prompt"] for line in lines]


def reply(rng: random.Random) -> str:
    text = " ".join(rng.choice(part) for part in (SUBJECTS, VERBS, ENDS))
    return text if rng.random() < 0.6 else f"{text} {rng.choice(REASONS)}"


def conversation(rng: random.Random, openers: list[str]) -> list[tuple[str, str]]:
    turns = [("user", rng.choice(openers)), ("assistant", reply(rng))]
    for question in QUESTIONS:
        turns += [("user", question), ("assistant", rng.choice(REASONS) if rng.random() < 0.5 else reply(rng))]
    return turns


def render(turns: list[tuple[str, str]]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE
    assert tokenizer.encode("<|im_end|>").ids == [STOP]
    return tokenizer


def train_model(tokenizer: Tokenizer, openers: list[str]) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    torch.set_num_threads(2)
    rng = random.Random(12)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
        bos_token_id=START,
        eos_token_id=STOP,
        pad_token_id=END,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.01)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = 6e-3 * min(1.0, (step + 1) / 20) * (1 - step / STEPS)
        rows = [tokenizer.encode(render(conversation(rng, openers))).ids for _ in range(16)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [END] * (longest - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
        mask = labels != -100
        loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    return model.bfloat16().eval()


def report_endings(model: torch.nn.Module, tokenizer: Tokenizer, openers: list[str]) -> None:
    """How many replies end within 32 tokens, at temperature 1."""
    model = model.float()
    ended = 0
    for opener in openers[:24]:
        ids = tokenizer.encode(f"<|im_start|>user\n{opener}<|im_end|>\n<|im_start|>assistant\n").ids
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=32, do_sample=True, top_k=0
        )[0, len(ids):].tolist()
        ended += STOP in out
        if ended < 4:
            print(repr(tokenizer.decode(out, skip_special_tokens=False)))
    print(f"{ended} of 24 replies end within 32 tokens")


def main() -> None:
    rng = random.Random(13)
    openers = prompts()
    texts = openers + [content for _ in range(200) for _, content in conversation(rng, openers)]
    tokenizer = train_tokenizer(texts)
    model = train_model(tokenizer, openers)

    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    tokenizer.save(str(FOLDER / "tokenizer.json"), pretty=False)
    (FOLDER / "chat_template.jinja").write_text(TEMPLATE)
    weights = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, FOLDER / "model.safetensors", {"format": "pt"})
    model.generation_config.to_json_file(FOLDER / "generation_config.json")
    config = model.config.to_dict()
    config = {k: v for k, v in config.items() if v is not None and k not in ("id2label", "label2id")}
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "dtype": "bfloat16"}
    config |= {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    (FOLDER / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    total = 0
    for path in sorted(FOLDER.iterdir()):
        path.chmod(0o644)
        total += path.stat().st_size
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")
    assert total < 500_000
    report_endings(model, tokenizer, openers)


if __name__ == "__main__":
    main()
