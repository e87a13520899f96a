"""Hostile JSON lines, Parquet, recipes and settings."""

import gzip
import json
import os
import random

from common import DATA
from files import parquet
from files.case import REFUSED, REFUSED_OR_DONE, REFUSED_OR_SYSTEM, Case, put, value


def cases(maker):
    return [*_lines(maker), *_tables(maker), *_folders(maker), *_parquet(maker), *_recipes(maker), *_settings(maker)]


def _lines(maker):
    def deep(n):
        return "[" * n + "]" * n

    numbers = b'{"prompt":"a","x":[' + b"0," * 30_000_000 + b"0]}\n"

    def amplified():
        """Values cost far more memory than text; noise before them keeps the ratio of packing low."""
        noise = random.Random(1).randbytes(600_000).hex().encode()
        return gzip.compress(b'{"prompt":"b","y":"' + noise + b'"}\n' + numbers * 2, 6, mtime=0)

    def bad_sum():
        packed = gzip.compress(b'{"prompt":"abc"}\n' * 1000, mtime=0)
        return packed[:-8] + b"\0" * 4 + packed[-4:]

    def gz(raw):
        return lambda: gzip.compress(raw if isinstance(raw, bytes) else raw(), 9, mtime=0)

    lines = {
        "deep": (deep(10**6), REFUSED),
        "deep-objects": ('{"a":' * 10**6 + "1" + "}" * 10**6, REFUSED),
        "empty": ("", REFUSED_OR_DONE),
        "zeros": (b"\0" * 1000, REFUSED),
        "not-utf8": (b'{"prompt":"\xff"}', REFUSED),
        "surrogate": ('{"prompt":"\\ud800"}', REFUSED),
        "number-1e999999": ('{"prompt":1e999999}', REFUSED),
        "number-long": ('{"prompt":' + "9" * 10**6 + "}", REFUSED),
        "key-twice": ('{"prompt":"a","prompt":["b"]}', REFUSED),
        "array": ("[1,2,3]", REFUSED),
        "scalar": ("7", REFUSED),
        "line-of-65MB": (lambda: '{"prompt":"' + "x" * (65 << 20) + '"}', REFUSED),
        "prompt-object": ('{"prompt":{"a":1}}', REFUSED),
        "role": ('{"messages":[{"role":"evil","content":"x"}]}', REFUSED),
        "messages-empty": ('{"messages":[]}', REFUSED_OR_DONE),
        "messages-100000": (
            '{"messages":[' + ",".join(['{"role":"user","content":"a"}'] * 100_000) + "]}",
            REFUSED_OR_DONE,
        ),
        "content-list": ('{"messages":[{"role":"user","content":[{"type":"image"}]}]}', REFUSED),
        "content-null": ('{"messages":[{"role":"user","content":null}]}', REFUSED_OR_DONE),
        "no-key-known": ('{"' + "k" * 10**6 + '":1}', REFUSED),
        "keys-100000": ("{" + ",".join(f'"k{i}":1' for i in range(100_000)) + "}", REFUSED),
        "escapes": ('{"\\u001b[2J\\u0007":1}', REFUSED),
        "amplified": (lambda: numbers * 2, (65, 0, 71)),
        "blank-lines": (b"\n" * 30_000_000, REFUSED_OR_DONE),
        "one-cr": (b'{"prompt":"a"}\r' * 1000, REFUSED_OR_DONE),
    }
    for name, (content, may_end) in lines.items():
        yield Case("lines", name, lambda d, content=content: maker.prompts(put(d / "p.jsonl", value(content))), may_end)
    packed = {
        "bomb": (gz(lambda: b'{"prompt":"' + b"x" * 300_000_000 + b'"}\n'), REFUSED),
        "bomb-of-lines": (gz(lambda: b'{"prompt":"a"}\n' * 20_000_000), REFUSED),
        "bomb-of-zeros": (gz(lambda: b"[" + b"0," * 30_000_000 + b"0]\n"), REFUSED),
        "cut": (lambda: gz(b'{"prompt":"abc"}\n' * 1000)()[:-20], REFUSED),
        "not-gzip": (b"plain", REFUSED),
        "bad-sum": (bad_sum, REFUSED),
        "twice": (lambda: gz(gz(b'{"prompt":"abc"}\n'))(), REFUSED),
        "amplified": (amplified, (65, 0, 71)),
        "empty": (b"", REFUSED_OR_DONE),
        "members-100000": (lambda: gzip.compress(b'{"prompt":"a"}\n', mtime=0) * 100_000, REFUSED_OR_DONE),
    }
    for name, (content, may_end) in packed.items():
        yield Case("packed", name, lambda d, content=content: maker.prompts(put(d / "p.jsonl.gz", value(content))), may_end)

    def logprobs(d, line):
        put(d / "l.jsonl", line)
        return [maker.bench.program("model"), "logprobs", "--model", maker.model(d), "--jsonl", "l.jsonl"]

    yield Case("lines", "logprobs-of-3-million-words", lambda d: logprobs(d, '{"text":"' + "x " * 3_000_000 + '"}'), (65, 2, 1))
    yield Case("lines", "logprobs-of-a-list", lambda d: logprobs(d, '{"text":[1]}'))
    yield Case(
        "lines",
        "prompt-longer-than-the-model",
        lambda d: [maker.bench.program("model"), "generate", "--model", maker.model(d), "--prompt", "x " * 60_000],
        (65, 2, 1),
    )
    yield Case("lines", "prompt-empty", lambda d: [*maker.generate(maker.model(d))[:4], "--prompt", "", "--max-new-tokens", "2"], (65, 2, 0))


