"""No coding: for streams in which nothing can be saved."""

from __future__ import annotations

import numpy as np

from shortstack.packed.coders import Bytes, CodingError

PACKAGE: str | None = None


def encode(data: Bytes, columns: int, effort: str) -> bytes:
    return data.tobytes()


def decode(coded: bytes, n_bytes: int, columns: int) -> Bytes:
    if len(coded) != n_bytes:
        raise CodingError(f"{len(coded)} bytes instead of {n_bytes}")
    return np.frombuffer(coded, np.uint8)
