#!/usr/bin/env python3
"""Checks and times every CUDA kernel of ours on the GPU at hand, with torch and CuPy alone: no Rust, no network.

    python3 scripts/gpu/kernels.py                 compile, check against f64 and torch, time; ends with one Markdown table
    python3 scripts/gpu/kernels.py --quick         the same without the timing
    python3 scripts/gpu/kernels.py --dry-run       without a GPU, torch or CuPy: compiles where NVRTC is found, makes every input and
                                                   reference, and checks the references against a second way to compute them
    python3 scripts/gpu/kernels.py --machine target/tmp   its launches on the SIMT machine that `cargo test --test cuda_simt` built
    python3 scripts/gpu/kernels.py --list          the kernels it knows, one a line

What it needs is this file and the folder of kernels, beside it as `kernels` or in its place in the repository: 100 kB in all.
Small shapes are compared with sums in Python's own f64, large ones with torch; a launch's numbers follow crates/model/src/cuda/plan.
"""
import argparse
import ctypes
import datetime
import glob
import math
import pathlib
import random
import struct
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
FORMATS = ("f32", "bf16", "f16")
CODEBOOK = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
            -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
# Per file: its kernels, and the macro that selects those of a format, where there is one.
KERNELS = {
    "dequantize.cu": [(f"dequantize_{f}", None) for f in FORMATS],
    "quantize.cu": [(f"quantize_{f}", None) for f in FORMATS],
    "multiply.cu": [(f"multiply_{f}_{n}", f) for f in FORMATS for n in (1, 2, 4, 8, 16) if n < 16 or f != "f32"],
    "nf4_rows.cu": [(f"nf4_rows_{f}_{n}", f) for f in ("bf16", "f16") for n in (8, 16, 32, 64)],
    "attention.cu": [(f"attention_{f}_{n}", f) for f in FORMATS for n in (1, 2, 4, 8)],
    "rows.cu": [(f"{name}_{f}", f) for f in FORMATS for name in (
        "add_norm", "add_norm_backward", "swiglu", "swiglu_backward", "rotate", "rotate_backward", "lora_down", "lora_up", "lora_join",
        "lora_part")],
    "vocabulary.cu": [(f"{name}_{f}", f) for f in FORMATS for name in ("token_logprob", "sample")],
}


def kernels_folder():
    for folder in (HERE / "kernels", HERE.parents[1] / "crates/model/src/cuda/kernels"):
        if (folder / "common.cuh").exists():
            return folder
    sys.exit(f"kernels.py: no folder with common.cuh: put crates/model/src/cuda/kernels beside {HERE / 'kernels.py'} as `kernels`")


def source(file):
    folder = kernels_folder()
    return "".join(f'#line 1 "{name}"\n{(folder / name).read_text()}\n' for name in ("common.cuh", file))


def runs_on(name, arch):
    """As plan.rs: tensor cores multiply f16 from Turing on, bf16 from Ampere on."""
    return not name.startswith("nf4_rows_bf16") or arch >= 80


# ---- numbers ----

def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def bf16_bits(x):
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def encoded(values, form):
    if form == "f32":
        return struct.pack(f"<{len(values)}f", *values)
    if form == "f16":
        return struct.pack(f"<{len(values)}e", *values)
    return struct.pack(f"<{len(values)}H", *map(bf16_bits, values))


def decoded(data, form):
    if form == "drawn":  # tokens, then their log-probabilities
        words = struct.unpack(f"<{len(data) // 4}I", data)
        return [float(w) for w in words[::2]] + list(struct.unpack(f"<{len(words) // 2}f", struct.pack(f"<{len(words) // 2}I", *words[1::2])))
    if form == "f32":
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    if form == "f16":
        return list(struct.unpack(f"<{len(data) // 2}e", data))
    return [struct.unpack("<f", struct.pack("<I", bits << 16))[0] for bits in struct.unpack(f"<{len(data) // 2}H", data)]


def rounded(values, form):
    return decoded(encoded(values, form), form)


SIZE = {"f32": 4, "bf16": 2, "f16": 2}
EPSILON = {"f32": 2.0**-24, "bf16": 2.0**-8, "f16": 2.0**-11}


# ---- launches, as plan.rs computes them ----