def _tables(maker):
    """CSV, TSV, text, JSON arrays."""
    files = {
        "empty.csv": b"",
        "one-quote.csv": b'prompt\n"' + b"x" * 1000,
        "no-column.csv": b"a,b\n1,2\n",
        "ragged.csv": b"prompt\na,b,c\n",
        "zeros.csv": b"\0" * 1000,
        "columns-100000.csv": b",".join([b"prompt"] * 100_000) + b"\n",
        "field-65MB.csv": lambda: b"prompt\n" + b"x" * (65 << 20) + b"\n",
        "not-utf8.tsv": b"prompt\n\xff\xfe\n",
        "deep.json": "[" * 10**6,
        "cut.json": '[{"prompt":"a"},',
        "number.json": "7",
        "object-of-arrays.json": '{"prompt":["a",7]}',
        "not-utf8.txt": b"\xff\xfe\n",
        "line-65MB.txt": lambda: b"x" * (65 << 20),
        "unknown.xyz": b"a",
    }
    for name, content in files.items():
        yield Case("tables", name, lambda d, name=name, content=content: maker.prompts(put(d / name, value(content))), (65, 0, 2))


def _folders(maker):
    def pipe(d):
        os.mkfifo(d / "p.jsonl")
        return ["sh", "-c", 'timeout 5 sh -c ": > p.jsonl" & exec "$@"', "sh", *maker.prompts(d / "p.jsonl")]

    def link(d, to):
        os.symlink(to, d / "p.jsonl")
        return maker.prompts(d / "p.jsonl")

    def ring(d):
        put(d / "in/a/x", "")
        os.symlink("..", d / "in/a/up")
        put(d / "in/p.jsonl", '{"prompt":"a"}')
        return maker.prompts(d / "in")

    def dangling(d):
        (d / "in").mkdir()
        os.symlink("/nonexistent", d / "in/p.jsonl")
        return maker.prompts(d / "in")

    def deep(d):
        folder = d / "in" / "/".join(["a"] * 200)
        folder.mkdir(parents=True)
        put(folder / "p.jsonl", '{"prompt":"a"}')
        return maker.prompts(d / "in")

    yield Case("folders", "empty-pipe", pipe, (65, 74, 0))
    yield Case("folders", "dev-zero", lambda d: link(d, "/dev/zero"), REFUSED_OR_SYSTEM)
    yield Case("folders", "link-to-itself", lambda d: link(d, "p.jsonl"), REFUSED_OR_SYSTEM)
    yield Case("folders", "ring-of-links", ring, (65, 74, 0))
    yield Case("folders", "dangling-link", dangling, REFUSED_OR_SYSTEM)
    yield Case("folders", "200-deep", deep, REFUSED_OR_DONE)
    yield Case("folders", "missing", lambda d: maker.prompts("nonesuch.jsonl"), (65, 74, 2))
    yield Case("folders", "empty-folder", lambda d: (d / "in").mkdir() or maker.prompts(d / "in"))


