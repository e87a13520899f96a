"""Hostile safetensors, their index, and GGUF."""

import json
import os
import struct

from common import REPOSITORY, TINY
from files.case import REFUSED, REFUSED_OR_SYSTEM, Case, put, value


def cases(maker):
    return [*_safetensors(maker), *_not_files(maker), *_index(maker), *_gguf(maker)]


def safetensors(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def parts_of(raw):
    """Header and data of a safetensors file."""
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_value(raw, name, number):
    """The file with the first number of a tensor replaced."""
    header, data = parts_of(raw)
    start, tensor = header[name]["data_offsets"][0], header[name]
    single = struct.pack("<f", number)
    new = {"F32": single, "BF16": single[2:], "F16": struct.pack("<e", number)}[tensor["dtype"]]
    return safetensors(header, data[:start] + new + data[start + len(new) :])


def _f32(shape, offsets):
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


def _safetensors(maker):
    original = (TINY / "model.safetensors").read_bytes()
    header, data = parts_of(original)
    named = [name for name in header if name != "__metadata__"]
    one = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    files = {
        "empty": b"",
        "seven-bytes": b"\0" * 7,
        "length-2^63": safetensors(b"{}", length=2**63),
        "length-max": safetensors(b"{}", length=2**64 - 1),
        "header-100MB": lambda: safetensors(b"{" + b" " * 100_000_000 + b"}"),
        "header-24MB-text": lambda: safetensors(b'{"__metadata__":{"a":"' + b"x" * 24_000_000 + b'"}}'),
        "header-24MB-tensors": lambda: safetensors(
            ("{" + ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(400_000)) + "}").encode()
        ),
        "negative-shape": safetensors({"a": _f32([-1], [0, 4])}, b"1234"),
        "shape-overflows": safetensors({"a": _f32([2**62, 4], [0, 0])}),
        "shape-of-zeros": safetensors({"a": _f32([0] + [2**39] * 7, [0, 0])}),
        "offsets-backwards": safetensors({"a": _f32([1], [4, 0])}, b"1234"),
        "offsets-huge": safetensors({"a": _f32([1], [2**64 - 5, 2**64 - 1])}, b"1234"),
        "overlap": safetensors({"a": _f32([1], [0, 4]), "b": _f32([1], [0, 4])}, b"1234"),
        "hole": safetensors({"a": _f32([1], [4, 8])}, b"12345678"),
        "name-twice": safetensors(b'{"a":' + one + b',"a":' + one + b"}", b"1234"),
        "shape-float": safetensors(b'{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}', b"1234"),
        "header-deep": safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "dtype-unknown": safetensors({"a": {"dtype": "F8_E5M2" + "x" * 10_000, "shape": [1], "data_offsets": [0, 1]}}, b"1"),
        "no-tensors": safetensors({"__metadata__": {"format": "pt"}}),
        "a-tensor-missing": safetensors({name: header[name] for name in list(header)[:-1]}, data),
        "cut": original[: len(original) // 2],
        "one-byte-more": original + b"\0",
        "header-an-array": safetensors(b"[]"),
        "header-not-utf8": safetensors(b'{"\xff":' + one + b"}", b"1234"),
        "name-with-escapes": safetensors({"\x1b[2J\u202e": _f32([1], [0, 4])}, b"1234"),
        "metadata-numbers": safetensors(b'{"__metadata__":{"a":1}}'),
        "dimensions-10000": safetensors({"a": _f32([1] * 10_000, [0, 4])}, b"1234"),
    }
    for name, content in files.items():
        yield Case("safetensors", name, lambda d, content=content: maker.generate(maker.model(d, weights=value(content))))
    # A number that is none in any tensor that counts: the tensor is named, wherever it lies.
    for idx, name in enumerate(named):
        for what, number in (("nan", float("nan")), ("inf", float("inf"))) if idx < 6 else (("nan", float("nan")),):
            yield Case(
                "safetensors",
                f"{what}-in-{name}",
                lambda d, name=name, number=number: maker.generate(maker.model(d, weights=with_value(original, name, number))),
                (1, 65),
            )

    def all_nan(d):
        numbers = struct.pack("<f", float("nan")) * (len(data) // 4)
        return maker.generate(maker.model(d, weights=safetensors(header, numbers + data[len(numbers) :])))

    yield Case("safetensors", "all-nan", all_nan, (1, 65))

    def trained_on(d):
        model = maker.model(d, weights=with_value(original, next(name for name in named if "q_proj" in name), float("nan")))
        os.symlink(maker.bench.reference / "run/demonstrations", d / "demonstrations")
        words = [maker.bench.program("sft"), "train", "--demonstrations", "demonstrations", "--model", model, "--max-steps", "2"]
        return words + ["--output", "out", "--dtype", "f32"]

    yield Case("safetensors", "nan-in-training", trained_on, (1, 65))


def _not_files(maker):
    """Folders, pipes and devices under the names of files."""

    def directory(d, name):
        model = maker.model(d)
        (model / name).unlink()
        (model / name).mkdir()
        return maker.generate(model)

    def pipe(d, name):
        model = maker.model(d)
        (model / name).unlink()
        os.mkfifo(model / name)
        return maker.generate(model)

    def link(d, name, to):
        model = maker.model(d)
        (model / name).unlink()
        os.symlink(to, model / name)
        return maker.generate(model)

    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        yield Case("special", f"{name}-a-folder", lambda d, name=name: directory(d, name), REFUSED_OR_SYSTEM)
        yield Case("special", f"{name}-a-pipe", lambda d, name=name: pipe(d, name), REFUSED_OR_SYSTEM)
        yield Case("special", f"{name}-dev-zero", lambda d, name=name: link(d, name, "/dev/zero"), REFUSED_OR_SYSTEM)
        # Optional files may count as missing where their link leads nowhere or to themselves.
        optional = (65, 74, 0) if name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json") else REFUSED_OR_SYSTEM
        yield Case("special", f"{name}-a-loop", lambda d, name=name: link(d, name, name), optional)

    def pickle(d):
        model = maker.model(d, weights=None)
        put(model / "pytorch_model.bin", b"\x80\x02cos\nsystem\n")
        return maker.generate(model)

    yield Case("special", "pickle", pickle)


def _index(maker):
    def shards(name, index, may_end=REFUSED):
        content = index if isinstance(index, str) else json.dumps(index)
        return Case("index", name, lambda d: maker.generate(maker.model(d, weights=None, index=content)), may_end)

    def all_in(shard):
        header, _ = parts_of((TINY / "model.safetensors").read_bytes())
        return {"weight_map": {name: shard for name in header if name != "__metadata__"}}

    yield shards("passwd", {"weight_map": {"model.embed_tokens.weight": "../../../../etc/passwd"}})
    yield shards("outside", {"weight_map": {"a": "../../etc/x.safetensors"}})
    yield shards("absolute", {"weight_map": {"a": "/etc/x.safetensors"}})
    yield shards("zero-byte", {"weight_map": {"a": "x\0.safetensors"}})
    yield shards("name-of-300", {"weight_map": {"a": "x" * 300 + ".safetensors"}}, REFUSED_OR_SYSTEM)
    yield shards("empty", {"weight_map": {}})
    yield shards("a-list", {"weight_map": []})
    yield shards("a-number", {"weight_map": {"a": 7}})
    yield shards("missing-shard", {"weight_map": {"a": "model-00001-of-00009.safetensors"}}, REFUSED_OR_SYSTEM)
    yield shards("300000-tensors", json.dumps({"weight_map": {f"t{i}": "a.safetensors" for i in range(300_000)}}), REFUSED_OR_SYSTEM)
    yield shards("5000-shards", json.dumps({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(5_000)}}), REFUSED_OR_SYSTEM)
    yield shards("deep", '{"weight_map":' + "[" * 200_000 + "]" * 200_000 + "}")

    def linked(d):
        model = maker.model(d, weights=None, index=json.dumps(all_in("a.safetensors")))
        os.symlink("/etc/passwd", model / "a.safetensors")
        return maker.generate(model)

    yield Case("index", "shard-is-a-link", linked, REFUSED_OR_SYSTEM)

    def twice(d):
        """A shard that holds more than the index says of it."""
        index = all_in("a.safetensors")
        index["weight_map"].pop(next(iter(index["weight_map"])))
        model = maker.model(d, index=json.dumps(index))
        (model / "model.safetensors").rename(model / "a.safetensors")
        return maker.generate(model)

    yield Case("index", "a-tensor-not-listed", twice, (65, 0))


# ---- GGUF

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key, kind, raw):
    return string(key) + struct.pack("<I", kind) + raw


