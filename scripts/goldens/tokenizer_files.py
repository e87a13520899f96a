"""What transformers makes of a tokenizer's three files where they disagree.

    pip install transformers==5.24.0
    python -P scripts/goldens/tokenizer_files.py

Writes `crates/model/tests/goldens/tokenizer_files.json`: edits of two tokenizers (`tests/fixtures/tiny-chat`, and the one that
`llama_cpp.py` writes), the special tokens that transformers then has, its ids of some texts and what it decodes them to.
"""

import copy
import json
import pathlib
import shutil
import tempfile

from transformers import AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "crates/model/tests/goldens/tokenizer_files.json"
BASES = {"tiny-chat": ROOT / "tests/fixtures/tiny-chat", "spm": ROOT / "crates/model/tests/goldens/llama_cpp/spm"}
TEXTS = ["hello the", " hello", "hello<|im_end|>user", "<|im_start|>a<|im_end|>\nb"]


def decoder_of(base: str) -> dict:
    tokens = json.loads((BASES[base] / "tokenizer.json").read_text())["added_tokens"]
    return {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in tokens}


def cases() -> list[dict]:
    """`config` is laid over tokenizer_config.json (null removes a key), `map` is special_tokens_map.json, `special` sets flags of
    added tokens, `removed` takes added tokens and their vocabulary entries out of tokenizer.json."""
    tiny, spm = {"base": "tiny-chat"}, {"base": "spm"}
    end = {"<|im_end|>": False}
    listed = decoder_of("tiny-chat")
    return [
        {**tiny, "name": "as it is"},
        {**tiny, "name": "the map says another end", "map": {"eos_token": "<|im_start|>", "pad_token": {"content": "<|im_end|>"}}},
        {**tiny, "name": "the map where tokens are listed", "map": {"eos_token": "<|im_start|>"}, "config": {"added_tokens_decoder": {}}},
        {**tiny, "name": "the map alone", "map": {"eos_token": {"content": "<|im_end|>"}}, "config": {"eos_token": None}},
        {**tiny, "name": "neither", "config": {"eos_token": None, "added_tokens_decoder": {}}, "map": {"eos_token": "<|im_end|>"}},
        {**tiny, "name": "a declared end that is not special", "special": end, "config": {"eos_token": "<|im_end|>"}},
        {**tiny, "name": "padding that nobody has", "config": {"pad_token": "[PAD]"}},
        {**tiny, "name": "listed special", "special": end, "config": {"added_tokens_decoder": listed}},
        {**spm, "name": "tokens that are only listed", "removed": ["<|im_start|>", "<|im_end|>"], "config": {"added_tokens_decoder": decoder_of("spm")}},
        {**tiny, "name": "GPT-2's prefix", "config": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}},
        {**tiny, "name": "no prefix for GPT-2", "config": {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": False}},
        {**tiny, "name": "a prefix that no class asks for", "config": {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}},
        {**spm, "name": "SentencePiece as it is"},
        {**spm, "name": "no prefix for PreTrainedTokenizerFast", "config": {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False}},
        {**spm, "name": "no prefix for Llama", "config": {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}},
    ]  # fmt: skip


def result(case: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        target = pathlib.Path(folder) / "model"
        target.mkdir()
        for path in BASES[case["base"]].iterdir():
            if path.name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(path, target / path.name)
        tokenizer = json.loads((target / "tokenizer.json").read_text())
        removed = case.get("removed", [])
        for token in removed:
            tokenizer["model"]["vocab"].pop(token, None)
        tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] not in removed]
        for token in tokenizer["added_tokens"]:
            token["special"] = case.get("special", {}).get(token["content"], token["special"])
        (target / "tokenizer.json").write_text(json.dumps(tokenizer))
        config = json.loads((target / "tokenizer_config.json").read_text()) | copy.deepcopy(case.get("config", {}))
        config = {key: value for key, value in config.items() if value is not None}
        (target / "tokenizer_config.json").write_text(json.dumps(config))
        if "map" in case:
            (target / "special_tokens_map.json").write_text(json.dumps(case["map"]))
        made = AutoTokenizer.from_pretrained(target)
        ids = [made(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
        return {
            "tokens": {name: getattr(made, f"{name}_token") for name in ("bos", "eos", "unk")},
            "ids": ids,
            "decoded": [made.decode(i, skip_special_tokens=True) for i in ids],
        }


def main() -> None:
    out = []
    for case in cases():
        try:
            out.append({**case, **result(case)})
        except Exception as error:  # what transformers cannot load is no reference
            print(case["name"], "->", type(error).__name__, str(error)[:200])
    OUT.write_text(json.dumps({"texts": TEXTS, "cases": out}, indent=0, ensure_ascii=False) + "\n")
    for case in out:
        print(case["name"], case["tokens"], case["ids"][2], repr(case["decoded"][2]))


main()
