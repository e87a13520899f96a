"""Ids of 1,000 varied texts under SmolLM2's tokenizer, by transformers.

    pip install transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0 jinja2==3.1.6
    python -P scripts/goldens/tokenizer.py                # writes the golden from the GGUF file
    python -P scripts/goldens/tokenizer.py --check DIR    # AutoTokenizer on a directory we saved

The vocabulary comes from the GGUF file of `make setup`, through transformers' own converter. Its table has no entry for
`pre = smollm` and would fall back to GPT-2's pattern, so the pre-tokenizer is set to the published tokenizer.json's:
digits one by one, then ByteLevel.
"""

import argparse
import gzip
import importlib
import json
import os
import pathlib
import sys
import types

sys.path.append(str(pathlib.Path(__file__).parent))
from strings import varied  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
GGUF = next(iter(sorted((ROOT / ".deps/smollm2").rglob("*.gguf"))), None)
OUT = ROOT / "crates/model/tests/goldens/tokenizer_smollm2.json.gz"


def converter():
    """transformers' module that builds tokenizers from GGUF metadata; its package wants torch, it does not."""
    import transformers.integrations as integrations

    name = "transformers.integrations.gguf"
    package = types.ModuleType(name)
    package.__path__ = [os.path.join(os.path.dirname(integrations.__file__), "gguf")]
    sys.modules.setdefault(name, package)
    return importlib.import_module(f"{name}.gguf_tokenizer_mapping")


def metadata(path):
    import gguf

    fields = gguf.GGUFReader(path).fields
    names = converter().GGUF_TOKENIZER_MAPPING["tokenizer"]
    return {ours: fields[f"tokenizer.{key}"].contents() for key, ours in names.items() if f"tokenizer.{key}" in fields}


def smollm2():
    from tokenizers import pre_tokenizers

    backend, _ = converter().convert_gguf_tokenizer("llama", metadata(GGUF))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def write(path, value):
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    path.write_bytes(gzip.compress(data, 9, mtime=0))
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=pathlib.Path)
    directory = parser.parse_args().check
    if directory is None:
        encode = smollm2()
        texts = varied()
        write(OUT, {"texts": texts, "ids": [encode(text) for text in texts]})
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    golden = json.loads(gzip.decompress(OUT.read_bytes()))
    wrong = [
        text
        for text, ids in zip(golden["texts"], golden["ids"])
        if tokenizer(text, add_special_tokens=False).input_ids != ids or tokenizer(text).input_ids != ids
    ]
    assert not wrong, f"{len(wrong)} texts differ, first {wrong[0]!r}"
    assert tokenizer.chat_template and tokenizer.pad_token_id == 0 and tokenizer.eos_token == "<|im_end|>"
    print(f"{len(golden['texts'])} texts, {type(tokenizer).__name__}: equal")


if __name__ == "__main__":
    main()