def array(kind, n, raw=b""):
    return struct.pack("<IQ", kind, n) + raw


def tensor(name, shape, kind, at):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)


def gguf(n_tensors, n_entries, body=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_entries) + body


def _u32(n):
    return struct.pack("<I", n)


def _gguf(maker):
    llama = entry("general.architecture", STRING, string("llama"))
    good = (REPOSITORY / "crates/model/tests/goldens/gguf/llama.gguf").read_bytes()
    zeros = b"\0" * 400
    files = {
        "empty": b"",
        "magic": b"GGUF",
        "counts-2^63": gguf(2**63, 2**63),
        "counts-max": gguf(2**64 - 1, 2**64 - 1),
        "version-1": gguf(0, 0, version=1),
        "version-max": gguf(0, 0, version=2**32 - 1),
        "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        "key-past-the-end": gguf(0, 1, struct.pack("<Q", 2**62) + b"x" * 100),
        "key-of-max": gguf(0, 1, struct.pack("<Q", 2**64 - 1) + b"x" * 100),
        "arrays-nested": gguf(0, 1, string("a") + _u32(ARRAY) + array(ARRAY, 1) * 10_000),
        "arrays-wide": gguf(0, 1, entry("a", ARRAY, array(ARRAY, 1000, array(ARRAY, 0) * 1000))),
        "array-huge": gguf(0, 1, entry("a", ARRAY, array(U32, 2**61))),
        "array-of-empty-strings": lambda: gguf(0, 1, entry("a", ARRAY, array(STRING, 2_000_000, b"\0" * 16_000_000))),
        "array-of-booleans": gguf(0, 1, entry("a", ARRAY, array(BOOL, 3, b"\2\3\4"))),
        "kind-77": gguf(0, 1, entry("a", 77, b"\0" * 8)),
        "alignment-0": gguf(0, 1, entry("general.alignment", U32, _u32(0))),
        "alignment-3": gguf(0, 1, entry("general.alignment", U32, _u32(3))),
        "alignment-2^31": gguf(0, 1, entry("general.alignment", U32, _u32(2**31))),
        "alignment-text": gguf(0, 1, entry("general.alignment", STRING, string("32"))),
        "alignment-negative": gguf(0, 1, entry("general.alignment", I32, struct.pack("<i", -32))),
        "key-twice": gguf(0, 2, entry("a", U32, _u32(0)) * 2),
        "boolean-2": gguf(0, 1, entry("a", BOOL, b"\2")),
        "not-utf8": gguf(0, 1, entry("a", STRING, string(b"\xff\xfe"))),
        "key-escapes": gguf(0, 1, entry("\x1b[2J", 77, b"\0" * 8)),
        "architecture-long": gguf(0, 1, entry("general.architecture", STRING, string("evil" * 10_000))),
        "architecture-number": gguf(0, 1, entry("general.architecture", U32, _u32(7))),
        "no-metadata": gguf(0, 1, llama),
        "dimensions-max": gguf(1, 1, llama + string("t") + _u32(2**32 - 1)),
        "dimensions-0": gguf(1, 1, llama + tensor("t", [], 0, 0) + zeros),
        "shape-overflows": gguf(1, 1, llama + tensor("token_embd.weight", [2**32] * 4, 0, 0)),
        "offset-2^63": gguf(1, 1, llama + tensor("token_embd.weight", [32], 0, 2**63) + zeros),
        "offset-odd": gguf(1, 1, llama + tensor("token_embd.weight", [32], 0, 7) + zeros),
        "type-99": gguf(1, 1, llama + tensor("token_embd.weight", [32], 99, 0) + zeros),
        "blocks-cut": gguf(1, 1, llama + tensor("token_embd.weight", [33], 2, 0) + zeros),
        "no-elements": gguf(1, 1, llama + tensor("token_embd.weight", [0], 0, 0) + zeros),
        "tensor-twice": gguf(2, 1, llama + tensor("token_embd.weight", [32], 0, 0) * 2 + zeros),
        "tensor-of-negative-name": gguf(1, 1, llama + tensor("blk.-1.attn_q.weight", [32], 0, 0) + zeros),
        "tensor-of-layer-2^64": gguf(1, 1, llama + tensor(f"blk.{2**64}.attn_q.weight", [32], 0, 0) + zeros),
        "cut-in-half": good[: len(good) // 2],
        "cut-by-one": good[:-1],
    }
    for name, content in files.items():
        yield Case("gguf", name, lambda d, content=content: maker.generate(put(d / "m.gguf", value(content))))
    for key in ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "feed_forward_length", "context_length"):
        key = f"llama.{key}"
        for number in (0, 10**9, 2**32 - 1):
            at = good.index(key.encode() + _u32(U32)) + len(key) + 4
            content = good[:at] + _u32(number) + good[at + 4 :]
            may_end = (65, 0, 71) if key.endswith("context_length") else REFUSED
            yield Case("gguf", f"{key}={number}", lambda d, content=content: maker.generate(put(d / "m.gguf", content)), may_end)
    for key in ("llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon"):
        for number in (float("nan"), float("inf"), -1.0):
            at = good.index(key.encode() + _u32(F32)) + len(key) + 4
            content = good[:at] + struct.pack("<f", number) + good[at + 4 :]
            yield Case("gguf", f"{key}={number}", lambda d, content=content: maker.generate(put(d / "m.gguf", content)), (65, 1))