def ceil(a, b):
    return -(-a // b)


def power_of_two(n):
    return 1 << max(0, n - 1).bit_length()


class Packed:
    """A random packed matrix: codes, and scales in f32 or in eight bits."""

    def __init__(self, outputs, inputs, block, double, seed):
        draw = random.Random(seed)
        self.outputs, self.inputs, self.block, self.double = outputs, inputs, block, double
        n = outputs * inputs
        blocks = ceil(n, block)
        self.codes = bytes(draw.randrange(256) for _ in range(ceil(n, 2)))
        scales = lambda count: rounded([0.05 * 2 ** draw.uniform(-4, 4) for _ in range(count)], "f32")
        if double:
            self.absmax_codes = bytes(draw.randrange(256) for _ in range(blocks))
            self.map = rounded([draw.uniform(-1, 1) for _ in range(256)], "f32")
            self.nested = scales(2 * ceil(blocks, 256))
            self.scales = [f32(f32(self.map[c] * self.nested[i // 256 * 2]) + self.nested[i // 256 * 2 + 1])
                           for i, c in enumerate(self.absmax_codes)]
        else:
            self.scales = scales(blocks)

    def weights(self):
        code = lambda i: self.codes[i // 2] >> 4 if i % 2 == 0 else self.codes[i // 2] & 15
        return [f32(f32(CODEBOOK[code(i)]) * self.scales[i // self.block]) for i in range(self.outputs * self.inputs)]

    def arguments(self):
        codebook = encoded(CODEBOOK, "f32")
        if not self.double:
            return [self.codes, codebook, encoded(self.scales, "f32"), None, None, None]
        return [self.codes, codebook, None, self.absmax_codes, encoded(self.map, "f32"), encoded(self.nested, "f32")]


def dequantize_launch(form, n, block):
    return dict(kernel=f"dequantize_{form}", grid=(ceil(n, 256 * 4 * 8), 1), threads=256, shared=64,
                tail=[("long", n), ("int", block.bit_length() - 1)])


def quantize_launch(form, n, block):
    lanes = min(32, block // 8)
    return dict(kernel=f"quantize_{form}", grid=(ceil(ceil(n, block), 256 // lanes), 1), threads=256, shared=0,
                tail=[("long", n), ("int", block.bit_length() - 1)])


def multiply_launch(form, rows, outputs, inputs, block, processors):
    size, chunks = SIZE[form], inputs // 32
    parts = 32 * size // 16

    def tile_bytes(count, tile):
        return count * parts * ((tile + 7 - 8 // parts) // 8 * 8 + 8 // parts) * 16

    warps, splits = ceil(outputs, 4), 1
    while splits < 4 and warps * splits < 16 * processors and chunks > 32 * splits:
        splits *= 2
    run, at_once = 32 * splits, min(power_of_two(rows), 8 if form == "f32" else 16)
    while tile_bytes(at_once, min(run, chunks)) > 36 * 1024:
        at_once //= 2
    tile = chunks
    if tile_bytes(at_once, chunks) > 36 * 1024:
        tile = run
        while tile_bytes(at_once, tile + run) <= 36 * 1024:
            tile += run
    columns = 4 if at_once <= 2 else 2
    return dict(kernel=f"multiply_{form}_{at_once}", grid=(ceil(outputs, columns * 8 // splits), ceil(rows, at_once)), threads=256,
                shared=64 + 8 * at_once * columns * 4 + tile_bytes(at_once, tile),
                tail=[("int", v) for v in (rows, outputs, inputs, block.bit_length() - 1, tile, splits)])


def nf4_rows_launch(form, rows, outputs, inputs, block, processors):
    at_once = min(max(power_of_two(rows), 8), 64)
    tiles, passes = ceil(outputs, 128), ceil(rows, at_once)
    blocks = min(max(tiles * ceil(inputs, 128) // 4, 1), 4 * processors)
    return dict(kernel=f"nf4_rows_{form}_{at_once}", grid=(blocks, passes), threads=128,
                shared=64 + 1024 + 16 + 2 * at_once * 256, scratch=(passes * blocks * 2 * 128 * at_once, passes * tiles),
                tail=[("int", v) for v in (rows, outputs, inputs, block.bit_length() - 1)])


def attention_launch(form, rows, n_segments, heads, kv_heads, size, window, longest):
    group = heads // kv_heads
    at_once = min(power_of_two(group), 8)
    parts = kv_heads * ceil(group, at_once)
    splits = ceil(longest, 128)
    if window:
        splits = min(splits, ceil(window - 1, 128) + 1)
    shared = 16 + 512 + at_once * 512 + 2 * 4 * at_once * 4 + at_once * size * 4 + 128 * 17 * 16
    return dict(kernel=f"attention_{form}_{at_once}", grid=(parts * splits, rows), threads=128, shared=shared,
                scratch=(rows * parts * splits * at_once * (size + 2), rows * parts),
                tail=[("int", v) for v in (n_segments, heads, kv_heads, size, window, splits)] + [("float", 1 / math.sqrt(size))])


# ---- cases: a launch, its buffers, and what must come out ----

class Case:
    def __init__(self, name, launch, buffers, form, expected, tolerance):
        self.name, self.launch, self.buffers, self.form = name, launch, buffers, form
        self.result = 0  # which buffer
        self.once = False  # it reads what it writes
        self.expected, self.tolerance = expected, tolerance

    def compare(self, out, what):
        got = decoded(out, self.form) if self.form != "u8" else list(out)
        assert len(got) == len(self.expected), f"{self.name}: {len(got)} numbers, expected {len(self.expected)}"
        for i, (a, b) in enumerate(zip(got, self.expected)):
            limit = self.tolerance[i] if isinstance(self.tolerance, list) else self.tolerance
            if not abs(a - b) <= limit:
                sys.exit(f"kernels.py: {self.name} ({what}): number {i} is {a!r}, expected {b!r} ± {limit:g}")


def product_case(kind, form, rows, outputs, inputs, block, double, processors, seed):
    packed = Packed(outputs, inputs, block, double, seed)
    weights = packed.weights()
    if kind == "nf4_rows":
        weights = rounded(weights, form)
    draw = random.Random(seed + 1)
    x = rounded([draw.uniform(-1, 1) for _ in range(rows * inputs)], form)
    expected, tolerance = [], []
    for row in range(rows):
        own = x[row * inputs:(row + 1) * inputs]
        for output in range(outputs):
            terms = [a * b for a, b in zip(own, weights[output * inputs:(output + 1) * inputs])]
            expected.append(math.fsum(terms))
            size = math.fsum(map(abs, terms))
            tolerance.append(EPSILON[form] * abs(expected[-1]) + 40 * 2.0**-24 * size + 2.0**-25)
    make = nf4_rows_launch if kind == "nf4_rows" else multiply_launch
    launch = make(form, rows, outputs, inputs, block, processors)
    buffers = [bytes(rows * outputs * SIZE[form]), encoded(x, form), *packed.arguments()]
    if "scratch" in launch:
        buffers += [bytes(4 * n) for n in launch["scratch"]]
    case = Case(f"{launch['kernel']}: {rows} x {outputs} x {inputs}", launch, buffers, form, expected, tolerance)
    case.again = lambda: [sum(a * b for a, b in zip(x[r * inputs:][:inputs], weights[o * inputs:][:inputs]))
                          for r in range(rows) for o in range(outputs)]
    return case


def attention_case(form, heads, kv_heads, size, window, segments, seed):
    """segments: (rows, spans) with spans of (first slot, length), the rows' own keys last."""
    draw = random.Random(seed)
    slots = max(start + length for _, spans in segments for start, length in spans)
    number = lambda count, scale: rounded([draw.uniform(-scale, scale) for _ in range(count)], form)
    n_rows = sum(rows for rows, _ in segments)
    q, k, v = number(n_rows * heads * size, 4), number(slots * kv_heads * size, 2), number(slots * kv_heads * size, 1)
    table, flat, seen_by, row = [], [], [], 0
    for rows, spans in segments:
        order = [start + i for start, length in spans for i in range(length)]
        position = len(order) - rows
        table += [row, rows, position, len(flat) // 2, len(spans)]
        flat += [n for span in spans for n in span]
        row += rows
        for at in range(position, position + rows):
            seen_by.append(order[max(0, at + 1 - window) if window else 0:at + 1])

    def attend(splits):
        out = []
        for row, seen in enumerate(seen_by):
            for head in range(heads):
                at = lambda slot: (slot * kv_heads + head * kv_heads // heads) * size
                query = q[(row * heads + head) * size:][:size]
                scores = [math.fsum(a * b for a, b in zip(query, k[at(s):at(s) + size])) / math.sqrt(size) for s in seen]
                parts = []
                for begin in range(0, len(seen), splits):
                    part = scores[begin:begin + splits]
                    top = max(part)
                    weights = [math.exp(score - top) for score in part]
                    sums = [math.fsum(w * v[at(s) + e] for w, s in zip(weights, seen[begin:begin + splits])) for e in range(size)]
                    parts.append((top, math.fsum(weights), sums))
                top = max(part[0] for part in parts)
                total = math.fsum(math.exp(part[0] - top) * part[1] for part in parts)
                out += [math.fsum(math.exp(part[0] - top) * part[2][e] for part in parts) / total for e in range(size)]
        return out

    expected = attend(len(flat) + slots)
    launch = attention_launch(form, n_rows, len(segments), heads, kv_heads, size, window, max(map(len, seen_by)) if not window
                              else max(sum(length for _, length in spans) for _, spans in segments))
    buffers = [bytes(len(q) * SIZE[form]), encoded(q, form), encoded(k, form), encoded(v, form),
               struct.pack(f"<{len(table)}q", *table), struct.pack(f"<{len(flat)}q", *flat)]
    buffers += [bytes(4 * n) for n in launch["scratch"]]
    case = Case(f"{launch['kernel']}: {n_rows} rows, {heads}/{kv_heads} heads of {size}, window {window}", launch, buffers, form,
                expected, [EPSILON[form] * abs(e) + 2e-5 for e in expected])
    case.again = lambda: attend(3)
    return case


def rows_cases(form):
    """rows.cu and vocabulary.cu: three rows each; each reference as a sum by fsum and again by plain sums."""
    draw, rows, width, eps = random.Random(40), 3, 72, f32(1e-5)
    number = lambda n, scale=1.0: rounded([draw.uniform(-scale, scale) for _ in range(n)], form)
    longs = lambda values: struct.pack(f"<{len(values)}q", *values)
    ints = lambda *values: [("int", v) for v in values]

    def case(kernel, grid, shared, buffers, tail, reference, roundings=1, result=0, kind=None, once=False, slack=4e-6, threads=256):
        expected = reference(math.fsum)
        launch = dict(kernel=f"{kernel}_{form}", grid=grid, threads=threads, shared=shared, tail=tail)
        made = Case(f"{kernel}_{form}", launch, buffers, kind or form, expected,
                    [roundings * 1.01 * (EPSILON[form] if kind is None else 0) * abs(e) + slack * (1 + abs(e)) for e in expected])
        made.result, made.once, made.again = result, once, lambda: reference(sum)
        return made

    result = lambda n: bytes(n * SIZE[form])
    own = lambda values, row, n: values[row * n:(row + 1) * n]
    x, delta, weight, grad = number(rows * width), number(rows * width), number(width), number(rows * width)
    total = rounded([f32(a + b) for a, b in zip(x, delta)], form)

    def norm(add):
        out = []
        for row in range(rows):
            values = own(total, row, width)
            inverse = 1 / math.sqrt(add(v * v for v in values) / width + eps)
            out += [v * inverse * w for v, w in zip(values, weight)]
        return out
    yield case("add_norm", (rows, 1), 32, [result(rows * width), result(rows * width), bytes(4 * rows), encoded(x, form),
                                            encoded(delta, form), encoded(weight, form)], ints(width) + [("float", eps)], norm, 2)
    inverse = rounded([draw.uniform(0.5, 2) for _ in range(rows)], "f32")

    def norm_backward(add):
        out = []
        for row in range(rows):
            g, v = own(grad, row, width), own(total, row, width)
            mean = add(a * w * b for a, w, b in zip(g, weight, v)) * inverse[row] ** 2 / width
            out += [(a * w - b * mean) * inverse[row] + c for a, w, b, c in zip(g, weight, v, own(x, row, width))]
        return out
    yield case("add_norm_backward", (rows, 1), 32, [result(rows * width), encoded(grad, form), encoded(x, form), encoded(total, form),
                                                     encoded(weight, form), encoded(inverse, "f32")], ints(width), norm_backward)
    gates = number(2 * rows * width, 6)
    halves = lambda row: (own(gates, 2 * row, width), own(gates, 2 * row + 1, width))
    sigmoid = lambda gate: 1 / (1 + math.exp(-gate))
    elements = (rows, ceil(width, 256 * 16 // SIZE[form]))
    yield case("swiglu", elements, 0, [result(rows * width), encoded(gates, form)], ints(width),
               lambda add: [add((a * sigmoid(a) * b,)) for row in range(rows) for a, b in zip(*halves(row))])

    def swiglu_backward(add):
        out = []
        for row in range(rows):
            parts = list(zip(*halves(row), own(grad, row, width)))
            out += [add((g * b * sigmoid(a) * (1 + a * (1 - sigmoid(a))),)) for a, b, g in parts]
            out += [g * a * sigmoid(a) for a, b, g in parts]
        return out
    yield case("swiglu_backward", elements, 0, [result(2 * rows * width), encoded(gates, form), encoded(grad, form)], ints(width),
               swiglu_backward)
    heads, kv_heads, size = 3, 1, 8
    qkv, angles = number(rows * (heads + 2 * kv_heads) * size), [draw.uniform(-3, 3) for _ in range(4 * size // 2)]
    positions = [2, 0, 3]
    cos_sin = []
    for at in range(4):
        own_angles = angles[at * size // 2:(at + 1) * size // 2]
        cos_sin += [math.cos(a) for a in own_angles] + [math.sin(a) for a in own_angles]
    cos_sin = rounded(cos_sin, "f32")

    def turned(head, row, sign):
        c, s = cos_sin[positions[row] * size:][:size // 2], cos_sin[positions[row] * size + size // 2:][:size // 2]
        a, b = head[:size // 2], head[size // 2:]
        return ([p * q - sign * r * t for p, q, r, t in zip(a, c, b, s)] + [r * q + sign * p * t for p, q, r, t in zip(a, c, b, s)])
    row_width = (heads + 2 * kv_heads) * size
    yield case("rotate", (rows, 1), 0, [result(rows * heads * size), result(rows * kv_heads * size), result(rows * kv_heads * size),
                                         encoded(qkv, form), longs(positions), None, encoded(cos_sin, "f32")],
               ints(heads, kv_heads, size),
               lambda add: [add((v,)) for row in range(rows) for h in range(heads)
                            for v in turned(own(qkv, row, row_width)[h * size:(h + 1) * size], row, 1)])
    grads = [number(rows * n * size) for n in (heads, kv_heads, kv_heads)]

    def rotate_backward(add):
        out = []
        for row in range(rows):
            for part, n in ((grads[0], heads), (grads[1], kv_heads)):
                for h in range(n):
                    out += turned(own(part, row, n * size)[h * size:(h + 1) * size], row, -1)
            out += [add((v,)) for v in own(grads[2], row, kv_heads * size)]
        return out
    yield case("rotate_backward", (rows, 1), 0, [result(rows * row_width), *(encoded(g, form) for g in grads), longs(positions),
                                                  encoded(cos_sin, "f32")], ints(heads, kv_heads, size), rotate_backward)
    rank, outputs = 8, 40
    a, down, b, y = number(rank * width), number(rows * rank), number(outputs * rank), number(rows * outputs)
    dots = lambda add, left, right, n, start: [add([start[i] if start else 0.0] + [p * q for p, q in zip(l, r)])
                                               for i, (l, r) in enumerate((own(left, m, n), own(right, o, n)) for m in range(rows)
                                                                          for o in range(len(right) // n))]
    yield case("lora_down", (rank, 1), 128, [result(rows * rank), encoded(x, form), encoded(a, form)], ints(rows, width, rank),
               lambda add: dots(add, x, a, width, None))
    yield case("lora_up", (1, 1), 0, [encoded(y, form), encoded(down, form), encoded(b, form)], ints(rows, rank, outputs),
               lambda add: dots(add, down, b, rank, y), once=True)
    ranks, heights, inputs, scale = (2, 0, 3), (5, 4, 6), 7, f32(1.5)
    masters = [rounded([draw.uniform(-1, 1) for _ in range(r * inputs)], "f32") for r in ranks]
    masters += [rounded([draw.uniform(-1, 1) for _ in range(r * o)], "f32") for r, o in zip(ranks, heights)]
    pointers = [encoded(m, "f32") if m else None for m in masters]
    n_ranks, n_heights = sum(ranks), sum(heights)
    numbers = ints(inputs, *ranks, *heights) + [("float", scale)]
    grid = (ceil(n_ranks * (inputs + n_heights), 256), 1)

    def joined(add):
        out, left = [], 0
        for part, (r, o) in enumerate(zip(ranks, heights)):
            for row in range(o):
                line = [0.0] * n_ranks
                line[left:left + r] = [add((v * scale,)) for v in masters[3 + part][row * r:(row + 1) * r]]
                out += line
            left += r
        return out
    yield case("lora_join", grid, 0, [result(n_ranks * inputs), result(n_heights * n_ranks), *pointers], numbers, joined, result=1)
    grad_a, grad_b = number(n_ranks * inputs), number(n_heights * n_ranks)
    yield case("lora_part", grid, 0, [*(bytes(4 * len(m)) if m else None for m in masters), encoded(grad_a, form), encoded(grad_b, form)],
               numbers, lambda add: [add((grad_b[row * n_ranks + column] * scale,)) for row in range(heights[0]) for column in range(ranks[0])],
               result=3, kind="f32")
    size = 300
    logits, temperature = number(rows * size, 8), 0.75
    targets, scale = [5, 299, 0], f32(1 / temperature)

    def weights(row, add):
        values = own(logits, row, size)
        exponents = [(v - max(values)) * scale for v in values]
        return exponents, add(math.exp(e) for e in exponents)

    def derivative(add):
        out = []
        for row in range(rows):
            exponents, whole = weights(row, add)
            out += [((i == targets[row]) - math.exp(e) / whole) * scale for i, e in enumerate(exponents)]
        return out
    yield case("token_logprob", (rows, 1), 2584, [bytes(4 * rows), bytes(4 * rows), encoded(logits, form), longs(targets)],
               ints(size) + [("float", scale)] + ints(1), derivative, result=2, once=True, threads=512)
    uniforms = [0.1, 0.5, 0.93]
    for top_k, top_p in ((0, 1.0), (20, 0.5)):
        def drawn(add, top_k=top_k, top_p=top_p):
            tokens, logprobs = [], []
            for row in range(rows):
                exponents, whole = weights(row, add)
                order = list(range(size))
                if top_k:
                    order = sorted(order, key=lambda i: (-exponents[i], i))[:top_k]
                    kept, n = add(math.exp(exponents[i]) for i in order), 1
                    while add(math.exp(exponents[i]) for i in order[:n]) < top_p * kept:
                        n += 1
                    order = order[:n]
                left = uniforms[row] * add(math.exp(exponents[i]) for i in order)
                for token in order:
                    left -= math.exp(exponents[token])
                    if left < 0:
                        break
                tokens.append(float(token))
                logprobs.append(exponents[token] - math.log(whole))
            return tokens + logprobs
        yield case("sample", (rows, 1), 2584 + 8 * ceil(size, 256), [bytes(8 * rows), encoded(logits, form), None,
                                                                      struct.pack("<3d", *uniforms)],
                   ints(size) + [("float", temperature)] + ints(top_k) + [("float", top_p)], drawn, kind="drawn", threads=512)


def small_cases(processors):
    """Every kernel once or more."""
    for form in FORMATS:
        yield from rows_cases(form)
        for block, double in ((64, False), (32, False), (64, True)):
            packed = Packed(70, 192, block, double, 1)
            expected = rounded(packed.weights(), form)
            launch = dequantize_launch(form, 70 * 192, block)
            case = Case(f"dequantize_{form}, blocks of {block}, double {double}", launch,
                        [bytes(len(expected) * SIZE[form]), *packed.arguments()], form, expected, 0.0)
            case.again = lambda packed=packed, form=form: rounded(
                [CODEBOOK_F32[c] * packed.scales[i // packed.block] for i, c in
                 enumerate(int(digit, 16) for digit in packed.codes.hex())], form)
            yield case
        # Values of the codebook times a power of two: their codes are known, and a code is two hexadecimal digits' half.
        digits = random.Random(2).choices(range(16), k=32 * 64)
        for first in range(0, len(digits), 64):
            digits[first] = 15
        scale = [2.0 ** (i % 5 - 2) for i in range(32)]
        values = [CODEBOOK_F32[d] * scale[i // 64] for i, d in enumerate(digits)]
        form_values = rounded(values, form)
        nearest = [min(range(16), key=lambda c, x=x, s=scale[i // 64]: abs(x / s - CODEBOOK_F32[c])) for i, x in enumerate(form_values)]
        expected = bytes(nearest[i] << 4 | nearest[i + 1] for i in range(0, len(nearest), 2))
        case = Case(f"quantize_{form}", quantize_launch(form, len(values), 64),
                    [bytes(len(expected)), bytes(4 * 32), encoded(form_values, form)], "u8", list(expected), 0)
        case.again = lambda digits=digits: list(bytes(digits[i] << 4 | digits[i + 1] for i in range(0, len(digits), 2)))
        yield case
        for rows in (1, 2, 3, 8) + ((16,) if form != "f32" else ()):
            yield product_case("multiply", form, rows, 37, 192, 64, rows == 2, processors, 10 + rows)
        if form != "f32":
            for rows in (1, 9, 17, 33, 64):
                yield product_case("nf4_rows", form, rows, 133, 320, 64, rows == 9, processors, 20 + rows)
            yield product_case("nf4_rows", form, 2, 40, 1088, 64, True, processors, 30)
        segments = [(1, [(0, 40), (150, 103)]), (1, [(0, 40), (60, 1)]), (3, [(0, 40), (70, 60)]), (1, [(139, 1)])]
        for heads, kv_heads, size, window in ((8, 2, 128, 0), (3, 3, 64, 50), (2, 1, 64, 0), (5, 1, 80, 0)):
            yield attention_case(form, heads, kv_heads, size, window, segments, heads)


CODEBOOK_F32 = [f32(c) for c in CODEBOOK]


# ---- without a GPU ----

def find_nvrtc():
    places = [HERE.parents[1] / ".deps/nvrtc", HERE.parents[1] / ".deps/libtorch", *map(pathlib.Path, sys.path)]
    for place in places:
        for library in glob.glob(str(place / "nvidia/*/lib/libnvrtc.so.1*")):
            for builtins in glob.glob(str(pathlib.Path(library).parent / "libnvrtc-builtins.so*")):
                ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(library)
    try:
        return ctypes.CDLL("libnvrtc.so")
    except OSError:
        return None


def compile_by_nvrtc(nvrtc, file, macro, arch):
    program = ctypes.c_void_p()
    text = source(file).encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, file.encode(), 0, None, None) == 0
    options = [f"--gpu-architecture=sm_{arch}", "--std=c++17", "--diag-suppress=177"] + ([f"-DARETE_{macro.upper()}"] if macro else [])
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options)))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if status:
        sys.exit(f"kernels.py: {file} for sm_{arch}: {log.value.decode()}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


def dry_run(archs):
    nvrtc = find_nvrtc()
    if nvrtc is None:
        print("no NVRTC here: nothing was compiled")
    for arch in archs if nvrtc else ():
        for file, kernels in KERNELS.items():
            for macro in sorted({macro or "" for _, macro in kernels}):
                names = [name for name, own in kernels if (own or "") == macro and runs_on(name, arch)]
                if names:
                    cubin = compile_by_nvrtc(nvrtc, file, macro or None, arch)
                    missing = [name for name in names if name.encode() + b"\0" not in cubin]
                    assert not missing, f"{file} for sm_{arch} lacks {missing}"
                    print(f"compiled {file} {macro} for sm_{arch}: {len(names)} kernels")
    seen, n = set(), 0
    for case in small_cases(108):
        again = case.again()
        if case.form != "u8":
            again = struct.pack(f"<{len(again)}d", *again)
            again = list(struct.unpack(f"<{len(again) // 8}d", again))
        for i, (a, b) in enumerate(zip(again, case.expected)):
            assert abs(a - b) <= 1e-9 * (1 + abs(b)), f"{case.name}: two references differ at {i}: {a} and {b}"
        assert len(again) == len(case.expected) and len(case.expected) > 0
        seen.add(case.launch["kernel"])
        n += 1
    unchecked = set(all_kernels()) - seen
    assert not unchecked, f"no case launches {sorted(unchecked)}"
    print(f"{n} cases, {len(seen)} kernels: inputs made, references agree with their second computation")


def all_kernels():
    return sorted(name for kernels in KERNELS.values() for name, _ in kernels)


def run_on_machine(folder):
    """The launches above on the SIMT machine of crates/model/tests/simt, as `cargo test --test cuda_simt` has built it."""
    n = 0
    for processors in (1, 108):
        for case in small_cases(processors):
            stem = next(file[:-3] for file, names in KERNELS.items() if case.launch["kernel"] in dict(names))
            programs = glob.glob(str(pathlib.Path(folder) / f"simt-{stem}-plain-*"))
            if len(programs) != 1:
                sys.exit(f"kernels.py: {folder} has {len(programs)} programs simt-{stem}-plain-…, expected one: run "
                         "`cargo test --release -p arete-model --test cuda_simt`")
            name = case.launch["kernel"].encode()
            data = struct.pack("<I", len(name)) + name
            data += struct.pack("<4IQ", *case.launch["grid"], case.launch["threads"], case.launch["shared"], 0)
            data += struct.pack("<I", len(case.buffers) + len(case.launch["tail"]))
            for buffer in case.buffers:
                data += b"\3" if buffer is None else b"\2" + struct.pack("<Q", len(buffer)) + buffer
            for kind, value in case.launch["tail"]:
                data += (b"\1" if kind == "long" else b"\0") + struct.pack({"int": "<i", "long": "<q", "float": "<f"}[kind], value)
            done = subprocess.run([programs[0]], input=data, stdout=subprocess.PIPE, check=True)
            start = sum(len(buffer) for buffer in case.buffers[:case.result] if buffer is not None)
            case.compare(done.stdout[start:start + len(case.buffers[case.result])], "SIMT machine")
            n += 1
    print(f"{n} launches on the SIMT machine: equal to f64 within rounding")


# ---- with a GPU ----

class Gpu:
    def __init__(self):
        import cupy
        import numpy
        import torch
        self.cupy, self.numpy, self.torch = cupy, numpy, torch
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        self.name = properties["name"].decode()
        self.arch = 10 * properties["major"] + properties["minor"]
        self.processors = properties["multiProcessorCount"]
        self.cache_bytes = properties["l2CacheSize"]
        self.functions = {}
        for file, kernels in KERNELS.items():
            modules = {}
            for name, macro in kernels:
                if not runs_on(name, self.arch):
                    continue
                if macro not in modules:
                    options = ("--std=c++17", "--diag-suppress=177") + ((f"-DARETE_{macro.upper()}",) if macro else ())
                    modules[macro] = cupy.RawModule(code=source(file), options=options, backend="nvrtc")
                self.functions[name] = modules[macro].get_function(name)

    def array(self, data):
        return self.cupy.asarray(self.numpy.frombuffer(data, dtype=self.numpy.uint8))

    def launch(self, launch, buffers):
        """Queues it; buffers are arrays, None for a null pointer."""
        scalar = {"int": self.numpy.int32, "long": self.numpy.int64, "float": self.numpy.float32}
        arguments = [self.numpy.uint64(0) if b is None else b for b in buffers]
        arguments += [scalar[kind](value) for kind, value in launch["tail"]]
        self.functions[launch["kernel"]](launch["grid"], (launch["threads"],), tuple(arguments), shared_mem=launch["shared"])

    def microseconds(self, work, repeats=60):
        for i in range(5):
            work(i)
        start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record()
        for i in range(repeats):
            work(i)
        end.record()
        end.synchronize()
        return self.cupy.cuda.get_elapsed_time(start, end) * 1000 / repeats


def check_small(gpu):
    n = 0
    for case in small_cases(gpu.processors):
        if case.launch["kernel"] not in gpu.functions:
            continue
        outs = []
        arrays = [None if data is None else gpu.array(data) for data in case.buffers]
        for what in ("first run",) if case.once else ("first run", "second run"):  # the counters must be zero again
            gpu.launch(case.launch, arrays)
            out = arrays[case.result].get().tobytes()  # waits
            case.compare(out, what)
            outs.append(out)
        assert outs[0] == outs[-1], f"{case.name}: two runs differ"
        n += 1
    return n


def random_packed(gpu, outputs, inputs, copies):
    cupy = gpu.cupy
    n = outputs * inputs
    codes = cupy.random.randint(0, 256, (copies, n // 2), dtype=cupy.uint8)
    absmax = cupy.random.uniform(0.01, 0.1, (copies, n // 64), dtype=cupy.float32)
    return [[codes[i], cupy.asarray(CODEBOOK_F32, dtype=cupy.float32), absmax[i], None, None, None] for i in range(copies)]


def torch_of(gpu, array, kind):
    return gpu.torch.as_tensor(array, device="cuda").view(kind)


def time_all(gpu):
    cupy, torch = gpu.cupy, gpu.torch
    rows_out = []
    big = cupy.zeros(1 << 28, dtype=cupy.float32)
    other = cupy.empty_like(big)
    copy = 2 * big.nbytes / gpu.microseconds(lambda i: cupy.copyto(other, big), 20) / 1e3  # GB/s
    del big, other
    form = "bf16" if gpu.arch >= 80 else "f16"
    kind = torch.bfloat16 if form == "bf16" else torch.float16
    a = torch.randn(8192, 8192, device="cuda", dtype=kind)
    rate = 2 * 8192**3 / gpu.microseconds(lambda i: a @ a, 10) / 1e6  # TFLOP/s
    del a
    idle = [cupy.zeros(16, dtype=cupy.float32) for _ in range(2)]
    empty = dict(dequantize_launch("f32", 0, 64), grid=(1, 1))
    launch_us = gpu.microseconds(lambda i: gpu.launch(empty, [idle[0], idle[0], idle[1], idle[0], None, None, None]), 500)

    def report(kernel, shape, moved, flops, us):
        rate_now = moved / us / 1e3
        rows_out.append(f"| {kernel} | {shape} | {moved / 1e6:.1f} | {us:.1f} | {rate_now:.0f} | {100 * rate_now / copy:.0f} % | "
                        f"{flops / us / 1e6:.1f} |")

    outputs, inputs = 28672, 4096
    n = outputs * inputs
    copies = max(3, ceil(4 * gpu.cache_bytes + (1 << 28), n * 9 // 16))
    sets = random_packed(gpu, outputs, inputs, copies)
    shape = f"{outputs} x {inputs}"
    dense = torch.empty(outputs, inputs, device="cuda", dtype=kind)
    dense_array = cupy.asarray(dense.view(torch.int16))
    launch = dequantize_launch(form, n, 64)
    us = gpu.microseconds(lambda i: gpu.launch(launch, [dense_array, *sets[i % copies]]))
    report(launch["kernel"], shape, n * (0.5625 + 2), 0, us)
    launch = quantize_launch(form, n, 64)
    packed_again = [cupy.empty_like(sets[0][0]), cupy.empty_like(sets[0][2])]
    us = gpu.microseconds(lambda i: gpu.launch(launch, [*packed_again, dense_array]), 20)
    report(launch["kernel"], shape, n * (0.5625 + 2), 0, us)

    gpu.launch(dequantize_launch(form, n, 64), [dense_array, *sets[0]])
    x64 = torch.randn(64, inputs, device="cuda", dtype=kind)
    exact = x64.float() @ dense.float().t()
    first = None
    for rows in (1, 4, 16):
        launch = multiply_launch(form, rows, outputs, inputs, 64, gpu.processors)
        x, y = cupy.asarray(x64[:rows].contiguous().view(torch.int16)), cupy.empty((rows, outputs), dtype=cupy.int16)
        us = gpu.microseconds(lambda i: gpu.launch(launch, [y, x, *sets[i % copies]]))
        report(launch["kernel"], f"{rows} x {shape}", n * 0.5625 + 2 * rows * (outputs + inputs), 2 * rows * n, us)
    for rows in (1, 8, 16, 32, 64):
        launch = nf4_rows_launch(form, rows, outputs, inputs, 64, gpu.processors)
        x, y = cupy.asarray(x64[:rows].contiguous().view(torch.int16)), cupy.empty((rows, outputs), dtype=cupy.int16)
        scratch = [cupy.empty(launch["scratch"][0], dtype=cupy.float32), cupy.zeros(launch["scratch"][1], dtype=cupy.uint32)]
        gpu.launch(launch, [y, x, *sets[0], *scratch])
        got = torch_of(gpu, y, kind)
        gap = ((got.float() - exact[:rows]).abs() / (exact[:rows].abs() + exact.abs().mean())).max().item()
        assert gap < (0.02 if form == "bf16" else 0.005), f"{launch['kernel']} at {rows} rows: {gap} off torch's product"
        first = got[0].clone() if first is None else first
        assert torch.equal(first, got[0]), f"{launch['kernel']}: row 0 of {rows} differs from row 0 alone"
        us = gpu.microseconds(lambda i: gpu.launch(launch, [y, x, *sets[i % copies], *scratch]))
        report(launch["kernel"], f"{rows} x {shape}", n * 0.5625 + 2 * rows * (outputs + inputs), 2 * rows * n, us)
    us = gpu.microseconds(lambda i: x64 @ dense.t())
    report(f"torch {form} product of a dense matrix", f"64 x {shape}", n * 2, 2 * 64 * n, us)
    del sets, dense, exact

    heads, kv_heads, size = 32, 8, 128
    for rows, tokens in ((1, 400), (1, 8192), (32, 400), (64, 400), (64, 2048)):
        one = rows * tokens * kv_heads * size * 2 * 2
        copies = max(2, min(32, ceil(4 * gpu.cache_bytes, one)))
        caches = [torch.randn(2, rows * tokens, kv_heads, size, device="cuda", dtype=kind) for _ in range(copies)]
        arrays = [[cupy.asarray(cache[i].view(torch.int16)) for i in range(2)] for cache in caches]
        q = torch.randn(rows, heads, size, device="cuda", dtype=kind)
        q_array, out = cupy.asarray(q.view(torch.int16)), cupy.empty((rows, heads, size), dtype=cupy.int16)
        table = cupy.asarray([[i, 1, tokens - 1, i, 1] for i in range(rows)], dtype=cupy.int64)
        spans = cupy.asarray([[i * tokens, tokens] for i in range(rows)], dtype=cupy.int64)
        launch = attention_launch(form, rows, rows, heads, kv_heads, size, 0, tokens)
        scratch = [cupy.empty(launch["scratch"][0], dtype=cupy.float32), cupy.zeros(launch["scratch"][1], dtype=cupy.uint32)]
        gpu.launch(launch, [out, q_array, *arrays[0], table, spans, *scratch])
        k, v = (caches[0][i].view(rows, tokens, kv_heads, size).transpose(1, 2).float().repeat_interleave(heads // kv_heads, 1)
                for i in range(2))
        reference = torch.nn.functional.scaled_dot_product_attention(q.unsqueeze(2).float(), k, v).squeeze(2)
        gap = (torch_of(gpu, out, kind).float() - reference).abs().max().item()
        assert gap < (0.02 if form == "bf16" else 0.004), f"{launch['kernel']}, {rows} rows of {tokens}: {gap} off torch's attention"
        us = gpu.microseconds(lambda i: gpu.launch(launch, [out, q_array, *arrays[i % copies], table, spans, *scratch]))
        report(launch["kernel"], f"{rows} rows of {tokens} keys", one, 4 * rows * tokens * heads * size, us)
        del k, v, caches, arrays
    return copy, rate, launch_us, rows_out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--arch", default="75,80,90", help="with --dry-run: what to compile for (default: 75,80,90)")
    parser.add_argument("--machine", metavar="target/tmp", help="run the small cases on the SIMT machine built there, without a GPU")
    options = parser.parse_args()
    folder = {path.name for path in kernels_folder().glob("*.cu")}
    if folder != set(KERNELS):
        sys.exit(f"kernels.py: it knows {sorted(KERNELS)}, the folder has {sorted(folder)}: add what is missing")
    if options.list:
        print("\n".join(all_kernels()))
        return
    if options.machine:
        run_on_machine(options.machine)
        return
    if options.dry_run:
        dry_run([int(arch) for arch in options.arch.split(",")])
        return
    try:
        gpu = Gpu()
    except ImportError as error:
        sys.exit(f"kernels.py: {error.name} is missing: it needs torch and CuPy, or --dry-run")
    n = check_small(gpu)
    print(f"{n} cases against f64: equal within rounding, the same bits twice", file=sys.stderr)
    if options.quick:
        return
    copy, rate, launch_us, rows = time_all(gpu)
    print(f"\n{gpu.name}, compute capability {gpu.arch / 10}, {datetime.date.today()}: copy {copy:.0f} GB/s, "
          f"16-bit products {rate:.0f} TFLOP/s, an empty launch {launch_us:.1f} µs\n")
    print("| kernel | shape | MB moved | µs | GB/s | of copy | TFLOP/s |\n|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