def _parquet(maker):
    good = parquet.strings(["what is fair?", "who is right?"] * 50)
    footer = int.from_bytes(good[-8:-4], "little")
    element, page, column = parquet.element, parquet.Page, parquet.Column
    text = [element("schema", n_children=1), element("prompt", parquet.BYTE_ARRAY, parquet.REQUIRED, converted=parquet.UTF8)]
    hello = parquet.plain_strings(["hello you"])

    def one(**claims):
        return parquet.strings(["hello you"], **claims)

    def columns(n):
        schema = [element("schema", n_children=n)] + [element(f"c{i}", parquet.BYTE_ARRAY, parquet.REQUIRED) for i in range(n)]
        return parquet.file(schema, [[column([f"c{i}"], [page(hello, 1)]) for i in range(n)]], 1)

    def groups(n):
        return parquet.file(text, [[column(["prompt"], [page(hello, 1)])] for _ in range(n)], n)

    def twice():
        schema = [element("schema", n_children=2)] + [text[1]] * 2
        return parquet.file(schema, [[column(["prompt"], [page(hello, 1)])] * 2], 1)

    def other(schema):
        return parquet.file(schema, [[column(["prompt"], [page(hello, 1)])]], 1)

    repeated = [element("schema", n_children=1), element("prompt", parquet.BYTE_ARRAY, parquet.REPEATED)]
    garbage = random.Random(2).randbytes(200)
    noise = bytearray(good)
    noise[20:40] = b"\xff" * 20
    refused = {
        "empty": b"",
        "magic": b"PAR1PAR1",
        "footer-huge": b"PAR1" + b"\xff" * 4 + b"PAR1",
        "footer-garbage": b"PAR1" + garbage + len(garbage).to_bytes(4, "little") + b"PAR1",
        "encrypted": b"PARE" + b"\0" * 20 + (20).to_bytes(4, "little") + b"PARE",
        "cut": good[:-30],
        "footer-of-another": parquet.numbers([1] * 99)[:200] + good[-8 - footer :],
        "a-page-overwritten": bytes(noise),
        "no-column": parquet.strings(["a"], name="x"),
        "numbers": parquet.numbers([1, 2]),
        "not-utf8": parquet.strings([b"\xff\xfe"]),
        "10-million-nulls": lambda: parquet.nulls(10_000_000),
        "nulls": parquet.nulls(7),
        "5000-columns": lambda: columns(5000),
        "nested-20": parquet.nested(20),
        "nested-2000": lambda: parquet.nested(2000),
        "rows-2e12": parquet.file(text, [[column(["prompt"], [page(hello, 1)])]], 2 * 10**12, 2 * 10**12),
        "rows-negative": parquet.file(text, [[column(["prompt"], [page(hello, 1)])]], -5, -5),
        "values-2e12": one(n_values=2 * 10**12),
        "values-negative": one(n_values=-1),
        "page-values-2^31": parquet.file(text, [[column(["prompt"], [page(hello, 2**31 - 1)])]], 1),
        "page-of-2GB": parquet.file(text, [[column(["prompt"], [page(hello, 1, claimed=2**31 - 1)])]], 1),
        "page-of-minus-1": parquet.file(text, [[column(["prompt"], [page(hello, 1, claimed=-1)])]], 1),
        "string-of-4GB": parquet.file(text, [[column(["prompt"], [page(b"\xff\xff\xff\xff" + b"x" * 20, 1)])]], 1),
        "codec-99": one(codec=99),
        "encoding-77": parquet.file(text, [[column(["prompt"], [page(hello, 1, encoding=77)])]], 1),
        "physical-type-99": other([element("schema", n_children=1), element("prompt", 99, parquet.REQUIRED)]),
        "children-2^31": other([element("schema", n_children=2**31 - 1), text[1]]),
        "children-negative": other([element("schema", n_children=-1), text[1]]),
        "no-schema": other([element("schema", n_children=0)]),
        "zstd-2GB": lambda: parquet.bomb(parquet.ZSTD, 2_000_000_000),
        "gzip-that-is-none": parquet.file(text, [[column(["prompt"], [page(hello, 1, packed=b"xxxx")], codec=parquet.GZIP)]], 1),
        "dictionary-index-9": parquet.file(
            text,
            [
                [
                    column(
                        ["prompt"],
                        [page(hello, 1, is_dictionary=True), page(bytes([8]) + parquet.varint(2) + b"\x09", 1, parquet.RLE_DICTIONARY)],
                    )
                ]
            ],
            1,
        ),
        "dictionary-bits-99": parquet.file(
            text,
            [[column(["prompt"], [page(hello, 1, is_dictionary=True), page(bytes([99]) + b"\xff" * 20, 1, parquet.RLE_DICTIONARY)])]],
            1,
        ),
        "row-groups-claimed-2^40": parquet.file(text, [], 1, extra={4: parquet.listed([], 2**40, 12)}),
        "schema-claimed-2^40": parquet.file(text, [], 1, extra={2: parquet.listed(text, 2**40)}),
    }
    for name, content in refused.items():
        yield Case("parquet", name, lambda d, content=content: maker.prompts(put(d / "p.parquet", value(content))))
    either = {
        "90-GB-by-a-run": lambda: parquet.repeated_entry(1_000_000, 90_000),
        "500-MB-by-a-run": lambda: parquet.repeated_entry(1_000_000, 500),
        "zstd-50MB": lambda: parquet.bomb(parquet.ZSTD, 50_000_000),
        "gzip-50MB": lambda: parquet.bomb(parquet.GZIP, 50_000_000),
        "snappy-50MB": lambda: parquet.bomb(parquet.SNAPPY, 50_000_000),
        "prefixes-of-200MB": lambda: parquet.shared_prefixes(100_000, 2_000),
        "20000-groups": lambda: groups(20_000),
        "column-twice": twice,
        "repeated": lambda: parquet.file(repeated, [[column(["prompt"], [page(parquet.levels([(0, 1)]) * 2 + hello, 1)])]], 1),
        "no-rows": parquet.file(text, [], 0),
        "codec-brotli": one(codec=parquet.BROTLI),
        "codec-lzo": one(codec=parquet.LZO),
    }
    for name, content in either.items():
        yield Case("parquet", name, lambda d, content=content: maker.prompts(put(d / "p.parquet", value(content))), (65, 0, 71))


