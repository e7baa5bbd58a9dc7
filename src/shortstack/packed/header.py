"""The header of a packed file: what it holds, checked before anything is allocated.

A packed file is a safetensors file whose tensors are U8 blobs. `__metadata__` begins with the
SHA-256 of the header, at a fixed place, and holds one JSON document, `Contents`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shortstack.checkpoint import DTYPE_BYTES, TOKENIZER_FILES
from shortstack.errors import ShortstackError, one_line
from shortstack.packed.coders import MAX_CHUNK_BYTES
from shortstack.safetensors_header import unique_keys

HEADER_BYTES = 2**25
"""Fifty times what a model of 7 billion weights needs; parsed it takes about 20 times as much."""

MOST_VALUES = 2**19
"""In a header, counted by its commas before it is parsed: sixty times what 7 billion weights need.
A value of two bytes can take a hundred in memory."""

LEAST_CHUNK_BYTES = 2**16
"""Of what is cut at all: smaller chunks would make a header of lengths alone."""

CHUNK_BYTES = 2**24
"""What is coded at once: bounds the memory of packing and of unpacking."""

WHOLE_BYTES = 2**27
"""Of a file beside the weights or a shard's head: these are unpacked in memory. Tokenizers of large
vocabularies take 35 MB."""

SLACK_BYTES = 4096
"""A coded chunk is at most a 64th and so much longer than its plain bytes."""

GET_AGAIN = "Get it again."
PREFIX = b'{"__metadata__":{"header_sha256":"'
NO_DIGEST = b"0" * 64
FILES = frozenset(
    {
        *("config.json", "model.safetensors.index.json", "plan.json", *TOKENIZER_FILES),
        *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
        *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "README.md"),
    }
)
"""Files beside the weights that are packed, and the only names that unpacking writes."""

Kind = Literal["row-codes", "float-split", "raw", "file", "shard"]
Coder = Literal["none", "zstd", "ans"]
Count = Annotated[int, Field(ge=0, le=2**44)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
STREAMS = {"row-codes": 2, "raw": 1, "file": 1, "shard": 1}


class Entry(BaseModel):
    """One blob: a tensor of the model, a file beside it, or the header of a shard.

    The tensor is cut into chunks of `chunk` elements (the last may be shorter), each chunk into
    streams (`tensors.py`), each stream coded alone by its coder. `parts` are the coded lengths,
    bytes, a row a chunk and a column a stream; the blob is the parts one after another.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1, max_length=512)]
    kind: Kind
    dtype: Literal["F64", "F32", "F16", "BF16", "U8"]
    shape: Annotated[tuple[Count, ...], Field(max_length=8)]
    chunk: Annotated[int, Field(ge=1, le=MAX_CHUNK_BYTES)]
    coders: Annotated[tuple[Coder, ...], Field(min_length=1, max_length=8)]
    parts: tuple[tuple[Count, ...], ...]
    raw_bytes: Count
    coded_bytes: Count
    raw_sha256: tuple[Digest, ...]
    coded_sha256: Digest

    @property
    def blob(self) -> str:
        """Name of the U8 tensor: no file can take a tensor's place."""
        place = self.kind if self.kind in ("file", "shard") else "tensor"
        return f"{place}:{self.name}"

    @property
    def is_tensor(self) -> bool:
        return self.kind not in ("file", "shard")

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def itemsize(self) -> int:
        """Bytes of an element as the checkpoint stores it."""
        return 1 if self.dtype == "U8" else DTYPE_BYTES[self.dtype]

    def chunk_elements(self, index: int) -> int:
        return min(self.chunk, self.n_elements - index * self.chunk)

    def stream_bytes(self, elements: int) -> tuple[int, ...]:
        """Plain bytes of each stream of a chunk."""
        if self.kind == "row-codes":
            return elements, 2 * (elements // self.columns)
        if self.kind == "float-split":
            return (elements,) * self.itemsize
        return (elements * self.itemsize,)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        for fact, holds in self._facts():
            if not holds:
                raise ValueError(f"{self.name}: {fact}")
        for index, lengths in enumerate(self.parts):
            plain = self.stream_bytes(self.chunk_elements(index))
            for coder, length, size in zip(self.coders, lengths, plain, strict=True):
                if length > size + size // 64 + SLACK_BYTES or (coder == "none" and length != size):
                    raise ValueError(f"{self.name}: a chunk of {size} bytes is coded in {length}")
        return self

    def _facts(self) -> list[tuple[str, bool]]:
        """What must hold before the sizes of single chunks mean anything, in words."""
        n, files = self.n_elements, self.kind in ("file", "shard")
        streams = STREAMS.get(self.kind, self.itemsize)
        rows = 0 if self.columns == 0 else n // self.columns
        held = n + 2 * rows if self.kind == "row-codes" else n * self.itemsize
        return [
            ("dtype U8 is for files alone", (self.dtype == "U8") == files),
            ("the shape is too large", n <= 2**44),
            ("a file or a shard's head is too large", not files or n <= WHOLE_BYTES),
            ("a chunk is too large", self.chunk * self.itemsize <= MAX_CHUNK_BYTES),
            (
                "its chunks are too small",
                len(self.parts) < 2 or self.chunk * self.itemsize >= LEAST_CHUNK_BYTES,
            ),
            (
                "row codes are for F32 matrices, by whole rows",
                self.kind != "row-codes"
                or (
                    self.dtype == "F32"
                    and len(self.shape) == 2
                    and (n == 0 or self.chunk % self.columns == 0)
                ),
            ),
            ("raw_bytes is not what shape and dtype need", self.raw_bytes == held),
            ("each stream needs one coder", len(self.coders) == streams),
            ("the chunks do not cover the tensor", len(self.parts) == -(-n // self.chunk)),
            (
                "a chunk has not one length a stream",
                all(len(lengths) == streams for lengths in self.parts),
            ),
            (
                "coded_bytes is not the sum of the parts",
                self.coded_bytes == sum(map(sum, self.parts)),
            ),
            (
                "raw_sha256 needs one hash, of row codes two",
                len(self.raw_sha256) == (2 if self.kind == "row-codes" else 1),
            ),
            (
                "no file of a model has this name",
                self.kind != "file" or self.name in FILES,
            ),
            (
                "a shard is NAME.safetensors",
                self.kind != "shard" or names_a_shard(self.name),
            ),
        ]


class Contents(BaseModel):
    """Everything that a packed file says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    packed: Literal[1] = 1
    tool: Annotated[str, Field(max_length=128)]
    entries: tuple[Entry, ...]

    @model_validator(mode="after")
    def _unique(self) -> Self:
        blobs = [
            entry.blob.lower() if not entry.is_tensor else entry.blob for entry in self.entries
        ]
        seen: set[str] = set()
        for name in blobs:
            if name in seen:
                raise ValueError(f"{name} is there twice")
            seen.add(name)
        return self

    @property
    def tensors(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries if entry.is_tensor}

    @property
    def plain_bytes(self) -> int:
        """What unpacking writes, without a sidecar: tensors as they are stored, and files."""
        return sum(entry.n_elements * entry.itemsize for entry in self.entries)


def parse_contents(text: str, where: str, remedy: str = GET_AGAIN) -> Contents:
    """Read a JSON document `Contents`. Raises ShortstackError for all it must not be."""
    check_count(text.count(","), where, remedy)
    try:
        return Contents.model_validate_json(text)
    except ValidationError as error:
        raise damaged(where, first_fault(error), remedy) from None


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")


def names_a_shard(name: str) -> bool:
    """Whether unpacking may write a file of this name: in the folder, seen, and typed as it is."""
    return (
        name.endswith(".safetensors")
        and name.isprintable()
        and not name.startswith((".", "-"))
        and not set('/\\:*?"<>|') & set(name)
    )


def check_count(commas: int, where: str, remedy: str = GET_AGAIN) -> None:
    """Raise ShortstackError for JSON of more values than any model's header has."""
    if commas > MOST_VALUES:
        raise damaged(where, f"its header has more than {MOST_VALUES} values", remedy)


def damaged(where: str, fact: str, remedy: str = GET_AGAIN) -> ShortstackError:
    """Build the error for a packed file, or a variant of a catalogue, that is not what it was."""
    return ShortstackError(
        f"{where} is damaged or not a packed model: {one_line(fact, 300)}. {remedy}"
    )


def encode(contents: Contents, length: int | None = None) -> bytes:
    """The file's bytes before the blobs: the length, the JSON padded to `length` (8 bytes apart).

    Raises ValueError if it does not fit.
    """
    text = PREFIX + NO_DIGEST + b'","packed":'
    text += json.dumps(contents.model_dump_json()).encode() + b"}"
    offset = 0
    for entry in contents.entries:
        info = {
            "dtype": "U8",
            "shape": [entry.coded_bytes],
            "data_offsets": [offset, offset + entry.coded_bytes],
        }
        blob = json.dumps(info, separators=(",", ":"))
        text += f",{json.dumps(entry.blob)}:{blob}".encode()
        offset += entry.coded_bytes
    text += b"}"
    length = length or len(text) + -len(text) % 8
    if len(text) > length:
        raise ValueError(f"the header takes {len(text)} bytes, {length} are reserved")
    whole = length.to_bytes(8, "little") + text.ljust(length)
    at = 8 + len(PREFIX)
    return whole[:at] + hashlib.sha256(whole).hexdigest().encode() + whole[at + 64 :]


def decode(whole: bytes, data_bytes: int, where: str) -> Contents:
    """Read what `encode` wrote, for a file with `data_bytes` behind it.

    Raises ShortstackError, naming `where`, for a wrong checksum and for offsets that overlap,
    leave gaps or lead out of the file.
    """
    at = 8 + len(PREFIX)
    if whole[8:at] != PREFIX or len(whole) < at + 64:
        raise damaged(where, "its header does not begin as one of a packed model")
    said = whole[at : at + 64]
    zeroed = hashlib.sha256(whole[:at] + NO_DIGEST + whole[at + 64 :])
    if zeroed.hexdigest().encode() != said:
        raise damaged(where, "the header's checksum is wrong")
    check_count(whole.count(b","), where)
    table = _json(whole[8:], where)
    meta = table.pop("__metadata__")
    if not isinstance(meta, dict) or set(meta) != {"header_sha256", "packed"}:
        raise damaged(where, "__metadata__ has other keys than header_sha256 and packed")
    if not isinstance(meta["packed"], str):
        raise damaged(where, "__metadata__.packed is no text")
    contents = parse_contents(meta["packed"], where)
    _check_offsets(table, contents, data_bytes, where)
    return contents


def _check_offsets(
    table: Mapping[str, Any], contents: Contents, data_bytes: int, where: str
) -> None:
    """Blobs lie in the order of the entries, without a gap, to the very end of the file."""
    if list(table) != [entry.blob for entry in contents.entries]:
        raise damaged(where, "its blobs are not those that its entries describe, in their order")
    offset = 0
    for entry in contents.entries:
        stop = offset + entry.coded_bytes
        expected = {"dtype": "U8", "shape": [entry.coded_bytes], "data_offsets": [offset, stop]}
        if table[entry.blob] != expected:
            raise damaged(where, f"{entry.name} is not at bytes {offset} to {stop} of the data")
        offset = stop
    if offset != data_bytes:
        raise damaged(where, f"{data_bytes} bytes of data, its entries need {offset}")


def _json(text: bytes, where: str) -> dict[str, Any]:
    try:
        table = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"its header is no JSON ({one_line(str(error), 80)})") from None
    if not isinstance(table, dict):
        raise damaged(where, "its header is no JSON object")
    return table
