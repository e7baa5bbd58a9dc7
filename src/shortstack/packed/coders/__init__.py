"""Coders: bytes to fewer bytes and back, without loss. One file and one table line each."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from shortstack.errors import unknown

Bytes = NDArray[np.uint8]

CODERS: dict[str, str] = {
    "none": "shortstack.packed.coders.none",
    "zstd": "shortstack.packed.coders.zstd",
    "ans": "shortstack.packed.coders.ans",
}
"""Name in the header -> module that offers what `Coder` says. Fastest to decode first."""


MAX_CHUNK_BYTES = 2**26
"""Nothing longer is coded or decoded at once: bounds the memory that a header can ask for."""


class CodingError(ValueError):
    """Coded bytes that their coder cannot have made."""


class Coder(Protocol):
    """What a module in CODERS offers."""

    PACKAGE: str | None
    """What has to be installed; None for nothing."""

    def encode(self, data: Bytes, columns: int, effort: str) -> bytes:
        """Code a chunk, shape (n,), of rows of `columns` bytes. `effort`: a word of choose.EFFORTS.

        The result is at most a 64th and header.SLACK_BYTES longer than the chunk.
        """
        ...

    def decode(self, coded: bytes, n_bytes: int, columns: int) -> Bytes:
        """Undo it: exactly `n_bytes`, shape (n_bytes,); allocates little more than that.

        Raises CodingError.
        """
        ...


def coder(name: str) -> Coder:
    """The coder of that name. Raises ShortstackError for one that no table line has."""
    try:
        module = CODERS[name]
    except KeyError:
        raise unknown("coder", name, CODERS) from None
    return cast(Coder, importlib.import_module(module))