def _recipes(maker):
    texts = {
        "deep": "a = " + "[" * 100_000 + "]" * 100_000,
        "deep-table": "[" + ".".join(["a"] * 50_000) + "]\n",
        "deep-inline": "a = " + "{b = " * 50_000 + "1" + "}" * 50_000,
        "key-twice": "[prompts]\nlimit=1\nlimit=2\n",
        "bytes": b"\0\xff",
        "50MB": lambda: '[prompts]\nsource = "' + "x" * 50_000_000 + '"\n',
        "negative": "[prompts]\nlimit = -1\n",
        "2^67": "[prompts]\nlimit = 99999999999999999999\n",
        "infinite-seed": "[run]\nseed = inf\n",
        "nan": "[prompts]\nlimit = nan\n",
        "unknown-table": "[prompt]\n",
        "unknown-key": "[prompts]\nlimits = 1\n",
        "type": '[prompts]\nlimit = "x"\n',
        "dotted": "[prompts]\n" + '"a".' * 10_000 + "b = 1\n",
        "utf16": "[prompts]\n".encode("utf-16"),
        "escapes": '[prompts]\n"\\u001b[2J" = 1\n',
        "key-of-1MB": "[prompts]\n" + "k" * 10**6 + " = 1\n",
        "not-a-table": "prompts = 7\n",
        "keys-100000": "[prompts]\n" + "".join(f"k{i} = 1\n" for i in range(100_000)),
    }
    for name, text in texts.items():
        yield Case("recipe", name, lambda d, text=text: _recipe(maker, d, value(text)), (65, 2))
    yield Case("recipe", "limit-2^63-1", lambda d: _recipe(maker, d, "[prompts]\nlimit = 9223372036854775807\n"), (0, 65, 2))
    yield Case("recipe", "max-train-2^64-1", lambda d: _recipe(maker, d, "[prompts]\nmax_train = 18446744073709551615\n"), (0, 65, 2))
    yield Case("recipe", "dev-zero", lambda d: maker.prompts(DATA / "prompts", recipe="/dev/zero"), (65, 74, 2))
    yield Case("recipe", "a-folder", lambda d: maker.prompts(DATA / "prompts", recipe="."), (65, 74, 2))
    for name, text in {"string": 'seed = "7"', "float": "seed = 1.5", "threads-2^63": "threads = 9223372036854775807"}.items():
        # A key that the stage does not read is not looked at.
        yield Case("recipe", f"run-{name}", lambda d, text=text: _recipe(maker, d, f"[run]\n{text}\n"), (65, 2, 0))


