"""A packed model opened to run: its small files, and each tensor as codes or as floats, checked.

Nothing here knows a runtime: arrays out, one tensor at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shortstack.packed.coders import Bytes
from shortstack.packed.header import Entry, damaged
from shortstack.packed.read import Packed, check_blob, open_packed, plain_chunks, read_whole
from shortstack.packed.read import streams as decoded_streams
from shortstack.row_codes import RowCodes


class Resident:
    """A packed file, or NAME.json of a catalogue, read tensor by tensor.

    Raises ShortstackError for one that is none, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.packed: Packed = open_packed(path)
        self.path = path
        self.sha256 = self.packed.sha256
        self.tensors = self.packed.contents.tensors

    @property
    def coded(self) -> frozenset[str]:
        """Names of the matrices that are codes x steps."""
        return frozenset(name for name, e in self.tensors.items() if e.kind == "row-codes")

    def write_files(self, folder: Path) -> None:
        """Write the files beside the weights (config.json, the tokenizer's) into `folder`."""
        for entry in self.packed.contents.entries:
            if entry.kind == "file":
                (folder / entry.name).write_bytes(read_whole(self.packed, entry))

    def codes(self, name: str) -> RowCodes:
        """A matrix of row codes whole: int8 (rows, columns), float16 (rows,)."""
        entry = self.tensors[name]
        parts = list(self._code_chunks(entry))
        codes = np.concatenate([codes for codes, _ in parts]).view(np.int8)
        steps = np.concatenate([steps for _, steps in parts]).view("<f2")
        return RowCodes(codes.reshape(entry.shape), steps)

    def floats(self, name: str) -> Bytes:
        """The bytes of a tensor as its checkpoint stores them, little endian, row-major."""
        return np.concatenate(list(plain_chunks(self.packed, self.tensors[name])))

    def _code_chunks(self, entry: Entry) -> Iterator[tuple[Bytes, Bytes]]:
        """Codes and steps, chunk by chunk: the blob is hashed before it is decoded, then both."""
        check_blob(self.packed, entry)
        digests = [hashlib.sha256(), hashlib.sha256()]
        for codes, steps in decoded_streams(self.packed, entry):
            for digest, part in zip(digests, (codes, steps), strict=True):
                digest.update(part.data)
            yield codes, steps
        if tuple(digest.hexdigest() for digest in digests) != entry.raw_sha256:
            raise damaged(str(self.path), f"{entry.name} is decoded to something else")


@dataclass(frozen=True)
class Pieces:
    """A matrix cut into runs of whole rows, each coded alone: what a runtime decodes ahead of use.

    `coded`: one blob a piece. `piece_rows` rows are in each, fewer in the last.
    """

    coded: tuple[bytes, ...]
    rows: int
    columns: int
    piece_rows: int

    @property
    def n_bytes(self) -> int:
        return sum(map(len, self.coded))

    def span(self, piece: int) -> tuple[int, int]:
        """(first row, row behind the last) of a piece."""
        start = piece * self.piece_rows
        return start, min(self.rows, start + self.piece_rows)


def cut(matrix: Bytes, piece_bytes: int) -> Pieces:
    """Code a matrix of bytes, shape (rows, columns), by Zstandard in pieces of about `piece_bytes`.

    The packed file's own chunks are up to 16 MiB, and may be ANS, which numpy decodes at a tenth of
    Zstandard's speed: neither suits a buffer that is filled once a token.
    """
    from shortstack.packed.coders import zstd

    rows, columns = matrix.shape
    step = max(1, min(rows, piece_bytes // max(1, columns)))
    coded = tuple(
        zstd.encode(np.ascontiguousarray(matrix[start : start + step]).reshape(-1), columns, "fast")
        for start in range(0, rows, step)
    )
    return Pieces(coded, rows, columns, step)
