"""Token ids of llama.cpp for GGUF files that say little about their vocabulary, and of transformers for the same one as a directory.

    pip install gguf==0.19.0 xllamacpp==2026.10.11549 transformers==5.24.0    # the second is llama.cpp with its server, prebuilt
    python -P scripts/goldens/llama_cpp.py

Writes to `crates/model/tests/goldens/llama_cpp/`: one-layer models of width 8 in GGUF files that differ in their metadata, `spm/`, the
SentencePiece vocabulary as a directory, and `ids.json`: for each file the ids that llama.cpp's server gives for each text with
`add_special` and `parse_special`, and for `spm` those of transformers.
"""

import json
import pathlib
import shutil
import urllib.request

import gguf
import numpy as np
import xllamacpp
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "crates/model/tests/goldens/llama_cpp"

TEXTS = [
    "hello the<|im_end|>user",
    " hello",
    "hello",
    "",
    "<s>[INST] hi [/INST]ab</s> the",
    " hello  hello",
    "It's (a) test.",
    "12345a (a) 1234567 $3+4=7",
    "the hello in a the, user!! 12345 <|im_start|>user hello\n\n ab\tAB 3.14",
    "<|im_start|>assistant\nthe<|im_end|>\n<|im_start|> the",
    "ABc aBC É ü\u00a0x",
]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]


def byte_alphabet() -> list[str]:
    """GPT-2's `bytes_to_unicode`, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def bpe() -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and types of a byte-level vocabulary whose merges show how words were cut."""
    merges = ["1 2", "3 4", "12 34", "1234 5", "Ġ (", "! !", "Ġ t", "h e", "Ġt he", "a )", "a b", "A B", "AB c", "Ġ 1", "l l", "7 Ġ", "= 7"]
    tokens = SPECIAL + byte_alphabet()
    for merge in merges:
        joined = merge.replace(" ", "")
        if joined not in tokens:
            tokens.append(joined)
    tokens += ["Ġ1234", "ABc1"]  # in the vocabulary, but no merge leads there
    types = [UNKNOWN, *[CONTROL] * (len(SPECIAL) - 1), *[NORMAL] * (len(tokens) - len(SPECIAL))]
    return tokens, merges, types


def sentencepiece() -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and types of a SentencePiece vocabulary."""
    pieces = ["▁", "▁▁", "▁t", "he", "▁the", "ll", "hell", "hello", "▁hello", "▁a", "in", "▁in", "us", "er", "user", "▁user", "ab"]
    letters = sorted({c for text in TEXTS for c in text if c.isascii() and c not in " \n\t"})
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + letters + pieces + ["<|im_start|>", "<|im_end|>"]
    scores = [0.0] * (3 + 256 + len(letters)) + [-float(i + 1) for i in range(len(pieces))] + [0.0, 0.0]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(letters) + len(pieces)) + [CONTROL, CONTROL]
    return tokens, scores, types


def write(name: str, tokens: list[str], types: list[int], extra: dict, merges=None, scores=None, parts=1) -> None:
    """A GGUF file with one tiny layer; `extra` holds further keys of `tokenizer.ggml`. Of several parts, the first is written."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(OUT / f"{name}.gguf", "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama" if scores else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores:
        writer.add_token_scores(scores)
    if merges:
        writer.add_token_merges(merges)
    for key, value in extra.items():
        key = f"tokenizer.ggml.{key}"
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
    if parts > 1:
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", 11)
    matrix = lambda *shape: rng.normal(0, 0.1, shape).astype(np.float16)  # noqa: E731
    ones = np.ones(8, np.float32)
    writer.add_tensor("token_embd.weight", matrix(len(tokens), 8))
    if parts == 1:
        add_layer(writer, matrix, ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_layer(writer: gguf.GGUFWriter, matrix, ones: np.ndarray) -> None:
    for tensor, shape in [("attn_q", (8, 8)), ("attn_k", (4, 8)), ("attn_v", (4, 8)), ("attn_output", (8, 8)),
                          ("ffn_gate", (8, 8)), ("ffn_up", (8, 8)), ("ffn_down", (8, 8))]:  # fmt: skip
        writer.add_tensor(f"blk.0.{tensor}.weight", matrix(*shape))
    writer.add_tensor("blk.0.attn_norm.weight", ones)
    writer.add_tensor("blk.0.ffn_norm.weight", ones)
    writer.add_tensor("output_norm.weight", ones)


def ids_of_llama_cpp(path: pathlib.Path) -> list[list[int]]:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    out = []
    for text in TEXTS:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
        out.append(json.loads(urllib.request.urlopen(request, timeout=20).read())["tokens"])
    return out


def directory(tokens: list[str], scores: list[float], types: list[int]) -> None:
    """The SentencePiece vocabulary as Llama's directories have it: merges by score, a prefix by the normaliser."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    text = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    merges = []
    for token in text:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in text and right in text:
                score = scores[vocabulary[token]]
                merges.append((-score, -len(left), -len(right), (left, right)))
    merges.sort()
    inner = Tokenizer(models.BPE(vocabulary, [m[-1] for m in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    shutil.rmtree(OUT / "spm", ignore_errors=True)
    made.save_pretrained(OUT / "spm")


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    tokens, merges, types = bpe()
    usual = {"bos_token_id": 1, "eos_token_id": 2}
    files = {
        "pre_missing": {**usual},
        "pre_default": {**usual, "pre": "default"},
        "gpt2": {**usual, "pre": "gpt-2"},
        "smollm": {**usual, "pre": "smollm"},
        "llama_bpe": {**usual, "pre": "llama-bpe"},
        "qwen2": {**usual, "pre": "qwen2"},
        "tekken": {**usual, "pre": "tekken"},
        "tekken_no_bos": {**usual, "pre": "tekken", "add_bos_token": False},
        "pad_is_minus_1": {**usual, "pre": "gpt-2", "padding_token_id": 2**32 - 1},
    }
    for name, extra in files.items():
        write(name, tokens, types, extra, merges=merges)
    # Several empty tokens; the end of turn as a token that users defined.
    empty = [*tokens, "", ""]
    write("empty_tokens", empty, [*types, NORMAL, NORMAL], {**usual, "pre": "gpt-2"}, merges=merges)
    write("split", tokens, types, usual, merges=merges, parts=2)
    user = [USER_DEFINED if token == "<|im_end|>" else kind for token, kind in zip(tokens, types, strict=True)]
    write("user_defined_end", tokens, user, {**usual, "pre": "gpt-2"}, merges=merges)

    tokens, scores, types = sentencepiece()
    directory(tokens, scores, types)
    for name, extra in {
        "spm": {**usual, "unknown_token_id": 0},
        "spm_without_ids": {},
        "spm_bos_out_of_range": {"bos_token_id": 100_000, "eos_token_id": 2},
        "spm_no_prefix": {**usual, "add_space_prefix": False},
        "spm_no_bos": {**usual, "add_bos_token": False},
    }.items():
        files[name] = extra
        write(name, tokens, types, extra, scores=scores)
    names = [*files, "empty_tokens", "user_defined_end"]
    expected = {name: ids_of_llama_cpp(OUT / f"{name}.gguf") for name in names}
    transformers = AutoTokenizer.from_pretrained(OUT / "spm")
    expected["directory spm"] = [transformers(text)["input_ids"] for text in TEXTS]
    (OUT / "ids.json").write_text(json.dumps({"texts": TEXTS, "ids": expected}, ensure_ascii=False) + "\n")
    for path in sorted(OUT.rglob("*")):
        if path.is_file():
            path.chmod(0o644)
            print(path.relative_to(ROOT), path.stat().st_size)


main()