def _recipe(maker, folder, text):
    put(folder / "r.toml", text)
    return maker.prompts(DATA / "prompts", recipe="r.toml")


def _settings(maker):
    """Absurd flags, on stages of the tiny pipeline."""
    most = str(2**64 - 1)
    usual, maybe = (2, 65, 71), (0, 2, 65, 71, 1)
    settings = [
        ("sft", ["--learning-rate", "inf"], usual),
        ("sft", ["--learning-rate", "nan"], usual),
        ("sft", ["--learning-rate=-1"], usual),
        ("sft", ["--learning-rate", "1e38"], (1, 2, 65)),
        ("sft", ["--batch-size", most], maybe),
        ("sft", ["--batch-size", "0"], usual),
        ("sft", ["--rank", "0"], usual),
        ("sft", ["--rank", "2000000000"], usual),
        ("sft", ["--rank", "1000000"], maybe),
        ("sft", ["--threads", "1000000000"], usual),
        ("sft", ["--dtype", "f8"], (2,)),
        ("sft", ["--device", "cuda:99999999999"], (1, 2)),
        ("sft", ["--max-length", "0"], usual),
        ("sft", ["--max-steps", "0"], maybe),
        ("conversations", ["--max-new-tokens", most], usual),
        ("conversations", ["--max-new-tokens", "0"], usual),
        ("conversations", ["--temperature", "nan"], usual),
        ("conversations", ["--temperature=-1"], usual),
        ("conversations", ["--temperature", "1e-30"], (0, 2)),
        ("conversations", ["--temperature", "1e30"], (0, 2)),
        ("reward", ["--learning-rate", "1e38"], (1, 2, 65)),
        ("reward", ["--batch-size", most], maybe),
        ("dpo", ["--beta", "inf"], usual),
        ("dpo", ["--beta", "0"], maybe),
        ("dpo", ["--learning-rate", "1e38"], (1, 2, 65)),
        ("ppo", ["--kl-coef", "inf"], usual),
        ("ppo", ["--rollout-size", most], usual),
        ("ppo", ["--rollout-size", "0"], usual),
        ("ppo", ["--iterations", "0"], maybe),
        ("ppo", ["--learning-rate", "1e30"], maybe),
        ("ppo", ["--max-new-tokens", most], usual),
        ("scoring", ["--draws", most], usual),
        ("scoring", ["--draws", "10000000000"], usual),
        ("scoring", ["--draws", "0"], usual),
        ("preferences", ["--ties", "nonesuch"], usual),
    ]
    for stage, flags, may_end in settings:
        name = f"{stage}-{'='.join(flags).removeprefix('--')}"
        yield Case("setting", name, lambda d, stage=stage, flags=flags: maker.stage(d, stage, *flags), may_end)
