"""One packed file: written in one pass behind room kept for its header, read by ranges."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shortstack.checkpoint import DTYPE_BYTES, Checkpoint
from shortstack.disk import disk_errors
from shortstack.errors import ShortstackError
from shortstack.manifest import partial_of
from shortstack.packed import pack
from shortstack.packed.choose import Tries
from shortstack.packed.header import (
    GET_AGAIN,
    HEADER_BYTES,
    PREFIX,
    Contents,
    Entry,
    damaged,
    decode,
    encode,
)
from shortstack.packed.pack import Packing
from shortstack.packed.sources import Source, sources
from shortstack.progress import OnProgress, silent

ENTRY_BYTES = 900
"""Room for an entry and its blob in the header, beside names and parts."""

PART_BYTES = 12


class _Sink:
    """Appends to a file; `begin` takes back what was appended since the one before."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._start = file, file.tell()

    def begin(self) -> None:
        self._file.seek(self._start)
        self._file.truncate()

    def append(self, data: bytes) -> int:
        return self._file.write(data)


def write_packed(
    checkpoint: Checkpoint, target: Path, allowed: Tries, progress: OnProgress = silent
) -> list[Packing]:
    """Write the file whole or not at all. Memory: a few chunks, whatever the model's size."""
    partial = partial_of(target)
    room = header_room(checkpoint)
    if room > HEADER_BYTES:
        raise ShortstackError(
            f"{checkpoint.path} has {len(checkpoint.tensors)} tensors: too many for the header of "
            "one packed file. Report this model."
        )
    try:
        with disk_errors(target), partial.open("wb") as file:
            file.write(bytes(8 + room))
            made = list(
                pack.pack_sources(checkpoint, lambda source: _Sink(file), allowed, progress)
            )
            file.seek(0)
            file.write(encode(pack.contents([packing.entry for packing in made]), room))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return made


def header_room(checkpoint: Checkpoint) -> int:
    """Bytes that the header can take at most, so that blobs need not wait for their sizes."""
    total = 4096 + sum(map(_entry_room, sources(checkpoint)))
    return total + -total % 8


def expected_room(checkpoint: Checkpoint) -> int:
    """`header_room` from the shapes alone, without the heads of shards: of a checkpoint that may
    not lie on disk yet. These grow with the names: 200 bytes a tensor, before they are coded."""
    total = 0
    for name, info in checkpoint.tensors.items():
        columns = max(1, info.shape[-1]) if info.shape else 1
        total += 200 + len(name)
        total += _room(name, math.prod(info.shape), columns, DTYPE_BYTES[info.dtype])
    return 4096 + total


def _entry_room(source: Source) -> int:
    return _room(source.name, source.n_elements, source.columns, source.itemsize)


def _room(name: str, n_elements: int, columns: int, itemsize: int) -> int:
    chunks = -(-n_elements // pack.chunk_elements(columns, itemsize))
    names = len(json.dumps(json.dumps(name))) + len(json.dumps(name))
    return ENTRY_BYTES + names + chunks * (4 + itemsize * PART_BYTES)


class PackedFile:
    """A packed file, its header checked. Blobs are read by `open_blob`."""

    def __init__(self, path: Path) -> None:
        self.path, self.remedy = path, GET_AGAIN
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_BYTES):
                raise damaged(str(path), f"a header of {length} bytes in a file of {size}")
            file.seek(0)
            whole = file.read(8 + length)
        self.contents: Contents = decode(whole, size - len(whole), str(path))
        self.sha256 = whole[8 + len(PREFIX) :][:64].decode()
        """Of the header, and so of everything: it holds the checksums of all blobs."""
        self._begins: dict[str, int] = {}
        at = len(whole)
        for entry in self.contents.entries:
            self._begins[entry.blob] = at
            at += entry.coded_bytes

    @classmethod
    def looks_like(cls, path: Path) -> bool:
        """Whether the file begins as a packed one; its checksum is not looked at."""
        with path.open("rb") as file:
            return file.read(8 + len(PREFIX))[8:] == PREFIX

    @contextmanager
    def open_blob(self, entry: Entry) -> Iterator[BinaryIO]:
        """The file at the first byte of an entry's blob."""
        with self.path.open("rb") as file:
            file.seek(self._begins[entry.blob])
            yield file
