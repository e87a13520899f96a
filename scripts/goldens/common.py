"""What the golden scripts of the model crate share: folders, tiny random models, a 96-character tokenizer.

Several scripts here are named after the thing they pin down, which can also be the name of a package
(`gguf.py`): run them with `python -P`, so that this folder is not searched for imports.
"""

import json
import pathlib

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "crates/model/tests/goldens"
SMOLLM2 = ROOT / ".deps/smollm2/hf"

VOCABULARY_SIZE = 96
UNKNOWN, BOS, EOS = 0, 1, 2  # as in Llama and Mistral; padding uses the unknown token

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Three special tokens and 93 printable ASCII characters (all but ` and ~), one token each."""
    characters = [chr(c) for c in range(32, 127) if chr(c) not in "`~"]
    vocabulary = {"<unk>": UNKNOWN, "<s>": BOS, "</s>": EOS}
    vocabulary |= {character: 3 + i for i, character in enumerate(characters)}
    assert len(vocabulary) == VOCABULARY_SIZE
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def randomise(model: torch.nn.Module, seed: int, std: float = 0.2) -> None:
    """Fills every parameter: norms around 1 (a forgotten norm weight shows), the rest normal with `std`
    (attention far from uniform, logits of order 1). Values are rounded to bf16, exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            value = 1 + 0.3 * noise if name.endswith("norm.weight") else std * noise
            parameter.copy_(value.bfloat16().float())


def token_ids(length: int, seed: int) -> torch.Tensor:
    """One sequence `[1, length]` i64: BOS, then random ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY_SIZE, (1, length), generator=generator)
    ids[0, 0] = BOS
    return ids


def tidy_adapter(folder: pathlib.Path, base: str) -> None:
    """Leaves in a peft directory what is the same on every machine: no card, no absolute path, sorted targets."""
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2) + "\n")
    report(folder / "adapter_model.safetensors")


def save_tensors(path: pathlib.Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes one safetensors file and prints its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, path, {"format": "pt"})
    report(path)


def save_json(path: pathlib.Path, value: object) -> None:
    """Writes one JSON file, readable and with a final newline."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    report(path)


def report(path: pathlib.Path) -> None:
    path.chmod(0o644)  # safetensors writes 0600
    size = path.stat().st_size
    print(f"{path.relative_to(ROOT)}: {size:,} bytes")
    assert size < 200_000, f"{path} is too large for the repository"
