"""A chunk of a tensor as byte streams that code well, and back. Arrays in, arrays out.

float-split: each element, an unsigned integer of its dtype's width, is rotated left by one bit, so
that the sign leaves the top and the exponent fills the first byte (of BF16 and F32 exactly); stream
i is byte i of all elements, the most significant first. The idea is ZipNN's (arXiv 2411.05239).

row-codes: stream 0 is the int8 codes, row-major, stream 1 the float16 steps of these rows, little
endian; an element is float32(code) * float32(step).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
UNSIGNED: dict[int, str] = {2: "<u2", 4: "<u4", 8: "<u8"}


def split_floats(data: Bytes, itemsize: int) -> list[Bytes]:
    """Cut bytes of little-endian elements, shape (n * itemsize,), into `itemsize` streams (n,)."""
    whole: NDArray[Any] = data.view(UNSIGNED[itemsize])
    kind, top = whole.dtype.type, 8 * itemsize - 1
    rotated = (whole << kind(1)) | (whole >> kind(top))
    table = rotated.astype(UNSIGNED[itemsize], copy=False).view(np.uint8).reshape(-1, itemsize)
    return [np.ascontiguousarray(table[:, i]) for i in reversed(range(itemsize))]


def join_floats(streams: list[Bytes]) -> Bytes:
    """Undo `split_floats`; returns the elements' bytes, shape (n * itemsize,)."""
    itemsize = len(streams)
    table = np.empty((streams[0].size, itemsize), np.uint8)
    for i, stream in zip(reversed(range(itemsize)), streams, strict=True):
        table[:, i] = stream
    rotated: NDArray[Any] = table.reshape(-1).view(UNSIGNED[itemsize])
    kind, top = rotated.dtype.type, 8 * itemsize - 1
    whole = (rotated >> kind(1)) | (rotated << kind(top))
    plain: Bytes = whole.astype(UNSIGNED[itemsize], copy=False).view(np.uint8)
    return plain


def dequantize(codes: Bytes, steps: Bytes, columns: int) -> Bytes:
    """The float32 bytes of rows of codes: `codes` (rows * columns,), `steps` (2 * rows,)."""
    if codes.size == 0:
        return np.empty(0, np.uint8)
    matrix = codes.view(np.int8).reshape(-1, columns)
    weights = matrix * steps.view("<f2").astype(np.float32)[:, None]
    return weights.astype("<f4", copy=False).reshape(-1).view(np.uint8)


assert sys.byteorder == "little", "packed models are read and written on little-endian machines"
