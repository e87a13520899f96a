"""Parquet bytes made by hand, so that every number in them can lie: Thrift's compact protocol, pages, packed codecs."""

import gzip
import struct

BOOLEAN, INT32, INT64, INT96, FLOAT, DOUBLE, BYTE_ARRAY = range(7)
REQUIRED, OPTIONAL, REPEATED = range(3)
PLAIN, PLAIN_DICTIONARY, RLE, BIT_PACKED, DELTA_BINARY_PACKED, DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY, RLE_DICTIONARY = 0, 2, 3, 4, 5, 6, 7, 8
NONE, SNAPPY, GZIP, LZO, BROTLI, LZ4, ZSTD, LZ4_RAW = range(8)
UTF8, MAP, LIST, TIMESTAMP_MICROS = 0, 1, 3, 10

# Thrift's types in the compact protocol, of the values that Parquet has.
_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12


def varint(n):
    out = bytearray()
    while True:
        out.append((n & 127) | (128 if n > 127 else 0))
        n >>= 7
        if n == 0:
            return bytes(out)


def zigzag(n):
    return varint((n << 1) if n >= 0 else ((-n << 1) - 1))


def i32(n):
    return _I32, zigzag(n)


def i64(n):
    return _I64, zigzag(n)


def binary(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return _BINARY, varint(len(raw)) + raw


def listed(items, n_claimed=None, kind=None):
    """A list of such values; `n_claimed`: the length that its head states."""
    n = len(items) if n_claimed is None else n_claimed
    kind = items[0][0] if items else (kind or _I32)
    head = bytes([(n << 4) | kind]) if n < 15 else bytes([0xF0 | kind]) + varint(n)
    return _LIST, head + b"".join(raw for _, raw in items)


def struct_of(fields):
    """Field number → value."""
    out, last = b"", 0
    for number, (kind, raw) in sorted(fields.items()):
        delta = number - last
        out += (bytes([(delta << 4) | kind]) if delta < 16 else bytes([kind]) + zigzag(number)) + raw
        last = number
    return _STRUCT, out + b"\0"


def element(name, physical=None, repetition=None, n_children=None, converted=None):
    """An element of the schema."""
    fields = {4: binary(name)}
    for number, value in ((1, physical), (3, repetition), (5, n_children), (6, converted)):
        if value is not None:
            fields[number] = i32(value)
    return struct_of(fields)


def pack(raw, codec):
    """The bytes of a page, packed."""
    if codec == GZIP:
        return gzip.compress(raw, 9, mtime=0)
    if codec == SNAPPY:
        out = varint(len(raw))
        for at in range(0, len(raw), 60):
            part = raw[at : at + 60]
            out += bytes([(len(part) - 1) << 2]) + part
        return out
    if codec == ZSTD:
        return zstd([raw])
    return raw


def zstd(parts):
    """A zstd frame of raw blocks (bytes) and blocks of one byte repeated (byte, n)."""
    blocks = []
    for part in parts:
        if isinstance(part, bytes):
            blocks += [(0, len(part[at : at + 65536]), part[at : at + 65536]) for at in range(0, max(1, len(part)), 65536)]
        else:
            byte, n = part
            blocks += [(1, min(131072, n - at), byte) for at in range(0, n, 131072)]
    out = b"\x28\xb5\x2f\xfd" + bytes([0x00, 0x58])  # no content size, a window of 2 MiB
    for idx, (kind, n, content) in enumerate(blocks):
        out += struct.pack("<I", (n << 3) | (kind << 1) | (idx == len(blocks) - 1))[:3] + content
    return out


class Page:
    """A page's header and bytes; `claimed`: the unpacked size that the header states."""

    def __init__(self, raw, n_values, encoding=PLAIN, is_dictionary=False, packed=None, claimed=None):
        self.raw, self.n_values, self.encoding, self.is_dictionary = raw, n_values, encoding, is_dictionary
        self.packed, self.claimed = packed, claimed

    def bytes(self, codec):
        packed = pack(self.raw, codec) if self.packed is None else self.packed
        claimed = len(self.raw) if self.claimed is None else self.claimed
        fields = {1: i32(2 if self.is_dictionary else 0), 2: i32(claimed), 3: i32(len(packed))}
        if self.is_dictionary:
            fields[7] = struct_of({1: i32(self.n_values), 2: i32(PLAIN)})
        else:
            fields[5] = struct_of({1: i32(self.n_values), 2: i32(self.encoding), 3: i32(RLE), 4: i32(RLE)})
        return struct_of(fields)[1] + packed


class Column:
    """A column chunk of a leaf: its pages, and what its metadata claims."""

    def __init__(self, path, pages, physical=BYTE_ARRAY, codec=NONE, n_values=None, unpacked=None):
        self.path, self.pages, self.physical, self.codec = path, pages, physical, codec
        self.n_values, self.unpacked = n_values, unpacked


def file(schema, groups, n_rows, group_rows=None, extra=None):
    """A file of row groups, each a list of columns. `extra`: further fields of its metadata."""
    out, row_groups = b"PAR1", []
    for group in groups:
        chunks, group_bytes = [], 0
        for column in group:
            start, dictionary_at, data_at, unpacked = len(out), None, None, 0
            for page in column.pages:
                if page.is_dictionary:
                    dictionary_at = len(out)
                elif data_at is None:
                    data_at = len(out)
                unpacked += len(page.raw) if page.claimed is None else page.claimed
                out += page.bytes(column.codec)
            n_values = sum(page.n_values for page in column.pages if not page.is_dictionary)
            encodings = sorted({page.encoding for page in column.pages} | {RLE})
            meta = {
                1: i32(column.physical),
                2: listed([i32(encoding) for encoding in encodings]),
                3: listed([binary(part) for part in column.path]),
                4: i32(column.codec),
                5: i64(n_values if column.n_values is None else column.n_values),
                6: i64(unpacked if column.unpacked is None else column.unpacked),
                7: i64(len(out) - start),
                9: i64(start if data_at is None else data_at),
            }
            if dictionary_at is not None:
                meta[11] = i64(dictionary_at)
            group_bytes += len(out) - start
            chunks.append(struct_of({2: i64(start), 3: struct_of(meta)}))
        rows = n_rows // max(1, len(groups)) if group_rows is None else group_rows
        row_groups.append(struct_of({1: listed(chunks, kind=_STRUCT), 2: i64(group_bytes), 3: i64(rows)}))
    footer = struct_of(
        {1: i32(1), 2: listed(schema), 3: i64(n_rows), 4: listed(row_groups, kind=_STRUCT), 6: binary("by hand")} | (extra or {})
    )[1]
    return out + footer + struct.pack("<I", len(footer)) + b"PAR1"


def plain_strings(values):
    raw = [value if isinstance(value, bytes) else value.encode() for value in values]
    return b"".join(struct.pack("<I", len(value)) + value for value in raw)


def strings(values, name="prompt", codec=NONE, **claims):
    """A file of one column of required strings."""
    page = Page(plain_strings(values), len(values))
    return file(_one_column(name), [[Column([name], [page], codec=codec, **claims)]], len(values))


def _one_column(name, **of):
    of = {"physical": BYTE_ARRAY, "repetition": REQUIRED, "converted": UTF8} | of
    return [element("schema", n_children=1), element(name, **of)]


def numbers(values, name="prompt"):
    """A file of one column of 64-bit integers."""
    page = Page(struct.pack(f"<{len(values)}q", *values), len(values))
    schema = [element("schema", n_children=1), element(name, INT64, REQUIRED)]
    return file(schema, [[Column([name], [page], INT64)]], len(values))


def levels(runs, width=1):
    """Definition or repetition levels, run-length encoded: (value, n) pairs, with their length before them."""
    raw = b"".join(varint(n << 1) + value.to_bytes((width + 7) // 8, "little") for value, n in runs)
    return struct.pack("<I", len(raw)) + raw


def nulls(n, name="prompt"):
    """A file of one column of strings that are all missing."""
    page = Page(levels([(0, n)]), n)
    schema = _one_column(name, repetition=OPTIONAL)
    return file(schema, [[Column([name], [page])]], n)


def repeated_entry(text_bytes, n, name="prompt", codec=GZIP):
    """One dictionary entry of so many bytes, `n` times by a run."""
    dictionary = Page(plain_strings([b"x" * text_bytes]), 1, is_dictionary=True)
    data = Page(bytes([1]) + varint(n << 1) + b"\0", n, RLE_DICTIONARY)
    return file(_one_column(name), [[Column([name], [dictionary, data], codec=codec)]], n)


def delta_packed(values):
    """DELTA_BINARY_PACKED, blocks of 128 in 4 parts."""
    out = varint(128) + varint(4) + varint(len(values)) + zigzag(values[0])
    deltas = [after - before for before, after in zip(values, values[1:])]
    for at in range(0, len(deltas), 128):
        block = deltas[at : at + 128]
        least = min(block)
        parts = [[delta - least for delta in block[i : i + 32]] for i in range(0, 128, 32)]
        widths = [max((delta.bit_length() for delta in part), default=0) for part in parts]
        out += zigzag(least) + bytes(widths)
        for part, width in zip(parts, widths):
            if part:
                packed = sum(delta << (width * idx) for idx, delta in enumerate(part))
                out += packed.to_bytes(32 * width // 8, "little")
    return out


def shared_prefixes(prefix_bytes, n, name="prompt"):
    """DELTA_BYTE_ARRAY: `n` strings that share a long prefix written once."""
    suffixes = [b"a" * prefix_bytes] + [b"b"] * (n - 1)
    raw = delta_packed([0] + [prefix_bytes] * (n - 1)) + delta_packed([len(suffix) for suffix in suffixes]) + b"".join(suffixes)
    return file(_one_column(name), [[Column([name], [Page(raw, n, DELTA_BYTE_ARRAY)])]], n)


def nested(depth, name="prompt"):
    """A list of lists of … of one string."""
    schema, path = [element("schema", n_children=1)], []
    for idx in range(depth):
        outer = name if idx == 0 else "element"
        schema += [element(outer, repetition=OPTIONAL, n_children=1, converted=LIST), element("list", repetition=REPEATED, n_children=1)]
        path += [outer, "list"]
    schema.append(element("element", BYTE_ARRAY, OPTIONAL, converted=UTF8))
    width = (2 * depth + 1).bit_length()
    raw = levels([(0, 1)], width=depth.bit_length()) + levels([(2 * depth + 1, 1)], width=width) + plain_strings(["x"])
    return file(schema, [[Column([*path, "element"], [Page(raw, 1)])]], 1)


def bomb(codec, unpacked_bytes, name="prompt"):
    """One string of so many equal bytes in a few."""
    head = struct.pack("<I", unpacked_bytes)
    if codec == ZSTD:
        packed = zstd([head, (b"a", unpacked_bytes)])
    elif codec == SNAPPY:
        packed = varint(unpacked_bytes + 4) + bytes([4 << 2]) + head + b"a"
        left = unpacked_bytes - 1
        packed += b"\xfe\x01\x00" * (left // 64)  # a copy of 64 bytes from one before
        if left % 64:
            packed += bytes([((left % 64 - 1) << 2) | 2]) + b"\x01\x00"
    else:
        packed = gzip.compress(head + b"a" * unpacked_bytes, 9, mtime=0)
    page = Page(b"", 1, packed=packed, claimed=unpacked_bytes + 4)
    return file(_one_column(name), [[Column([name], [page], codec=codec)]], 1)
