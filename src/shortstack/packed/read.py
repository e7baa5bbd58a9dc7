"""Blobs back into what they were made of: hashed before a decoder sees them, and after."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from shortstack.errors import ShortstackError
from shortstack.packed.coders import Bytes, CodingError, coder
from shortstack.packed.header import CHUNK_BYTES, Contents, Entry, damaged
from shortstack.packed.pack import stream_columns
from shortstack.packed.tensors import dequantize, join_floats
from shortstack.progress import OnProgress, silent


class Packed(Protocol):
    """A packed model, in one file or in a catalogue."""

    path: Path
    contents: Contents
    sha256: str
    remedy: str
    """What mends blobs that have changed."""

    def open_blob(self, entry: Entry) -> AbstractContextManager[BinaryIO]:
        """A file at the first byte of the entry's blob."""
        ...


def check_blob(packed: Packed, entry: Entry) -> None:
    """Raise ShortstackError, naming the entry, if its coded bytes are not those it was made of."""
    digest, left = hashlib.sha256(), entry.coded_bytes
    with packed.open_blob(entry) as file:
        while left:
            data = file.read(min(left, CHUNK_BYTES))
            if not data:
                raise damaged(str(packed.path), f"it ends inside {entry.name}", packed.remedy)
            digest.update(data)
            left -= len(data)
    if digest.hexdigest() != entry.coded_sha256:
        raise damaged(str(packed.path), f"the bytes of {entry.name} have changed", packed.remedy)


def streams(packed: Packed, entry: Entry, only: Sequence[int] = ()) -> Iterator[list[Bytes]]:
    """Decode a checked blob chunk by chunk; `only` some streams, by number."""
    wanted = only or range(len(entry.coders))
    with packed.open_blob(entry) as file:
        for index, lengths in enumerate(entry.parts):
            plain = entry.stream_bytes(entry.chunk_elements(index))
            found = []
            for i, (length, n_bytes) in enumerate(zip(lengths, plain, strict=True)):
                coded = file.read(length)
                if i in wanted:
                    found.append(_decode(packed, entry, i, coded, n_bytes))
            yield found


def _decode(packed: Packed, entry: Entry, stream: int, coded: bytes, n_bytes: int) -> Bytes:
    columns = stream_columns(entry.kind, stream, entry.columns, entry.itemsize)
    try:
        return coder(entry.coders[stream]).decode(coded, n_bytes, columns)
    except CodingError as error:
        raise damaged(str(packed.path), f"{entry.name} cannot be decoded ({error})") from None


def plain_chunks(packed: Packed, entry: Entry) -> Iterator[Bytes]:
    """The bytes as the checkpoint stores them, checked: those of the blob first, then the result.

    Raises ShortstackError that names the entry; the last check comes behind the last chunk.
    """
    check_blob(packed, entry)
    digests = [hashlib.sha256() for _ in entry.raw_sha256]
    for found in streams(packed, entry):
        if entry.kind == "row-codes":
            result, hashed = dequantize(found[0], found[1], entry.columns), found
        else:
            result = join_floats(found) if entry.kind == "float-split" else found[0]
            hashed = [result]
        for digest, part in zip(digests, hashed, strict=True):
            digest.update(part.data)
        yield result
    if tuple(digest.hexdigest() for digest in digests) != entry.raw_sha256:
        raise damaged(str(packed.path), f"{entry.name} is decoded to something else")


def read_whole(packed: Packed, entry: Entry) -> bytes:
    """The content of a small entry: a file or the head of a shard."""
    return b"".join(chunk.tobytes() for chunk in plain_chunks(packed, entry))


def verify(packed: Packed, progress: OnProgress = silent) -> None:
    """Decode everything and hold it against every checksum; keep nothing. Raises ShortstackError
    that names the first entry that is damaged."""
    for done, entry in enumerate(packed.contents.entries, 1):
        for _ in plain_chunks(packed, entry):
            pass
        progress(done, len(packed.contents.entries))


def open_packed(path: Path) -> Packed:
    """A packed file, or NAME.json in a catalogue. Raises ShortstackError for one that is none, or
    damaged."""
    from shortstack.packed.catalogue import Variant
    from shortstack.packed.file import PackedFile

    if not path.is_file():
        raise ShortstackError(f"there is no packed file {path}. Check the path.")
    return Variant(path) if path.suffix == ".json" else PackedFile(path)
