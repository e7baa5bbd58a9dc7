"""The header of a GGUF file: key-values and tensor table, nothing believed before it is checked.

Little-endian GGUF 2 and 3 (ggml/include/gguf.h). Reads through a map of the file, so arrays of a
tokenizer become Python objects only where they are asked for. Imports nothing but Python.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from shortstack.errors import ShortstackError

MAGIC: Final = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
MAX_DIMS = 4
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
SCALARS: Mapping[int, str] = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"},
    **{UINT64: "<Q", 11: "<q", 12: "<d"},
}
"""Type of a value of fixed size -> how struct reads it."""

Value = str | int | float | bool | list[str] | list[int] | list[float] | list[bool]


@dataclass(frozen=True)
class GgmlType:
    """A tensor type: `block` values of a row are stored in `n_bytes` bytes."""

    name: str
    block: int
    n_bytes: int


GGML_TYPES: Mapping[int, GgmlType] = {
    0: GgmlType("F32", 1, 4),
    1: GgmlType("F16", 1, 2),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    9: GgmlType("Q8_1", 32, 40),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    15: GgmlType("Q8_K", 256, 292),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    23: GgmlType("IQ4_XS", 256, 136),
    24: GgmlType("I8", 1, 1),
    25: GgmlType("I16", 1, 2),
    26: GgmlType("I32", 1, 4),
    27: GgmlType("I64", 1, 8),
    28: GgmlType("F64", 1, 8),
    29: GgmlType("IQ1_M", 256, 56),
    30: GgmlType("BF16", 1, 2),
    34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66),
    39: GgmlType("MXFP4", 32, 17),
    40: GgmlType("NVFP4", 64, 36),
    41: GgmlType("Q1_0", 128, 18),
    42: GgmlType("Q2_0", 64, 18),
}
"""ggml's number of a type -> what it is (ggml.h, block sizes of ggml-common.h)."""


@dataclass(frozen=True)
class KeyValue:
    """One key-value as byte ranges of the file: all of it, and its value behind the type words."""

    name: str
    kind: int
    start: int
    value_start: int
    end: int
    item_kind: int | None = None
    count: int = 1
    """Elements of an array."""


@dataclass(frozen=True)
class TensorEntry:
    """One row of the tensor table. `dims` as GGUF writes them, the fastest first; `offset` counts
    from the start of the data."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A checked header: every range lies in the file, no name comes twice, no tensors overlap."""

    file: Path
    version: int
    alignment: int
    data_start: int
    n_bytes: int
    """Size of the whole file."""
    keys: Mapping[str, KeyValue]
    tensors: tuple[TensorEntry, ...] = field(repr=False)

    def value(self, name: str) -> Value | None:
        """The value of a key, read now; None where the file has no such key.

        Raises ShortstackError for a string that is not UTF-8.
        """
        entry = self.keys.get(name)
        if entry is None:
            return None
        with self.file.open("rb") as stream:
            stream.seek(entry.value_start)
            raw = _Bytes(self.file, stream.read(entry.end - entry.value_start))
        if entry.kind != ARRAY:
            return _scalar(raw, entry.kind, name)
        assert entry.item_kind is not None
        if entry.item_kind == STRING:
            return [raw.string(f"a string of {name}") for _ in range(entry.count)]
        return list(struct.unpack(f"<{entry.count}{SCALARS[entry.item_kind][1]}", raw.data))

    def integer(self, name: str, default: int = 0) -> int:
        """The value of a key that must be a whole number. Raises ShortstackError if it is none."""
        found = self.value(name)
        if found is None:
            return default
        if not isinstance(found, int):
            _damaged(self.file, f"{name} is no whole number")
        return int(found)

    def text(self, name: str) -> str:
        """The value of a key that must be a string. Raises ShortstackError if it is none."""
        found = self.value(name)
        if not isinstance(found, str):
            _damaged(self.file, f"{name} is missing or no text")
        return found


def read_header(file: Path) -> GgufHeader:
    """Read and check a header. Raises ShortstackError, one line, for whatever is wrong with it.

    Time and memory are bounded by the bytes that are there, whatever counts the file claims.
    """
    size = file.stat().st_size
    if size < 24:
        _refuse_foreign(file, file.read_bytes())
        _damaged(file, f"it ends after {size} bytes")
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        raw = _Bytes(file, mapped)
        _refuse_foreign(file, raw.take(4, "the magic"))
        version = _version(raw)
        n_tensors, n_keys = raw.number("<Q", "the counts"), raw.number("<Q", "the counts")
        keys = _keys(raw, n_keys)
        alignment = _alignment(raw, keys)
        tensors = _tensors(raw, n_tensors)
        data_start = -(-raw.at // alignment) * alignment
    header = GgufHeader(file, version, alignment, data_start, size, keys, tensors)
    _check_layout(header)
    return header


def check_vocabulary(header: GgufHeader) -> None:
    """Raise ShortstackError if the tokenizer has not one token for each row of the embedding."""
    tokens = header.keys.get("tokenizer.ggml.tokens")
    rows = next((t.dims[-1] for t in header.tensors if t.name == "token_embd.weight"), None)
    if tokens is None or rows is None:
        return
    if tokens.kind != ARRAY or tokens.count != rows:
        raise ShortstackError(
            f"{header.file}: its tokenizer has {tokens.count:,} tokens, its embedding {rows:,} "
            "rows: they do not belong together. Download the file again or convert it anew."
        )


class _Bytes:
    """Bytes with a place in them; whatever would reach beyond their end is refused first."""

    def __init__(self, file: Path, data: bytes | mmap.mmap) -> None:
        self.file, self.data, self.at, self.size = file, data, 0, len(data)

    def skip(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.size - self.at:
            _damaged(self.file, f"{what} at byte {self.at} reaches beyond the end")
        self.at += n_bytes

    def take(self, n_bytes: int, what: str) -> bytes:
        self.skip(n_bytes, what)
        return self.data[self.at - n_bytes : self.at]

    def number(self, form: str, what: str) -> int:
        self.skip(struct.calcsize(form), what)
        found: int = struct.unpack_from(form, self.data, self.at - struct.calcsize(form))[0]
        return found

    def string(self, what: str) -> str:
        start = self.at
        raw = self.take(self.number("<Q", what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            _damaged(self.file, f"{what} at byte {start} is not UTF-8")

    def claim(self, count: int, least_bytes: int, what: str) -> None:
        """Refuse a count that the rest of the file has no room for."""
        if count * least_bytes > self.size - self.at:
            room = self.size - self.at
            _damaged(self.file, f"it claims {count:,} {what} in {room:,} bytes")


def _version(raw: _Bytes) -> int:
    version = raw.number("<I", "the version")
    if version in VERSIONS:
        return version
    if int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS:
        raise ShortstackError(f"{raw.file} is big-endian. Use the little-endian file.")
    raise ShortstackError(
        f"{raw.file} says GGUF version {version}; 2 and 3 can be read. "
        "Download it again or convert it anew."
    )


def _keys(raw: _Bytes, count: int) -> dict[str, KeyValue]:
    raw.claim(count, 13, "key-values")
    keys: dict[str, KeyValue] = {}
    for _ in range(count):
        entry = _key(raw)
        if entry.name in keys:
            _damaged(raw.file, f"the key {entry.name!r} comes twice")
        keys[entry.name] = entry
    return keys


def _key(raw: _Bytes) -> KeyValue:
    start = raw.at
    name = raw.string("a key")
    kind = raw.number("<I", f"the type of {name!r}")
    if kind != ARRAY:
        value_start = raw.at
        _scalar(raw, kind, name)
        return KeyValue(name, kind, start, value_start, raw.at)
    item = raw.number("<I", f"the type of {name!r}")
    count = raw.number("<Q", f"the length of {name!r}")
    value_start = raw.at
    _skip_items(raw, item, count, name)
    return KeyValue(name, kind, start, value_start, raw.at, item, count)


def _scalar(raw: _Bytes, kind: int, name: str) -> str | int:
    if kind == STRING:
        return raw.string(f"the text of {name!r}")
    return raw.number(_form(raw, kind, name), f"the value of {name!r}")


def _skip_items(raw: _Bytes, kind: int, count: int, name: str) -> None:
    if kind != STRING:
        each = struct.calcsize(_form(raw, kind, name))
        raw.claim(count, each, f"items in {name!r}")
        raw.skip(count * each, repr(name))
        return
    raw.claim(count, 8, f"items in {name!r}")
    # A tokenizer has hundreds of thousands of strings: no call a string but what struct needs.
    length_of, data, at, size = struct.Struct("<Q").unpack_from, raw.data, raw.at, raw.size
    for _ in range(count):
        if at + 8 > size:
            break
        at += 8 + length_of(data, at)[0]
    raw.skip(at - raw.at, f"a string of {name!r}")


def _form(raw: _Bytes, kind: int, name: str) -> str:
    if kind not in SCALARS:
        _damaged(raw.file, f"{name!r} has the unknown type {kind}")
    return SCALARS[kind]


def _alignment(raw: _Bytes, keys: Mapping[str, KeyValue]) -> int:
    entry = keys.get(ALIGNMENT)
    if entry is None:
        return 32
    alignment = 0
    if entry.kind == UINT32:
        alignment = struct.unpack_from("<I", raw.data, entry.value_start)[0]
    if alignment.bit_count() != 1:
        _damaged(raw.file, f"{ALIGNMENT} is no power of two")
    return alignment


def _tensors(raw: _Bytes, count: int) -> tuple[TensorEntry, ...]:
    raw.claim(count, 32, "tensors")
    tensors: dict[str, TensorEntry] = {}
    for _ in range(count):
        entry = _tensor(raw)
        if entry.name in tensors:
            _damaged(raw.file, f"the tensor {entry.name!r} comes twice")
        tensors[entry.name] = entry
    return tuple(tensors.values())


def _tensor(raw: _Bytes) -> TensorEntry:
    name = raw.string("the name of a tensor")
    n_dims = raw.number("<I", f"the shape of {name!r}")
    if not 1 <= n_dims <= MAX_DIMS:
        _damaged(raw.file, f"the tensor {name!r} has {n_dims} dimensions")
    dims = tuple(raw.number("<Q", f"the shape of {name!r}") for _ in range(n_dims))
    number = raw.number("<I", f"the type of {name!r}")
    offset = raw.number("<Q", f"the place of {name!r}")
    kind = GGML_TYPES.get(number)
    if kind is None:
        _damaged(raw.file, f"the tensor {name!r} has the unknown type {number}")
    if 0 in dims or dims[0] % kind.block:
        _damaged(raw.file, f"the tensor {name!r} of type {kind.name} has rows of {dims[0]} values")
    n_bytes = math.prod(dims) // kind.block * kind.n_bytes
    return TensorEntry(name, dims, number, offset, n_bytes)


def _check_layout(header: GgufHeader) -> None:
    room = header.n_bytes - header.data_start
    for tensor in header.tensors:
        if tensor.offset % header.alignment:
            _damaged(header.file, f"the data of {tensor.name!r} are not aligned")
        if tensor.offset + tensor.n_bytes > room:
            _damaged(header.file, f"the data of {tensor.name!r} reach beyond the end")
    for before, after in _neighbours(header.tensors):
        if before.offset + before.n_bytes > after.offset:
            _damaged(header.file, f"the data of {before.name!r} and {after.name!r} overlap")


def _neighbours(tensors: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, TensorEntry]]:
    placed = sorted(tensors, key=lambda tensor: tensor.offset)
    return zip(placed, placed[1:], strict=False)


def _refuse_foreign(file: Path, start: bytes) -> None:
    if start[:4] != MAGIC:
        raise ShortstackError(f"{file} is not a GGUF file. Download it again.")


def _damaged(file: Path, fact: str) -> NoReturn:
    raise ShortstackError(f"{file} is truncated or damaged: {fact}. Download it again.")


def encode_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def encode_scalar(name: str, kind: int, value: int) -> bytes:
    """A whole key-value of fixed size."""
    return encode_string(name) + struct.pack(f"<I{SCALARS[kind][1]}", kind, value)


def encode_array(name: str, item_kind: int, items: bytes) -> bytes:
    """A whole key-value: an array of items of fixed size, given as they lie in the file."""
    count = len(items) // struct.calcsize(SCALARS[item_kind])
    return encode_string(name) + struct.pack("<IIQ", ARRAY, item_kind, count) + items
